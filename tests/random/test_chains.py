"""Random chains against every oracle at once. The ordinary run takes the same seeds every time; to explore:

    NBDQ_SEED=$RANDOM NBDQ_RANDOM_COUNT=500 ./run-tests tests/random -x

A failure names its seed, which ``NBDQ_SEED=<seed> NBDQ_RANDOM_COUNT=1`` runs again.
"""

import filecmp
import os
from pathlib import Path

import pytest

from tests.random.chains import random_chain
from tests.support import oracles
from tests.support.cli import nbdq, run_nbdq
from tests.support.images import build
from tests.support.libnbd import nbdsh
from tests.support.serving import serve
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdsh")

FIRST = int(os.environ.get("NBDQ_SEED", "1"))
COUNT = int(os.environ.get("NBDQ_RANDOM_COUNT", "25"))

READS = """
from random import Random
random = Random({seed})
h.connect_unix(socket)
for _ in range(200 if data else 0):
    offset = random.randrange(len(data))
    length = min(random.choice((1, 512, 4096, 5000, 70_000, 400_000)), len(data) - offset)
    assert h.pread(length, offset) == data[offset : offset + length], (offset, length)
"""


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_qemu_and_nbdq_see_the_same_disk_in_a_random_chain(seed: int, tmp_path: Path) -> None:
    variant = random_chain(seed)
    print(f"seed {seed}:", *variant.layers, sep="\n  ")
    image = build(variant, tmp_path)
    raw, copy = tmp_path / "qemu.raw", tmp_path / "nbdq.raw"
    run("qemu-img", "convert", "-f", image.format, "-O", "raw", image.top, raw, cwd=tmp_path)
    extents = oracles.map_extents(image)

    with serve("-r", "-A", "-f", image.format, *image.options, image.top) as server:
        run("nbdcopy", server.uri(), copy)
        assert filecmp.cmp(raw, copy, shallow=False)
        nbdsh(READS.format(seed=seed), socket=server.socket, data=raw)
        allocation = oracles.block_status([server.uri()])
        assert allocation == oracles.status_of_map(extents)
        assert allocation == oracles.block_status(oracles.qemu_nbd(image))
        depth = oracles.block_status([server.uri()], "qemu:allocation-depth")
        assert depth == oracles.block_status(oracles.qemu_nbd(image, "-A"), "qemu:allocation-depth")

    ours = nbdq("map", "--output=json", "-f", image.format, *image.options, image.top)
    assert oracles.without_compressed(ours) == oracles.map_text(image)
    ours = run_nbdq("map", "-f", image.format, *image.options, image.top).stdout
    assert ours == execute("qemu-img", "map", "-f", image.format, image.top, cwd=tmp_path).stdout
