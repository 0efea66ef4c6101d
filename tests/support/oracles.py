"""What QEMU says about an image, in the form in which an NBD client would see it.

``qemu-img map`` sees the layers; block status sees flags. :func:`status_of_map` is the rule between them (P6, P118).
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.images import Image
from tests.support.tools import run

HOLE, ZERO = 1, 2


class Status(NamedTuple):
    """A range of the disk with one value of one metadata context."""

    offset: int
    length: int
    value: int


def merged(statuses: list[Status]) -> list[Status]:
    """Join neighbours of equal value: servers may cut their answers where they like (P117)."""
    found: list[Status] = []
    for status in statuses:
        if found and found[-1].value == status.value and found[-1].offset + found[-1].length == status.offset:
            found[-1] = found[-1]._replace(length=found[-1].length + status.length)
        else:
            found.append(status)
    return found


def block_status(server: list[str], context: str = "base:allocation") -> list[Status]:
    """A context of a whole export as libnbd sees it; ``server`` is a URI, or ``[ COMMAND ]`` that libnbd starts."""
    extents = json.loads(run("nbdinfo", "--json", f"--map={context}", "--", *server))
    return merged([Status(extent["offset"], extent["length"], extent["type"]) for extent in extents])


def qemu_nbd(image: Image, *options: str) -> list[str]:
    """The argument of libnbd's tools that makes them start qemu-nbd on ``image``, without a socket of ours."""
    command = ["qemu-nbd", "-r", "-f", image.format, *options, str(image.top)]
    # QEMU looks for external data files in its working directory (Q76).
    return ["[", "env", f"--chdir={image.directory}", *command, "]"]


def map_text(image: Image, *options: str | Path) -> str:
    """``qemu-img map --output=json``, byte for byte."""
    return run("qemu-img", "map", "-f", image.format, "--output=json", *options, image.top, cwd=image.directory)


def map_extents(image: Image) -> list[dict[str, Any]]:
    """``qemu-img map --output=json``, parsed."""
    return json.loads(map_text(image))  # type: ignore[no-any-return]


def status_of_map(extents: list[dict[str, Any]]) -> list[Status]:
    """The base:allocation that ``map`` implies: HOLE is "not data", ZERO is "reads as zeros" (P6)."""
    return merged(
        [
            Status(extent["start"], extent["length"], (0 if extent["data"] else HOLE) | (ZERO if extent["zero"] else 0))
            for extent in extents
            if extent["length"]  # an empty disk is one extent of length 0 to qemu-img, and none to a client
        ]
    )


def without_compressed(text: str) -> str:
    """Our ``map`` output as QEMU 7.2 would print it: it does not know the newer key."""
    return re.sub(r', "compressed": (true|false)', "", text)
