"""How ``nbdq ctl`` watches jobs: one line about each, until all have ended or wait for somebody."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from nbdq.admin.client import AdminError, Client
from nbdq.cli.ctl.output import size_text
from nbdq.errors import printable

#: Seconds between looks at jobs.
_POLL_SECONDS = 0.5
#: Exit status of who is interrupted, as in shells.
INTERRUPTED = 130


def job_text(job: dict[str, Any]) -> str:
    """One line about a job of query-block-jobs."""
    done, total = job["offset"], job["len"]
    text = f"{printable(job['device'])}: {job['type'].removeprefix('x-nbdq-')} {job['status']}"
    if total:
        text += f", {min(done / total, 1):.1%} ({size_text(done)} of {size_text(total)})"
    if job["status"] == "running" and job.get("x-nbdq-rate"):
        text += f", {size_text(job['x-nbdq-rate'])}/s, {job.get('x-nbdq-eta', 0)} s left"
    return text + (f": {printable(job['error'], 1000)}" if "error" in job else "")


class Progress:
    """Shows jobs as they go on: one line that changes on a terminal, a line for every tenth elsewhere."""

    def __init__(self, *, as_json: bool) -> None:
        self._on_terminal = sys.stdout.isatty() and not as_json
        self._quiet = as_json
        self._last: dict[str, tuple[str, int]] = {}

    def show(self, job: dict[str, Any]) -> None:
        """What query-block-jobs says now."""
        if self._on_terminal:
            click.echo(f"\r\x1b[K{job_text(job)}", nl=False)
        elif not self._quiet:
            tenth = job["status"], job["offset"] * 10 // job["len"] if job["len"] else 0
            if tenth != self._last.get(job["device"]):
                click.echo(job_text(job))
            self._last[job["device"]] = tenth

    def clear(self) -> None:
        """Make room on the terminal for something else."""
        if self._on_terminal:
            click.echo("\r\x1b[K", nl=False)

    def end(self, text: str) -> None:
        """The last word about a job."""
        self.clear()
        if not self._quiet:
            click.echo(text)


def follow(client: Client, jobs: Sequence[str], *, complete: bool, as_json: bool) -> None:
    """Watch jobs until each has ended, or waits for somebody; let one that is ready complete if ``complete`` says so.

    What happened since ``client`` connected counts, too: a job that it has started cannot end unnoticed. Whoever
    interrupts this leaves, and is told that the jobs go on.

    Raises:
        AdminError: one failed, was cancelled, is paused by an error or is not there; said when none goes on any more.
            Or the server went away.
    """
    left = list(jobs)
    progress = Progress(as_json=as_json)
    try:
        _follow(client, left, progress, complete=complete, as_json=as_json)
    except KeyboardInterrupt:
        progress.clear()
        for job_id in left:
            shown = printable(job_id)
            click.echo(f"\njob {shown} goes on; nbdq ctl job cancel {shown} ends it", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def _follow(client: Client, left: list[str], progress: Progress, *, complete: bool, as_json: bool) -> None:
    """Watch the jobs in ``left``, and remove from there those that are done with."""
    failures = []
    completing: set[str] = set()
    while left:
        for event in _events(client):
            name, data = event["event"], event["data"]
            job_id = data.get("device", data.get("id"))
            if job_id not in left:
                continue
            if as_json:
                click.echo(json.dumps(event))
            if name in ("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"):
                left.remove(job_id)
                if name == "BLOCK_JOB_CANCELLED":
                    failures.append(f"job {printable(job_id)} was cancelled")
                elif "error" in data:
                    failures.append(f"job {printable(job_id)} failed: {printable(data['error'], 1000)}")
                else:
                    progress.end(f"{printable(job_id)}: done, {size_text(data['offset'])}")
        found = {job["device"]: job for job in client.call("query-block-jobs")}
        if client.has_events:
            continue  # they may tell how a job ended
        for job_id in list(left):
            job = found.get(job_id)
            if job is not None and job["status"] == "ready" and complete:
                if job_id not in completing:
                    completing.add(job_id)
                    client.call("job-complete", {"id": job_id})
            elif problem := _problem(job_id, job):
                left.remove(job_id)
                failures.append(problem)
            elif job is not None and (text := _standstill(job)):
                left.remove(job_id)
                progress.end(f"{printable(job_id)}: {text}")
            elif job is not None:
                progress.show(job)
    if failures:
        progress.clear()
        raise AdminError("; ".join(failures))


def _events(client: Client) -> list[dict[str, Any]]:
    """What has happened by now; waits a little if that is nothing."""
    event = client.next_event(_POLL_SECONDS)
    found = []
    while event is not None:
        found.append(event)
        event = client.next_event(0.001) if client.has_events else None
    return found


def _problem(job_id: str, job: dict[str, Any] | None) -> str | None:
    """Why a job will not go on, if that is bad."""
    shown = printable(job_id)
    if job is None:
        return f"job {shown} is not there; it has ended, or never was"
    if job["status"] == "concluded" and "error" in job:
        return f"job {shown} failed: {printable(job['error'], 1000)}"
    if job["status"] == "paused" and job["io-status"] != "ok":
        return f"job {shown} is paused by an error ({job['io-status']}); nbdq ctl job resume {shown} lets it try again"
    return None


def _standstill(job: dict[str, Any]) -> str | None:
    """What a job waits for that somebody else has to do."""
    shown = printable(job["device"])
    if job["status"] == "ready":
        return f"ready; nbdq ctl job complete {shown} lets it finish"
    if job["status"] == "pending" and not job["auto-finalize"]:
        return f"pending; nbdq ctl job finalize {shown} lets it finish"
    if job["status"] == "concluded" and not job["auto-dismiss"]:
        return f"done; nbdq ctl job dismiss {shown} forgets it"
    return None
