"""The command line: click commands, each one call. Knows no formats and no protocol.

Commands are imported when they are named, so that each starts as fast as what it needs.
"""

import gc
import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

from nbdq import __version__
from nbdq.cli.logs import configure_logging
from nbdq.errors import NbdqError, in_words

# numpy starts a thread for each core at import, for linear algebra that nbdq never does: a third of the start-up time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

#: Command → its module below this package and the name of its click command there.
_COMMANDS = {
    "amend": ("images.amend", "amend_command"),
    "check": ("images.check", "check_command"),
    "commit": ("images.commit", "commit_command"),
    "create": ("images.create", "create_command"),
    "ctl": ("ctl.command", "ctl_command"),
    "info": ("images.info", "info_command"),
    "map": ("images.map", "map_command"),
    "probe": ("probe", "probe_command"),
    "serve": ("serve.command", "serve_command"),
    "wait": ("wait", "wait_command"),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        gc.disable()  # what is imported stays; looking for garbage in it takes a tenth of the start-up time
        try:
            command: click.Command = getattr(import_module(f"nbdq.cli.{module}"), name)
        finally:
            gc.enable()
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Errors that a user can cause are one line on stderr and exit status 1."""
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                print(end="", flush=True)  # now, while an error can still be told
        except BrokenPipeError:
            _fail("")  # the reader of our output has gone; nothing is left to say
        except (NbdqError, OSError) as error:
            _fail(in_words(error))


def _fail(text: str) -> None:
    try:
        print(end="", flush=True)
    except OSError:
        with suppress(OSError):
            sys.stdout.close()  # else the interpreter would try again at exit, and complain
    if text:
        click.echo(f"nbdq: {text}", err=True)
    sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "NBDQ"})
@click.version_option(__version__, prog_name="nbdq")
def main() -> None:
    """Serve QCOW2 backing chains over NBD, and look into them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file name is bytes, and leaves as it came
    configure_logging(verbosity=0, log_format="text")
