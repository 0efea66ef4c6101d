"""Making the images of a disk other kinds of images, while it is served (4.11). No QEMU can do that."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from nbdq.admin.commands.block_jobs import JobOptions
from nbdq.admin.context import Context
from nbdq.admin.registry import Reply, command
from nbdq.errors import OperationError
from nbdq.ops.amend import Amend, ChainRules
from nbdq.qcow2.amending.options import AmendOptions

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


@dataclass(frozen=True, kw_only=True)
class AmendArguments(JobOptions):
    """Of x-nbdq-amend; what is left out stays as it is."""

    compat: Literal["0.10", "v2", "1.1", "v3"] | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    data_file: str | None = None
    """Another name of the file for the guest's data; the one in use stays in use until the disk is opened again."""
    data_file_raw: bool | None = None
    size: int | None = None
    """Bytes of the disk."""
    shrink: bool = False
    """Let it become smaller; what lies behind is lost."""
    chain: bool = False
    """Amend all layers, base first, but for raw ones; not templates, nor what other disks lie over."""
    directories: list[str] = field(default_factory=list)
    """Where to look for other overlays, besides the layers' own directories."""


@command("x-nbdq-amend", AmendArguments)
async def amend(context: Context, arguments: AmendArguments) -> Reply:
    """Change options of a disk's image, or of all its layers: version, width of refcounts, size, …

    Each image that has been amended is told by an event, X_NBDQ_AMENDED.
    """
    volume = context.volumes.volume(arguments.device)
    options = AmendOptions(
        version=None if arguments.compat is None else _VERSIONS[arguments.compat],
        refcount_bits=arguments.refcount_bits,
        lazy_refcounts=arguments.lazy_refcounts,
        data_file_name=arguments.data_file,
        data_file_raw=arguments.data_file_raw,
    )
    if options == AmendOptions() and arguments.size is None:
        raise OperationError("Must specify options")
    single = (arguments.data_file, arguments.data_file_raw, arguments.size)
    if arguments.chain and any(value is not None for value in single):
        raise OperationError("'data-file', 'data-file-raw' and 'size' are options of one image; leave out 'chain'")
    loop = asyncio.get_running_loop()

    def tell(path: str, done: int, total: int) -> None:
        about = {"device": volume.name, "file": path, "done": done, "total": total}
        loop.call_soon_threadsafe(context.emit, "X_NBDQ_AMENDED", about)

    rules = ChainRules(is_template=context.policies.is_template, directories=arguments.directories)

    def make() -> Amend:
        return Amend(
            volume.chain,
            options,
            name=volume.name,
            size=arguments.size,
            shrink=arguments.shrink,
            whole_chain=rules if arguments.chain else None,
            on_layer=tell,
        )

    await context.jobs.start(arguments.request("x-nbdq-amend", "amend", volume, persistent=False, paths={}), make)
    return None
