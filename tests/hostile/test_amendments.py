"""Damaged images that are amended: refused, or amended without making anything worse.

For a longer exploration, as in ``test_writes.py``::

    NBDQ_SEED=$RANDOM NBDQ_AMENDMENTS=5000 pytest tests/hostile/test_amendments.py
"""

import os
import random
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nbdq.errors import NbdqError
from nbdq.ops.control import Control
from nbdq.qcow2.amending.amend import amend_image
from nbdq.qcow2.amending.options import AmendOptions
from nbdq.qcow2.format import Header, read_header
from nbdq.storage import FileStorage
from tests.hostile.mutations import mutate
from tests.hostile.seeds import VARIANTS_TO_MUTATE, make_seed
from tests.hostile.write_trial import Disk, audit, look
from tests.support.images import Variant
from tests.support.tools import requires

RANDOM_SEED = os.environ.get("NBDQ_SEED", "nbdq")
_NAMES = (
    "clusters-1k",
    "extended-l2-16k",
    "refcount-bits-1",
    "refcount-bits-64",
    "zlib-mixed",
    "zlib-v2",
    "zeros-preallocated",
    "lazy-refcounts",
    "data-file-raw-on",
    "snapshots",
    "snapshots-v2",
    "snapshots-over-backing",
    "small-clusters-512",
    "bitmaps-over-backing",
)
_VARIANTS = [variant for variant in VARIANTS_TO_MUTATE if variant.name in _NAMES]
_EACH = -(-int(os.environ.get("NBDQ_AMENDMENTS", "420")) // len(_VARIANTS))
#: Seconds of CPU time that one image may cost (R-33).
_CPU_LIMIT = 2.0
_WISHES = (
    AmendOptions(version=3),
    AmendOptions(version=2, refcount_bits=16),
    AmendOptions(version=2),
    AmendOptions(version=3, refcount_bits=2),
    AmendOptions(version=3, refcount_bits=64, lazy_refcounts=True),
    AmendOptions(data_file_raw=False, lazy_refcounts=False),
)


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("variant", _VARIANTS, ids=str)
def test_a_damaged_image_is_refused_or_amended_without_making_anything_worse(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileStorage, "_fdatasync", lambda storage: None)  # costs more time than all the rest
    built, place = tmp_path / "built", tmp_path / "place"
    built.mkdir()
    seed = make_seed(variant, built)
    for name, stored in seed.files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        stored.store(place / name)
    top = place / seed.top
    seen: Counter[str] = Counter()
    for number in range(_EACH):
        mutation = mutate(seed, number, random_seed=RANDOM_SEED)
        mutation.apply(seed.files[mutation.file]).store(place / mutation.file)
        options = random.Random(str(mutation)).choice(_WISHES)
        failure = _attempt(Disk(top, seed.directory, variant.snapshots, ()), options, seen)
        assert not failure, f"NBDQ_SEED={RANDOM_SEED}, {mutation}, {options}: {failure}"
        for name in {mutation.file, seed.top}:
            seed.files[name].store(place / name)
    assert seen["amended"], "an image that is always refused tests nothing"


def _said(header: Header) -> Header:
    return replace(header, warnings=())


def _attempt(disk: Disk, options: AmendOptions, seen: Counter[str]) -> str:
    """What is wrong with what became of the image, if anything is."""
    before = audit(disk.path)
    is_sound = before is not None and not before.corruptions and not before.check_errors
    content, snapshots = look(disk) if is_sound else (None, [])
    started = time.process_time()
    with closing(FileStorage.open(str(disk.path), writable=True)) as storage:
        try:
            header = amend_image(storage, read_header(storage), options, Control())
        except (NbdqError, OSError) as error:
            header, refusal = None, str(error)
        else:
            refusal = ""
        seen["refused" if refusal else "amended"] += 1
        if "\n" in refusal:
            return f"not one line: {refusal!r}"
        if header is not None and _said(header) != _said(read_header(storage)):
            return "the header that is returned is not the one in the file"
    if time.process_time() - started > _CPU_LIMIT:
        return "took too long"
    if not is_sound:
        return ""
    assert before is not None
    after = audit(disk.path)
    if after is None or after.corruptions or after.check_errors:
        return f"is corrupt now: {after and after.findings[:4]}"
    if after.leaks > before.leaks and not refusal:
        return f"leaks: {after.findings[:4]}"
    again, snapshots_again = look(disk)
    if content is not None and (again is None or content.differs(again)):
        return f"differs in {content.differs(again) if again else 'everything'}"
    return "" if snapshots == snapshots_again else "a snapshot changed"
