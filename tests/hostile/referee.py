"""QEMU's opinion of a damaged image.

``qemu-img map`` says whether QEMU opens the image and how it maps it; ``qemu-img convert --salvage`` what it reads,
sector by sector, and which sectors fail.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.hostile.reader import MAPPED, windows
from tests.support.tools import SEARCH_PATH

#: Seconds until QEMU counts as hung; what it does then is not compared.
_PATIENCE = 20
_KEYS = ("start", "length", "depth", "present", "zero", "data")


class QemuHangs(Exception):
    """QEMU did not end; it has no loop detection, for one (D1)."""


class Map(NamedTuple):
    """Whether QEMU opens an image, and the map of it."""

    refusal: str | None
    extents: list[list[Any]] | None
    """As in reports of the reader; None where QEMU refuses, or a damaged table stops it."""


class Content(NamedTuple):
    """What QEMU reads of a disk."""

    refusal: str | None
    sectors: NDArray[np.uint8]
    """The windows that are read, one after the other; a row for each sector."""
    bad: NDArray[np.bool_]
    """Which sectors fail."""


class Referee:
    """Asks QEMU about the image in one directory."""

    def __init__(self, directory: Path, top: str) -> None:
        self._directory = directory
        self._top = top

    def map(self) -> Map:
        """Whether QEMU opens the image, and its map.

        Raises:
            QemuHangs: no answer came.
        """
        done = self._run("map", "-f", "qcow2", "--output=json", "-l", str(MAPPED), self._top)
        if "Could not open" in done.stderr:
            return Map(done.stderr.strip(), None)
        if done.returncode:
            return Map(None, None)
        extents = [
            [*(extent[key] for key in _KEYS), extent.get("offset")]
            for extent in json.loads(done.stdout)
            if extent["length"]  # an empty disk is one extent of length 0
        ]
        return Map(None, extents)

    def read(self, size: int, snapshot: str | None) -> Content:
        """Read the windows of the disk, whose size should be ``size``. A snapshot is read as a whole.

        Raises:
            QemuHangs: no answer came.
        """
        sectors, bad = [np.zeros((0, 512), dtype=np.uint8)], [np.zeros(0, dtype=bool)]
        for offset, length in windows(size):
            source = ["-f", "qcow2", self._top]
            if snapshot is not None:
                source = ["-l", f"snapshot.name={snapshot}", *source]
            elif length < size:
                window = f"driver=raw,offset={offset},size={length}"
                source = ["--image-opts", f"{window},file.driver=qcow2,file.file.filename={self._top}"]
            done = self._run("convert", "--salvage", "-O", "raw", *source, "theirs")
            if done.returncode:
                return Content(done.stderr.strip(), sectors[0], bad[0])
            sectors.append(np.fromfile(self._directory / "theirs", dtype=np.uint8).reshape(-1, 512))
            bad.append(np.zeros(len(sectors[-1]), dtype=bool))
            failed = re.findall(r"error while reading offset (\d+)", done.stderr)
            bad[-1][np.array(failed, dtype=np.int64) // 512] = True
        return Content(None, np.concatenate(sectors), np.concatenate(bad))

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run qemu-img. What it warns of goes to a file, because a line for each bad sector makes a pipe slow."""
        path = self._directory / "warnings"
        with path.open("wb") as warnings:
            try:
                done = subprocess.run(
                    ["qemu-img", *words],
                    cwd=self._directory,
                    env={"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=warnings,
                    timeout=_PATIENCE,
                    check=False,
                    text=True,
                )
            except subprocess.TimeoutExpired as error:
                raise QemuHangs(" ".join(words)) from error
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, path.read_text(errors="replace"))
