"""The verb of ``nbdq ctl`` for internal snapshots: older states of a disk that its own image keeps."""

import time

import click

from nbdq.cli.ctl.output import show_table, size_text
from nbdq.cli.ctl.session import DISK, Session, pass_session


@click.group("internal")
def internal() -> None:
    """Internal snapshots: states that a disk's image keeps."""


@internal.command("list")
@click.argument("disk", type=DISK)
@pass_session
def show_all(session: Session, disk: str) -> None:
    """List the internal snapshots of DISK."""
    found = session.call("x-nbdq-snapshot-list", device=disk)
    if session.as_json:
        return session.show(found)
    rows = [
        {
            "id": snapshot["id"],
            "name": snapshot["name"],
            "date": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"])),
            "size": size_text(snapshot["x-nbdq-disk-size"]),
        }
        for snapshot in found
    ]
    if rows:
        show_table(rows, ["id", "name", "date", "size"])
    return None


@internal.command("create")
@click.argument("disk", type=DISK)
@click.argument("name")
@pass_session
def create(session: Session, disk: str, name: str) -> None:
    """Keep DISK as it is now under NAME."""
    session.call("blockdev-snapshot-internal-sync", device=disk, name=name)


@internal.command("apply")
@click.argument("disk", type=DISK)
@click.argument("name")
@click.option("--id", is_flag=True, help="NAME is the id of the snapshot.")
@pass_session
def apply(session: Session, disk: str, name: str, id: bool) -> None:
    """Let DISK hold again what it held then; what it holds now is lost, and connected clients see it at once."""
    session.call("x-nbdq-snapshot-apply", device=disk, **{"id" if id else "name": name})


@internal.command("delete")
@click.argument("disk", type=DISK)
@click.argument("name")
@click.option("--id", is_flag=True, help="NAME is the id of the snapshot.")
@pass_session
def delete(session: Session, disk: str, name: str, id: bool) -> None:
    """Forget a snapshot; its space is free again."""
    session.call("blockdev-snapshot-delete-internal-sync", device=disk, **{"id" if id else "name": name})


VERBS: tuple[click.Command, ...] = (internal,)
