"""QEMU's image locks: who uses an image file, and what each user tolerates in the others (L1-L11, R-44).

Every user of an image states a :class:`Claim`: the permissions that it needs, and those that it lets others have.
It publishes the claim as read locks on single bytes of the file, which may lie beyond its end: byte ``100 + bit`` for
each permission it needs, byte ``200 + bit`` for each one it refuses to others. Only then does it test for contrary
claims, so that of two users who collide at least one sees the other. Locks belong to the open file description and
vanish when its last descriptor is closed; nothing has to be undone after a crash.

Knows descriptors. Must not know image formats. Only kernels and hosts that share the file system's locks see them:
images on block devices that several hosts reach need a lease of their own (L11).
"""

import errno
import fcntl
import struct
from enum import Enum, Flag
from typing import NamedTuple

from nbdq.errors import ImageError, ImageLocked


class Permission(Flag):
    """What a user does with an image; the bits are QEMU's and part of the protocol (L2)."""

    CONSISTENT_READ = 1 << 0
    """Reads, and what it reads must make sense."""
    WRITE = 1 << 1
    """Changes what the image reads as."""
    WRITE_UNCHANGED = 1 << 2
    """Writes without changing what the image reads as, such as copy-on-read."""
    RESIZE = 1 << 3
    """Changes the length."""

    @property
    def qemu_name(self) -> str:
        """The words of QEMU's own messages (L7)."""
        return str(self.name).replace("_", " ").lower()


class Claim(NamedTuple):
    """One user's terms: ``permissions`` that it needs, and those that it lets others have at the same time (L3)."""

    permissions: Permission
    shared: Permission

    @property
    def refused(self) -> Permission:
        """What nobody else may do meanwhile."""
        return ~self.shared

    def beyond(self, other: "Claim") -> "Claim":
        """What this claim needs and refuses and ``other`` does not."""
        return Claim(self.permissions & ~other.permissions, self.shared | other.refused)


#: An image that is only read, and every layer below a top: nobody may change or resize it. Bytes 100, 201, 203 (L6).
READER = Claim(
    permissions=Permission.CONSISTENT_READ,
    shared=Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED,
)

#: A QCOW2 image that is written to: nobody else may change it. Bytes 100, 101, 103, 201, 203 (L6).
WRITER = Claim(
    permissions=Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
    shared=Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED,
)

#: A raw image that is written to and keeps its length. Bytes 100, 101, 201, 203: what qemu-nbd refuses to others (203)
#: and what a guest of QEMU refuses to others (201), so that of two writers of one disk the second never gets in.
RAW_WRITER = Claim(
    permissions=Permission.CONSISTENT_READ | Permission.WRITE,
    shared=Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED,
)

#: The external data file of a QCOW2 image that is written to. Bytes 100, 101, 103, 203 as in QEMU, which lets those
#: write who claim nothing more; a second image with this data file, and whoever serves it as a raw disk, are kept away.
DATA_FILE_WRITER = Claim(
    permissions=Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
    shared=Permission.CONSISTENT_READ | Permission.WRITE | Permission.WRITE_UNCHANGED,
)

#: The reader of ``--force-share``: others may write, and reading nonsense is the operator's risk. Byte 100 alone, like
#: ``qemu-img -U``; an image that is inconsistent by design, such as a layer being committed, still refuses it.
TOLERANT_READER = Claim(permissions=Permission.CONSISTENT_READ, shared=~Permission(0))

#: The claim of somebody who has not claimed anything.
_NO_CLAIM = Claim(permissions=Permission(0), shared=~Permission(0))


class Locking(Enum):
    """What to do about locks, and about a file system that has none (L9)."""

    AUTO = "auto"
    """Lock where the file system can; go on without where it cannot."""
    ON = "on"
    """Refuse images whose file system cannot lock. Never falls back to POSIX locks, which any close() would lose."""
    OFF = "off"
    """Neither lock nor look."""


_NEEDED_BYTE = 100
_REFUSED_BYTE = 200

#: ``struct flock``: type, whence, start, length, pid (0 for locks of an open file description), with native padding.
_FLOCK = struct.Struct("@hhqqi0q")

_CONFLICTS = (errno.EAGAIN, errno.EACCES)
#: How kernels and (network) file systems say that they have no such locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def lock_image(descriptor: int, path: str, claim: Claim, mode: Locking = Locking.AUTO) -> bool:
    """Hold ``claim`` on the image open at ``descriptor`` until that is closed; ``path`` is for messages.

    The descriptor must be open for reading and hold no claim yet.

    Returns:
        Whether the claim is held; False without locking, or on a file system without locks under ``AUTO``.

    Raises:
        ImageLocked: another user's claim is contrary to this one; nothing is held.
        ImageError: the file system has no locks and ``mode`` is ``ON``.
        OSError: any other failure of ``fcntl``.
    """
    return change_claim(descriptor, path, _NO_CLAIM, claim, mode)


def share_claim(descriptor: int, claim: Claim) -> None:
    """Hold on ``descriptor``, too, a claim that another open file description of ours holds on the same image.

    Nothing is tested: that claim has kept others away.

    Raises:
        OSError: as :func:`lock_image`; not for file systems without locks.
    """
    try:
        _publish(descriptor, claim)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def change_claim(descriptor: int, path: str, old: Claim, new: Claim, mode: Locking = Locking.AUTO) -> bool:
    """Hold ``new`` instead of ``old`` on the image open at ``descriptor``, without a moment of holding less than both
    have in common (L5): what ``new`` has more is taken and tested, and only then released what it has less.

    So whoever gives up a right must have stopped using it before this call, and whoever gains one may use it after.

    Returns:
        As :func:`lock_image`.

    Raises:
        ImageLocked: another user's claim is contrary to ``new``; ``old`` is still held. Cannot happen where ``new``
            needs and refuses nothing that ``old`` did not.
        ImageError, OSError: as from :func:`lock_image`; ``old`` is still held.
    """
    if mode is Locking.OFF:
        return False
    added = new.beyond(old)
    try:
        _publish(descriptor, added)
        conflict = _find_conflict(descriptor, added)
    except OSError as error:
        _withdraw(descriptor, added)
        if error.errno in _CONFLICTS:
            # Nobody who follows the protocol takes a write lock on these bytes.
            raise ImageLocked(path, "another process locks the whole file", "stop that process") from error
        if error.errno not in _NO_LOCKS:
            raise
        if mode is Locking.ON:
            mend = f"set locking to {Locking.AUTO.value} if nothing else uses the image"
            raise ImageError(path, f"the file system cannot lock it ({error.strerror})", mend) from error
        return False
    if conflict is not None:
        _withdraw(descriptor, added)
        raise _refusal(path, new, *conflict)
    _withdraw(descriptor, old.beyond(new))
    return True


def _publish(descriptor: int, claim: Claim) -> None:
    for byte in _bytes_of(claim):
        _set_lock(descriptor, fcntl.F_RDLCK, byte)


def _withdraw(descriptor: int, claim: Claim) -> None:
    for byte in _bytes_of(claim):
        try:
            _set_lock(descriptor, fcntl.F_UNLCK, byte)
        except OSError:
            return  # a file that cannot lock holds nothing to release


def _bytes_of(claim: Claim) -> list[int]:
    return [_NEEDED_BYTE + _bit(permission) for permission in claim.permissions] + [
        _REFUSED_BYTE + _bit(permission) for permission in claim.refused
    ]


def _find_conflict(descriptor: int, claim: Claim) -> tuple[Permission, bool] | None:
    """The first permission of ``claim`` that others contest, and whether we refuse it to them; QEMU's order (L4)."""
    for permission in claim.permissions:
        if _is_locked_by_others(descriptor, _REFUSED_BYTE + _bit(permission)):
            return permission, False
    for permission in claim.refused:
        if _is_locked_by_others(descriptor, _NEEDED_BYTE + _bit(permission)):
            return permission, True
    return None


def _refusal(path: str, claim: Claim, permission: Permission, refused_by_us: bool) -> ImageLocked:
    shared = "shared " if refused_by_us else ""
    mend = "stop the other process"
    if Permission.WRITE in claim.permissions:
        mend += ", or serve the image with -r/--read-only if that only reads it"
    elif refused_by_us:
        mend += ", or read the image while it changes with -U/--force-share"
    return ImageLocked(
        path, f'failed to get {shared}"{permission.qemu_name}" lock: another process uses the image', mend
    )


def _bit(permission: Permission) -> int:
    return permission.value.bit_length() - 1


def _set_lock(descriptor: int, kind: int, byte: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))


def _is_locked_by_others(descriptor: int, byte: int) -> bool:
    """Whether another open file description, of any process, holds a lock on ``byte``. Takes nothing."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK
