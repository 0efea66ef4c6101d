"""``nbdq commit``: an image goes into a layer below it, offline, with the options of ``qemu-img commit`` (4.7)."""

from contextlib import closing, suppress

import click

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.chain.resolve import backing_path, resolve_chain
from nbdq.cli.options import (
    Size,
    allow_backing_option,
    allow_data_file_option,
    format_option,
    progress_option,
    quiet_option,
)
from nbdq.cli.progress import ShownControl
from nbdq.errors import NotFound, OperationError, printable
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.control import Control
from nbdq.qcow2.writing.emptying import can_make_empty, make_empty


@click.command("commit")
@format_option
@click.option(
    "-b",
    "--base",
    "base",
    metavar="BASE",
    help="Commit into this layer, instead of the next one; implies -d. The layers between become invalid.",
)
@click.option("-d", "--drop", is_flag=True, help="Do not empty IMAGE afterwards: it will not be used any more.")
@click.option("-r", "--rate", type=Size(), default=0, metavar="BYTES", help="Copy no more than this per second.")
@click.option("--force", is_flag=True, help="Commit even if other overlays of BASE would be damaged.")
@click.option(
    "--search",
    type=click.Path(exists=True, file_okay=False),
    multiple=True,
    help="A directory that other overlays may lie in, besides the layers' own.",
)
@allow_backing_option
@allow_data_file_option
@progress_option
@quiet_option
@click.argument("image", type=click.Path())
def commit_command(
    image: str,
    format: str,
    base: str | None,
    drop: bool,
    rate: int,
    force: bool,
    search: tuple[str, ...],
    allow_backing: tuple[str, ...],
    allow_data_file: bool,
    progress: bool,
    quiet: bool,
) -> None:
    """Copy what IMAGE holds into its backing file, and empty IMAGE.

    IMAGE must not be in use; a disk that is being served is committed with nbdq ctl. If it is interrupted, IMAGE reads
    as before, and the command can be given again.
    """
    control = ShownControl(speed=rate) if progress and not quiet else Control(speed=rate)
    policy = Policy(roots=allow_backing, allow_data_file=allow_data_file)
    with closing(ClusterCache(budget=_CACHE)) as clusters:
        chain = LiveChain.open(image, format=format, policy=policy, clusters=clusters, on_event=_warn)
        with closing(chain):
            if len(chain.layers) < 2:
                raise OperationError("Image does not have a backing file")
            index = 1 if base is None else _find_base(chain, base)
            operation = ActiveCommit(chain, base=index, directories=search, force=force, workers=_WORKERS)
            operation.complete()
            try:
                operation.run(control)
                operation.pivot()
            except BaseException:
                operation.abort()
                raise
            operation.finish()
        if base is None and not drop:
            _empty(image, policy, clusters)
    if isinstance(control, ShownControl):
        control.end()
    if not quiet:
        click.echo("Image committed.")


#: Bytes of inflated clusters: each is read once.
_CACHE = 16 << 20
#: Threads that copy.
_WORKERS = 4


def _find_base(chain: LiveChain, name: str) -> int:
    """The layer that the operator names: by its path, or as the image above it does."""
    for depth, layer in enumerate(chain.layers[:-1]):
        header = layer.header
        if header is not None and name in (header.backing_name, backing_path(layer.path, header.backing_name or "")):
            return depth + 1
    with suppress(NotFound):
        if found := chain.index_of(name):
            return found
    names = f"'{printable(name, 1024)}' in the backing chain of '{printable(chain.path, 1024)}'"
    raise OperationError(f"Did not find {names}")


def _empty(image: str, policy: Policy, clusters: ClusterCache) -> None:
    """Let the image hold nothing any more: at once if there is nothing else in it, or table by table."""
    (layer,) = resolve_chain(image, policy=policy, backing=[], describe=True, writable=True)
    with closing(layer.storage):
        assert layer.header is not None, "a raw image has no backing file"
        if can_make_empty(layer.storage, layer.header):
            make_empty(layer.storage, layer.header)
            return
    disk = open_writable(image, format="qcow2", policy=policy, clusters=clusters, on_event=_warn)
    with closing(disk):
        assert isinstance(disk, OverlayDisk)
        disk.make_empty()


def _warn(text: str) -> None:
    click.echo(f"nbdq: {text}", err=True)
