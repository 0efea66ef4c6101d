"""Verbs of ``nbdq ctl`` for exports: what NBD clients can reach, and when."""

import click

from nbdq.cli.ctl.output import show_table, size_text
from nbdq.cli.ctl.session import DISK, EXPORT, Session, absolute, pass_session


@click.command("exports")
@pass_session
def exports(session: Session) -> None:
    """List exports, with their clients."""
    found = session.call("query-block-exports")
    if session.as_json:
        return session.show(found)
    rows = []
    for export in found:
        limit = export["x-nbdq-max-connections"]
        marks = [
            "read-write" if export["x-nbdq-writable"] else "read-only",
            *(["paused"] if export["x-nbdq-paused"] else []),
            *(["going away"] if export["shutting-down"] else []),
        ]
        shown = [export[name] for name in ("x-nbdq-layer", "x-nbdq-snapshot") if name in export]
        rows.append(
            {
                "id": export["id"] or '""',
                "name": export["x-nbdq-name"] or '""',
                "disk": export["node-name"],
                "size": size_text(export["x-nbdq-size"]),
                "clients": f"{export['x-nbdq-clients']}" + (f" of {limit}" if limit else ""),
                "state": ", ".join(marks),
                "shows": " @ ".join(shown),
                "description": export["x-nbdq-description"],
            }
        )
    if rows:
        show_table(rows, ["id", "name", "disk", "size", "clients", "state", "shows", "description"])
    return None


@click.command("export")
@click.argument("disk", type=DISK)
@click.argument("name")
@click.option("--writable", is_flag=True, help="Let clients write.")
@click.option("--layer", type=click.Path(), default=None, help="Show DISK as it is from this layer down.")
@click.option("--internal", "snapshot", default=None, metavar="SNAPSHOT", help="Show an internal snapshot.")
@click.option("-B", "--bitmap", "bitmaps", multiple=True, metavar="NAME", help="Offer this dirty bitmap. Repeatable.")
@click.option("-A", "--allocation-depth", is_flag=True, help="Offer the context qemu:allocation-depth.")
@click.option("-D", "--description", default=None, help="Text about the export.")
@click.option(
    "-e", "--shared", type=int, default=None, metavar="N", help="Clients at once.  [default: 0, what the limits say]"
)
@click.option("--discard", type=click.Choice(["unmap", "ignore"]), default=None)
@click.option("--detect-zeroes", type=click.Choice(["off", "on", "unmap"]), default=None)
@pass_session
def export(
    session: Session,
    disk: str,
    name: str,
    writable: bool,
    layer: str | None,
    snapshot: str | None,
    bitmaps: tuple[str, ...],
    allocation_depth: bool,
    description: str | None,
    shared: int | None,
    discard: str | None,
    detect_zeroes: str | None,
) -> None:
    """Offer DISK under another NAME, too. Clients can only read, unless --writable is given."""
    session.call(
        "block-export-add",
        type="nbd",
        id=name or disk,  # as serve calls the export without a name
        node_name=disk,
        name=name,
        writable=writable,
        x_nbdq_layer=absolute(layer),
        x_nbdq_snapshot=snapshot,
        bitmaps=list(bitmaps),
        allocation_depth=allocation_depth,
        description=description,
        x_nbdq_max_connections=shared,
        x_nbdq_discard=discard,
        x_nbdq_detect_zeroes=detect_zeroes,
    )


@click.command("unexport")
@click.argument("export", type=EXPORT)
@click.option(
    "--mode",
    type=click.Choice(["safe", "soft", "hard"]),
    default=None,
    help="While clients are connected: refuse, wait until they have left, or cut them.  [default: safe]",
)
@pass_session
def unexport(session: Session, export: str, mode: str | None) -> None:
    """Take EXPORT (its id) back."""
    session.call("block-export-del", id=export, mode=mode)


@click.command("pause")
@click.argument("disk", type=DISK)
@click.option("--seconds", type=int, default=None, help="Go on by itself after so long; 0 for never.  [default: 60]")
@click.option("--flush", is_flag=True, help="Make durable what was written until then.")
@pass_session
def pause(session: Session, disk: str, seconds: int | None, flush: bool) -> None:
    """Hold back all clients of DISK. On return nothing that they asked for is in progress any more."""
    session.call("x-nbdq-pause", device=disk, seconds=seconds, flush=flush)


@click.command("resume")
@click.argument("disk", type=DISK)
@pass_session
def resume(session: Session, disk: str) -> None:
    """Let the clients of DISK go on."""
    session.call("x-nbdq-resume", device=disk)


VERBS: tuple[click.Command, ...] = (exports, export, unexport, pause, resume)
