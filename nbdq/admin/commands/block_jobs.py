"""Jobs that restructure a chain: commit, stream and rebase, with QEMU's arguments where QEMU has the command.

Layers are named by their paths, or by node names that they were given. Only nbdq looks before it leaps: a commit is
refused under other overlays, into templates, and where exports show what would change.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nbdq.admin.context import Context
from nbdq.admin.job_request import JobRequest, OnError
from nbdq.admin.registry import Reply, command
from nbdq.chain.live import LiveChain
from nbdq.chain.resolve import ResolvedLayer
from nbdq.errors import NotFound, OperationError, printable
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.commit import Commit, check_range
from nbdq.ops.operation import Operation
from nbdq.ops.preflight import plan_commit
from nbdq.ops.rebase import Rebase, change_backing_file
from nbdq.ops.stream import Stream
from nbdq.server.exports.volume import Volume
from nbdq.server.threads import in_thread


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What all of them can be told."""

    device: str
    job_id: str | None = None
    """By default the name of the device."""
    speed: int = 0
    on_error: Literal["report", "ignore", "enospc", "stop"] = "report"
    filter_node_name: str | None = None
    """Accepted for QEMU's sake: there are no filter nodes."""
    auto_finalize: bool = True
    auto_dismiss: bool = True

    @property
    def id(self) -> str:
        return self.device if self.job_id is None else self.job_id

    def request(
        self,
        name: str,
        kind: str,
        volume: Volume,
        *,
        persistent: bool,
        paths: dict[str, str],
        layers: Iterable[ResolvedLayer] | None = None,
    ) -> JobRequest:
        """The job that the command ``name`` starts, of QEMU's type ``kind``, and that changes ``layers``; None: all.

        Raises:
            OperationError: an option is impossible.
        """
        if self.speed < 0:
            raise OperationError("Invalid parameter 'speed': it must not be negative")
        if self.on_error == "ignore":
            raise OperationError("Parameter 'on-error' does not accept value 'ignore': the disk would lose data")
        on_error: OnError = self.on_error
        return JobRequest(
            id=self.id,
            type=kind,
            volume=volume,
            command=name,
            arguments=asdict(self),
            paths=paths,
            layers=None if layers is None else frozenset(layer.path for layer in layers),
            speed=self.speed,
            on_error=on_error,
            auto_finalize=self.auto_finalize,
            auto_dismiss=self.auto_dismiss,
            persistent=persistent,
        )


@dataclass(frozen=True, kw_only=True)
class CommitArguments(JobOptions):
    """Of block-commit."""

    top: str | None = None
    top_node: str | None = None
    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    x_nbdq_directories: list[str] = field(default_factory=list)
    """Where to look for other overlays, besides the layers' own directories."""
    x_nbdq_force: bool = False
    """Commit even where other overlays, templates or exports are in the way."""
    x_nbdq_dry_run: bool = False
    """Only say what would happen."""


@command("block-commit", CommitArguments)
async def commit(context: Context, arguments: CommitArguments) -> Reply:
    """Commit layers of a disk into one below them; if the active one is among them, that waits to be completed."""
    if not arguments.x_nbdq_dry_run and _is_there(context, "block-commit", arguments):
        return None
    volume = _volume(context, arguments)
    chain = volume.chain
    layers = chain.layers
    if len(layers) < 2:
        raise OperationError("Image does not have a backing file.")
    top = _layer(context, chain, "top", arguments.top, arguments.top_node, default=0)
    base = _layer(context, chain, "base", arguments.base, arguments.base_node, default=len(layers) - 1)
    if top == 0 and arguments.backing_file is not None:
        raise OperationError("'backing-file' specified, but 'top' is the active layer")
    if context.policies.is_template(layers[base].path) and not arguments.x_nbdq_force:
        raise OperationError(f"{printable(layers[base].path, 1024)} is a template; it must not be committed into")

    options: dict[str, Any] = {"directories": arguments.x_nbdq_directories, "force": arguments.x_nbdq_force}
    paths = {"top": layers[top].path, "base": layers[base].path}

    def make() -> Operation:  # the layers may have other places by now
        first, into = chain.index_of(paths["top"]), chain.index_of(paths["base"])
        if not arguments.x_nbdq_force:
            _refuse_shown(volume, first, into)
        if first == 0:
            return ActiveCommit(chain, base=into, **options)
        return Commit(
            chain,
            top=first,
            base=into,
            backing_file=arguments.backing_file,
            start=0 if context.resumed is None else context.resumed.job.offset,
            on_durable=_recorder(context, volume.name, arguments.id),
            **options,
        )

    if arguments.x_nbdq_dry_run:
        async with volume.steady():
            return await in_thread(_foresee_commit, chain, paths, arguments.x_nbdq_directories)
    changed = layers[max(0, top - 1) : base + 1]
    request = arguments.request("block-commit", "commit", volume, persistent=True, paths=paths, layers=changed)
    await context.jobs.start(request, make)
    return None


def _foresee_commit(chain: LiveChain, paths: dict[str, str], directories: list[str]) -> dict[str, Any]:
    """What a commit would do, found out without changing anything."""
    top, base = chain.index_of(paths["top"]), chain.index_of(paths["base"])
    check_range(chain, top=top, base=base)
    plan = plan_commit(chain, top=top, base=base, directories=directories)
    return {
        "bytes": plan.bytes_to_copy,
        "grows-by": plan.base_grows_by,
        "space-needed": plan.space_needed,
        "space-free": plan.space_free,
        "drops": plan.dropped,
        "invalid": plan.invalid,
        "overlays": plan.overlays,
    }


@dataclass(frozen=True, kw_only=True)
class StreamArguments(JobOptions):
    """Of block-stream."""

    base: str | None = None
    base_node: str | None = None
    bottom: str | None = None
    """The last layer that is taken over, instead of the first one that is not."""
    backing_file: str | None = None
    x_nbdq_layer: str | None = None
    """The layer that takes over, instead of the active one."""
    x_nbdq_force: bool = False
    """Also if internal snapshots of that layer lose what they read from below."""


@command("block-stream", StreamArguments)
async def stream(context: Context, arguments: StreamArguments) -> Reply:
    """Let a layer of a disk take over what the layers below it hold, down to a base or all of it."""
    if _is_there(context, "block-stream", arguments):
        return None
    volume = _volume(context, arguments)
    chain = volume.chain
    into = None if arguments.device == volume.name else arguments.device  # the node name of a layer
    index = _layer(context, chain, "layer", arguments.x_nbdq_layer, into, default=0)
    if arguments.bottom is not None and (arguments.base is not None or arguments.base_node is not None):
        raise OperationError("'bottom' and 'base' are mutually exclusive")
    if arguments.bottom is not None:
        base = _layer(context, chain, "bottom", arguments.bottom, None, default=0) + 1
    else:
        base = _layer(context, chain, "base", arguments.base, arguments.base_node, default=len(chain.layers))
    paths = {"layer": chain.layers[index].path}
    if arguments.bottom is not None:
        paths["bottom"] = chain.layers[base - 1].path
    if base < len(chain.layers):
        paths["base"] = chain.layers[base].path

    def make() -> Operation:  # the layers may have other places by now
        index = chain.index_of(paths["layer"])
        below = chain.index_of(paths["base"]) if "base" in paths else None
        _refuse_shown(volume, index + 1, (below or len(chain.layers)) - 1, filled=index)
        name, force = arguments.backing_file, arguments.x_nbdq_force
        return Stream(chain, index=index, base=below, backing_file=name, force=force)

    changed = chain.layers[index:base]
    request = arguments.request("block-stream", "stream", volume, persistent=True, paths=paths, layers=changed)
    await context.jobs.start(request, make)
    return None


@dataclass(frozen=True, kw_only=True)
class RebaseArguments(JobOptions):
    """Of x-nbdq-rebase."""

    backing_file: str
    """The new backing file, as it is to be recorded; empty: none, all of it is taken over."""
    backing_format: Literal["qcow2", "raw"] | None = None
    layer: str | None = None
    """The layer that is to lie over it, instead of the active one."""
    force: bool = False
    """Also if internal snapshots of that layer read otherwise afterwards."""


@command("x-nbdq-rebase", RebaseArguments)
async def rebase(context: Context, arguments: RebaseArguments) -> Reply:
    """Put a layer of a disk over another chain; it takes over what would read otherwise there."""
    if _is_there(context, "x-nbdq-rebase", arguments):
        return None
    volume = context.volumes.volume(arguments.device)
    chain = volume.chain
    index = _layer(context, chain, "layer", arguments.layer, None, default=0)
    if arguments.backing_file and arguments.backing_format is None:
        raise OperationError("backing format must be specified")
    layer = chain.layers[index].path

    def make() -> Operation:  # the layer may have another place by now
        index = chain.index_of(layer)
        _refuse_shown(volume, index + 1, len(chain.layers) - 1, filled=index)
        if not arguments.backing_file:
            return Stream(chain, index=index, force=arguments.force)
        assert arguments.backing_format is not None
        name, format = arguments.backing_file, arguments.backing_format
        return Rebase(chain, index=index, name=name, format=format, force=arguments.force)

    request = arguments.request("x-nbdq-rebase", "x-nbdq-rebase", volume, persistent=False, paths={})
    await context.jobs.start(request, make)
    return None


@dataclass(frozen=True, kw_only=True)
class ChangeBackingFile:
    """Of change-backing-file."""

    device: str
    image_node_name: str
    """The layer: its node name or path."""
    backing_file: str
    """Empty: none."""
    x_nbdq_backing_format: Literal["qcow2", "raw"] | None = None


@command("change-backing-file", ChangeBackingFile)
async def change_backing(context: Context, arguments: ChangeBackingFile) -> Reply:
    """Change what a layer's header says of its backing file; the disk goes on as it is. Nothing is checked."""
    volume = context.volumes.volume(arguments.device)
    chain = volume.chain
    with context.jobs.exclusive(volume, "change-backing-file"):
        async with volume.steady():
            index = chain.index_of(arguments.image_node_name)
            await in_thread(change_backing_file, chain, index, arguments.backing_file, arguments.x_nbdq_backing_format)
    return None


def _is_there(context: Context, name: str, arguments: JobOptions) -> bool:
    """Whether this very job has been started already; then its layers may be gone."""
    return context.jobs.find_same(arguments.id, name, asdict(arguments)) is not None


def _volume(context: Context, arguments: JobOptions) -> Volume:
    return context.volumes.volume(arguments.device) if context.resumed is None else context.resumed.volume


def _layer(context: Context, chain: LiveChain, what: str, path: str | None, node: str | None, *, default: int) -> int:
    """The layer that an argument names in one of QEMU's two ways, or that it meant when its job began."""
    if path is not None and node is not None:
        raise OperationError(f"'{what}-node' and '{what}' are mutually exclusive")
    if context.resumed is not None and what in context.resumed.job.paths:
        return chain.index_of(context.resumed.job.paths[what])
    name = path if node is None else node
    return default if name is None else chain.index_of(name)


def _refuse_shown(volume: Volume, first: int, last: int, *, filled: int | None = None) -> None:
    """Leave alone what exports show as it is: layers, and internal snapshots of the layer ``filled``, which lie over
    what is below it, and take nothing over."""
    for export in volume.exports:
        view = volume.view_of(export)
        if view.layer is None:
            continue
        try:
            index = volume.chain.index_of(view.layer)
        except NotFound:
            continue
        if first <= index <= last or (index == filled and view.snapshot is not None):
            raise OperationError(
                f"{printable(view.layer, 1024)} is shown by export '{printable(export.id)}'; delete that first"
            )


def _recorder(context: Context, name: str, job_id: str) -> Callable[[int], None]:
    """Records, from the operation's thread, how far a job has come."""

    def record(offset: int) -> None:
        with context.state.transaction() as changes:
            changes.advance_job(name, job_id, offset)

    return record
