"""What a guest does while a file fails: short histories that between them take every path on which nbdq writes."""

from dataclasses import dataclass

from tests.support.images import Layer, Variant
from tests.support.operations import Guest, Operation, Verb


@dataclass(frozen=True)
class Scenario:
    """A chain, and what is done to it."""

    variant: Variant
    operations: tuple[Operation, ...]
    bitmap: str = ""
    """Name of a persistent dirty bitmap that the top image gets before."""

    @property
    def name(self) -> str:
        return self.variant.name

    def guest(self, content: bytes | bytearray) -> Guest:
        """The disk that reads as ``content``, for the rules of this chain."""
        layers = self.variant.layers
        ignored = "compat=0.10" in layers[-1].options and len(layers) > 1  # M2
        return Guest(content, cluster_size=layers[-1].cluster_size, discards=not ignored)


def _scenario(name: str, *layers: Layer, done: str, bitmap: str = "") -> Scenario:
    """``done``: operations by ``;``, each ``verb offset length``, in the units of the top layer, ``!`` for FUA."""
    top = layers[-1]
    operations = []
    for number, text in enumerate(done.split(";"), 100):
        verb, *place = text.split()
        offset, length = map(top.bytes, place) if place else (0, 0)
        operations.append(Operation(Verb(verb.rstrip("!")), offset, length, number, fua=verb.endswith("!")))
    return Scenario(Variant(name, layers, ("--allow-data-file",)), tuple(operations), bitmap)


_BASE = Layer("16c", ("write 0 6c", "write 9c 2c"), "cluster_size=4k")
_REWRITE = "write 0 2c; write 3c+512 1k; flush; discard 0 2c; unmap 3c 1c; flush; write 8c 3c; write! 0 1c; zero 8c 2c"

SCENARIOS: tuple[Scenario, ...] = (
    _scenario("empty", Layer("16c", (), "cluster_size=4k"), done=_REWRITE + "; flush"),
    _scenario(
        "large-clusters", Layer("8c"), done="write 0 1c; write 2c+1k 512; zero 5c 1c; flush; discard 0 1c; flush"
    ),
    _scenario(
        "copy-on-write",
        _BASE,
        Layer("16c", ("write 1c 1c",), "cluster_size=4k"),
        done="write 512 512; write 2c+1k 2c; read 0 16c; flush; zero 4c+512 1c; discard 9c 1c; write 9c+100 33; flush",
    ),
    _scenario(
        "copy-on-write-in-v2",
        _BASE,
        Layer("16c", ("write 1c 1c",), "cluster_size=4k,compat=0.10"),
        done="write 512 512; zero 4c 1c; flush; unmap 5c+512 2c; discard 9c 1c; write 15c 1c; flush",
    ),
    _scenario(
        "refcount-blocks",  # of 64 clusters each, behind a table that holds 64 of them
        Layer("1200c", ("write 0 4c",), "cluster_size=512,refcount_bits=64"),
        done="write 0 100c; flush; write 300c 200c; write! 900c 300c; discard 300c 200c; flush; write 500c 100c; flush",
    ),
    _scenario(
        "refcount-table",  # 4096 clusters are all that its one cluster can count
        Layer("5000c", ("write 0 3700c",), "cluster_size=512,refcount_bits=64"),
        done="write 3700c 400c; flush; write 4200c 700c; flush; discard 0 200c; flush; write 4900c 100c",
    ),
    _scenario(
        "compressed",
        Layer("16c", ("compress 0 16c",), "cluster_size=4k"),
        done="write 512 512; write 2c 2c; read 0 8c; flush; discard 5c 2c; unmap 8c+512 2c; flush; write 5c 1c; flush",
    ),
    _scenario(
        "snapshot",
        Layer("16c", ("write 0 8c", "zero 10c 1c", "snapshot one", "write 1c 1c"), "cluster_size=4k"),
        done="write 0 512; write 2c 2c; flush; discard 4c 2c; zero 6c 1c; flush; write 4c 1c; write! 10c 1c",
    ),
    _scenario(
        "subclusters",
        Layer("4c", ("write 0 2c",), "cluster_size=16k"),
        Layer("4c", ("write 1c 1s",), "extended_l2=on,cluster_size=16k"),
        done="write 3s 2s; write 1c+5s+10 700; zero 8s 4s; flush; unmap 1c 4s; discard 0 1c; write 1s 1s; flush",
    ),
    _scenario(
        "dirty",
        Layer("16c", ("write 0 4c", "poke 72 8 1"), "cluster_size=4k,lazy_refcounts=on"),
        done="write 2c 4c; flush; discard 0 2c; flush",
    ),
    _scenario(
        "unknown-autoclear-bits",
        Layer("16c", ("write 0 4c", "poke 88 8 0x8000"), "cluster_size=4k"),
        done="write 2c 4c; flush",
    ),
    _scenario(
        "preallocated",
        Layer("16c", ("write 0 4c", "zero 1c 2c"), "cluster_size=4k,preallocation=metadata"),
        done="write 1c+512 512; write 5c 2c; flush; unmap 0 1c; zero 6c 1c; discard 7c 2c; flush; write 7c 512",
    ),
    _scenario(
        "data-file",  # named from the directory that each run has for itself (Q76)
        Layer("16c", ("write 0 4c", "zero 1c 1c"), "cluster_size=4k,data_file=guest.data"),
        done="write 1c+512 512; write 5c 2c; flush; unmap 0 1c; zero 6c 1c; discard 7c 2c; flush; write 7c 512",
    ),
    _scenario(
        "dirty-bitmap",
        Layer("16c", ("write 0 6c",), "cluster_size=4k"),
        done="write 512 512; flush; write 8c 2c; discard 0 1c; zero 2c 1c; flush; write 12c 1c",
        bitmap="backup",
    ),
)
