"""``nbdq ctl``: the administrator's client of a running server. One command, one call.

Frequent things have verbs of their own (modules ``ctl_…``, by subject). Every other command of the server can be given
by its name: its options are made from what the server says about it, so a client knows whatever its server knows.
"""

from typing import Any

import click
from click.shell_completion import CompletionItem

from nbdq.cli.ctl import bitmaps as ctl_bitmaps
from nbdq.cli.ctl import exports as ctl_exports
from nbdq.cli.ctl import internal as ctl_internal
from nbdq.cli.ctl import jobs as ctl_jobs
from nbdq.cli.ctl import verbs as ctl_verbs
from nbdq.cli.ctl.session import COMMAND, NAMED, Json, Session, ask_quickly, pass_session
from nbdq.cli.options import Size

_SUBJECTS = (ctl_verbs, ctl_jobs, ctl_exports, ctl_bitmaps, ctl_internal)
VERBS = {str(verb.name): verb for subject in _SUBJECTS for verb in subject.VERBS}


class _Verbs(click.Group):
    """The verbs, and behind them every command that the server has."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*VERBS, "call"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "call":
            return _call
        return VERBS.get(cmd_name) or _generated(ctx, cmd_name)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        names = [entry["name"] for entry in ask_quickly(ctx, "query-commands")] if incomplete else []
        return found + [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _generated(ctx: click.Context, name: str) -> click.Command | None:
    """A click command made from what the server says about its command ``name``; None if it has none."""
    session = Session(ctx.params.get("socket"), as_json=False)
    if session.socket is None or name.startswith("-"):
        return None
    try:
        known = {entry["name"]: entry for entry in session.call("x-nbdq-help")}
    finally:
        session.close()
    if name not in known:
        return None
    about = known[name]

    @pass_session
    def run(session: Session, /, **values: Any) -> None:
        given = {name: _joined(value) if isinstance(value, tuple) else value for name, value in values.items()}
        session.show(session.call(name, **{name: value for name, value in given.items() if value != []}))

    return click.Command(
        name, callback=run, help=about["help"], params=[_option(entry) for entry in about["arguments"]]
    )


def _joined(values: tuple[Any, ...]) -> list[Any]:
    """The array that was given member by member, or as one."""
    return [member for value in values for member in (value if isinstance(value, list) else [value])]


def _option(entry: dict[str, Any]) -> click.Option:
    """The option for an argument of a command."""
    name, required = entry["name"], entry["required"]
    variable = name.replace("-", "_")
    if entry["type"] == "boolean":
        return click.Option([variable, f"--{name}/--no-{name}"], default=None, required=required)
    if entry["type"] == "array":
        return click.Option([variable, f"--{name}"], multiple=True, type=Json(), required=required, help="Repeatable.")
    return click.Option([variable, f"--{name}"], type=_kind(entry), required=required)


def _kind(entry: dict[str, Any]) -> click.ParamType[Any]:
    if entry.get("values"):
        return click.Choice(entry["values"])
    if entry["type"] == "string":
        return NAMED.get(entry["name"], click.STRING)
    return Size() if entry["type"] == "integer" else Json()


@click.command("call")
@click.argument("command", type=COMMAND)
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]...")
@pass_session
def _call(session: Session, command: str, arguments: tuple[str, ...]) -> None:
    """Have any COMMAND of the server executed. A VALUE is taken as what the server says it is; lists and objects are
    JSON."""
    about = {entry["name"]: entry for entry in session.call("x-nbdq-help", command=command)[0]["arguments"]}
    given = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise click.UsageError(f"{argument!r} is not NAME=VALUE")
        try:
            given[name] = _converted(about.get(name, {"name": name, "type": "string"}), value)
        except click.BadParameter as error:
            error.param_hint = repr(name)
            raise
    session.show(session.client.call(command, given))


def _converted(entry: dict[str, Any], value: str) -> Any:
    if entry["type"] == "boolean":
        return click.BOOL.convert(value, None, None)
    return _kind(entry).convert(value, None, None)


@click.group("ctl", short_help="Administer a running server: snapshots, jobs, exports, bitmaps.", cls=_Verbs)
@click.option("-s", "--socket", type=click.Path(), help="The admin socket of the server (serve --admin).")
@click.option("--json", "as_json", is_flag=True, help="Print what the server says, as JSON.")
@click.pass_context
def ctl_command(ctx: click.Context, socket: str | None, as_json: bool) -> None:
    """Administer a running server: snapshots, commits, exports, bitmaps, jobs.

    Besides the verbs below, every command of the server can be given by its name ('nbdq ctl query-commands').
    """
    ctx.obj = Session(socket, as_json=as_json)
    ctx.call_on_close(ctx.obj.close)
