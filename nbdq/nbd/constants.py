"""Every name of the NBD specification that nbdq uses, with its number. No logic.

The specification's prefixes (``NBD_OPT_``, ``NBD_REP_``, ``NBD_CMD_`` …) are the enums; what follows the prefix is the
member, so ``Option.GO.name`` is already what a log should say.
"""

from enum import IntEnum, IntFlag
from typing import Final

#: Default TCP port (P1).
DEFAULT_PORT: Final = 10809

#: Bytes of UTF-8 that no string on the wire may exceed: names, descriptions, contexts, queries, error texts (P2).
MAXIMUM_STRING: Final = 4096

#: Largest READ or WRITE payload, in bytes, that a client may use without block-size information (P85, P126).
DEFAULT_PAYLOAD: Final = 32 << 20

#: Largest WRITE payload, in bytes, that is consumed to be refused; the connection does not survive more (P85, W4).
MAXIMUM_PAYLOAD: Final = 64 << 20

# Magic numbers (P4).
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_CHUNK_MAGIC: Final = 0x6E8A278C

# Metadata contexts with a meaning fixed outside nbdq (P47, P48).
BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""Prefix; the name of the bitmap follows."""


class HandshakeFlag(IntFlag):
    """What the server says in its hello (P11)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client answers to the hello (P12)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks during the handshake (P22)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    """Withdrawn from the specification; answered like an unknown option."""
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """What the server answers to an option; bit 31 marks errors (P23)."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class InfoType(IntEnum):
    """What an INFO reply is about (P35)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do, 16 bits (1.6)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """What a client asks during transmission (P82)."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How a command is to be done (P83)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkFlag(IntFlag):
    """Flags of a structured reply chunk (P110)."""

    DONE = 1 << 0


class ChunkType(IntEnum):
    """Types of structured reply chunks; bit 15 marks errors (P111)."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class Errno(IntEnum):
    """The error numbers of the wire, the same on every platform; nothing else may be sent (P98)."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class AllocationState(IntFlag):
    """Status bits of ``base:allocation``; 0 is data, and always a safe answer (P118)."""

    HOLE = 1 << 0
    ZERO = 1 << 1
