"""The disk that qemu-nbd is to show: opened, perhaps under a temporary overlay, with the habits that it was given."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import cast

from nbdq.block import BlockDevice, WritableBlockDevice
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.create import create_qcow2, inspect_backing
from nbdq.chain.live import LiveChain
from nbdq.chain.policy import Policy
from nbdq.chain.window import Window, WritableWindow
from nbdq.cli.qemu_nbd.arguments import Arguments
from nbdq.cli.qemu_nbd.devices import GuardedRaw, WriteThrough
from nbdq.cli.qemu_nbd.image import Image, guess_format
from nbdq.errors import ExportError, ImageError, ImageLocked, printable
from nbdq.qcow2.create import CreateOptions

#: What an administrator may allow beyond the directory of the image; programs that start qemu-nbd cannot say it.
ALLOW_BACKING = "NBDQ_QEMU_NBD_ALLOW_BACKING"
ALLOW_DATA_FILE = "NBDQ_QEMU_NBD_ALLOW_DATA_FILE"

#: For what clients write under -s, which may be more than memory holds: no place for /tmp.
_TEMPORARY = "/var/tmp"
#: Inflated clusters that are kept.
_INFLATED_BYTES = 64 << 20

#: What is said about a guess, in qemu-nbd's words.
GUESSED_RAW = """\
WARNING: Image format was not specified for '{}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
restricted.
         Specify the 'raw' format explicitly to remove the restrictions.
"""


@contextmanager
def open_disk(
    arguments: Arguments, image: Image, environment: Mapping[str, str] = os.environ
) -> Iterator[tuple[Image, LiveChain, BlockDevice]]:
    """The image with its format, its chain, and what clients see of it; at the end everything written is durable, and
    all is closed.

    Raises:
        ExportError: it cannot be opened; the text is qemu-nbd's as far as programs may know it. At the end: what was
            written last may be lost.
    """
    name = printable(arguments.file or "", 1024)
    with closing(ClusterCache(budget=_INFLATED_BYTES)) as clusters:
        try:
            if image.format is None:
                image = replace(image, format=guess_format(image.path), guessed=True, backing=())
            chain = _open_chain(arguments, image, environment, clusters)
        except (ImageError, ExportError, OSError) as error:
            raise ExportError(f"Failed to blk_new_open '{name}': {_in_qemu_words(error, image.path)}") from error
        try:
            yield image, chain, _shown(arguments, image, chain.device)
        finally:
            clusters.close()  # already now, because it may be reading the disk
            try:
                chain.close()
            except OSError as error:
                raise ExportError(f"{name}: what was written last may be lost: {error.strerror or error}") from error


def _policy(image: Image, environment: Mapping[str, str]) -> Policy:
    allowed = tuple(root for root in environment.get(ALLOW_BACKING, "").split(os.pathsep) if root)
    return Policy(
        roots=allowed,
        allow_data_file=environment.get(ALLOW_DATA_FILE, "") not in ("", "0"),
        force_share=image.force_share,
        locking=image.locking,
    )


def _open_chain(
    arguments: Arguments, image: Image, environment: Mapping[str, str], clusters: ClusterCache
) -> LiveChain:
    policy = _policy(image, environment)
    assert image.format is not None
    if not arguments.snapshot:
        return LiveChain.open(
            image.path,
            format=image.format,
            policy=policy,
            clusters=clusters,
            backing=image.backing,
            snapshot=arguments.load_snapshot,
            read_only=arguments.read_only or image.read_only,
            on_event=_warn,
        )
    if arguments.load_snapshot is not None:
        raise ExportError("-s and -l exclude each other: an internal snapshot is only read anyway")
    path = os.path.abspath(image.path)
    size, _ = inspect_backing(path, path, format=image.format, policy=policy)
    roots = (*policy.roots, os.path.dirname(path), os.path.dirname(os.path.realpath(path)))
    place = environment.get("TMPDIR") or _TEMPORARY
    with tempfile.TemporaryDirectory(prefix="nbdq-", dir=place) as directory:
        overlay = os.path.join(directory, "overlay")
        create_qcow2(overlay, CreateOptions(size=size, backing_name=path, backing_format=image.format))
        return LiveChain.open(  # which keeps the file that goes with its directory
            overlay,
            format="qcow2",
            policy=replace(policy, roots=roots),
            clusters=clusters,
            backing=None if image.backing is None else [(image.format, path), *image.backing],
            read_only=arguments.read_only,
            on_event=_warn,
        )


def _shown(arguments: Arguments, image: Image, device: BlockDevice) -> BlockDevice:
    """The part of the disk that is wanted, with what happens to writes; the device itself where that is all."""
    parts = [(image.offset, image.size), (arguments.offset, None)]
    parts = [(offset, size) for offset, size in parts if offset or size is not None]
    if arguments.read_only or image.read_only:
        for offset, size in parts:
            device = Window(device, offset, size)
        return device
    disk = cast(WritableBlockDevice, device)
    if image.guessed and image.format == "raw" and not arguments.snapshot:
        disk = GuardedRaw(disk)
    for offset, size in parts:
        disk = WritableWindow(disk, offset, size)
    return WriteThrough(disk, 0) if arguments.write_through else disk


def _warn(text: str) -> None:
    print(f"qemu-nbd: warning: {text}", file=sys.stderr)


def _in_qemu_words(error: Exception, path: str) -> str:
    """What programs look for in QEMU's messages, and what nbdq has to say."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and (not isinstance(error, ImageError) or error.path == path):
        return f"Could not open '{printable(path, 1024)}': {cause.strerror}"
    if isinstance(error, ImageLocked):
        return f'Failed to get "write" lock: {error}'
    return str(error)
