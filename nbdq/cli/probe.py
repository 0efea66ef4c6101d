"""``nbdq probe``: does an NBD server keep the rules of the protocol? A table of those that it does not."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from nbdq.nbd.uri import parse_uri
from nbdq.probe.check import Check, Level
from nbdq.probe.run import Result, Verdict, deviations, run, select
from nbdq.probe.target import Target


@click.command("probe", short_help="Test whether an NBD server keeps the rules of the protocol.")
@click.option("--write", is_flag=True, help="Test writing, too. Whatever the export contains may be destroyed.")
@click.option("--slow", is_flag=True, help="Test, too, what a server does only after a minute.")
@click.option("--only", "items", multiple=True, metavar="ITEM", help="Test the rules with this number or name only.")
@click.option("--all", "show_all", is_flag=True, help="Show what the server does as it should, too.")
@click.option("--list", "list_checks", is_flag=True, help="Show every check and probe nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds until a server that does not answer counts as one that never will.",
)
@click.argument("uri", required=False)
@click.pass_context
def probe_command(
    ctx: click.Context,
    uri: str | None,
    write: bool,
    slow: bool,
    items: tuple[str, ...],
    show_all: bool,
    list_checks: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Test whether the NBD server of an export at URI keeps the rules of the protocol.

    Without --write nothing is changed. A server that is not prepared for hostile clients may well crash: do not probe
    one that somebody needs.

    Exit status: 0 no MUST of the specification is broken, 1 one is, or the server cannot be probed at all, 2 the
    command line is wrong.
    """
    try:
        checks = select(items)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from None
    if list_checks:
        _print_checks(checks, as_json=as_json)
        return
    if uri is None:
        raise click.UsageError("Missing argument 'URI'.")
    results = list(run(Target(parse_uri(uri), timeout, may_write=write), checks, slow=slow))
    if as_json:
        click.echo(json.dumps([_object(result) for result in results], indent=2))
    else:
        _print_results(results, show_all=show_all)
    sys.stdout.flush()
    ctx.exit(1 if deviations(results, Level.MUST) else 0)


def _object(result: Result) -> dict[str, Any]:
    return {
        "check": result.check.name,
        "items": list(result.check.items),
        "level": result.level.value,
        "rule": result.check.rule,
        "verdict": result.verdict.value,
        "observed": result.observed,
    }


def _print_checks(checks: Sequence[Check], *, as_json: bool) -> None:
    if as_json:
        listed = [
            {"check": check.name, "items": list(check.items), "level": check.level.value, "rule": check.rule}
            for check in checks
        ]
        click.echo(json.dumps(listed, indent=2))
        return
    for check in checks:
        needs = " (--write)" if check.writes else " (--slow)" if check.slow else ""
        click.echo(f"{check.level.value:8}  {' '.join(check.items)}  {check.name}{needs}\n    {check.rule}")


def _print_results(results: Sequence[Result], *, show_all: bool) -> None:
    order = [Level.MUST, Level.SHOULD, Level.PRACTICE]
    for result in sorted(results, key=lambda result: order.index(result.level)) if not show_all else results:
        if result.verdict is Verdict.DEVIATES or show_all:
            verdict = f"deviates ({result.level.value})" if result.verdict is Verdict.DEVIATES else result.verdict.value
            click.echo(f"{verdict}: {' '.join(result.check.items)} {result.check.name}")
            click.echo(f"    rule:     {result.check.rule}")
            if result.observed:
                click.echo(f"    observed: {result.observed}")
    click.echo(summary(results))


def summary(results: Sequence[Result]) -> str:
    """How many checks have found what, in one line."""
    found = Counter(result.verdict for result in results)
    broken = ", ".join(f"{deviations(results, level)} of {level.value}" for level in Level)
    return (
        f"{len(results)} checks: {found[Verdict.OK]} ok, {found[Verdict.DEVIATES]} deviations ({broken}), "
        f"{found[Verdict.NOT_APPLICABLE]} not applicable, {found[Verdict.NOT_TESTED]} not tested"
    )
