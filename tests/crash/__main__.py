"""``python -m tests.crash``: explore many states of the engine and print what was found.

A failure is told with the line that repeats its run; the exit status is 1 if there was any.
"""

import sys
import time
from contextlib import ExitStack

import click

from tests.crash.engine import believed_bitmaps, open_engine, own_check
from tests.crash.explore import Explorer, Figures, scratch
from tests.crash.mutants import MUTANTS
from tests.crash.workloads import WORKLOADS, by_name

_TOLD = 5


@click.command(help=__doc__)
@click.option("--states", default=100_000, show_default=True, help="How many states to look at, about.")
@click.option("--per-run", default=1000, show_default=True, help="States of one run.")
@click.option("--seed", default=1, show_default=True, help="Of the first run of each workload; it is counted up.")
@click.option("--workload", type=click.Choice([workload.name for workload in WORKLOADS]), help="Only this one.")
@click.option("--mutant", type=click.Choice(sorted(MUTANTS)), help="Remove a barrier from the engine first.")
@click.option("--recoveries", default=3, show_default=True, help="States of a run that are opened and crashed again.")
@click.option("--stop", is_flag=True, help="End at the first failure.")
def main(
    states: int, per_run: int, seed: int, workload: str | None, mutant: str | None, recoveries: int, stop: bool
) -> None:
    figures = Figures()
    chosen = [by_name()[workload]] if workload else WORKLOADS
    started = time.monotonic()
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        if mutant:
            stack.enter_context(MUTANTS[mutant].installed())
        judges = (own_check,)
        explorer = Explorer(
            directory, open_engine, judges=judges, bitmap_judge=believed_bitmaps, figures=figures, stop_at_failure=stop
        )
        while figures.states < states and not explorer.is_over:
            before = figures.states
            for each in chosen:
                explorer.run(each, seed, states=min(per_run, states), recoveries=recoveries)
                rate = figures.states / (time.monotonic() - started)
                click.echo(f"{each.name}, seed {seed}: {figures.states} states, {rate:.0f}/s", err=True)
                if figures.states >= states or explorer.is_over:
                    break
            click.echo(f"seed {seed}: {figures}")
            seed += 1
            if figures.states == before:
                break  # every run breaks
    for failure in figures.failures[:_TOLD]:
        click.echo(f"\n{failure}")
    sys.exit(bool(figures.failures))


if __name__ == "__main__":
    main()
