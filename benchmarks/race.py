"""Race nbdq against qemu-nbd: same images, same clients, same machine, in turns.

    python benchmarks/race.py [--quick] [--only PATTERN] [--rounds N] [--json FILE] [--markdown]

README.md beside this file says what each case measures and what would make the numbers meaningless. The exit status is
0 if every case could run, whether or not its target was met.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import click
from cases import CASES, Case
from images import GIB, IMAGES, Image
from report import machine, markdown_table, plain_table, progress_line
from runner import Race
from servers import NBDKIT_RAW, QEMU_IO_URING, QEMU_THREADS, Server, ServerError, ServerKind, nbdq
from workloads import ClientError, libnbd_python

REQUIRED_TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "fio", "nbdcopy", "nbdinfo")
DISK_NEEDED = 12 * GIB


def default_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"nbdq-race-{os.getuid()}"


def check_tools(*, yardstick: bool) -> None:
    """Raises ClickException if a tool is missing or lacks the part that is needed."""
    wanted = (*REQUIRED_TOOLS, "nbdkit") if yardstick else REQUIRED_TOOLS
    missing = [tool for tool in wanted if shutil.which(tool) is None]
    if missing:
        raise click.ClickException(f"not found in PATH: {', '.join(missing)}")
    engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=True).stdout.split()
    if "nbd" not in engines:
        raise click.ClickException("this fio was built without its nbd engine; take one that has it")
    try:
        libnbd_python()
    except ClientError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def locked_dir(work_dir: Path) -> Iterator[None]:
    """Make the directory ours alone: by owner, because servers open what lies in it, and against a second race."""
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if work_dir.stat().st_uid != os.getuid():
        raise click.ClickException(f"{work_dir} belongs to another user; name a directory with --dir")
    with (work_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise click.ClickException(
                f"another race runs in {work_dir}; wait for its end, neither would tell"
            ) from error
        yield


def make_images(cases: Sequence[Case], work_dir: Path) -> None:
    wanted: dict[str, Image] = {}
    for case in cases:
        for image in (case.image, case.own_rival):
            if image is not None:
                wanted |= {name: IMAGES[name] for name in (*image.needs, image.name)}
    missing = [image for image in wanted.values() if not image.is_made(work_dir)]
    if missing and shutil.disk_usage(work_dir).free < DISK_NEEDED:
        raise click.ClickException(
            f"{work_dir} has less than {DISK_NEEDED // GIB} GiB free; name a directory with --dir"
        )
    for image in missing:
        started = time.monotonic()
        image.make(work_dir)
        click.echo(f"made {image.name} ({image.recipe}) in {time.monotonic() - started:.0f} s", err=True)


def usable_rivals(work_dir: Path, image: Image, *, yardstick: bool) -> list[ServerKind]:
    """qemu-nbd with threads, with io_uring where kernel and build have it, and nbdkit on the raw file if asked for."""
    rivals = [QEMU_THREADS]
    try:
        Server(QEMU_IO_URING, image, work_dir).stop()
        rivals.append(QEMU_IO_URING)
    except ServerError as error:
        click.echo(f"racing without io_uring: {error}", err=True)
    return [*rivals, NBDKIT_RAW] if yardstick else rivals


@click.command()
@click.option("--quick", is_flag=True, help="Two rounds of 2 s per measurement: a look, not a result.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Cases whose name fits this shell pattern. Repeatable.")
@click.option("--rounds", type=click.IntRange(1), help="Measurements per case and server (default 5).")
@click.option("--seconds", type=click.FloatRange(0.5), help="Length of one measurement (default 4).")
@click.option("--retries", type=click.IntRange(0), default=2, help="Repeat a disturbed measurement (default 2 times).")
@click.option(
    "--dir",
    "work_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_dir,
    help="Where images are kept.",
)
@click.option("--ours", metavar="COMMAND", help="Race this server as nbdq; {socket} and {image} are filled in.")
@click.option("--yardstick", is_flag=True, help="Also show nbdkit's file plugin on a raw image. It does not count.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all samples there.")
@click.option("--markdown", is_flag=True, help="Print the table for a README, with date and machine.")
@click.option("--list", "list_cases", is_flag=True, help="Print the names of the cases and stop.")
def main(
    quick: bool,
    only: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    retries: int,
    work_dir: Path,
    ours: str | None,
    yardstick: bool,
    json_path: Path | None,
    markdown: bool,
    list_cases: bool,
) -> None:
    """Race nbdq against qemu-nbd."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped then, too
    cases = [case for case in CASES if not only or any(fnmatch(case.id, pattern) for pattern in only)]
    if not cases:
        raise click.UsageError(f"no case fits {' or '.join(only)}; --list prints their names")
    if list_cases:
        click.echo("\n".join(case.id for case in cases))
        return
    rounds = rounds or (2 if quick else 5)
    seconds = seconds or (2.0 if quick else 4.0)
    check_tools(yardstick=yardstick)
    with locked_dir(work_dir):
        make_images(cases, work_dir)
        our_kind = nbdq(shlex.split(ours)) if ours else nbdq()
        rivals = usable_rivals(work_dir, cases[0].image, yardstick=yardstick)
        results = []
        race = Race(work_dir, our_kind, rivals, rounds=rounds, seconds=seconds, retries=retries)
        for result in race.run(cases):
            results.append(result)
            click.echo(progress_line(result), err=True)
        facts = machine(work_dir)

    columns = [kind.label for kind in (our_kind, *rivals)]
    click.echo(markdown_table(results, columns, facts) if markdown else plain_table(results, columns))
    if json_path is not None:
        settings = {"rounds": rounds, "seconds": seconds, "retries": retries, "ours": " ".join(our_kind.argv)}
        report = {"machine": facts, "settings": settings, "cases": [result.as_json() for result in results]}
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(result.failure for result in results))


if __name__ == "__main__":
    main()
