"""The judgement over one damaged image: as in QEMU, or different for a reason that is listed here, or a failure.

Every reason is a rule of nbdq, not a licence to differ; a new difference fails until it is mended or has a reason.
"""

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.hostile.anatomy import COMPRESSED, Layout
from tests.hostile.reader import CPU_LIMIT, MEMORY_LIMIT, windows
from tests.hostile.referee import Map, QemuHangs, Referee


class Reason(NamedTuple):
    """Why nbdq and QEMU may differ about an image."""

    name: str
    pattern: str
    """Of the message of the one that refuses."""


#: nbdq refuses what QEMU opens: the HARD list of 1.13, and what an image may refer to.
_REFUSED_BY_US = (
    # QEMU reads zeros past the end of the file: a cut-off L1 table becomes an empty disk, a cut-off directory garbage.
    Reason("table outside of the file", r"after the file|past the end of the file|outside of the file"),
    # QEMU does not look at the size of a snapshot when it shows one (Q63, Q64).
    Reason("snapshot larger than its L1 table", r"the L1 table of snapshot '.*' has \d+ entries, but \d+ bytes need"),
    # Q24; to QEMU the last one wins.
    Reason("extension twice", r"header extension 0x[0-9a-f]+ appears twice"),
    # Q24.
    Reason("control character in a name", r"has a control character"),
    Reason("backing format is no word", r"the backing format is not a word"),
    # Q10.
    Reason("name inside the header", r"backing_file_offset is \d+, inside the header"),
    # QEMU probes (F2, F6, R-34).
    Reason("backing format not recorded", r"has no recorded format"),
    #
    Reason("name is refused", r'(backing|data) file ".*(is refused|lies outside)'),
    # QEMU 7.2 opens the same file again and again (D1).
    Reason("loop", r"closes a loop"),
)

#: QEMU refuses what nbdq opens.
_REFUSED_BY_QEMU = (
    # QEMU loads what is in the bitmaps when it opens an image. Reading the disk needs no more than a sound directory.
    Reason("content of a bitmap", r"Could not read bitmap"),
)

#: nbdq answers EIO where QEMU reads something, whatever else the image says.
_UNREADABLE_FOR_US = (
    # QEMU allows 2^27.
    Reason("zstd window above 2^23", r"requires too much memory"),
    # Later versions of the library find damage that earlier ones decode to something; which one QEMU has, it has.
    Reason("damage that an older zstd does not see", r"Data corruption detected"),
)


def explain(reasons: Iterable[Reason], message: str) -> str | None:
    """The name of the first reason that a message fits."""
    return next((reason.name for reason in reasons if re.search(reason.pattern, message)), None)


def reason_to_fail(message: str) -> str | None:
    """Why nbdq may answer EIO, in these words, for a compressed cluster that QEMU reads."""
    return explain(_UNREADABLE_FOR_US, message)


def reason_to_read(data: bytes, cluster_size: int) -> str | None:
    """Why nbdq may read a deflate stream that QEMU refuses: libdeflate knows fewer rules than zlib, which refuses it.

    It gives unused codes a meaning (286 and 287 literals, 30 and 31 distances). No writer emits them.
    """
    try:
        zlib.decompressobj(-15).decompress(data, cluster_size)
    except zlib.error:
        return "damage that libdeflate does not see"
    return None


@dataclass
class Finding:
    """What came out for one image."""

    opened: bool = False
    reasons: set[str] = field(default_factory=set)
    """Names of differences that have a reason."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(kind, text): hang, traceback, memory or difference."""

    def fail(self, kind: str, text: str) -> None:
        self.failures.append((kind, text))

    def differ(self, reason: str | None, text: str) -> None:
        """Note a difference, which is a failure without a reason."""
        if reason is None:
            self.fail("difference", text)
        else:
            self.reasons.add(reason)


class Judge:
    """Judges reports about the image in one directory; asks QEMU as far as needed."""

    def __init__(self, directory: Path, images: Sequence[str], top: str) -> None:
        """``images`` are the names of all QCOW2 layers."""
        self._images = [directory / name for name in images]
        self._top = directory / top
        self._referee = Referee(directory, top)
        self.content = directory / "ours"
        """Where the reader is to write what it reads."""

    def judge(self, report: dict[str, Any] | None, snapshot: str | None) -> Finding:
        """Judge what a reader reports about the image, or about an internal snapshot of it."""
        finding = Finding()
        if report is None:
            finding.fail("hang", "killed: no answer within the limits")
            return finding
        if report["cpu"] > CPU_LIMIT:
            finding.fail("hang", f"{report['cpu']:.1f} s of CPU time")
        if report["memory"] > MEMORY_LIMIT:
            finding.fail("memory", f"{report['memory'] >> 20} MiB")
        if report["outcome"] in ("memory", "traceback"):
            finding.fail(report["outcome"], report["error"])
            return finding
        finding.opened = report["outcome"] == "opened"
        try:
            if finding.opened:
                self._judge_disk(finding, report, snapshot)
            else:
                self._judge_refusal(finding, report["error"], snapshot)
        except QemuHangs:
            finding.reasons.add("QEMU hangs")
        return finding

    def _judge_refusal(self, finding: Finding, error: str, snapshot: str | None) -> None:
        if not error.isprintable():
            finding.fail("difference", f"the message is not one printable line: {error!r}")
        refusal = self._referee.map().refusal if snapshot is None else self._referee.read(512, snapshot).refusal
        if refusal is None:
            finding.differ(explain(_REFUSED_BY_US, error), f"QEMU opens it, but we say: {error}")

    def _judge_disk(self, finding: Finding, report: dict[str, Any], snapshot: str | None) -> None:
        map_ = self._referee.map() if snapshot is None else Map(None, None)
        refusal, sectors, bad = self._referee.read(report["size"], snapshot)
        refusal = map_.refusal or refusal
        if refusal is not None:
            finding.differ(explain(_REFUSED_BY_QEMU, refusal), f"opens, but QEMU says: {refusal}")
            return
        for text in report["differing"]:
            finding.fail("difference", text)
        ours = np.fromfile(self.content, dtype=np.uint8).reshape(-1, 512)
        if snapshot is not None:  # to QEMU it has the size of the active state (Q64)
            ours, sectors, bad = ours[: len(sectors)], sectors[: len(ours)], bad[: len(ours)]
        if ours.shape != sectors.shape:
            finding.fail("difference", f"{len(ours)} sectors are read, but {len(sectors)} by QEMU")
            return
        shown = None if snapshot is None else self._top
        our_bad = self._judge_failures(finding, report, bad, shown)
        if (ours != sectors)[~our_bad & ~bad].any():
            first = int(np.flatnonzero((ours != sectors).any(axis=1) & ~our_bad & ~bad)[0])
            finding.fail("difference", f"sector {first} of what is read: {ours[first].tobytes()[:32].hex()}…")
        self._judge_successes(finding, report["size"], np.flatnonzero(bad & ~our_bad).tolist(), shown)
        if snapshot is None:
            self._judge_map(finding, report, map_)

    def _judge_failures(
        self, finding: Finding, report: dict[str, Any], bad: NDArray[np.bool_], shown: Path | None
    ) -> NDArray[np.bool_]:
        """Which sectors nbdq cannot read; ``bad`` are those that QEMU cannot."""
        our_bad = np.zeros_like(bad)
        unexplained = []
        for offset, length, message in report["bad"]:
            first = _position(report["size"], offset) // 512
            piece = slice(first, first + length // 512)
            our_bad[piece] = True
            if not bad[piece].all():
                reason = _reason_for_error(offset, message, shown)
                if reason is None:
                    unexplained.append(message)
                else:
                    finding.reasons.add(reason)
        if unexplained:
            finding.fail("difference", f"QEMU reads {len(unexplained)} granules of which we say: {unexplained[0]}")
        return our_bad

    def _judge_successes(self, finding: Finding, size: int, sectors: Iterable[int], shown: Path | None) -> None:
        """Sectors that only QEMU cannot read must belong to deflate data of which zlib says so, too."""
        unexplained = []
        for sector in sectors:
            guest_offset = _guest_offset(size, sector * 512)
            streams = (stream for path in self._images for stream in _streams(path, guest_offset, shown))
            reason = next(filter(None, (reason_to_read(*stream) for stream in streams)), None)
            if reason is None:
                unexplained.append(sector)
            else:
                finding.reasons.add(reason)
        if unexplained:
            finding.fail("difference", f"QEMU cannot read {len(unexplained)} sectors from {unexplained[0]}, but we do")

    def _judge_map(self, finding: Finding, report: dict[str, Any], map_: Map) -> None:
        message = report["map_error"]
        if (message is None) != (map_.extents is not None):
            offset = re.search(r"guest offset (\d+)", message or "")
            reason = _reason_for_error(int(offset[1]), message, None) if offset else None
            finding.differ(reason, f"only one can map: {message}, {map_}")
        elif message is None and report["map"] != map_.extents:
            assert map_.extents is not None
            pairs = [pair for pair in zip(report["map"], map_.extents, strict=False) if pair[0] != pair[1]]
            finding.fail("difference", f"map: {pairs[0] if pairs else 'length'}")


def _position(size: int, guest_offset: int) -> int:
    """Where a guest offset is in what is read of a disk."""
    position = 0
    for start, length in windows(size):
        if start <= guest_offset < start + length:
            return position + guest_offset - start
        position += length
    raise AssertionError(f"guest offset {guest_offset} is not read")


def _guest_offset(size: int, position: int) -> int:
    """The inverse of :func:`_position`."""
    for start, length in windows(size):
        if position < length:
            return start + position
        position -= length
    raise AssertionError(f"position {position} is not read")


def _streams(path: Path, guest_offset: int, shown: Path | None) -> Iterator[tuple[bytes, int]]:
    """What is compressed for a guest offset in one layer, and the size of its clusters.

    ``shown`` is the image of which an internal snapshot is shown, if any; all others show their active state.
    """
    with path.open("rb") as file:
        layout = Layout(lambda offset, length: os.pread(file.fileno(), length, offset))
        for place in layout.entry_offsets(guest_offset, snapshots=path == shown):
            entry = layout.number(place, 8)
            if entry & COMPRESSED:
                offset, length = layout.compressed_range(entry)
                yield os.pread(file.fileno(), length, offset), layout.cluster_size


def _reason_for_error(guest_offset: int, message: str, shown: Path | None) -> str | None:
    """Why nbdq may answer EIO for a guest offset that QEMU reads, proven by the image that the message names."""
    path = re.search(r": '(.*)'$", message)
    if path is None or reason_to_fail(message):
        return reason_to_fail(message)
    with open(path[1], "rb") as file:
        layout = Layout(lambda offset, length: os.pread(file.fileno(), length, offset))
        end = os.fstat(file.fileno()).st_size
        for place in layout.entry_offsets(guest_offset, snapshots=path[1] == str(shown)):
            # QEMU reads zeros past the end of the file: the guest would see a blank disk.
            if place // layout.cluster_size * layout.cluster_size >= end:
                return "L2 table past the end of the file"
    return None
