"""QEMU as a server of disks that are changed while they are served: the referee for what administrators do."""

import json
import subprocess
from pathlib import Path
from typing import Any


class StorageDaemon:
    """A running QEMU with one qcow2 node, driven over its monitor."""

    def __init__(self, path: Path, *, node: str = "d") -> None:
        self._node = node
        self._process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,filename={path},node-name=f"),
                *("--blockdev", f"driver=qcow2,file=f,node-name={node},discard=unmap"),
                *("--chardev", "stdio,id=c", "--monitor", "chardev=c"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while "event" in (reply := json.loads(self._process.stdout.readline())):
            pass
        return reply  # type: ignore[no-any-return]

    def execute(self, command: str, **arguments: Any) -> Any:
        """What the command returns; the text of its error if it fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        return reply["return"] if "return" in reply else reply["error"]["desc"]

    def bitmap(self, verb: str, name: str, **arguments: Any) -> Any:
        return self.execute(f"block-dirty-bitmap-{verb}", node=self._node, name=name, **arguments)

    def digest(self, name: str) -> str:
        return self.execute("x-debug-block-dirty-bitmap-sha256", node=self._node, name=name)["sha256"]  # type: ignore[no-any-return]

    def states(self) -> dict[str, tuple[int, int, bool, bool]]:
        """Of each bitmap: dirty bytes, granularity, whether it records, whether it is persistent."""
        (node,) = [node for node in self.execute("query-named-block-nodes") if node["node-name"] == self._node]
        keys = ("count", "granularity", "recording", "persistent")
        return {each["name"]: tuple(each[key] for key in keys) for each in node.get("dirty-bitmaps", [])}

    def close(self) -> None:
        self.execute("quit")
        self._process.communicate(timeout=20)
