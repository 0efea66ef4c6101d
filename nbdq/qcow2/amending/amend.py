"""An image becomes another kind of image, in the order of QEMU: upgrade, refcount width, the rest, downgrade (4.11).

Everything happens to a quiet file: nobody else changes it, and whoever reads its guest data meanwhile sees the same
before, during and after each step. Every step is durable before the next begins, and switched to by one sector (R-61),
so that a crash leaves a valid image that is what it was, or has become some of what it was to be.
"""

from dataclasses import replace

from nbdq.qcow2.amending.compat import downgrade, upgrade
from nbdq.qcow2.amending.options import AmendOptions, Progress, check_options
from nbdq.qcow2.amending.refcount_width import change_refcount_bits
from nbdq.qcow2.features import Autoclear, Compatible
from nbdq.qcow2.format import Header
from nbdq.qcow2.header_area import rewrite_header_area, write_fields
from nbdq.qcow2.writing.prepare import prepare_for_writing
from nbdq.storage import FileStorage


def amend_image(storage: FileStorage, header: Header, options: AmendOptions, progress: Progress) -> Header:
    """Make the image what ``options`` say; the header that it has then. Durable on return.

    No :class:`~nbdq.qcow2.writing.writable.WritableImage` is open on it, and the caller holds the writer's lock. A
    dirty image is repaired first. What ``progress`` raises ends the work, between two steps or within one.

    Raises:
        OperationError: the image cannot become that; nothing was changed.
        ImageError: the image is damaged.
        OSError: it cannot be read or written; ENOSPC if there is no room.
    """
    header = prepare_for_writing(storage, header)
    check_options(storage, header, options)
    version = header.version if options.version is None else options.version
    if version > header.version:
        header = upgrade(storage, header)
        progress.advance()
    if options.refcount_bits not in (None, 1 << header.refcount_order):
        assert options.refcount_bits is not None
        header = change_refcount_bits(storage, header, options.refcount_bits, progress)
    header = _amend_header(storage, header, options)
    if version < header.version:
        header = downgrade(storage, header, progress)
    return header


def _amend_header(storage: FileStorage, header: Header, options: AmendOptions) -> Header:
    """What is only said in the header."""
    amended = header
    if options.data_file_raw is False:
        amended = replace(amended, autoclear=Autoclear(amended.autoclear & ~Autoclear.DATA_FILE_RAW))
    if options.lazy_refcounts is not None:
        lazy = amended.compatible | Compatible.LAZY_REFCOUNTS
        amended = replace(amended, compatible=lazy if options.lazy_refcounts else lazy ^ Compatible.LAZY_REFCOUNTS)
    if options.data_file_name not in (None, amended.data_file_name):
        return rewrite_header_area(storage, replace(amended, data_file_name=options.data_file_name))
    return header if amended == header else write_fields(storage, amended)
