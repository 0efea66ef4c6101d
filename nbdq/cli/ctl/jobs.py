"""Verbs of ``nbdq ctl`` for what goes on: jobs and events."""

import json

import click

from nbdq.cli.ctl.follow import INTERRUPTED, follow, job_text
from nbdq.cli.ctl.output import event_text
from nbdq.cli.ctl.session import JOB, Session, pass_session
from nbdq.cli.options import Size


@click.command("jobs")
@pass_session
def jobs(session: Session) -> None:
    """List what goes on."""
    found = session.call("query-block-jobs")
    if session.as_json:
        return session.show(found)
    for job in found:
        click.echo(job_text(job))
    return None


@click.group("job")
def job() -> None:
    """Steer a job."""


def _order(verb: str, help: str) -> click.Command:
    @click.command(verb, help=help)
    @click.argument("job", type=JOB)
    @pass_session
    def order(session: Session, job: str) -> None:
        session.call(f"job-{verb}", id=job)

    return order


for _verb, _help in {
    "pause": "Let JOB stop, after the piece of work in hand.",
    "resume": "Let JOB go on.",
    "cancel": "End JOB; the disk stays as it was.",
    "complete": "Let JOB, which is ready, finish.",
    "finalize": "Let JOB, which is pending, finish.",
    "dismiss": "Forget JOB, which is concluded.",
}.items():
    job.add_command(_order(_verb, _help))


@job.command("speed")
@click.argument("job", type=JOB)
@click.argument("speed", type=Size())
@pass_session
def set_speed(session: Session, job: str, speed: int) -> None:
    """Limit JOB to SPEED bytes per second; 0 for no limit."""
    session.call("block-job-set-speed", device=job, speed=speed)


@job.command("wait")
@click.argument("job", type=JOB)
@pass_session
def wait(session: Session, job: str) -> None:
    """Watch JOB until it ends, or waits for somebody."""
    follow(session.client, [job], complete=False, as_json=session.as_json)


@click.command("watch")
@pass_session
def watch(session: Session) -> None:
    """Print events as they come, until the server goes away."""
    try:
        while event := session.client.next_event():
            click.echo(json.dumps(event) if session.as_json else event_text(event))
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None


VERBS: tuple[click.Command, ...] = (jobs, job, watch)
