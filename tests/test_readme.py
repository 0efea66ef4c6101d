"""The README promises nothing that the command line does not have, and leaves nothing out."""

import re
from pathlib import Path

import click
import pytest

from nbdq.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
CONTEXT = click.Context(main)
COMMANDS = {name: command for name in main.list_commands(CONTEXT) if (command := main.get_command(CONTEXT, name))}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_readme(name: str) -> None:
    for parameter in COMMANDS[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            if option.startswith("-"):
                assert re.search(rf"[`|, ]{option}[` ,=]", README), f"nbdq {name} {option}"


def test_every_option_of_the_readme_exists() -> None:
    parameters = [parameter for command in COMMANDS.values() for parameter in command.params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    rows = re.findall(r"^\| (`-.*?)(?<!\\)\|", README, flags=re.MULTILINE)
    named = [option for row in rows for option in re.findall(r"`(--?[\w-]+)", row)]
    assert len(named) > 30
    assert set(named) <= known


def test_every_command_line_of_the_readme_can_be_parsed() -> None:
    """Each ``nbdq …`` line of the examples, up to what it would open."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^(?:\$ )?nbdq (\w+) ([^#\n]*)", blocks, flags=re.MULTILINE)
    assert len(lines) > 5
    for name, words in lines:
        arguments = [word.replace("/srv/templates", "/") for word in words.split()]
        COMMANDS[name].make_context(name, arguments, parent=CONTEXT)
