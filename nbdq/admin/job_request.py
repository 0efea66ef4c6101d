"""What a job is to do, for whom, and how it is to behave: everything that is known before it begins."""

from dataclasses import dataclass, field
from typing import Any, Literal

from nbdq.server.exports.volume import Volume

OnError = Literal["report", "stop", "enospc"]
"""What becomes of a job whose operation meets an I/O error: it fails, or pauses (on a full medium only) to go on after
``job-resume``."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What somebody wants to have done."""

    id: str
    type: str
    """QEMU's JobType."""
    volume: Volume
    command: str
    """The command that asks for it; together with ``arguments`` it says whether two requests are the same."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The fields of the command's argument class."""
    paths: dict[str, str] = field(default_factory=dict)
    """What layers the arguments meant when it began; to be recorded, for names may mean others later."""
    layers: frozenset[str] | None = None
    """Paths of the layers that nobody else may restructure meanwhile; None for all of the disk."""
    speed: int = 0
    """Bytes per second; 0 for no limit."""
    on_error: OnError = "report"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    obsolete: str | None = None
    """The path of an overlay that the operation removes when it is no part of the disk any more."""
    persistent: bool = False
    """Whether it is started again after a restart of the server."""
