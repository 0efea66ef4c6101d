"""What a scenario is: a directory of images, and an administrator who does something to the disks."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.crash.guest import Habits
from tests.crash.live.images import Layer, build, padded, read_by_qemu
from tests.crash.live.server import Disk
from tests.crash.recorder import SECTOR
from tests.crash.stamps import Values

if TYPE_CHECKING:
    from tests.crash.live.stage import Stage

_HABITS = Habits(write=60, zero=8, zero_mapped=4, discard=10, flush=18, largest=24, aligned_to=8)


@dataclass(frozen=True)
class Scenario:
    """One operation on disks that are in use."""

    name: str
    chains: dict[str, tuple[Layer, ...]]
    """Of each disk, by its name; bottom first."""
    operate: Callable[[Stage], Awaitable[None]]
    state: bool = True
    """The server has a state file."""
    habits: Habits = _HABITS
    requests: int = 10
    """Of every guest before the operation, and after it."""
    eagerness: float = 0.5
    """How probably guests make a request after a piece of work."""
    threads: int = 0
    """Guests that work in threads beside the operation, instead of in its pauses."""
    cancelled_after: int | None = None
    """So many pieces of work are done, then the job is cancelled."""
    spare: tuple[Layer, ...] = ()
    """A chain that belongs to no disk."""
    together: bool = False
    """All disks get other tops, or none."""
    largest: int = 0
    """Bytes of the largest size that a disk ever has, if that is not the size of its top."""

    def __str__(self) -> str:
        return self.name

    @property
    def disks(self) -> tuple[Disk, ...]:
        """What the command line says."""
        return tuple(Disk(name, f"{name}{len(c) - 1}", c[-1].format) for name, c in self.chains.items())

    def padded(self, values: Values) -> Values:
        """A disk with as many sectors as any disk ever has."""
        sizes = [chain[-1].size for chain in self.chains.values()]
        return padded(values, max(*sizes, self.largest) // SECTOR)


@dataclass(frozen=True)
class Prepared:
    """The files of a scenario before anybody works on them; the same for every seed."""

    scenario: Scenario
    directory: Path
    initial: dict[str, Values] = field(default_factory=dict)
    """What each disk holds."""
    names: frozenset[str] = frozenset()
    """Of all files."""
    bitmapped: dict[str, Values] = field(default_factory=dict)
    """What images with bitmaps hold, by their names."""

    def copy_to(self, directory: Path) -> Prepared:
        """The same files elsewhere."""
        shutil.copytree(self.directory, directory, dirs_exist_ok=True)
        return replace(self, directory=directory)


def prepare(scenario: Scenario, directory: Path) -> Prepared:
    """Make the files of ``scenario`` in the existing, empty ``directory``."""
    initial, bitmapped = {}, {}
    for number, (name, layers) in enumerate(scenario.chains.items()):
        top = build(directory, name, layers, number=10 * number + 1)
        initial[name] = scenario.padded(read_by_qemu(directory / top, format=layers[-1].format))
        for depth, layer in enumerate(layers):
            if layer.bitmap:
                bitmapped[f"{name}{depth}"] = scenario.padded(
                    read_by_qemu(directory / f"{name}{depth}", format="qcow2")
                )
    if scenario.spare:
        build(directory, "spare", scenario.spare, number=91)
    names = frozenset(path.name for path in directory.iterdir())
    return Prepared(scenario, directory, initial, names, bitmapped)
