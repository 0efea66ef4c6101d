"""Everything that a server is started from: the command line and the configuration file make the same.

Each dataclass is a section of the file, each field a key of it (``read_only`` is ``read-only`` there). A field whose
type names a click type is read as an option of that type is, so that ``"64M"`` and ``"0660"`` mean the same in both.
"""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Literal

from nbdq.cli.options import Backing, Mode, Size
from nbdq.cli.serve.administration import AdminSettings
from nbdq.cli.serve.lifecycle import ServerSettings
from nbdq.cli.serve.metrics import MetricsSettings
from nbdq.errors import ExportError
from nbdq.server.admission.access import Access
from nbdq.server.exports.rate import Rates
from nbdq.server.limits import Limits
from nbdq.server.tls.credentials import TlsSettings


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

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: there is no such port, or none on a unix socket.
        """
        if self.socket is not None and self.port is not None:
            raise ExportError("a unix socket has no port; write a [[listen]] for each")
        if self.port is not None and self.port > 0xFFFF:
            raise ExportError(f"port: {self.port} is not in the range 0 to 65535")


@dataclass(frozen=True)
class AccessSettings:
    """What is demanded of clients: :class:`nbdq.server.admission.access.Access`. What is not given is not demanded."""

    tls: bool = False
    """Only under TLS."""
    subjects: tuple[str, ...] | None = None
    """Patterns for the subject or a name of the client's certificate, or ``PSK:`` and the name of its key."""
    networks: tuple[str, ...] | None = None
    """``192.0.2.0/24``, ``2001:db8::/32`` or single addresses, for TCP clients."""
    users: tuple[str, ...] | None = None
    """Names or numbers, for clients on unix sockets."""
    groups: tuple[str, ...] | None = None
    """The same of groups."""

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: a word means nothing.
        """
        object.__setattr__(self, "_made", Access.of(**vars(self)))

    def make(self) -> Access:
        """The demands, with names resolved, which may ask a directory service, when the settings were made."""
        made: Access = vars(self)["_made"]
        return made


@dataclass(frozen=True, kw_only=True)
class Offer:
    """How clients see a disk: what an export and a directory of exports have in common."""

    allow_backing: tuple[str, ...] = ()
    """Directories that backing and data files may lie in, besides the image's own."""
    allow_data_file: bool = False
    """Open external data files that headers name."""
    force_share: bool = False
    """Open the image even if another process writes to it; read-only."""
    allocation_depth: bool = False
    """Offer the context ``qemu:allocation-depth``."""
    snapshots: bool = False
    """Offer internal snapshots, too, read-only, as ``NAME@SNAPSHOT``."""
    layers: bool = False
    """Offer the layers below, too, read-only, as ``NAME#1``, ``NAME#2``, …"""
    max_connections: int = 0
    """Clients at once; 0: as many as the limits say."""
    discard: Literal["unmap", "ignore"] = "unmap"
    """Whether clients can make images give up space."""
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    """Turn writes of zeros into zeroing that keeps the space, or with ``unmap`` gives it up."""
    write_threshold: Annotated[int, Size()] | None = None
    """Bytes of the image file beyond which a warning is logged."""
    access: AccessSettings = field(default_factory=AccessSettings)
    """What is demanded of clients."""
    rate: Rates = field(default_factory=Rates)
    """What all clients together may do in a second."""

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: two keys contradict each other.
        """
        if self.detect_zeroes == "unmap" and self.discard == "ignore":
            raise ExportError("detect-zeroes unmap gives up space, which discard ignore forbids")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Offer):
    """A disk, and how clients see it."""

    image: str
    """The top of the chain."""
    name: str | None = None
    """What clients ask for; what the file is called, without its suffix, if not given."""
    default: bool = False
    """Clients that name no export get this one."""
    description: str = ""
    """Text for those who list exports."""
    format: Literal["qcow2", "raw"] = "qcow2"
    """Of the image; never guessed (R-34)."""
    backing: Annotated[tuple[tuple[str, str], ...], Backing()] | None = None
    """``qcow2:PATH`` or ``raw:PATH`` of every layer below, in place of what headers say; ``[]`` ends the chain."""
    read_only: bool = False
    """Refuse writes."""
    snapshot: str | None = None
    """Id or name of an internal snapshot to show instead of the disk; read-only."""
    bitmaps: tuple[str, ...] = ()
    """Dirty bitmaps to offer as contexts ``qemu:dirty-bitmap:NAME``."""

    @property
    def export_name(self) -> str:
        """What clients ask for."""
        return PurePath(self.image).stem if self.name is None else self.name

    @property
    def writable(self) -> bool:
        """Whether clients may write."""
        return not (self.read_only or self.snapshot is not None or self.force_share)


@dataclass(frozen=True, kw_only=True)
class DirectorySettings(Offer):
    """A directory each of whose images is an export, under the name of the file."""

    path: str
    """The directory; its subdirectories are not looked at."""
    prefix: str = ""
    """What names of exports begin with."""
    qcow2: tuple[str, ...] = (".qcow2",)
    """Suffixes of files that are QCOW2 images."""
    raw: tuple[str, ...] = ()
    """Suffixes of files that are raw images; formats are never guessed (R-34)."""
    read_only: bool = True
    """Refuse writes. If not, images that others in the directory lie over are read-only all the same."""
    rescan_seconds: float = 10.0
    """Between looks at what is there; 0: only on SIGHUP."""

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: two keys contradict each other, or one makes no sense.
        """
        super().__post_init__()
        if 0 < self.rescan_seconds < 0.1:
            raise ExportError(f"rescan-seconds: {self.rescan_seconds:g} is less than 0.1, and not 0")
        if both := {*self.qcow2} & {*self.raw}:
            raise ExportError(f"{', '.join(sorted(both))} cannot be the suffix of qcow2 and of raw images")


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
    export_directory: tuple[DirectorySettings, ...] = ()
    admin: AdminSettings = field(default_factory=AdminSettings)
    limits: Limits = field(default_factory=Limits)
    tls: TlsSettings = field(default_factory=TlsSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    log: LogSettings = field(default_factory=LogSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
