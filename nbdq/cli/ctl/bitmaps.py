"""Verbs of ``nbdq ctl`` for what changed when: dirty bitmaps, and checkpoints for backups."""

from typing import Any

import click

from nbdq.cli.ctl.follow import follow
from nbdq.cli.ctl.output import show_table, size_text
from nbdq.cli.ctl.session import CHECKPOINT, DISK, Session, pass_session
from nbdq.cli.options import Size


@click.command("bitmaps")
@click.argument("disk", type=DISK)
@pass_session
def bitmaps(session: Session, disk: str) -> None:
    """List the dirty bitmaps of DISK, layer by layer."""
    layers = session.call("x-nbdq-bitmap-list", node=disk)
    if session.as_json:
        return session.show(layers)
    rows = [
        {
            "name": bitmap["name"],
            "dirty": size_text(bitmap["count"]),
            "granularity": size_text(bitmap["granularity"]),
            "state": _state(bitmap, layer["depth"]),
            "layer": layer["path"],
        }
        for layer in layers
        for bitmap in layer["dirty-bitmaps"]
    ]
    if rows:
        show_table(rows, ["name", "dirty", "granularity", "state", "layer"])
    return None


def _state(bitmap: dict[str, Any], depth: int) -> str:
    if bitmap.get("inconsistent"):
        return "inconsistent"
    # Nobody writes to what lies below, so nothing is marked there; a commit into it marks what it brings.
    marks = "frozen" if depth else "recording" if bitmap["recording"] else "disabled"
    kind = "persistent" if bitmap["persistent"] else "transient"
    return ", ".join([marks, kind, *(["exported"] if bitmap["busy"] else [])])


@click.group("bitmap")
def bitmap() -> None:
    """Add, remove and change dirty bitmaps of a disk."""


@bitmap.command("add")
@click.argument("disk", type=DISK)
@click.argument("name")
@click.option("--transient", is_flag=True, help="Keep it in memory only: it is gone when the server stops.")
@click.option("--granularity", type=Size(), default=None, help="Bytes that one bit stands for.")
@click.option("--disabled", is_flag=True, help="Let it mark nothing yet.")
@pass_session
def add(session: Session, disk: str, name: str, transient: bool, granularity: int | None, disabled: bool) -> None:
    """Let a new bitmap of DISK mark what is written from now on. It is kept in the image, unless --transient."""
    session.call(
        "block-dirty-bitmap-add",
        node=disk,
        name=name,
        persistent=not transient,
        granularity=granularity,
        disabled=disabled,
    )


def _change(verb: str, help: str) -> click.Command:
    @click.command(verb, help=help)
    @click.argument("disk", type=DISK)
    @click.argument("name")
    @pass_session
    def change(session: Session, disk: str, name: str) -> None:
        session.call(f"block-dirty-bitmap-{verb}", node=disk, name=name)

    return change


for _verb, _help in {
    "remove": "Do without a bitmap, in the image too.",
    "clear": "Forget what a bitmap has marked.",
    "enable": "Let a bitmap mark writes.",
    "disable": "Let a bitmap stay as it is.",
}.items():
    bitmap.add_command(_change(_verb, _help))


@bitmap.command("merge")
@click.argument("disk", type=DISK)
@click.argument("target")
@click.argument("sources", nargs=-1, required=True)
@pass_session
def merge(session: Session, disk: str, target: str, sources: tuple[str, ...]) -> None:
    """Mark in the bitmap TARGET of DISK what SOURCES mark, too."""
    session.call("block-dirty-bitmap-merge", node=disk, target=target, bitmaps=list(sources))


@click.command("checkpoint")
@click.argument("id")
@click.argument("disks", nargs=-1, required=True, metavar="DISK[,OPTION=NAME]...")
@pass_session
def checkpoint(session: Session, id: str, disks: tuple[str, ...]) -> None:
    """Freeze one moment of all DISKs for a backup.

    It is exported read-only until checkpoint-end is told the same ID. Options of a disk are bitmap=NAME, which ends
    there and says what changed; new-bitmap=NAME, which begins there, for the next time; export=NAME of the frozen
    moment (by default DISK-ID); snapshot-file=PATH, where writes go meanwhile.
    """
    members = []
    for disk in disks:
        node, *options = disk.split(",")
        pairs = [option.partition("=") for option in options]
        if any(not equals for _, equals, _ in pairs):
            raise click.UsageError(f"{disk!r}: after the disk, only NAME=VALUE")
        members.append({"node": node, **{name: value for name, _, value in pairs}})
    _show(session, [session.call("x-nbdq-checkpoint", id=id, disks=members)], one=True)


@click.command("checkpoints")
@pass_session
def checkpoints(session: Session) -> None:
    """List the checkpoints that have not ended."""
    _show(session, session.call("x-nbdq-query-checkpoints"))


def _show(session: Session, found: list[dict[str, Any]], *, one: bool = False) -> None:
    if session.as_json:
        return session.show(found[0] if one else found)
    rows = [
        {"checkpoint": entry["id"], "disk": member["node"], **member} for entry in found for member in entry["disks"]
    ]
    if rows:
        show_table(rows, ["checkpoint", "disk", "export", "bitmap", "new-bitmap"])
    return None


@click.command("checkpoint-end")
@click.argument("id", type=CHECKPOINT)
@click.option("--failed", is_flag=True, help="The backup was not made: what had changed counts as changed still.")
@click.option("--hard", is_flag=True, help="Cut clients that still read it.")
@click.option("--background", is_flag=True, help="Do not wait until it is done.")
@pass_session
def checkpoint_end(session: Session, id: str, failed: bool, hard: bool, background: bool) -> None:
    """End the checkpoint ID. What was written meanwhile goes back into the images."""
    started = session.call(
        "x-nbdq-checkpoint-end", id=id, success=False if failed else None, mode="hard" if hard else None
    )
    if not background:
        follow(session.client, started["jobs"], complete=True, as_json=session.as_json)


VERBS: tuple[click.Command, ...] = (bitmaps, bitmap, checkpoint, checkpoints, checkpoint_end)
