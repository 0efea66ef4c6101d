"""What ``nbdq ctl`` prints: results for people or programs, and the progress of jobs."""

import json
import sys
from typing import Any

import click

from nbdq.admin.client import AdminError, Client
from nbdq.errors import printable

#: Seconds between looks at a job.
_POLL_SECONDS = 0.5
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def show(value: Any, *, as_json: bool) -> None:
    """Print what a command returned; nothing, if it returned nothing."""
    if as_json:
        click.echo(json.dumps(value, indent=2))
    elif isinstance(value, list) and value and all(map(_is_flat, value)):
        show_table(value, list(dict.fromkeys(name for row in value for name in row)))
    elif isinstance(value, dict) and _is_flat(value):
        for name, member in value.items():
            click.echo(f"{name}: {_cell(member)}")
    elif value not in ({}, [], None):
        click.echo(json.dumps(value, indent=2))


def show_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows below each other; what a row does not have stays empty."""
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    for line in [[name.upper() for name in columns], *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves something before the point."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit and size < 100 else f"{size:.0f} {_UNITS[unit]}"


def job_text(job: dict[str, Any]) -> str:
    """One line about a job of query-block-jobs."""
    done, total = job["offset"], job["len"]
    share = f"{min(done / total, 1):.1%}" if total else "0.0%" if job["status"] == "created" else "100.0%"
    text = f"{printable(job['device'])}: {job['type']} {job['status']}, {share}"
    text += f" ({size_text(done)} of {size_text(total)})"
    if job["status"] == "running" and job.get("x-nbdq-rate"):
        text += f", {size_text(job['x-nbdq-rate'])}/s, {job.get('x-nbdq-eta', 0)} s left"
    return text + (f": {printable(job['error'], 1000)}" if "error" in job else "")


def event_text(event: dict[str, Any]) -> str:
    """One line about an event."""
    stamp = event["timestamp"]
    data = " ".join(f"{name}={_cell(value)}" for name, value in event.get("data", {}).items())
    return f"{stamp['seconds']}.{stamp['microseconds']:06} {event['event']} {data}".rstrip()


class Progress:
    """Shows a job as it goes on: one line that changes on a terminal, a line for every tenth elsewhere."""

    def __init__(self, *, as_json: bool) -> None:
        self._on_terminal = sys.stdout.isatty() and not as_json
        self._quiet = as_json
        self._last: tuple[str, int] | None = None

    def show(self, job: dict[str, Any]) -> None:
        """What query-block-jobs says now."""
        if self._on_terminal:
            click.echo(f"\r\x1b[K{job_text(job)}", nl=False)
        elif not self._quiet:
            tenth = job["status"], job["offset"] * 10 // job["len"] if job["len"] else 0
            if tenth != self._last:
                click.echo(job_text(job))
            self._last = tenth

    def end(self, text: str) -> None:
        """The last word."""
        if self._on_terminal:
            click.echo("\r\x1b[K", nl=False)
        if not self._quiet:
            click.echo(text)


def follow(client: Client, job_id: str, *, complete: bool, as_json: bool) -> None:
    """Watch a job until it ends, or waits for somebody; let one that is ready complete if ``complete`` says so.

    Raises:
        AdminError: it failed or was cancelled, or the server went away.
    """
    progress = Progress(as_json=as_json)
    while True:
        for event in _events_of(client, job_id):
            if as_json:
                click.echo(json.dumps(event))
            name, data = event["event"], event["data"]
            if name == "BLOCK_JOB_READY" and complete:
                client.call("job-complete", {"id": job_id})
            elif name == "BLOCK_JOB_READY":
                return progress.end(f"{job_id}: ready; nbdq ctl job complete {job_id} lets it finish")
            elif name == "BLOCK_JOB_PENDING":
                return progress.end(f"{job_id}: pending; nbdq ctl job finalize {job_id} lets it finish")
            elif name == "BLOCK_JOB_ERROR" and data["action"] == "stop":
                progress.end(f"{job_id}: paused after an error; nbdq ctl job resume {job_id} lets it try again")
            elif name == "BLOCK_JOB_CANCELLED":
                progress.end("")
                raise AdminError(f"job {printable(job_id)} was cancelled")
            elif name == "BLOCK_JOB_COMPLETED" and "error" in data:
                progress.end("")
                raise AdminError(f"job {printable(job_id)} failed: {printable(data['error'], 1000)}")
            elif name == "BLOCK_JOB_COMPLETED":
                return progress.end(f"{job_id}: done, {size_text(data['offset'])}")
        job = next((job for job in client.call("query-block-jobs") if job["device"] == job_id), None)
        if job is None or job["status"] == "concluded":
            if not client.has_events:
                return progress.end(f"{job_id}: ended")
        else:
            progress.show(job)


def _events_of(client: Client, job_id: str) -> list[dict[str, Any]]:
    """What has happened to a job by now; waits a little if that is nothing."""
    event = client.next_event(_POLL_SECONDS)
    found = []
    while event is not None:
        if job_id in (event["data"].get("device"), event["data"].get("id")):
            found.append(event)
        event = client.next_event(0.001) if client.has_events else None
    return found


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(member, dict | list) and member for member in value.values())


def _cell(value: Any) -> str:
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value if isinstance(value, str) else json.dumps(value), 1000)
