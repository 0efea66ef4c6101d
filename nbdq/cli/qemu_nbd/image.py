"""What FILE means: a path, a list of ``--image-opts``, or ``json:{…}``; and what is done about a format nobody said."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nbdq.chain.policy import has_protocol
from nbdq.cli.qemu_nbd.devices import FOREIGN_MAGICS
from nbdq.cli.qemu_nbd.words import boolean, parse_json, parse_list
from nbdq.errors import ExportError, ImageError, printable
from nbdq.locks import Locking
from nbdq.qcow2.fields import MAGIC
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage

_FORMATS = ("qcow2", "raw")
_FILES = ("file", "host_device")
_LOCKING = {"on": Locking.ON, "off": Locking.OFF, "auto": Locking.AUTO}

#: Options of nodes that change nothing here: names, tuning, and what other options of qemu-nbd say.
_IGNORED = {
    *("node-name", "auto-read-only", "cache.direct", "cache.no-flush", "aio", "aio-max-batch", "lazy-refcounts"),
    *("l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-size", "cache-clean-interval"),
    *("pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "overlap-check", "overlap-check.template"),
    *("discard", "detect-zeroes", "drop-cache", "x-check-cache-dropped"),
}


@dataclass(frozen=True)
class Image:
    """An image file, and which part of its disk is wanted."""

    path: str
    format: str | None = None
    """None: nobody said it."""
    guessed: bool = False
    """Nobody said the format, and we had a look."""
    backing: tuple[tuple[str, str], ...] | None = None
    """(format, path) of every layer below; None: what headers say."""
    offset: int = 0
    size: int | None = None
    read_only: bool = False
    force_share: bool = False
    locking: Locking = Locking.AUTO


def parse_image(text: str, *, format: str | None, image_opts: bool) -> Image:
    """The image that FILE names.

    Raises:
        ExportError: nbdq has no such driver or option.
    """
    if image_opts:
        return _node(parse_list(text, first="file"))
    if text.startswith("json:"):
        values = parse_json(text.removeprefix("json:"))
        if format is not None and values.setdefault("driver", format) != format:
            raise ExportError("Driver specified twice")
        return _node(values)
    if format is not None:
        _check_format(format)
    return Image(_path(text), format)


def _path(name: str) -> str:
    """A file name as QEMU reads it, which takes what stands before a colon for a protocol."""
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif has_protocol(name):
        raise ExportError(f"Unknown protocol '{printable(name.partition(':')[0])}'; nbdq has files and block devices")
    if not name:
        raise ExportError("The 'file' block driver requires a file name")
    return name


def _check_format(name: str) -> None:
    if name not in _FORMATS:
        raise ExportError(f"Unknown driver '{printable(name)}'; nbdq has qcow2 and raw")


def _node(values: Mapping[str, str]) -> Image:
    """A node of QEMU's graph and what is below it."""
    own, file, backing = _split(values)
    driver = own.pop("driver", None)
    if driver in _FILES or (driver is None and "filename" in own):
        return _file_node(values if driver else {"driver": "file", **values}, None if driver is None else "raw")
    if driver is not None:
        _check_format(driver)
    if isinstance(file, str):
        raise ExportError(f"Cannot find node '{printable(file)}'; give file.driver and file.filename")
    if not file:
        raise ExportError(f"A block device must be specified for \"file\" of '{printable(driver or '')}'")
    offset, size = own.pop("offset", "0"), own.pop("size", None)
    if driver != "raw" and (offset != "0" or size is not None):
        raise ExportError(f"Block format '{driver}' does not support the option 'offset' or 'size'")
    below = _node(file) if file.get("driver", "file") not in _FILES else _file_node(file, driver)
    if below.format is None or below.format == driver:
        image = replace(below, format=driver)
    elif driver != "raw":
        raise ExportError(f"a {driver} image inside of another image is not supported; copy it to a file of its own")
    else:
        image = below
    if (image.offset or image.size is not None) and (offset != "0" or size is not None):
        raise ExportError("only one offset and size is supported")
    if driver == "raw" and (offset != "0" or size is not None):
        image = replace(image, offset=_bytes("offset", offset), size=None if size is None else _bytes("size", size))
    if backing is not None:
        if driver != "qcow2":
            raise ExportError(f"Driver '{driver}' doesn't support backing files")
        image = replace(image, backing=_backing(backing))
    return _with_common(image, own, f"Block format '{driver or 'auto'}'")


def _file_node(values: Mapping[str, str], format: str | None) -> Image:
    own, file, backing = _split(values)
    driver = own.pop("driver", "file")
    name = own.pop("filename", None)
    if driver not in _FILES or file or backing is not None:
        raise ExportError(f"Unknown protocol driver '{printable(driver)}'; nbdq has file and host_device")
    if not name:
        raise ExportError(f"The '{driver}' block driver requires a file name")
    return _with_common(Image(name, format), own, f"Block protocol '{driver}'")


def _with_common(image: Image, own: dict[str, str], who: str) -> Image:
    """What every node may say; nothing else may be left."""
    for name in _IGNORED & own.keys():
        del own[name]
    image = replace(
        image,
        read_only=image.read_only or boolean("read-only", own.pop("read-only", "off")),
        force_share=image.force_share or boolean("force-share", own.pop("force-share", "off")),
    )
    if "locking" in own:
        locking = own.pop("locking")
        if locking not in _LOCKING:
            raise ExportError("Parameter 'locking' expects 'on', 'off' or 'auto'")
        image = replace(image, locking=_LOCKING[locking])
    if own:
        raise ExportError(f"{who} does not support the option '{printable(next(iter(own)))}'")
    return image


def _backing(values: Mapping[str, str] | str) -> tuple[tuple[str, str], ...]:
    """An explicit chain below an image; ``backing=`` and null end it."""
    if values == "":
        return ()
    if isinstance(values, str):
        raise ExportError(f"Cannot find node '{printable(values)}'; give backing.driver and backing.file.filename")
    layer = _node(values)
    if layer.format is None or layer.offset or layer.size is not None:
        raise ExportError("backing: the driver, qcow2 or raw, has to be said, and a part of a disk is not supported")
    if layer.format == "qcow2" and layer.backing is None:
        raise ExportError("backing: the chain has to be told to its end; the last image is raw, or has backing=null")
    return ((layer.format, layer.path), *(layer.backing or ()))


def _split(
    values: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, str] | str | None, dict[str, str] | str | None]:
    """The options of a node itself, and those of its children: of each a node's, or a name, or None."""
    own: dict[str, str] = {}
    children: dict[str, dict[str, str]] = {"file": {}, "backing": {}}
    names: dict[str, str] = {}
    for key, value in values.items():
        child, dot, rest = key.partition(".")
        if child not in children:
            own[key] = value
        elif dot:
            children[child][rest] = value
        else:
            names[child] = value
    file, backing = (children[name] or names.get(name) for name in ("file", "backing"))
    return own, file, backing


def _bytes(name: str, text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,19})([kKmMgGtT]?)", text)
    if found is None:
        raise ExportError(f"Parameter '{name}' expects a size")
    return int(found[1]) << " kmgt".index(found[2].lower() or " ") * 10


def guess_format(path: str) -> str:
    """The format of an image of which nobody says it. Wrong guesses are harmless: an image that refers to other files
    is refused, as a guest may have written that into a raw disk (R-34), and so is what looks like yet another format.

    The caller keeps it so: no other file is opened, and a raw disk is not allowed to become something else.

    Raises:
        ExportError: somebody has to say it.
        ImageError, OSError: the image cannot be read.
    """
    storage = FileStorage.open(path)
    try:
        head = storage.read(0, 512)
        if head.startswith(MAGIC):
            header = read_header(storage)
            if header.backing_name is None and not header.has_data_file:
                return "qcow2"
            what = "it begins like a qcow2 image that refers to other files"
        elif head.startswith(FOREIGN_MAGICS):
            what = "it begins like an image of a format that nbdq does not have"
        else:
            return "raw"
    except ImageError as error:
        what = f"it begins like a qcow2 image, but {error.what}"
    finally:
        storage.close()
    raise ExportError(
        f"Image format was not specified for '{printable(path, 1024)}', and {what}; say -f qcow2 or -f raw"
    )
