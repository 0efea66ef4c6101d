"""Images to be amended, and what has to be true of them before and afterwards."""

import json
import random
from contextlib import closing
from pathlib import Path
from typing import Any

from nbdq.ops.control import Control
from nbdq.qcow2.amending.amend import amend_image
from nbdq.qcow2.amending.options import AmendOptions
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.format import Header, read_header
from nbdq.storage import FileStorage
from tests.support.tools import run


def make(path: Path, options: str, *, size: str = "4M", base: Path | None = None) -> Path:
    backing = ["-b", base.name, "-F", "qcow2"] if base else []
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, size)
    return path


def io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-t", "unsafe", "-f", "qcow2", *words, path)


def amend(path: Path, **options: Any) -> Header:
    """What the file says afterwards, which is what the function returned."""
    with closing(FileStorage.open(str(path), writable=True)) as storage:
        header = amend_image(storage, read_header(storage), AmendOptions(**options), Control())
        assert header == read_header(storage)
        return header


def busy_image(path: Path, options: str, *, seed: int, base: Path | None = None) -> Path:
    """An image with holes, data, zero clusters of both kinds, and compressed clusters if it may have any."""
    generator = random.Random(seed)
    make(path, options, base=base)
    commands = []
    for _ in range(24):
        offset = generator.randrange(0, 62) * 65536
        length = generator.choice([512, 4096, 65536, 131072])
        verb = generator.choice(["write -P {p}", "write -P {p}", "write -z", "write -z -u", "discard"])
        commands.append(f"{verb.format(p=generator.randrange(1, 256))} {offset} {length}")
    io(path, *commands)
    return path


def info(path: Path) -> dict[str, Any]:
    """``format-specific`` of qemu-img info."""
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))["format-specific"]["data"]
    return found


def contents(path: Path, *options: str) -> bytes:
    """All that a guest reads of the image."""
    copy = path.with_name("contents.raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *options, path, copy)
    return copy.read_bytes()


def check(path: Path) -> None:
    """Not even a leak."""
    run("qemu-img", "check", "-q", "-f", "qcow2", path)
    with closing(FileStorage.open(str(path))) as storage:
        result = check_image(storage, read_header(storage))
        assert result.is_clean, list(result.findings)
