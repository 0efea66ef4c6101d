"""Looking at jobs and steering them: QEMU's ``job-…`` commands, and ``block-job-…`` with the same meaning."""

from dataclasses import dataclass

from nbdq.admin.context import Context
from nbdq.admin.registry import NoArguments, Reply, command


@dataclass(frozen=True)
class JobName:
    """Which job."""

    id: str


@dataclass(frozen=True)
class BlockJobName:
    """Which job."""

    device: str
    """The job's id; it is the disk's name unless the job was given one."""


@dataclass(frozen=True)
class BlockJobCancel:
    """Which job, and how."""

    device: str
    force: bool = False
    """Whether a job that is ready ends as cancelled; without, it ends well, but does not change the disk."""


@dataclass(frozen=True)
class BlockJobSpeed:
    """Which job, and how fast."""

    device: str
    speed: int
    """Bytes per second; 0 for no limit."""


@command("query-jobs", NoArguments)
async def query_jobs(context: Context, arguments: NoArguments) -> Reply:
    """All jobs, in QEMU's JobInfo."""
    return [job.info() for job in context.jobs]


@command("query-block-jobs", NoArguments)
async def query_block_jobs(context: Context, arguments: NoArguments) -> Reply:
    """All jobs, in QEMU's BlockJobInfo, with x-nbdq-rate (bytes per second) and x-nbdq-eta (seconds)."""
    return [job.block_info() for job in context.jobs]


@command("job-pause", JobName)
async def pause(context: Context, arguments: JobName) -> Reply:
    """Pause a job after the piece of work in hand."""
    context.jobs.job(arguments.id).pause()
    return None


@command("job-resume", JobName)
async def resume(context: Context, arguments: JobName) -> Reply:
    """Let a paused job go on; one that paused for an error tries again."""
    context.jobs.job(arguments.id).resume()
    return None


@command("job-cancel", JobName)
async def cancel(context: Context, arguments: JobName) -> Reply:
    """End a job; the disk stays as it was."""
    context.jobs.job(arguments.id).cancel(force=True)
    return None


@command("job-complete", JobName)
async def complete(context: Context, arguments: JobName) -> Reply:
    """Let a job that is ready finish, and change the disk."""
    context.jobs.job(arguments.id).complete()
    return None


@command("job-finalize", JobName)
async def finalize(context: Context, arguments: JobName) -> Reply:
    """Let a job that is pending (auto-finalize: false) change the disk."""
    context.jobs.job(arguments.id).finalize()
    return None


@command("job-dismiss", JobName)
async def dismiss(context: Context, arguments: JobName) -> Reply:
    """Forget a job that is concluded (auto-dismiss: false)."""
    context.jobs.job(arguments.id).dismiss()
    return None


@command("block-job-pause", BlockJobName)
async def block_job_pause(context: Context, arguments: BlockJobName) -> Reply:
    """As job-pause."""
    context.jobs.block_job(arguments.device).pause()
    return None


@command("block-job-resume", BlockJobName)
async def block_job_resume(context: Context, arguments: BlockJobName) -> Reply:
    """As job-resume."""
    context.jobs.block_job(arguments.device).resume()
    return None


@command("block-job-cancel", BlockJobCancel)
async def block_job_cancel(context: Context, arguments: BlockJobCancel) -> Reply:
    """End a job; the disk stays as it was."""
    context.jobs.block_job(arguments.device).cancel(force=arguments.force)
    return None


@command("block-job-complete", BlockJobName)
async def block_job_complete(context: Context, arguments: BlockJobName) -> Reply:
    """As job-complete."""
    context.jobs.block_job(arguments.device).complete()
    return None


@command("block-job-finalize", JobName)
async def block_job_finalize(context: Context, arguments: JobName) -> Reply:
    """As job-finalize."""
    context.jobs.block_job(arguments.id).finalize()
    return None


@command("block-job-dismiss", JobName)
async def block_job_dismiss(context: Context, arguments: JobName) -> Reply:
    """As job-dismiss."""
    context.jobs.block_job(arguments.id).dismiss()
    return None


@command("block-job-set-speed", BlockJobSpeed)
async def set_speed(context: Context, arguments: BlockJobSpeed) -> Reply:
    """Limit the work of a job to so many bytes per second; 0 for no limit."""
    context.jobs.block_job(arguments.device).set_speed(arguments.speed)
    return None
