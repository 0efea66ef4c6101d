"""``python -m tests.crash.live``: explore many states of operations and print what was found.

A failure is told with the line that repeats its run; the exit status is 1 if there was any.
"""

import logging
import sys
import time
from contextlib import ExitStack

import click

from tests.crash.explore import scratch
from tests.crash.live.explore import Explorer
from tests.crash.live.mutants import MUTANTS
from tests.crash.live.scenarios import SCENARIOS, by_name


@click.command(help=__doc__)
@click.option("--states", default=20_000, show_default=True, help="How many states to look at, about.")
@click.option("--per-run", default=300, show_default=True, help="States of one run.")
@click.option("--seed", default=1, show_default=True, help="Of the first run of each scenario; it is counted up.")
@click.option("--scenario", type=click.Choice([scenario.name for scenario in SCENARIOS]), help="Only this one.")
@click.option("--mutant", type=click.Choice(sorted(MUTANTS)), help="Remove a barrier first.")
@click.option("--recoveries", default=3, show_default=True, help="States of a run that are started and crashed again.")
@click.option("--stop", is_flag=True, help="End at the first failure.")
def main(
    states: int, per_run: int, seed: int, scenario: str | None, mutant: str | None, recoveries: int, stop: bool
) -> None:
    logging.disable(logging.CRITICAL)
    chosen = [by_name()[scenario]] if scenario else SCENARIOS
    started = time.monotonic()
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        if mutant:
            stack.enter_context(MUTANTS[mutant].installed())
            chosen = [by_name()[scenario or MUTANTS[mutant].scenario]]
        explorer = Explorer(directory, stop_at_failure=stop)
        figures = explorer.figures
        before = -1
        while figures.states < states and figures.states > before and not explorer.is_over:
            before = figures.states
            for each in chosen:
                explorer.run(each, seed, states=min(per_run, states), recoveries=recoveries)
                rate = figures.states / (time.monotonic() - started)
                click.echo(f"{each.name}, seed {seed}: {figures.states} states, {rate:.0f}/s", err=True)
                if figures.states >= states or explorer.is_over:
                    break
            click.echo(f"seed {seed}: {figures}")
            seed += 1
    for name, count in figures.by_scenario.items():
        click.echo(f"{count:8} {name}")
    for failure in figures.failures:
        click.echo(f"\n{failure}")
    sys.exit(bool(figures.failures))


if __name__ == "__main__":
    main()
