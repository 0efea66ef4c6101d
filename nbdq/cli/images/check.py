"""``nbdq check``: is an image consistent, and can it be made so? Text, JSON and exit status of qemu-img (qcow2.md 4.3).

The backing file need not be there: a check looks at one image (C9).
"""

import json
import sys
from contextlib import closing

import click

from nbdq.cli.options import format_option, quiet_option
from nbdq.errors import printable
from nbdq.locks import READER, TOLERANT_READER, WRITER, lock_image
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.audit.damaged_header import read_header_to_check
from nbdq.qcow2.audit.repair import Repair, Repaired, repair_image
from nbdq.qcow2.audit.result import CheckResult
from nbdq.storage import FileStorage

#: Exit statuses.
_FAILED, _CORRUPT, _LEAKS, _NO_CHECK = 1, 2, 3, 63


@click.command("check")
@format_option
@click.option(
    "-r", "--repair", type=click.Choice([repair.value for repair in Repair]), help="Mend leaked clusters, or all."
)
@click.option("--output", type=click.Choice(["human", "json"]), default="human", show_default=True)
@quiet_option
@click.option("-U", "--force-share", is_flag=True, help="Check even if another process writes to the image.")
@click.argument("image", type=click.Path())
@click.pass_context
def check_command(
    ctx: click.Context, image: str, format: str, repair: str | None, output: str, quiet: bool, force_share: bool
) -> None:
    """Check the metadata of IMAGE, and repair it with -r.

    Exit status: 0 consistent, 1 the check failed, 2 corrupt, 3 leaked clusters only, 63 the format has no check. After
    a repair it is that of a second check.
    """
    if repair and force_share:
        raise click.UsageError("-U means that somebody else may write to the image; nothing can be repaired then")
    with closing(FileStorage.open(image, writable=repair is not None)) as storage:
        claim = TOLERANT_READER if force_share else READER if repair is None else WRITER
        lock_image(storage.descriptor, image, claim)
        if format == "raw":
            click.echo("nbdq: This image format does not support checks", err=True)
            ctx.exit(_NO_CHECK)
        header = read_header_to_check(storage)
        for warning in header.warnings:
            click.echo(f"nbdq: {printable(image, 1024)}: {warning}", err=True)
        if repair is None:
            repaired = Repaired(check_image(storage, header), 0, 0)
        else:
            repaired = repair_image(storage, header, Repair(repair))
    result = repaired.result
    for finding in result.findings:
        click.echo(finding, err=True)
    if result.omitted:
        click.echo(f"… and {result.omitted} more", err=True)
    if not quiet:
        click.echo(_json(image, repaired) if output == "json" else _text(repaired))
    if result.check_errors:
        click.echo("nbdq: Check failed", err=True)
    sys.stdout.flush()
    ctx.exit(_status(result))


def _status(result: CheckResult) -> int:
    if result.check_errors:
        return _FAILED
    if result.corruptions:
        return _CORRUPT
    return _LEAKS if result.leaks else 0


def _json(image: str, repaired: Repaired) -> str:
    result = repaired.result
    # QEMU leaves out what is 0, except of these.
    found: dict[str, str | int] = {
        "filename": image.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "format": "qcow2",
        "check-errors": result.check_errors,
    }
    optional = {
        "image-end-offset": result.image_end_offset,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": repaired.corruptions_fixed,
        "leaks-fixed": repaired.leaks_fixed,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    found |= {key: number for key, number in optional.items() if number}
    return json.dumps(found, indent=4)


def _text(repaired: Repaired) -> str:
    result = repaired.result
    lines = []
    if repaired.corruptions_fixed or repaired.leaks_fixed:
        lines += [
            "The following inconsistencies were found and repaired:",
            "",
            f"    {repaired.leaks_fixed} leaked clusters",
            f"    {repaired.corruptions_fixed} corruptions",
            "",
            "Double checking the fixed image now...",
        ]
    if result.is_clean:
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines += [
            "",
            f"{result.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if result.leaks:
        lines += [
            "",
            f"{result.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if result.check_errors:
        lines += ["", f"{result.check_errors} internal errors have occurred during the check."]
    if allocated := result.allocated_clusters:
        lines.append(
            f"{allocated}/{result.total_clusters} = {_percent(allocated, result.total_clusters)} allocated, "
            f"{_percent(result.fragmented_clusters, allocated)} fragmented, "
            f"{_percent(result.compressed_clusters, allocated)} compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{part * 100.0 / max(whole, 1):.2f}%"
