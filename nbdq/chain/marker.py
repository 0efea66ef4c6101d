"""The mark in the header of an image that an overlay has taken over: who writes to it damages the overlay.

A snapshot of a running disk leaves an image behind whose name everybody knows as the disk. Started again from it, the
disk would show its old state and, written to, make the overlay worthless; so the image names its overlay, and is opened
for writing only when that is no overlay of it any more. An active commit leaves its overlay behind in the same danger;
that is marked with the layer which took over. Readers do not care. QEMU keeps the mark and does not heed it.
"""

import errno
from collections.abc import Iterable
from contextlib import closing

from nbdq.chain.policy import Gate, Policy, Reference, Role, has_protocol
from nbdq.chain.resolve import backing_path
from nbdq.errors import ChainError, ImageError, InvalidImage, printable
from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.header_area import set_overlay_marker
from nbdq.storage import FileStorage, identity_of

_FORGET = "or have it forgotten with nbdq amend --forget-overlay"


def check_not_overlaid(storage: FileStorage, header: Header, policy: Policy) -> None:
    """Refuse to have an image written to whose overlay still stands on it.

    The name in the mark may lead where names in headers may lead (R-35); what cannot be looked at there counts as an
    overlay. On return a mark that ``header`` has is stale; see :func:`remove_stale_marker`.

    Raises:
        ChainError: the image has an overlay, whose name is in the message.
    """
    if header.overlay_marker is None:
        return
    name = header.overlay_marker
    reference = Reference(storage.path, Role.OVERLAY, name, backing_path(storage.path, name))
    try:
        backing = _backing_of(reference, Gate(storage.path, policy))
        overlaid = backing is not None and _is(storage, backing)
    except ChainError as error:
        mend = f"{error.mend}, {_FORGET}" if error.mend else _FORGET
        raise ChainError(storage.path, f"{error.what}, so that nobody knows whether it is one still", mend) from error
    except ImageError as error:
        raise reference.error(f"cannot be looked at: {error.what}", f"mend it, {_FORGET}") from error
    except OSError as error:
        raise reference.error(f"cannot be looked at: {error.strerror}", f"mend that, {_FORGET}") from error
    if overlaid:
        mend = f"open the overlay instead, or commit or rebase it, {_FORGET}"
        raise reference.error("would be damaged by writes to its backing file", mend)


def check_not_committed(storage: FileStorage, header: Header, below: Iterable[FileStorage]) -> None:
    """Refuse to have an image written to that was committed into one of its own layers, which has gone on alone since.

    What the image holds is older than what lies below it by then.

    Raises:
        ChainError: the mark names one of ``below``, the files of the layers under the image.
    """
    name = header.overlay_marker
    if name is None or not any(_is(layer, backing_path(storage.path, name)) for layer in below):
        return
    what = f'was committed into "{printable(name, 1024)}", which has been the disk since'
    raise ChainError(storage.path, what, f"open that instead, {_FORGET}")


def remove_stale_marker(storage: FileStorage, header: Header) -> Header:
    """Withdraw the mark that :func:`check_not_overlaid` did not believe; the header that the image has then.

    Durable on return. Where the header cannot be rewritten safely, the mark stays.

    Raises:
        OSError: the file cannot be read or written.
    """
    if header.overlay_marker is None:
        return header
    try:
        return set_overlay_marker(storage, header, None)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return header


def _backing_of(reference: Reference, gate: Gate) -> str | None:
    """What the overlay, if there is one, is backed by: a path as in its header, made relative to here."""
    try:
        overlay = gate.open(reference)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with closing(overlay):
        try:
            header = read_header(overlay, describe=True)
        except InvalidImage:
            return None
    if header.backing_name is None:
        return None
    if has_protocol(header.backing_name):
        raise reference.error("has a backing file that is no path")
    return backing_path(reference.path, header.backing_name)


def _is(storage: FileStorage, path: str) -> bool:
    try:
        return identity_of(path) == storage.identity
    except (FileNotFoundError, NotADirectoryError):
        return False
