"""What can be amended of an image, and why not: every refusal comes before the first change (4.11)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from nbdq.errors import OperationError, printable
from nbdq.qcow2.bitmaps.directory import iterate_bitmaps
from nbdq.qcow2.features import Compatible, Incompatible
from nbdq.qcow2.fields import MAX_BACKING_NAME
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshots import iterate_snapshots
from nbdq.storage import FileStorage

#: What a version 2 header, or a program that knows no other, has for the size of a VM state.
_MAX_OLD_VM_STATE = (1 << 32) - 1
_WIDTHS = (1, 2, 4, 8, 16, 32, 64)


class Progress(Protocol):
    """Who is told of the work, in bytes, and may end it by raising."""

    def expect(self, length: int) -> None:
        """So much more work was found."""
        ...

    def advance(self, length: int = 0) -> None:
        """So much of it is done."""
        ...


@dataclass(frozen=True, kw_only=True)
class AmendOptions:
    """What an image is to become; None leaves a property as it is."""

    version: int | None = None
    """2 (compat=0.10) or 3 (compat=1.1)."""
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    data_file_name: str | None = None
    """As it is to be stored; nobody looks whether it exists, or moves data."""
    data_file_raw: bool | None = None


def is_amended(header: Header, options: AmendOptions) -> bool:
    """Whether the image is what ``options`` say already."""
    present = AmendOptions(
        version=header.version,
        refcount_bits=1 << header.refcount_order,
        lazy_refcounts=Compatible.LAZY_REFCOUNTS in header.compatible,
        data_file_name=header.data_file_name,
        data_file_raw=header.data_file_raw,
    )
    return all(wanted in (None, getattr(present, name)) for name, wanted in vars(options).items())


def check_options(storage: FileStorage, header: Header, options: AmendOptions) -> None:
    """See whether an image can become what ``options`` say. Reads tables of snapshots and bitmaps, changes nothing.

    Raises:
        OperationError: it cannot, in QEMU's words where it has some.
        ImageError, OSError: a table cannot be read.
    """
    for problem in _problems(storage, header, options):
        raise OperationError(f"{printable(storage.path, 1024)}: {problem}")


def _problems(storage: FileStorage, header: Header, options: AmendOptions) -> Iterator[str]:
    version = header.version if options.version is None else options.version
    bits = 1 << header.refcount_order if options.refcount_bits is None else options.refcount_bits
    lazy = Compatible.LAZY_REFCOUNTS in header.compatible if options.lazy_refcounts is None else options.lazy_refcounts
    if version not in (2, 3):
        yield f"Unknown compatibility level {version}; there are 0.10 (v2) and 1.1 (v3)"
    if bits not in _WIDTHS:
        yield "Refcount width must be a power of two and may not exceed 64 bits"
    if options.data_file_name is not None:
        if not header.has_data_file:
            yield "data-file can only be set for images that use an external data file"
        if problem := _name_problem(options.data_file_name):
            yield f"data-file {problem}"
    if options.data_file_raw and not header.data_file_raw:
        yield "data-file-raw cannot be set on existing images"
    if version < 3:
        if bits != 16:
            yield (
                "compat=0.10 requires refcount_bits=16"
                if options.refcount_bits is None
                else "Refcount widths other than 16 bits require compatibility level 1.1 or above"
                " (use compat=1.1 or greater)"
            )
        if lazy and options.lazy_refcounts:
            yield "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
    if version < header.version:
        yield from _losses(storage, header)


def _losses(storage: FileStorage, header: Header) -> Iterator[str]:
    """What version 2 cannot hold, and QEMU in part drops (4.11)."""
    if header.has_data_file:
        yield "Cannot downgrade an image with a data file"
    if lost := header.incompatible & ~(Incompatible.COMPRESSION_TYPE | Incompatible.DIRTY):
        yield f"Cannot downgrade an image with incompatible features {lost:#x} set"
    if any(header.unknown_fields):
        yield "Cannot downgrade an image whose header has fields that nbdq does not know"
    for snapshot in iterate_snapshots(storage, header):
        if snapshot.vm_state_size > _MAX_OLD_VM_STATE or snapshot.disk_size not in (None, header.guest_size):
            yield (
                "Internal snapshots prevent downgrade of image: the disk or the VM state of"
                f" '{printable(snapshot.name, 60)}' has a size that version 2 cannot record; delete the snapshot first"
            )
    if header.bitmaps is not None:
        names = [f"'{printable(bitmap.name, 60)}'" for bitmap in islice(iterate_bitmaps(storage, header), 8)]
        more = ", …" if header.bitmaps.count > len(names) else ""
        yield f"Cannot downgrade an image with dirty bitmaps; remove {', '.join(names)}{more} first"


def _name_problem(name: str) -> str | None:
    if not name:
        return "is an empty name, and the image could not be opened without"
    if len(name.encode("utf-8", "surrogateescape")) > MAX_BACKING_NAME:
        return f"has more than {MAX_BACKING_NAME} bytes; use a relative name"
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in name):
        return "has a control character in its name, which no reader should accept"
    return None
