"""``nbdq create``: new images, with the options of ``qemu-img create`` (4.4)."""

import logging
import os
from functools import partial
from typing import Any

import click

from nbdq.chain.create import create_qcow2, create_raw, inspect_backing
from nbdq.chain.policy import Policy
from nbdq.chain.resolve import backing_path
from nbdq.cli.option_lists import (
    VERSIONS,
    Option,
    boolean,
    number,
    one_of,
    parse_option,
    parse_options,
    print_options,
    size_value,
    split_options,
)
from nbdq.errors import ImageError, NbdqError, printable
from nbdq.qcow2.create import CreateOptions, Preallocation
from nbdq.qcow2.features import CompressionType
from nbdq.qcow2.fields import MAGIC
from nbdq.storage import FileStorage, Identity

_logger = logging.getLogger(__name__)

_COMPRESSION = {"zlib": CompressionType.DEFLATE, "zstd": CompressionType.ZSTD}
_PREALLOCATION = {mode.value: mode for mode in Preallocation}
_FORMATS = {"qcow2": "qcow2", "raw": "raw"}
#: Options whose names differ from those of the fields of CreateOptions, and options without effect.
_FIELDS = {
    "compat": "version",
    "backing_file": "backing_name",
    "backing_fmt": "backing_format",
    "data_file": "data_file_name",
}
_UNUSED = ("encryption", "nocow", "extent_size_hint")
_NO_ENCRYPTION = "nbdq does not make encrypted images; use qemu-img, or encrypt inside the guest"


def _unencrypted(text: str) -> bool:
    if boolean(text):
        raise NbdqError(_NO_ENCRYPTION)
    return False


_HINT = Option("bool (on/off)", boolean, "Accepted; a hint to file systems that nbdq does not pass on")
_SIZE = Option("size", size_value, "Bytes of the disk")
_PREALLOCATED = Option("str", one_of(_PREALLOCATION), "How much of the image is there at once")

#: In the order in which qemu-img announces them.
_OPTIONS: dict[str, dict[str, Option]] = {
    "qcow2": {
        "encryption": Option("bool (on/off)", _unencrypted, "Must be off"),
        "cluster_size": Option("size", size_value, "Bytes of a cluster", "65536"),
        "extended_l2": Option("bool (on/off)", boolean, "Divide clusters into 32 subclusters", "off"),
        "preallocation": _PREALLOCATED,
        "compression_type": Option("str", one_of(_COMPRESSION), "Of compressed clusters: zlib or zstd", "zlib"),
        "size": _SIZE,
        "compat": Option("str", one_of(VERSIONS), "QCOW2 version: 0.10 (v2) or 1.1 (v3)"),
        "backing_file": Option("str", str, "The image below"),
        "backing_fmt": Option("str", one_of(_FORMATS), "Format of the image below"),
        "data_file": Option("str", str, "A file of its own for the guest's data"),
        "data_file_raw": Option("bool (on/off)", boolean, "The data file is a raw image of the disk"),
        "lazy_refcounts": Option("bool (on/off)", boolean, "Refcounts may be updated late", "off"),
        "refcount_bits": Option("num", number, "Width of a refcount", "16"),
        "nocow": _HINT,
        "extent_size_hint": Option("size", size_value, _HINT.help),
    },
    "raw": {
        "size": _SIZE,
        "nocow": _HINT,
        "preallocation": Option(
            "str",
            one_of({name: mode for name, mode in _PREALLOCATION.items() if name != "metadata"}),
            _PREALLOCATED.help,
        ),
        "extent_size_hint": Option("size", size_value, _HINT.help),
    },
}


@click.command("create", short_help="Make an image, empty or over another one.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@click.option(
    "-f", "--format", "format", type=click.Choice(list(_FORMATS)), default="qcow2", show_default=True, help="Of FILE."
)
@click.option("-b", "--backing-file", "backing", metavar="FILE", help="The image below, as FILE is to name it.")
@click.option("-F", "--backing-format", "backing_format", metavar="FORMAT", help="Format of the image below.")
@click.option("-u", "unsafe", is_flag=True, help="Do not open the image below; then SIZE is needed.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE,...", help="Options of the format; see -o help.")
@click.option(
    "--allow-backing",
    "allow_backing",
    type=click.Path(exists=True, file_okay=False),
    multiple=True,
    help="A directory that the images below that one may lie in, besides its own.",
)
@click.argument("file", required=False)
@click.argument("size", required=False)
def create_command(
    file: str | None,
    size: str | None,
    format: str,
    backing: str | None,
    backing_format: str | None,
    options: tuple[str, ...],
    unsafe: bool,
    quiet: bool,
    allow_backing: tuple[str, ...],
) -> None:
    """Make the image FILE, whose disk has SIZE bytes and reads as zeros, or as the image below it.

    SIZE may have a suffix of k, M, G, T, P or E. What exists is overwritten, unless it is in use.
    """
    words = split_options(options)
    if "help" in words or "?" in words:
        print_options("Supported options:", _OPTIONS[format])
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.")
    texts, values = parse_options(words, _OPTIONS[format], partial(_unknown, format))
    if size is not None and "size" in values:
        raise NbdqError("the image size must be specified only once: as SIZE, or with -o size")
    for name, text in (("size", size), ("backing_file", backing), ("backing_fmt", backing_format)):
        if text is not None:
            if name not in _OPTIONS[format]:
                raise NbdqError(f"{format} images have no backing file; leave out -b and -F, or use -f qcow2")
            texts[name], values[name] = text, parse_option(name, _OPTIONS[format][name], text)
    # The chain must still be one that can be opened when the new image is its top; a guest may be writing to it.
    policy = Policy(roots=allow_backing, max_depth=Policy.max_depth - 1, force_share=True)
    keep = _settle_backing(file, values, policy, unsafe=unsafe)
    if "size" not in values:
        raise NbdqError("the image needs a size: say SIZE, or a backing file to take it from")
    make = _make_qcow2 if format == "qcow2" else _make_raw
    announcement = f"Formatting '{file}', fmt={format} {_announced(format, texts, values)}"
    make(file, values, keep, announcement="" if quiet else announcement)


def _unknown(format: str, name: str) -> NbdqError:
    if name.startswith("encrypt."):
        return NbdqError(f"{printable(name)}: {_NO_ENCRYPTION}")
    return NbdqError(f"invalid parameter {printable(name)!r}; see nbdq create -f {format} -o help")


def _make_qcow2(file: str, values: dict[str, Any], keep: frozenset[Identity], *, announcement: str) -> None:
    options = CreateOptions(**{_FIELDS.get(name, name): value for name, value in values.items() if name not in _UNUSED})
    _announce(announcement)
    create_qcow2(file, options, keep=keep)
    if options.data_file_name is not None:
        path = backing_path(file, options.data_file_name)
        if os.path.realpath(path) != os.path.realpath(options.data_file_name):
            _logger.warning(
                "the data file is %s, beside the image; qemu-img looks for it in its current directory (use an"
                " absolute name to be clear)",
                printable(path, 1024),
            )


def _make_raw(file: str, values: dict[str, Any], keep: frozenset[Identity], *, announcement: str) -> None:
    size = -(-values["size"] // 512) * 512
    if size >= 1 << 63:
        raise NbdqError(f"the image size is too large: {size} bytes")
    _announce(announcement)
    create_raw(file, size, preallocation=values.get("preallocation", Preallocation.OFF), keep=keep)


def _announce(line: str) -> None:
    if line:
        print(line, flush=True)


def _settle_backing(file: str, values: dict[str, Any], policy: Policy, *, unsafe: bool) -> frozenset[Identity]:
    """Check the backing file, take the size from it if there is none yet, and return the files of its chain."""
    name = values.get("backing_file")
    if name is None:
        return frozenset()
    if name == "":
        raise NbdqError("expected the name of a backing file, got an empty one")
    if name == file:
        raise NbdqError(f"{printable(file)} cannot be its own backing file")
    if "backing_fmt" not in values:
        raise ImageError(file, "backing file specified without its format", _format_hint(file, name))
    if unsafe:
        return frozenset()
    size, files = inspect_backing(file, name, format=values["backing_fmt"], policy=policy)
    values.setdefault("size", size)
    return files


def _format_hint(file: str, name: str) -> str:
    """What to say: a guess, so that it is the operator who says it and not the guest who wrote the disk (F2)."""
    try:
        storage = FileStorage.open(backing_path(file, name))
        try:
            likely = "qcow2" if storage.read(0, len(MAGIC)) == MAGIC else "raw"
        finally:
            storage.close()
    except OSError:
        return "say it with -F qcow2 or -F raw"
    return f"if it is {likely}, say -F {likely}"


def _announced(format: str, texts: dict[str, str], values: dict[str, Any]) -> str:
    """The options as qemu-img prints them, to be read by the programs that read that."""
    shown = []
    for name, option in _OPTIONS[format].items():
        if option.kind in ("size", "num") and name in values:
            shown.append(f"{name}={values[name]}")
        elif (text := texts.get(name, option.default)) is not None:
            shown.append(f"{name}={text.replace(',', ',,')}")
    return " ".join(shown)
