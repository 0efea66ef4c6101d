"""Random chains: geometry, sizes, formats and histories of one to six layers, all a function of one seed."""

from random import Random

from tests.support.images import Layer, Variant

#: Bounds the guest's disk, so that a chain costs a second and not a minute.
LARGEST_DISK = 6 << 20

_CLUSTER_SIZES = (512, 1 << 10, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 64 << 10, 64 << 10, 256 << 10, 2 << 20)


def random_chain(seed: int) -> Variant:
    """The chain of ``seed``: the same today and tomorrow."""
    random = Random(seed)
    size = _random_size(random, LARGEST_DISK)
    layers: list[Layer] = []
    for number in range(random.choice((1, 1, 2, 2, 3, 4, 5, 6))):
        if random.random() < 0.3:
            size = _random_size(random, LARGEST_DISK)
        if number == 0 and random.random() < 0.2:
            layers.append(_raw_layer(random, size))
        else:
            layers.append(_qcow2_layer(random, size, number))
    return Variant(f"seed-{seed}", tuple(layers), serve=("--allow-data-file",))


def _random_size(random: Random, largest: int) -> int:
    """Sectors, often whole MiB, sometimes next to nothing."""
    match random.randrange(6):
        case 0:
            return random.randrange(20) * 512
        case 1 | 2:
            return random.randrange(1, largest >> 20) << 20
        case _:
            return random.randrange(1, largest // 512) * 512


def _raw_layer(random: Random, size: int) -> Layer:
    steps = [f"{random.choice(('write', 'write', 'unmap'))} {at} {n}" for at, n in _ranges(random, size, 8, unit=4096)]
    if random.random() < 0.4:
        steps.append(f"truncate {random.randrange(size + 1)}")
    return Layer(str(size), tuple(steps), format="raw")


def _qcow2_layer(random: Random, size: int, number: int) -> Layer:
    cluster_size = random.choice(_CLUSTER_SIZES)
    old = random.random() < 0.15
    extended = not old and cluster_size >= 16 << 10 and random.random() < 0.3
    data_file = not old and random.random() < 0.08
    options = [f"cluster_size={cluster_size}", f"compat={'0.10' if old else '1.1'}"]
    if extended:
        options.append("extended_l2=on")
    if data_file:
        options.append(f"data_file={{directory}}/{number}.data")
    if not old:
        options.append(f"compression_type={random.choice(('zlib', 'zstd'))}")
        options.append(f"refcount_bits={random.choice((1, 2, 8, 16, 16, 16, 64))}")
    preallocated = extended and size > 0 and random.random() < 0.3
    if preallocated:
        options.append("preallocation=metadata")
    steps = _history(random, size, cluster_size, may_compress=not data_file and not preallocated)
    if not old and not data_file and random.random() < 0.15:
        grown = size + random.randrange(2000) * 512
        steps += [f"resize {grown}", *_history(random, grown, cluster_size, may_compress=False)[:3]]
    return Layer(str(size), tuple(steps), ",".join(options))


def _history(random: Random, size: int, cluster_size: int, *, may_compress: bool) -> list[str]:
    """Guest operations in any place; in any order, but for compressed writes, which come first.

    Only an untouched cluster can be written compressed (Q57). And QEMU 7.2 may append compressed data to a host cluster
    that was freed and given to something else meanwhile: such an image is corrupt, and nothing can be learnt from it.
    """
    compressed: list[str] = []
    steps: list[str] = []
    touched: set[int] = set()
    for offset, length in _ranges(random, size, random.choice((0, 3, 10, 25)), unit=cluster_size):
        clusters = set(range(offset // cluster_size, -(-(offset + length) // cluster_size)))
        verb = random.choice(("write", "write", "zero", "unmap", "discard", "compress", "compress", "noise"))
        if verb in ("compress", "noise"):
            whole = offset % cluster_size == 0 and (length % cluster_size == 0 or offset + length == size)
            if not (may_compress and whole) or clusters & touched:
                verb = "write"
        touched |= clusters
        (compressed if verb in ("compress", "noise") else steps).append(f"{verb} {offset} {length}")
    return compressed + steps


def _ranges(random: Random, size: int, count: int, *, unit: int) -> list[tuple[int, int]]:
    """Ranges inside the disk: whole units, a part of one, or sectors across some; now and then up to the end."""
    found = []
    for _ in range(count if size else 0):
        sectors = size // 512
        match random.randrange(4):
            case 0:
                offset, length = random.randrange(sectors) * 512, random.randrange(1, 200) * 512
            case 1:
                offset, length = random.randrange(sectors) * 512, 512
            case 2:
                offset, length = random.randrange(-(-size // unit)) * unit, unit * random.randrange(1, 5)
            case _:
                offset, length = random.randrange(-(-size // unit)) * unit, unit
        found.append((offset, min(length, size - offset, 1 << 20)))
    return found
