"""Verbs of ``nbdq ctl`` for disks and their layers: what administrators do every day, with few words."""

import os
from typing import Any

import click

from nbdq.cli.ctl.follow import follow, job_text
from nbdq.cli.ctl.output import show_table, size_text
from nbdq.cli.ctl.session import DISK, Session, absolute, pass_session
from nbdq.cli.images.amend import OPTIONS, unknown_option
from nbdq.cli.images.info import human_lines
from nbdq.cli.option_lists import parse_options, print_options, split_options
from nbdq.cli.options import Size
from nbdq.errors import NbdqError, printable

_speed = click.option("--speed", type=Size(), default=None, metavar="BYTES", help="Copy no more than this per second.")
_background = click.option("--background", is_flag=True, help="Do not wait until it is done.")
_directories = click.option(
    "--search",
    "directories",
    type=click.Path(file_okay=False),
    multiple=True,
    help="A directory that other overlays may lie in, besides the layers' own.",
)


def _start(session: Session, command: str, disk: str, *, background: bool, complete: bool = True, **about: Any) -> None:
    """Start a job that is called as its disk, and watch it unless it is to go on in the background."""
    session.call(command, device=disk, **about)
    if not background:
        follow(session.client, [disk], complete=complete, as_json=session.as_json)


@click.command("status")
@pass_session
def status(session: Session) -> None:
    """Show disks, their exports, and what is going on."""
    blocks, exports = session.call("query-block"), session.call("query-block-exports")
    jobs = session.call("query-block-jobs")
    if session.as_json:
        return session.show({"disks": blocks, "exports": exports, "jobs": jobs})
    rows = []
    for block in blocks:
        image = block.get("inserted", {}).get("image", {})
        shown = [export["id"] or '""' for export in exports if export["node-name"] == block["device"]]
        rows.append(
            {
                "layers": block.get("inserted", {}).get("backing_file_depth", 0) + 1,
                "disk": block["device"],
                "size": size_text(image.get("virtual-size", 0)),
                "used": size_text(image.get("actual-size", 0)),
                "top": image.get("filename", ""),
                "exports": " ".join(shown),
            }
        )
    show_table(rows, ["disk", "size", "used", "layers", "top", "exports"])
    for job in jobs:
        click.echo(job_text(job))
    return None


@click.command("info")
@click.argument("disk", type=DISK)
@pass_session
def info(session: Session, disk: str) -> None:
    """Show the layers of DISK, the active one first."""
    layers = session.call("x-nbdq-info", device=disk)
    if session.as_json:
        return session.show(layers)
    return click.echo("\n\n".join("\n".join(human_lines(layer)) for layer in layers))


@click.command("snapshot")
@click.argument("disk", type=DISK)
@click.argument("file", type=click.Path())
@click.option("--cluster-size", type=Size(), default=None, help="Of the overlay, instead of what the policy says.")
@click.option("--existing", is_flag=True, help="FILE is there already, an empty overlay.")
@click.option("--minimum-free", type=Size(), default=None, help="Refuse if less than this is free where FILE goes.")
@pass_session
def snapshot(
    session: Session, disk: str, file: str, cluster_size: int | None, existing: bool, minimum_free: int | None
) -> None:
    """Freeze the images of DISK. A new overlay FILE takes all writes from now on.

    Persistent bitmaps stay below, and mark nothing until a commit into their layer, which marks what it brings.
    Transient ones are gone.
    """
    if not file:
        raise click.UsageError("FILE must not be empty")
    session.call(
        "blockdev-snapshot-sync",
        device=disk,
        snapshot_file=os.path.abspath(file),
        mode="existing" if existing else None,
        x_nbdq_cluster_size=cluster_size,
        x_nbdq_minimum_free=minimum_free,
    )


@click.command("commit")
@click.argument("disk", type=DISK)
@click.option("--top", type=click.Path(), default=None, help="The first layer to commit.  [default: the active one]")
@click.option("--base", type=click.Path(), default=None, help="The layer that takes it.  [default: the deepest one]")
@click.option("--backing-file", default=None, help="What the layer above records, instead of a name that fits.")
@click.option("--force", is_flag=True, help="Commit even where other overlays, templates or exports are in the way.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.option("--keep-ready", is_flag=True, help="Let a commit of the active layer wait for 'job complete'.")
@_directories
@_speed
@_background
@pass_session
def commit(
    session: Session,
    disk: str,
    top: str | None,
    base: str | None,
    backing_file: str | None,
    force: bool,
    dry_run: bool,
    keep_ready: bool,
    directories: tuple[str, ...],
    speed: int | None,
    background: bool,
) -> None:
    """Commit layers of DISK into one below them. They drop out of its chain; their files stay.

    A commit of the active layer completes by itself while it is watched. With --background or --keep-ready it copies
    what is written meanwhile, too, until 'nbdq ctl job complete'.
    """
    about: dict[str, Any] = {
        "top": absolute(top),
        "base": absolute(base),
        "backing_file": backing_file,
        "x_nbdq_force": force or None,
        "x_nbdq_directories": [absolute(path) for path in directories] or None,
    }
    if dry_run:
        plan = session.call("block-commit", device=disk, x_nbdq_dry_run=True, **about)
        return session.show(plan) if session.as_json else _show_plan(plan)
    return _start(session, "block-commit", disk, background=background, complete=not keep_ready, speed=speed, **about)


def _show_plan(plan: dict[str, Any]) -> None:
    click.echo(f"copies {size_text(plan['bytes'])}; the base grows by {size_text(plan['grows-by'])}")
    click.echo(f"needs {size_text(plan['space-needed'])} of {size_text(plan['space-free'])} that are free")
    for member, meaning in {
        "drops": "drops out of the disk",
        "invalid": "does not read the same any more",
        "overlays": "is another overlay of the base, and would be damaged",
    }.items():
        for path in plan[member]:
            click.echo(f"{printable(path, 1000)}: {meaning}")


@click.command("stream")
@click.argument("disk", type=DISK)
@click.option("--base", type=click.Path(), default=None, help="Take over only what lies above this layer.")
@click.option("--layer", type=click.Path(), default=None, help="The layer that takes over.  [default: the active one]")
@click.option("--backing-file", default=None, help="What it records as its backing file, instead of a name that fits.")
@click.option("--force", is_flag=True, help="Also if internal snapshots of that layer read otherwise then.")
@_speed
@_background
@pass_session
def stream(
    session: Session,
    disk: str,
    base: str | None,
    layer: str | None,
    backing_file: str | None,
    force: bool,
    speed: int | None,
    background: bool,
) -> None:
    """Let a layer of DISK take over what those below hold."""
    _start(
        session,
        "block-stream",
        disk,
        background=background,
        base=absolute(base),
        x_nbdq_layer=absolute(layer),
        backing_file=backing_file,
        x_nbdq_force=force or None,
        speed=speed,
    )


@click.command("rebase")
@click.argument("disk", type=DISK)
@click.argument("backing")
@click.option("-F", "--backing-format", type=click.Choice(["qcow2", "raw"]), default=None, help="Format of BACKING.")
@click.option("--layer", type=click.Path(), default=None, help="The layer to rebase.  [default: the active one]")
@click.option("-u", "--unsafe", is_flag=True, help="Change only what the header says, unseen.")
@click.option("--force", is_flag=True, help="Also if internal snapshots of that layer read otherwise then.")
@_speed
@_background
@pass_session
def rebase(
    session: Session,
    disk: str,
    backing: str,
    backing_format: str | None,
    layer: str | None,
    unsafe: bool,
    force: bool,
    speed: int | None,
    background: bool,
) -> None:
    """Put a layer of DISK over another BACKING.

    BACKING is a name as it is to be recorded, seen from the layer's directory; '' for nothing. The disk reads the same.
    """
    if unsafe:
        name = absolute(layer) or _top(session, disk)
        session.call(
            "change-backing-file",
            device=disk,
            image_node_name=name,
            backing_file=backing,
            x_nbdq_backing_format=backing_format,
        )
        return
    _start(
        session,
        "x-nbdq-rebase",
        disk,
        background=background,
        backing_file=backing,
        backing_format=backing_format,
        layer=absolute(layer),
        force=force or None,
        speed=speed,
    )


def _top(session: Session, disk: str) -> str:
    """The path of the active layer."""
    blocks = session.call("query-block")
    return next((block["inserted"]["file"] for block in blocks if block["device"] == disk), disk)


#: What can be amended while a disk is served; what lies below is changed by rebase.
_AMENDABLE = {name: option for name, option in OPTIONS.items() if not name.startswith("backing_")}


@click.command("amend")
@click.argument("disk", type=DISK, required=False)
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE[,...]", help="What to change; see -o help.")
@click.option("--chain", is_flag=True, help="All layers of DISK, the deepest first.")
@click.option("--shrink", is_flag=True, help="With -o size: let the disk become smaller; what lies behind is lost.")
@_directories
@_background
@pass_session
def amend(
    session: Session,
    disk: str | None,
    options: tuple[str, ...],
    chain: bool,
    shrink: bool,
    directories: tuple[str, ...],
    background: bool,
) -> None:
    """Change options of the images of DISK while it is served."""
    words = split_options(options)
    if "help" in words or "?" in words:
        return print_options("Amend options for 'qcow2':", _AMENDABLE)
    if disk is None:
        raise click.UsageError("Missing argument 'DISK'.")
    if not words:
        raise click.UsageError("say what to change: -o NAME=VALUE; see -o help")
    texts, values = parse_options(words, _AMENDABLE, _not_amendable)
    about: dict[str, Any] = {
        "chain": chain or None,
        "shrink": shrink or None,
        "directories": [absolute(path) for path in directories] or None,
    }
    wanted = values | ({"compat": texts["compat"]} if "compat" in texts else {})
    return _start(session, "x-nbdq-amend", disk, background=background, **about, **wanted)


def _not_amendable(name: str) -> NbdqError:
    if name in OPTIONS:
        return NbdqError(f"{name}: use nbdq ctl rebase, while the disk is served")
    return unknown_option(name)


@click.command("resize")
@click.argument("disk", type=DISK)
@click.argument("size", type=Size())
@click.option("--shrink", is_flag=True, help="Give up what lies behind SIZE.")
@pass_session
def resize(session: Session, disk: str, size: int, shrink: bool) -> None:
    """Give DISK another size."""
    session.call("block_resize", device=disk, size=size, x_nbdq_shrink=shrink or None)


@click.command("threshold")
@click.argument("disk", type=DISK)
@click.argument("size", type=Size())
@pass_session
def threshold(session: Session, disk: str, size: int) -> None:
    """Have an event tell when DISK's file grows past SIZE. It is the file of the active layer, and one event
    BLOCK_WRITE_THRESHOLD; SIZE 0 for none."""
    session.call("block-set-write-threshold", node_name=disk, write_threshold=size)


VERBS: tuple[click.Command, ...] = (status, info, snapshot, commit, stream, rebase, amend, resize, threshold)
