"""What happens to twins while they are served: actions that are nothing but a kind and a seed, so that any can be left
out of a run and the others still mean something."""

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from nbdq.admin.client import AdminError
from tests.random.live_sides import Daemon, Nbdq, Side
from tests.support.images import Image
from tests.support.operations import Operation, Verb, random_operations
from tests.support.tools import run

_Result = TypeVar("_Result")

#: Disks do not grow beyond.
_LARGEST_DISK = 8 << 20
_BITMAPS = ("a", "b", "c")
_SNAPSHOTS = ("x", "y")


class Action(NamedTuple):
    """One thing that happens; all that is not said by the state of the twins follows from the seed."""

    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind} {self.seed}"


class QemuFailed(Exception):
    """QEMU's daemon has broken down, or has no code for what was asked for: the run ends here."""


@dataclass
class Twins:
    """Two copies of a chain. Between rounds the images are at rest, and the servers are none."""

    ours: Image
    """The one that nbdq serves in this round."""
    theirs: Image
    sides: tuple[Nbdq, Daemon] = field(default_factory=lambda: (Nbdq(), Daemon()))
    number: int = 0
    """Of the guest's next operation."""
    overlays: int = 0
    excused: set[int] = field(default_factory=set)
    """Sectors in which the one may have written zeros where the other did not; see :meth:`excuse`."""
    told: list[str] = field(default_factory=list)
    """What happened, in words."""

    def both(self, act: Callable[[Side], _Result]) -> _Result | None:
        """Let both do something; what they agree upon. None if both refuse.

        Raises:
            AssertionError: only one refuses, or they return different things.
        """

        daemon = self.sides[1]

        def attempt(side: Side) -> tuple[_Result | None, str | None]:
            try:
                return act(side), None
            except (AdminError, AssertionError, subprocess.TimeoutExpired) as error:
                if side is daemon and (why := daemon.epitaph()) is not None:
                    raise QemuFailed(why or "it was silent") from None
                if isinstance(error, AdminError):
                    return None, str(error)
                raise

        with ThreadPoolExecutor(2) as pool:
            (mine, refusal), (other, their_refusal) = pool.map(attempt, self.sides)
        self.told.append(f"    → {refusal or 'done'} | {their_refusal or 'done'}")
        if refusal is None and their_refusal == "Operation not supported":
            raise QemuFailed(their_refusal)
        assert (refusal is None) == (their_refusal is None), (
            f"nbdq: {refusal or 'done'}; QEMU: {their_refusal or 'done'}"
        )
        assert mine == other, f"nbdq: {mine!r}; QEMU: {other!r}"
        return mine

    def has_hidden_data(self, base: int, top: int) -> bool:
        """Whether a layer between ``base`` and ``top``, which drops out, ends before the base does.

        What the base holds behind that end must stay hidden (S1); QEMU 7.2 lets it shine through after the operation.
        """
        sizes = [facts(path)["virtual-size"] for path in self.sides[0].layers[base : top + 1]]
        return min(sizes) < sizes[0]

    def say(self, text: str) -> None:
        self.told.append(text)

    @property
    def layers(self) -> list[str]:
        """Names of the layers' files, base first."""
        return [path.name for path in self.sides[0].layers]

    def facts(self, layer: int = -1) -> dict[str, Any]:
        """What QEMU says of a layer of ours."""
        return facts(self.sides[0].layers[layer])

    def excuse(self, operation: Operation, top: dict[str, Any]) -> None:
        """As :meth:`tests.random.twins.Twins.excuse`: zeros over zeros, at edges and in version 2."""
        if operation.verb not in (Verb.ZERO, Verb.UNMAP, Verb.DISCARD):
            return
        size, end = top["cluster-size"], operation.offset + operation.length
        if compat(top) == "0.10":
            self._excuse(operation.offset, end, size)
        for edge in (operation.offset, end):
            if edge % size:
                self._excuse(edge, edge, size)

    def excuse_end(self, top: dict[str, Any]) -> None:
        """Of a disk that grows over a backing file, nbdq takes the last cluster into the top if that was cut."""
        if top["format"] == "qcow2":
            self._excuse(top["virtual-size"], top["virtual-size"], 2 << 20)  # clusters above may be larger

    def _excuse(self, start: int, end: int, size: int) -> None:
        self.excused.update(range(start // size * size // 512, (end // size + 1) * size // 512))


def facts(path: Path) -> dict[str, Any]:
    """What QEMU says of one image, which may be in use."""
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    return found


def compat(info: dict[str, Any]) -> str:
    """The version of a qcow2 image; empty for others."""
    if info["format"] != "qcow2":
        return ""
    found: str = info["format-specific"]["data"]["compat"]
    return found


def can_grow(top: dict[str, Any]) -> bool:
    """Whether QEMU can hide what a longer backing file holds: in version 2 it refuses, where nbdq writes zeros.

    What is hidden counts as changed in nbdq's bitmaps, not in QEMU's.
    """
    return compat(top) != "0.10" or "backing-filename" not in top


def _operations(twins: Twins, random: Random, count: int, *, only_writes: bool = False) -> Callable[[Side], Any]:
    top = twins.facts()
    size, cluster_size = top["virtual-size"], top.get("cluster-size", 65536)
    operations = [
        _whole(operation, size, cluster_size)
        for operation in random_operations(
            random.randrange(1 << 32), count, size=size, cluster_size=cluster_size, number=twins.number
        )
        if not only_writes or operation.verb in (Verb.WRITE, Verb.FLUSH)
    ]
    twins.number += count
    for operation in operations:
        twins.excuse(operation, {"cluster-size": 65536, **top})
        twins.say(f"    {operation}")
    return lambda side: side.guest(operations)


def _whole(operation: Operation, size: int, cluster_size: int) -> Operation:
    """A discard of whole clusters: of others, QEMU marks in bitmaps what it was asked for, and nbdq what changes."""
    if operation.verb is not Verb.DISCARD:
        return operation
    offset = operation.offset // cluster_size * cluster_size
    end = min(size, -(-(operation.offset + operation.length) // cluster_size) * cluster_size)
    return operation._replace(offset=offset, length=end - offset)


def _guest(twins: Twins, random: Random) -> None:
    twins.both(_operations(twins, random, random.randrange(1, 12)))


def _meanwhile(twins: Twins, random: Random) -> Callable[[Side], Any]:
    if random.random() < 0.5:
        return lambda side: None
    return _operations(twins, random, 4, only_writes=True)


def _overlay(twins: Twins, random: Random) -> tuple[str, int | None]:
    """An empty overlay on both sides, and its cluster size if nbdq is to make it itself."""
    name = f"s{twins.overlays}.qcow2"
    twins.overlays += 1
    itself = random.random() < 0.4
    cluster_size = random.choice((512, 4096, 16384, 65536, 65536, 262144))
    options = [f"cluster_size={cluster_size}"]
    if not itself:
        old = random.random() < 0.15
        options.append(f"compat={'0.10' if old else '1.1'}")
        if not old:
            options.append(f"refcount_bits={random.choice((1, 8, 16, 64))}")
            if cluster_size >= 16384 and random.random() < 0.4:
                options.append("extended_l2=on")
    top = twins.facts()
    for side in twins.sides:
        below = side.layers[-1]
        command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", top["format"]]
        run(*command, "-o", ",".join(options), below.with_name(name), str(top["virtual-size"]))
    twins.say(f"    {name} {','.join(options)}{' by nbdq' * itself} over {below.name}")
    return name, cluster_size if itself else None


def _snapshot(twins: Twins, random: Random) -> None:
    if len(twins.layers) < 6:
        name, cluster_size = _overlay(twins, random)
        twins.both(lambda side: side.snapshot(name, cluster_size=cluster_size, more=[]))


def _transaction(twins: Twins, random: Random) -> None:
    """Actions on bitmaps, of which one may fail, and often a snapshot with them."""
    chosen = [random.choice(("add", "clear", "enable", "disable")) for _ in range(random.randrange(1, 4))]
    named = [(verb, random.choice(_BITMAPS)) for verb in chosen]
    there = twins.sides[0].bitmaps()  # to enable one that is not there in a transaction is the end of QEMU 7.2
    named = [(verb, name) for verb, name in named if verb != "enable" or name in there]
    twins.say(f"    {named}")

    def more(verb: str) -> dict[str, Any]:
        return {"persistent": True} if verb == "add" else {}

    def actions(side: Side) -> list[dict[str, Any]]:
        return [
            {"type": f"block-dirty-bitmap-{verb}", "data": {"node": side.node, "name": name, **more(verb)}}
            for verb, name in named
        ]

    if random.random() < 0.4 and len(twins.layers) < 6:  # as the last action: QEMU 7.2 breaks down if it has to undo it
        name, cluster_size = _overlay(twins, random)
        twins.both(lambda side: side.snapshot(name, cluster_size=cluster_size, more=actions(side)))
        if name not in twins.layers:
            for side in twins.sides:
                side.layers[-1].with_name(name).unlink(missing_ok=True)
    else:
        twins.both(lambda side: side("transaction", actions=actions(side)))


def _commit(twins: Twins, random: Random) -> None:
    if len(twins.layers) < 3:
        return
    base, top = sorted(random.sample(range(len(twins.layers) - 1), 2))
    if twins.has_hidden_data(base, top):
        return
    twins.say(f"    {twins.layers[top]} into {twins.layers[base]}")
    during = _meanwhile(twins, random)
    twins.both(lambda side: side.commit(top, base, during))


def _active_commit(twins: Twins, random: Random) -> None:
    if len(twins.layers) < 2:
        return
    base, top = random.randrange(len(twins.layers) - 1), len(twins.layers) - 1
    if twins.has_hidden_data(base, top):
        return
    twins.say(f"    {twins.layers[top]} into {twins.layers[base]}")
    during = _meanwhile(twins, random)
    twins.both(lambda side: side.commit(top, base, during))


def _stream(twins: Twins, random: Random) -> None:
    if len(twins.layers) < 2:
        return
    layer = len(twins.layers) - 1 if random.random() < 0.6 else random.randrange(1, len(twins.layers))
    base = None if random.random() < 0.4 else random.randrange(layer)
    if base is not None and twins.has_hidden_data(base, layer - 1):
        return
    if "snapshots" in twins.facts(layer):  # nbdq refuses to let them read otherwise
        return
    twins.say(f"    to {twins.layers[layer]} from above {twins.layers[base] if base is not None else None}")
    during = _meanwhile(twins, random)
    twins.both(lambda side: side.stream(layer, base, during))


def _resize(twins: Twins, random: Random) -> None:
    top = twins.facts()
    size = top["virtual-size"]
    if not can_grow(top) or ("backing-filename" in top and twins.sides[0].bitmaps()):
        return
    new = size + random.randrange(-200, 2000) * 512 if random.random() < 0.8 else random.randrange(_LARGEST_DISK)
    new = max(512, min(new, _LARGEST_DISK)) // 512 * 512
    if new < size:  # what QEMU leaves behind the end in the last cluster comes to light when the disk grows again
        new -= new % top.get("cluster-size", 512)
    if new == 0:  # nbdq refuses to make a disk disappear
        return
    twins.say(f"    {size} → {new}")
    if twins.both(lambda side: side.resize(new) or True):
        twins.excuse_end(top)
        if new < size:
            twins.excused.update(range(new // 512, size // 512 + 1))


def _bitmap(twins: Twins, random: Random) -> None:
    verb = random.choice(("add", "add", "add", "remove", "clear", "enable", "disable", "merge"))
    arguments: dict[str, Any] = {"name": random.choice(_BITMAPS)}
    if verb == "add":  # others end for nbdq when another layer becomes the top, and wait there for QEMU
        arguments |= {"persistent": True, "disabled": random.random() < 0.2}
        if random.random() < 0.6:
            arguments["granularity"] = random.choice((512, 4096, 65536, 1 << 20))
    elif verb == "merge":
        arguments = {"target": arguments["name"], "bitmaps": random.choices(_BITMAPS, k=random.randrange(1, 3))}
        if not set(arguments["bitmaps"]) <= set(twins.sides[0].bitmaps()):
            return  # nbdq also finds sources below the top
    twins.say(f"    {verb} {arguments}")
    twins.both(lambda side: side(f"block-dirty-bitmap-{verb}", node=side.node, **arguments))


def _digests(twins: Twins, random: Random) -> None:
    for name in _BITMAPS:
        twins.both(lambda side, name=name: side.digest(name))


def _internal(twins: Twins, random: Random) -> None:
    name = random.choice(_SNAPSHOTS)
    verb = random.choice(("blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"))
    twins.say(f"    {verb} {name}")
    twins.both(lambda side: side(verb, device=side.node, name=name) and None)


ACTIONS: dict[str, Callable[[Twins, Random], None]] = {
    "guest": _guest,
    "snapshot": _snapshot,
    "transaction": _transaction,
    "commit": _commit,
    "active commit": _active_commit,
    "stream": _stream,
    "resize": _resize,
    "bitmap": _bitmap,
    "digests": _digests,
    "internal snapshot": _internal,
}
WEIGHTS = {
    "guest": 40,
    "snapshot": 16,
    "transaction": 6,
    "commit": 9,
    "active commit": 6,
    "stream": 9,
    "resize": 6,
    "bitmap": 12,
    "digests": 6,
    "internal snapshot": 6,
}
