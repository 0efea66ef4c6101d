"""What the verbs of ``nbdq ctl`` have in common: the connection, and names that the server knows."""

import json
import os
from typing import Any

import click
from click.shell_completion import CompletionItem

from nbdq.admin.client import AdminError, Client
from nbdq.cli.ctl.output import show

#: Seconds until a server that does not answer the shell's completion is forgotten.
_COMPLETION_PATIENCE = 2.0


class Session:
    """Where the server listens and how to show what it says; connects when it is first asked."""

    def __init__(self, socket: str | None, *, as_json: bool) -> None:
        self.socket = socket
        self.as_json = as_json
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The connection.

        Raises:
            click.UsageError: nobody said where the server listens.
            AdminError: it cannot be reached.
        """
        if self._client is None:
            if self.socket is None:
                raise click.UsageError("say where the server listens: -s SOCKET, or set NBDQ_CTL_SOCKET")
            self._client = Client(self.socket)
        return self._client

    def call(self, command: str, /, **arguments: Any) -> Any:
        """Have a command executed; arguments that are None are left out, and ``a_b`` is called ``a-b``."""
        given = {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items() if value is not None}
        return self.client.call(command, given)

    def show(self, value: Any) -> None:
        """Print what a command returned."""
        show(value, as_json=self.as_json)

    def close(self) -> None:
        """Leave the server."""
        if self._client is not None:
            self._client.close()


pass_session = click.make_pass_decorator(Session)


class Json(click.ParamType[Any]):
    """A JSON value; text that is none is a string."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or value[:1] not in ("{", "["):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)


class Named(click.ParamType[str]):
    """A name that the server knows, which the shell can complete: an entry of what a query returns."""

    def __init__(self, name: str, query: str, member: str) -> None:
        self.name = name
        self._query = query
        self._member = member

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [entry.get(self._member, "") for entry in ask_quickly(ctx, self._query)]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


DISK = Named("disk", "query-block", "device")
JOB = Named("job", "query-jobs", "id")
EXPORT = Named("export", "query-block-exports", "id")
CHECKPOINT = Named("checkpoint", "x-nbdq-query-checkpoints", "id")
COMMAND = Named("command", "query-commands", "name")
#: What arguments of generated commands name.
NAMED = {"device": DISK, "node-name": DISK, "node": DISK}


def ask_quickly(ctx: click.Context, query: str) -> list[dict[str, Any]]:
    """What a query returns, for the shell's completion: nothing if it cannot be had at once."""
    context: click.Context | None = ctx
    while context is not None and "socket" not in context.params:
        context = context.parent
    path = context.params["socket"] if context is not None else None
    if path is None:
        return []
    try:
        with Client(path, timeout=_COMPLETION_PATIENCE) as client:
            found: list[dict[str, Any]] = client.call(query)
            return found
    except (AdminError, OSError):
        return []


def absolute(path: str | None) -> str | None:
    """The server may have another working directory; what is no file here is a name that it knows."""
    return os.path.abspath(path) if path is not None and os.path.exists(path) else path
