"""About the server itself: negotiation, what it is and what it can do, and its end."""

from dataclasses import dataclass, field

from nbdq.admin import wire
from nbdq.admin.arguments import describe
from nbdq.admin.context import Context
from nbdq.admin.registry import COMMANDS, NoArguments, Reply, command
from nbdq.errors import NotFound, OperationError, printable


@dataclass(frozen=True)
class Capabilities:
    """Of qmp_capabilities."""

    enable: list[str] = field(default_factory=list)


@command("qmp_capabilities", Capabilities, changes=False)
async def negotiate(context: Context, arguments: Capabilities) -> Reply:
    """Leave the negotiation; no other command is executed before. There are no capabilities to enable."""
    if arguments.enable:
        raise OperationError(f"Capability '{printable(arguments.enable[0])}' is not available")
    return None


@command("query-commands", NoArguments)
async def query_commands(context: Context, arguments: NoArguments) -> Reply:
    """The names of all commands."""
    return [{"name": name} for name in sorted(COMMANDS)]


@command("query-version", NoArguments)
async def query_version(context: Context, arguments: NoArguments) -> Reply:
    """The level of QEMU whose commands are offered, and nbdq's own version as the package."""
    return wire.VERSION


@command("query-status", NoArguments)
async def query_status(context: Context, arguments: NoArguments) -> Reply:
    """That the server runs."""
    return {"status": "running", "singlestep": False, "running": True}


@command("query-name", NoArguments)
async def query_name(context: Context, arguments: NoArguments) -> Reply:
    """The name of the server: none."""
    return {}


@command("quit", NoArguments)
async def leave(context: Context, arguments: NoArguments) -> Reply:
    """Stop the server cleanly: what clients have begun is finished, and everything written is durable."""
    context.quit()
    return None


@command("x-nbdq-reload", NoArguments)
async def reload(context: Context, arguments: NoArguments) -> Reply:
    """Do what SIGHUP does: read the configuration, certificates and export directories again. If something is wrong
    with them nothing changes, and the error says what."""
    if context.reload is None:
        raise OperationError("this server has nothing to reload")
    await context.reload()
    return None


@dataclass(frozen=True)
class HelpRequest:
    """Of x-nbdq-help."""

    command: str | None = None
    """Only this one."""


@command("x-nbdq-help", HelpRequest, changes=False)
async def show_help(context: Context, arguments: HelpRequest) -> Reply:
    """What commands there are, what they do, and their arguments."""
    name = arguments.command
    if name is not None and name not in COMMANDS:
        raise NotFound(f"The command {printable(name)} has not been found")
    chosen = sorted(COMMANDS) if name is None else [name]
    return [
        {
            "name": name,
            "help": COMMANDS[name].help,
            "changes": COMMANDS[name].changes,
            "arguments": describe(COMMANDS[name].arguments),
        }
        for name in chosen
    ]
