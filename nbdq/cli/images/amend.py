"""``nbdq amend``: make an image, or a whole chain, another kind of image, with the options of qemu-img amend (4.11)."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from functools import partial
from typing import Any

import click

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.create import inspect_backing
from nbdq.chain.live import LiveChain
from nbdq.chain.policy import Policy
from nbdq.chain.resolve import ResolvedLayer, resolve_chain
from nbdq.cli.option_lists import (
    VERSIONS,
    Option,
    boolean,
    number,
    one_of,
    parse_options,
    print_options,
    size_value,
    split_options,
)
from nbdq.cli.options import allow_backing_option, format_option, progress_option, quiet_option
from nbdq.cli.progress import ShownControl
from nbdq.errors import NbdqError, OperationError, UnsupportedImage, printable
from nbdq.ops.amend import Amend, ChainRules, failed, succeeded
from nbdq.ops.control import Control
from nbdq.ops.operation import Operation
from nbdq.ops.rebase import Rebase
from nbdq.ops.stream import Stream
from nbdq.qcow2.amending.amend import amend_image
from nbdq.qcow2.amending.options import AmendOptions, check_options
from nbdq.qcow2.features import CryptMethod
from nbdq.qcow2.header_area import set_backing, set_overlay_marker

#: Bytes of inflated clusters: each is read once.
_CACHE = 16 << 20
#: Options that are not a matter of the image's file alone.
_SETTLED_HERE = ("size", "backing_file", "backing_fmt")
#: Options whose names differ from those of the fields of AmendOptions.
_FIELDS = {"compat": "version", "data_file": "data_file_name"}
#: What ``-o`` takes.
OPTIONS = {
    "backing_file": Option("str", str, "The image below: the disk stays what it is, as with qemu-img rebase"),
    "backing_fmt": Option("str", one_of({"qcow2": "qcow2", "raw": "raw"}), "Format of the image below"),
    "compat": Option("str", one_of(VERSIONS), "QCOW2 version: 0.10 (v2) or 1.1 (v3)"),
    "data_file": Option("str", str, "Another name of the file for the guest's data"),
    "data_file_raw": Option(
        "bool (on/off)", boolean, "The data file is a raw image of the disk; only to be turned off"
    ),
    "lazy_refcounts": Option("bool (on/off)", boolean, "Refcounts may be updated late"),
    "refcount_bits": Option("num", number, "Width of a refcount"),
    "size": Option("size", size_value, "Bytes of the disk; smaller only with --shrink"),
}
#: What an image gets when it is made, and keeps.
_CREATION_ONLY = (
    *("cluster_size", "extended_l2", "preallocation", "compression_type", "encryption", "nocow", "extent_size_hint"),
    *("encrypt.format", "encrypt.cipher-alg", "encrypt.cipher-mode", "encrypt.ivgen-alg", "encrypt.ivgen-hash-alg"),
)
#: What can be said with --chain: nothing that is different in each layer.
_OF_CHAINS = {"compat", "lazy_refcounts", "refcount_bits"}


@click.command("amend")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE,...", help="What to change; see -o help.")
@format_option
@click.option("--chain", "whole_chain", is_flag=True, help="Amend all layers of IMAGE, base first, but for raw ones.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="PATTERN",
    help="With --chain: refuse to amend an image of this path, which other disks are made from; may be repeated.",
)
@click.option(
    "--search",
    type=click.Path(exists=True, file_okay=False),
    multiple=True,
    help="With --chain: a directory that overlays of other disks may lie in, besides the layers' own.",
)
@click.option("--shrink", is_flag=True, help="Let the disk become smaller; what lies behind is lost.")
@click.option("--forget-overlay", is_flag=True, help="Remove the mark of an overlay, so that IMAGE can be written to.")
@allow_backing_option
@click.option("--allow-data-file", is_flag=True, help="With --chain or size: open external data files.")
@progress_option
@quiet_option
@click.argument("image", type=click.Path(), required=False)
def amend_command(
    image: str | None,
    options: tuple[str, ...],
    format: str,
    whole_chain: bool,
    templates: tuple[str, ...],
    search: tuple[str, ...],
    shrink: bool,
    forget_overlay: bool,
    allow_backing: tuple[str, ...],
    allow_data_file: bool,
    progress: bool,
    quiet: bool,
) -> None:
    """Change options of IMAGE: version, width of refcounts, size, …

    IMAGE must not be in use; a disk that is being served is amended with nbdq ctl.
    """
    words = split_options(options)
    if "help" in words or "?" in words:
        print_options("Amend options for 'qcow2':", OPTIONS)
        return
    if image is None:
        raise click.UsageError("Missing argument 'IMAGE'.")
    if not words and not forget_overlay:
        raise NbdqError("Must specify options (-o)")
    if format == "raw":
        raise NbdqError("Format driver 'raw' does not support option amendment")
    values = parse_options(words, OPTIONS, unknown_option)[1]
    if whole_chain and (single := sorted(set(values) - _OF_CHAINS)):
        raise NbdqError(f"{', '.join(single)}: an option of one image; leave out --chain")
    wanted = AmendOptions(
        **{_FIELDS.get(name, name): value for name, value in values.items() if name not in _SETTLED_HERE}
    )
    policy = Policy(roots=allow_backing, allow_data_file=allow_data_file)
    control = ShownControl() if progress and not quiet else Control()
    if forget_overlay or _has_backing(values):
        _amend_backing(image, values, wanted, policy, control, forget_overlay=forget_overlay)
    if not whole_chain and "size" not in values:
        with _alone(image) as layer:
            assert layer.header is not None
            amend_image(layer.storage, layer.header, wanted, control)
    else:
        rules = ChainRules(is_template=partial(_matches, templates), directories=search) if whole_chain else None
        is_told = whole_chain and not quiet
        try:
            _amend_disk(image, wanted, values.get("size"), policy, rules, control, shrink=shrink, is_told=is_told)
        except (NbdqError, OSError) as error:
            if whole_chain:
                raise NbdqError(failed(image, error)) from error
            raise
        if is_told:
            click.echo(succeeded(image))
    if isinstance(control, ShownControl):
        control.end()


def unknown_option(name: str) -> NbdqError:
    """Why ``-o`` does not take ``name``."""
    text = f"Invalid parameter '{printable(name)}'"
    if name in _CREATION_ONLY:
        return NbdqError(f"{text}: This option is only supported for image creation")
    if name.startswith("encrypt."):
        return NbdqError(f"{text}: nbdq does not change encryption; use qemu-img amend")
    return NbdqError(f"{text}; see nbdq amend -o help")


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _has_backing(values: dict[str, Any]) -> bool:
    return "backing_file" in values or "backing_fmt" in values


@contextmanager
def _alone(image: str) -> Iterator[ResolvedLayer]:
    """The image by itself, ours to write to: neither backing nor data file have to be there.

    Raises:
        ImageError: it is in use, or no image that can be amended.
    """
    (layer,) = resolve_chain(image, policy=Policy(), backing=[], describe=True, writable=True)
    with closing(layer.storage):
        if layer.header is not None and layer.header.crypt_method is not CryptMethod.NONE:
            raise UnsupportedImage(image, "the image is encrypted", "use qemu-img amend")
        yield layer


def _amend_backing(
    image: str, values: dict[str, Any], wanted: AmendOptions, policy: Policy, control: Control, *, forget_overlay: bool
) -> None:
    """Settle what lies below and above, by the rules of a rebase; only if nothing else will be refused."""
    with _alone(image) as layer:
        header = layer.header
        assert header is not None
        check_options(layer.storage, header, wanted)
        if forget_overlay and header.overlay_marker is not None:
            header = set_overlay_marker(layer.storage, header, None)
        name = values.get("backing_file", header.backing_name) or None
        format: Any = values.get("backing_fmt", header.backing_format)
        if name is None and "backing_fmt" in values:
            raise OperationError("backing_fmt cannot be used without a backing file")
        if name == header.backing_name:
            if name is not None and format != header.backing_format:
                inspect_backing(image, name, format=format, policy=policy)
                set_backing(layer.storage, header, name=name, format=format)
            return
    if name is not None and "backing_fmt" not in values:
        raise OperationError("backing format must be specified")
    with _opened(image, policy) as chain:
        _carry_out(Rebase(chain, name=name, format=format) if name else Stream(chain), control)


@contextmanager
def _opened(image: str, policy: Policy) -> Iterator[LiveChain]:
    """The image with everything below it."""
    with closing(ClusterCache(budget=_CACHE)) as clusters:
        chain = LiveChain.open(image, format="qcow2", policy=policy, clusters=clusters)
        with closing(chain):
            yield chain


def _carry_out(operation: Operation, control: Control) -> None:
    """Nobody else uses the disk, so it is drained all the time."""
    try:
        operation.run(control)
        operation.pivot()
    except BaseException:
        operation.abort()
        raise
    operation.finish()


def _amend_disk(
    image: str,
    wanted: AmendOptions,
    size: int | None,
    policy: Policy,
    rules: ChainRules | None,
    control: Control,
    *,
    shrink: bool,
    is_told: bool,
) -> None:
    """Amend what needs the images below: the size of a disk, or all of its layers."""

    def tell(path: str, done: int, total: int) -> None:
        if is_told:
            click.echo(f"{printable(path, 1024)}: amended ({done} of {total})")

    with _opened(image, policy) as chain:
        operation = Amend(
            chain,
            wanted,
            name=image,
            size=None if size is None else -(-size // 512) * 512,
            shrink=shrink,
            whole_chain=rules,
            on_layer=tell,
            audit=lambda level, text: None,
        )
        _carry_out(operation, control)
