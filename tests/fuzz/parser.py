"""Fuzz the parsers of the protocol by coverage, for a time:

    python -m tests.fuzz.parser --seconds 60 [--seed 1] [--corpus DIRECTORY] [CASE...]

With CASE, a file, only that is judged, as after a failure. A corpus is gone on from, and added to. It needs atheris
(``pip install -e '.[fuzz]'``). The exit status is 0 if nothing was found.
"""

import sys
import tempfile
from pathlib import Path

import click

try:
    import atheris
except ImportError:
    sys.exit("tests.fuzz.parser needs atheris: pip install -e '.[fuzz]'")

with atheris.instrument_imports(include=["nbdq.nbd"]):
    from tests.fuzz.oracle import judge
from tests.fuzz.seeds import CORPUS, DICTIONARY, kept, made


@click.command()
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--corpus", type=click.Path(file_okay=False), default=None)
@click.argument("cases", nargs=-1, type=click.Path(exists=True, dir_okay=False))
def main(seconds: int, seed: int, corpus: str | None, cases: tuple[str, ...]) -> None:
    """Fuzz the parsers of the protocol."""
    if cases:
        for case in cases:
            judge(Path(case).read_bytes())
        return
    directory = Path(corpus or tempfile.mkdtemp(prefix="nbdq-fuzz-"))
    directory.mkdir(exist_ok=True)
    for number, case in enumerate([*(kept() if CORPUS.exists() else []), *made(seed, 20)]):
        (directory / f"seed-{number}").write_bytes(case)
    dictionary = directory.with_suffix(".dict")
    words = ("".join(map(r"\x{:02x}".format, word)) for word in DICTIONARY)
    dictionary.write_text("".join(f'"{word}"\n' for word in words))
    print(f"corpus and findings: {directory}; seed {seed}", flush=True)
    options = [
        *(f"-max_total_time={seconds}", f"-seed={seed}", f"-dict={dictionary}", f"-artifact_prefix={directory}/"),
        *("-max_len=4000", "-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1", "-verbosity=1"),
    ]
    atheris.Setup([sys.argv[0], *options, str(directory)], judge)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
