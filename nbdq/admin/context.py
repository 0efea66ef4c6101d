"""What a command of the admin socket has at hand."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nbdq.admin.checkpoints import Checkpoints
from nbdq.admin.jobs import Jobs
from nbdq.admin.policies import Policies
from nbdq.admin.state import JobRecord, State
from nbdq.errors import NotFound, printable
from nbdq.server.exports.export import Exports
from nbdq.server.exports.volume import Volume


@dataclass(frozen=True)
class Peer:
    """Who is connected, as the kernel says (SO_PEERCRED)."""

    process: int
    user: int
    group: int

    def __str__(self) -> str:
        return f"uid {self.user} (process {self.process})"


class Volumes:
    """The disks that the server has open, by name; the name serves as QEMU's ``device`` and as its ``node-name``."""

    def __init__(self, volumes: Iterable[Volume] = ()) -> None:
        self._volumes = {volume.name: volume for volume in volumes}

    def add(self, volume: Volume) -> None:
        """Another disk, of a name that none has."""
        assert volume.name not in self._volumes
        self._volumes[volume.name] = volume

    def remove(self, volume: Volume) -> None:
        """The server is about to close this disk."""
        del self._volumes[volume.name]

    def __iter__(self) -> Iterator[Volume]:
        return iter(list(self._volumes.values()))

    def volume(self, name: str) -> Volume:
        """The disk of that name, or the one with a layer that was given this node name.

        Raises:
            NotFound: there is none.
        """
        if name in self._volumes:
            return self._volumes[name]
        for volume in self:
            if any(volume.chain.node_name(index) == name for index in range(len(volume.chain.layers))):
                return volume
        raise NotFound(f"Cannot find device='{printable(name)}' nor node-name='{printable(name)}'")


@dataclass(frozen=True)
class Resumed:
    """A job that a former server had begun."""

    volume: Volume
    job: JobRecord


@dataclass(frozen=True)
class Context:
    """Shared by all clients but for ``peer``. Loop thread only, unless a member says otherwise."""

    volumes: Volumes
    exports: Exports
    jobs: Jobs
    state: State
    policies: Policies
    checkpoints: Checkpoints
    emit: Callable[[str, dict[str, Any]], None]
    """``emit(event, data)`` tells every client; to be called on the loop thread."""
    quit: Callable[[], None]
    """Stop the server cleanly, soon."""
    reload: Callable[[], Awaitable[None]] | None
    """Read the configuration again; raises, and changes nothing, if that is not possible (R-77)."""
    peer: Peer
    resumed: Resumed | None = None
    """What a command is to go on with; None if a client gave the command."""
