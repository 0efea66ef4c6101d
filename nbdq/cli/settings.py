"""Everything that a server is started from: the command line and the configuration file make the same.

Each dataclass is a section of the file, each field a key of it (``read_only`` is ``read-only`` there). A field whose
type names a click type is read as an option of that type is, so that ``"64M"`` and ``"0660"`` mean the same in both.
"""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Literal

from nbdq.cli.administration import AdminSettings
from nbdq.cli.lifecycle import ServerSettings
from nbdq.cli.metrics import MetricsSettings
from nbdq.cli.options import Mode, Size
from nbdq.server.limits import Limits
from nbdq.server.tls import TlsSettings


@dataclass(frozen=True)
class ListenSettings:
    """A place at which clients connect: a unix socket, or every address of a host."""

    socket: str | None = None
    """Path of a unix socket; TCP without."""
    mode: Annotated[int, Mode()] = 0o600
    """File mode of the unix socket."""
    address: str = "127.0.0.1"
    port: int | None = None
    """0 lets the system choose; the protocol's own if it is not given."""
    tls: Literal["off", "allow", "require"] | None = None
    """Whether clients may or must use TLS here; as section ``tls`` says for all if not given."""


@dataclass(frozen=True)
class ExportSettings:
    """A disk, and how clients see it."""

    image: str
    """The top of the chain."""
    name: str | None = None
    """What clients ask for; what the file is called, without its suffix, if not given."""
    description: str = ""
    format: Literal["qcow2", "raw"] = "qcow2"
    """Of the image; never guessed (R-34)."""
    backing: tuple[tuple[str, str], ...] | None = None
    """(format, path) of every layer below, in place of what headers say; empty ends the chain."""
    allow_backing: tuple[str, ...] = ()
    """Directories that backing and data files may lie in, besides the image's own."""
    allow_data_file: bool = False
    force_share: bool = False
    """Open the image even if another process writes to it; read-only."""
    read_only: bool = False
    snapshot: str | None = None
    """Id or name of an internal snapshot to show instead of the disk; read-only."""
    bitmaps: tuple[str, ...] = ()
    allocation_depth: bool = False
    max_connections: int = 0
    """Clients at once; 0 for no limit."""
    discard: Literal["unmap", "ignore"] = "unmap"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    write_threshold: Annotated[int, Size()] | None = None
    """Bytes of the image file beyond which a warning is logged."""

    @property
    def export_name(self) -> str:
        """What clients ask for."""
        return PurePath(self.image).stem if self.name is None else self.name

    @property
    def writable(self) -> bool:
        """Whether clients may write."""
        return not (self.read_only or self.snapshot is not None or self.force_share)


@dataclass(frozen=True)
class LogSettings:
    """What is logged, to stderr."""

    format: Literal["text", "json"] = "text"
    verbosity: int = 0
    """0: warnings; 1: what clients do, too; 2: everything."""


@dataclass(frozen=True)
class Settings:
    """A server; each field is a section."""

    listen: tuple[ListenSettings, ...] = ()
    """If there are none: the sockets of socket activation, or a private one for ``--run``, or TCP as ListenSettings has
    it by default."""
    export: tuple[ExportSettings, ...] = ()
    admin: AdminSettings = field(default_factory=AdminSettings)
    limits: Limits = field(default_factory=Limits)
    tls: TlsSettings = field(default_factory=TlsSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    log: LogSettings = field(default_factory=LogSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
