"""Whatever is done to a disk in use, nbdq and QEMU's storage daemon leave the same chain behind.

The ordinary run takes the same seeds every time; ``NBDQ_SEED`` gives others. For long runs see ``live_twins.py``. What
is left out there because QEMU 7.2 does it wrong is tested here alone.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.random.live_sides import finish
from tests.random.live_twins import failure, live_chain, random_rounds
from tests.support.administration import administered, check, qemu_io
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdsh")

SEED = int(os.environ.get("NBDQ_SEED", "1"))
MIB = 1 << 20


@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_twins_that_are_operated_on_while_they_are_served_stay_twins(seed: int) -> None:
    print(f"seed {seed}:", *live_chain(seed).layers, sep="\n  ")
    why, told = failure(seed, random_rounds(seed, rounds=2, count=6))
    assert not why, "\n".join([*told, why])


@pytest.fixture
def short(tmp_path: Path) -> list[Path]:
    """base, middle, upper and top: the base has data everywhere, the middle ends at 1 MiB, and hides the rest of it."""
    paths = [tmp_path / f"{name}.qcow2" for name in ("base", "middle", "upper", "top")]
    below: list[str | Path] = []
    for path, size in zip(paths, ("4M", "1M", "3M", "4M"), strict=True):
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, size)
        below = ["-b", path, "-F", "qcow2"]
    run("qemu-io", "-c", "write -P 1 0 4M", paths[0])
    run("qemu-io", "-c", "write -P 4 2560k 64k", paths[3])
    return paths


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("block-commit", {"top": 1, "base": 0}),
        ("block-commit", {"top": 2, "base": 0}),
        ("block-commit", {"base": 0}),
        ("block-stream", {"base": 0}),
        ("block-stream", {"base": 1}),
        ("block-stream", {"x_nbdq_layer": 2, "base": 0}),
        ("block-stream", {}),
    ],
    ids=str,
)
def test_what_a_short_layer_hides_stays_hidden_when_it_goes(
    short: list[Path], command: str, arguments: dict[str, Any]
) -> None:
    reads = ("read -P 1 0 1M", "read -P 0 1M 1536k", "read -P 4 2560k 64k", "read -P 0 2624k 1472k")
    named = {name: str(short[layer]) for name, layer in arguments.items()}
    with administered("-x", "disk", short[-1]) as server:
        server(command, device="disk", job_id="job", auto_dismiss=False, **named)
        finish(server, complete=command == "block-commit" and "top" not in named)
        qemu_io(server, *reads, export="disk")
        top = Path(server("query-block")[0]["inserted"]["file"])
    run("qemu-io", "-r", *(word for read in reads for word in ("-c", read)), top)
    check(top)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_stream_takes_over_no_zeros_behind_the_end_of_its_base(tmp_path: Path, compat: str) -> None:
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, "64G")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "-b", middle, "-F", "qcow2", top)
    with administered("-x", "disk", top) as server:
        server("block-stream", device="disk", base=str(base))
        server.wait_for_jobs()
        qemu_io(server, "read -P 0 0 2M", "read -P 0 63G 1M", export="disk")
    assert top.stat().st_size < MIB
    check(top)


def test_what_a_disk_lost_when_it_shrank_does_not_come_back_when_it_grows(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, "4M")
    with administered("-x", "disk", disk) as server:
        qemu_io(server, "write -P 1 0 4M", export="disk")
        for size in (MIB + 512, 4 * MIB):
            server("block_resize", device="disk", size=size, x_nbdq_shrink=True)
        qemu_io(server, f"read -P 1 0 {MIB + 512}", f"read -P 0 {MIB + 512} {3 * MIB - 512}", export="disk")
    check(disk)
