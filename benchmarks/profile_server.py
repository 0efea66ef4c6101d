"""Where nbdq's main thread spends its time in one case of the race.

    python benchmarks/profile_server.py CASE [--seconds S] [--sort cumulative] [--lines N]

cProfile makes every Python call several times dearer and sees one thread: compare shares, not times. Needs the images
that race.py has made.
"""

import pstats
import sys
import tempfile
from pathlib import Path

import click
from cases import CASES
from race import default_dir
from servers import NBDQ_ARGV, Server, nbdq


@click.command()
@click.argument("case_id", metavar="CASE", type=click.Choice([case.id for case in CASES]))
@click.option("--seconds", type=click.FloatRange(0.5), default=2.0, help="Length of the run (default 2).")
@click.option("--sort", type=click.Choice(["tottime", "cumulative", "ncalls"]), default="tottime")
@click.option("--lines", type=click.IntRange(1), default=30)
@click.option("--dir", "work_dir", type=click.Path(file_okay=False, path_type=Path), default=default_dir)
def main(case_id: str, seconds: float, sort: str, lines: int, work_dir: Path) -> None:
    """Profile the server in one CASE."""
    case = next(case for case in CASES if case.id == case_id)
    if not case.image.is_made(work_dir):
        raise click.ClickException(f"{work_dir} has no {case.image.name} image; run race.py --only {case_id} first")
    case.image.warm(work_dir)
    with tempfile.NamedTemporaryFile(suffix=".prof") as profile:
        server = Server(
            nbdq([sys.executable, "-m", "cProfile", "-o", profile.name, *NBDQ_ARGV[1:]]), case.image, work_dir
        )
        try:
            sample = case.workload.run(server, seconds)
        finally:
            server.stop()  # SIGTERM ends nbdq in order, and cProfile writes its file then
        click.echo(f"{case_id}: {sample.value:.6g} {case.workload.unit.value} under the profiler")
        pstats.Stats(profile.name).strip_dirs().sort_stats(sort).print_stats(lines)


if __name__ == "__main__":
    main()
