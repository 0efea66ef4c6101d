"""README and docs/options.md promise nothing that the command line does not have, and the latter leaves nothing out."""

import re
from pathlib import Path

import click
import pytest

from nbdq.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTEXT = click.Context(main)
COMMANDS = {name: command for name in main.list_commands(CONTEXT) if (command := main.get_command(CONTEXT, name))}


def _options_of(command: click.Command) -> set[str]:
    names = (name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
    return {name for name in names if name.startswith("-")}


def _options_in(text: str) -> set[str]:
    rows = re.findall(r"^\| (`-.*?)(?<!\\)\|", text, flags=re.MULTILINE)
    return {option for row in rows for option in re.findall(r"`(--?[\w-]+)", row)}


def _section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", OPTIONS, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_options_has_those_of_each_command_and_no_others(name: str) -> None:
    said = _options_in(_section(f"`{name}`"))
    if name in ("serve", "map", "info"):
        said |= _options_in(_section("Images"))
    assert said == _options_of(COMMANDS[name])


def test_every_option_of_the_readme_is_one_of_serve() -> None:
    named = _options_in(README)
    assert len(named) > 20
    assert named <= _options_of(COMMANDS["serve"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_can_be_parsed(page: Path) -> None:
    """Each ``nbdq …`` line of the examples, up to what it would open."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^(?:\$ )?nbdq (\w+) ([^#\n]*)", blocks, flags=re.MULTILINE)
    assert len(lines) > 5 or page.name != "README.md"
    for name, words in lines:
        arguments = [word.replace("/srv/templates", "/") for word in words.split()]
        COMMANDS[name].make_context(name, arguments, parent=CONTEXT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_link_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
