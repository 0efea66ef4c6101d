"""The two servers of a twin run, each over its own copy of a chain, that take the same orders."""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nbdq.admin.client import AdminError, Client
from tests.support.administration import administered
from tests.support.serving import PATIENCE
from tests.support.writing import Outcomes, play

#: What QEMU's daemon exports, but for the node.
_EXPORT = {"type": "nbd", "id": "e", "name": "disk", "writable": True}


class Side:
    """A server of one disk. ``layers`` are paths, base first."""

    name: str
    client: Client
    uri: str
    layers: list[Path]

    @property
    def node(self) -> str:
        """What bitmaps of the top are asked for."""
        raise NotImplementedError

    def __call__(self, command: str, **arguments: Any) -> Any:
        """As :class:`tests.support.administration.Administered`."""
        return self.client.call(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def guest(self, operations: Sequence[Any]) -> Outcomes:
        """Let a guest operate on the disk."""
        return play(self.uri, operations)

    def snapshot(self, overlay: str, *, cluster_size: int | None, more: list[dict[str, Any]]) -> None:
        """Put ``overlay``, in the directory of the top, in front; ``more`` are actions before it in that transaction.

        With ``cluster_size`` the server makes it itself, if it can; without, the file is there already.
        """
        raise NotImplementedError

    def commit(self, top: int, base: int, during: Callable[["Side"], None]) -> None:
        """Commit, and let ``during`` happen while the job is there. Both are indexes of :attr:`layers`."""
        raise NotImplementedError

    def stream(self, layer: int, base: int | None, during: Callable[["Side"], None]) -> None:
        """Let a layer take over what lies between it and ``base``; None: all of it."""
        raise NotImplementedError

    def resize(self, size: int) -> None:
        """Give the disk another size, be it smaller."""
        raise NotImplementedError

    def digest(self, bitmap: str) -> Any:
        """Of a bitmap of the top."""
        return self("x-debug-block-dirty-bitmap-sha256", node=self.node, name=bitmap)

    def run_job(self, command: str, **arguments: Any) -> None:
        """Have a job done to its end."""
        self(command, job_id="job", auto_dismiss=False, **arguments)
        finish(self)

    def _drop(self, first: int, end: int) -> None:
        """Layers that are not part of the disk any more: they would be overlays of what is."""
        for path in self.layers[first:end]:
            path.unlink()
        del self.layers[first:end]


def finish(server: Callable[..., Any], *, complete: bool = False) -> None:
    """Return when the job "job" has ended well; with ``complete``, complete it as soon as it is ready."""
    deadline = time.monotonic() + PATIENCE
    while jobs := server("query-jobs"):
        (job,) = jobs
        if job["status"] == "concluded":
            server("job-dismiss", id="job")
            if "error" in job:
                raise AdminError(job["error"], "GenericError")
        elif complete and job["status"] == "ready":
            server("job-complete", id="job")
            complete = False
        assert time.monotonic() < deadline, jobs
        time.sleep(0.005)


class Nbdq(Side):
    """``nbdq serve``."""

    name = "nbdq"
    node = "disk"

    @contextlib.contextmanager
    def serving(self, layers: list[Path], formats: list[str], options: Sequence[str]) -> Iterator[None]:
        """Serve the disk inside the block."""
        self.layers = layers
        with administered("-x", "disk", "-f", formats[-1], *options, layers[-1]) as server:
            self.client = server.client
            self.uri = server.uri("disk")
            yield

    def snapshot(self, overlay: str, *, cluster_size: int | None, more: list[dict[str, Any]]) -> None:
        path = self.layers[-1].with_name(overlay)
        data: dict[str, Any] = {"device": "disk", "snapshot-file": str(path)}
        if cluster_size is None:
            data["mode"] = "existing"
        else:
            path.unlink()
            data["x-nbdq-cluster-size"] = cluster_size
        if more:
            self("transaction", actions=[*more, {"type": "blockdev-snapshot-sync", "data": data}])
        else:
            self.client.call("blockdev-snapshot-sync", data)
        self.layers.append(path)

    def commit(self, top: int, base: int, during: Callable[[Side], None]) -> None:
        which = {"top": str(self.layers[top]), "base": str(self.layers[base])}
        self("block-commit", device="disk", job_id="job", auto_dismiss=False, **which)
        during(self)
        finish(self, complete=top == len(self.layers) - 1)
        self._drop(base + 1, top + 1)

    def stream(self, layer: int, base: int | None, during: Callable[[Side], None]) -> None:
        which = {"x_nbdq_layer": str(self.layers[layer])} | ({} if base is None else {"base": str(self.layers[base])})
        self("block-stream", device="disk", job_id="job", auto_dismiss=False, **which)
        during(self)
        finish(self)
        self._drop(0 if base is None else base + 1, layer)

    def resize(self, size: int) -> None:
        self("block_resize", device="disk", size=size, x_nbdq_shrink=True)

    def bitmaps(self) -> list[str]:
        """Names of those of the top."""
        layers = self("x-nbdq-bitmap-list", node="disk")
        return [bitmap["name"] for layer in layers if layer["depth"] == 0 for bitmap in layer["dirty-bitmaps"]]

    def digest(self, bitmap: str) -> Any:
        """Not of one below, where nbdq would go on looking."""
        if bitmap not in self.bitmaps():
            raise AdminError(f"Dirty bitmap '{bitmap}' not found", "GenericError")
        return super().digest(bitmap)


class Daemon(Side):
    """``qemu-storage-daemon``, with one node for each layer, as libvirt opens them.

    Like libvirt we say what is to be recorded as the backing file: by itself QEMU records options of nodes.
    """

    name = "QEMU"

    @property
    def node(self) -> str:
        return self._nodes[-1]

    def epitaph(self) -> str | None:
        """What it said last, if it has broken down."""
        try:
            self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            return None
        assert self._process.stderr is not None
        return self._process.stderr.read().strip()

    def node_of(self, path: Path) -> str:
        """How the node of a layer is called."""
        return f"n-{path.stem}"

    @contextlib.contextmanager
    def serving(self, layers: list[Path], formats: list[str], options: Sequence[str]) -> Iterator[None]:
        """Serve the disk inside the block."""
        self.layers = layers
        self._nodes = [self.node_of(path) for path in layers]
        words: list[str] = []
        for number, (path, format) in enumerate(zip(layers, formats, strict=True)):
            node: dict[str, Any] = {"driver": format, "node-name": self.node_of(path), "discard": "unmap"}
            node["read-only"] = number < len(layers) - 1
            node["file"] = {"driver": "file", "filename": str(path), "discard": "unmap", "cache": {"no-flush": True}}
            if format != "raw":
                node["backing"] = self.node_of(layers[number - 1]) if number else None
            words += ["--blockdev", json.dumps(node)]
        export = {**_EXPORT, "node-name": self._nodes[-1]}
        with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
            monitor, socket, ready = (Path(directory, name) for name in ("qmp", "nbd", "pid"))
            command = [
                *("qemu-storage-daemon", "--chardev", f"socket,path={monitor},server=on,wait=off,id=c"),
                *("--monitor", "chardev=c", *words),
                *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=100"),
                *("--export", json.dumps(export), "--pidfile", str(ready)),
            ]
            # QEMU looks for external data files in its working directory (Q76).
            process = subprocess.Popen(command, cwd=layers[-1].parent, stderr=subprocess.PIPE, text=True)
            self._process = process
            try:
                deadline = time.monotonic() + PATIENCE
                while not ready.exists():
                    if process.poll() is not None or time.monotonic() > deadline:
                        process.kill()
                        raise AssertionError(f"{' '.join(command)}: {process.communicate()[1]}")
                    time.sleep(0.005)
                self.uri = f"nbd+unix:///disk?socket={socket}"
                with Client(str(monitor), timeout=PATIENCE) as self.client:
                    yield
                    self("quit")
                status = process.wait(PATIENCE)
                assert status == 0, f"the storage daemon ended with {status}: {self.epitaph()}"
            finally:
                process.kill()
                process.wait()
                assert process.stderr is not None
                process.stderr.close()

    def snapshot(self, overlay: str, *, cluster_size: int | None, more: list[dict[str, Any]]) -> None:
        path = self.layers[-1].with_name(overlay)
        file = {"driver": "file", "filename": str(path), "discard": "unmap", "cache": {"no-flush": True}}
        self("blockdev-add", driver="qcow2", node_name=self.node_of(path), discard="unmap", backing=None, file=file)
        action = {"type": "blockdev-snapshot", "data": {"node": self.node, "overlay": self.node_of(path)}}
        try:
            self("transaction", actions=[*more, action])
        except AdminError:
            self("blockdev-del", node_name=self.node_of(path))
            raise
        self.layers.append(path)
        self._nodes.append(self.node_of(path))

    def commit(self, top: int, base: int, during: Callable[[Side], None]) -> None:
        which = {"top_node": self._nodes[top], "base_node": self._nodes[base]}
        if top < len(self.layers) - 1:
            which["backing_file"] = str(self.layers[base])
        self("block-commit", device=self.node, job_id="job", auto_dismiss=False, **which)
        during(self)
        finish(self, complete=top == len(self.layers) - 1)
        if top < len(self.layers) - 1:
            self._drop(base + 1, top + 1)
        else:
            with self._unexported():
                self._drop(base + 1, top + 1)

    def stream(self, layer: int, base: int | None, during: Callable[[Side], None]) -> None:
        which = {} if base is None else {"base_node": self._nodes[base], "backing_file": str(self.layers[base])}
        self("block-stream", device=self._nodes[layer], job_id="job", auto_dismiss=False, **which)
        during(self)
        finish(self)
        self._drop(0 if base is None else base + 1, layer)

    def resize(self, size: int) -> None:
        with self._unexported():
            self("block_resize", node_name=self.node, size=size)

    @contextlib.contextmanager
    def _unexported(self) -> Iterator[None]:
        """No export inside the block: QEMU's exports neither allow another size nor notice it."""
        self("block-export-del", id="e", mode="hard")
        deadline = time.monotonic() + PATIENCE
        while self("query-block-exports"):
            assert time.monotonic() < deadline, "QEMU keeps its export"
            time.sleep(0.005)
        try:
            yield
        finally:
            self("block-export-add", **{**_EXPORT, "node_name": self.node})

    def _drop(self, first: int, end: int) -> None:
        for node in reversed(self._nodes[first:end]):
            self("blockdev-del", node_name=node)
        del self._nodes[first:end]
        super()._drop(first, end)
