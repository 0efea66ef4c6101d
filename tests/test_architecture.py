"""The architecture of nbdq, held by reading its imports: these tables *are* the diagram of docs/design.md, section 2.

Nothing is executed: every module is parsed, imports inside functions count like those at the top, and those under
``if TYPE_CHECKING`` too, for a layer that names a type of the layer above depends on it.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nbdq"

#: Who may import whom, besides its own package; dependencies point down. A module that stands nowhere fails.
MAY_IMPORT: dict[str, set[str]] = {
    "nbdq": set(),
    "nbdq.__main__": {"nbdq.cli"},
    "nbdq.cli": {
        *("nbdq", "nbdq.server", "nbdq.admin", "nbdq.ops", "nbdq.chain", "nbdq.qcow2"),
        *("nbdq.locks", "nbdq.block", "nbdq.storage", "nbdq.errors"),
        *("nbdq.client", "nbdq.probe", "nbdq.nbd.uri"),
        "nbdq.nbd.constants",  # the number of the port; only the server and the client speak NBD
        "nbdq.nbd.handshake",  # whether a listener has TLS on offer
    },
    "nbdq.admin": {
        *("nbdq", "nbdq.server", "nbdq.ops", "nbdq.chain", "nbdq.qcow2"),
        *("nbdq.locks", "nbdq.block", "nbdq.storage", "nbdq.errors"),
        "nbdq.nbd.constants",  # names of metadata contexts, to tell backup programs
    },
    "nbdq.server": {
        *("nbdq.nbd", "nbdq.ops", "nbdq.chain", "nbdq.pool", "nbdq.durations"),
        *("nbdq.block", "nbdq.storage", "nbdq.errors"),
    },
    "nbdq.client": {"nbdq.nbd.constants", "nbdq.nbd.uri", "nbdq.errors"},  # never the server's side of the protocol
    "nbdq.probe": {"nbdq.client", "nbdq.nbd.constants", "nbdq.nbd.uri", "nbdq.errors"},
    "nbdq.ops": {"nbdq.chain", "nbdq.qcow2", "nbdq.locks", "nbdq.pool", "nbdq.block", "nbdq.storage", "nbdq.errors"},
    "nbdq.chain": {"nbdq.qcow2", "nbdq.locks", "nbdq.pool", "nbdq.block", "nbdq.storage", "nbdq.errors"},
    # The two cores never meet.
    "nbdq.qcow2": {"nbdq.block", "nbdq.storage", "nbdq.errors"},
    # Within it: an image is read by what lies at the top, and everything else stands on that.
    "nbdq.qcow2.bitmaps": {"nbdq.qcow2", "nbdq.block", "nbdq.storage", "nbdq.errors"},
    "nbdq.qcow2.audit": {"nbdq.qcow2", "nbdq.storage", "nbdq.errors"},
    "nbdq.qcow2.writing": {"nbdq.qcow2", "nbdq.block", "nbdq.storage", "nbdq.errors"},
    "nbdq.qcow2.amending": {"nbdq.qcow2", "nbdq.storage", "nbdq.errors"},
    "nbdq.nbd": {"nbdq.errors"},
    "nbdq.block": {"nbdq.storage", "nbdq.errors"},
    "nbdq.locks": {"nbdq.errors"},
    "nbdq.durations": set(),
    "nbdq.pool": set(),
    "nbdq.storage": {"nbdq.durations", "nbdq.errors"},
    "nbdq.errors": set(),
}

#: What ``nbdq check`` is made of.
AUDITORS = {
    *(
        "nbdq.qcow2.audit.check",
        "nbdq.qcow2.audit.mappings",
        "nbdq.qcow2.audit.result",
        "nbdq.qcow2.audit.sparse_tables",
    ),
    *("nbdq.qcow2.audit.reference_counts", "nbdq.qcow2.audit.stored_refcounts"),
}

#: Modules with fewer rights than their package.
MAY_IMPORT_ONLY: dict[str, set[str]] = {
    # An auditor that used the code it audits would repeat its mistakes.
    **{
        name: {
            *("nbdq.qcow2.format", "nbdq.qcow2.fields", "nbdq.qcow2.entries", "nbdq.qcow2.cursor"),
            *("nbdq.qcow2.snapshots", "nbdq.qcow2.snapshot_records", "nbdq.qcow2.bitmaps.directory"),  # readers
            "nbdq.qcow2.refcount_widths",
            *("nbdq.storage", "nbdq.errors", *AUDITORS),
        }
        for name in AUDITORS
    },
}

#: Outside modules that only some may import.
SHELL = {"nbdq.server", "nbdq.admin", "nbdq.cli"}
RESERVED: dict[str, set[str]] = {
    "asyncio": SHELL,
    "selectors": SHELL,
    "signal": SHELL,
    "select": {"nbdq.server.listener", "nbdq.client"},
    "socket": SHELL | {"nbdq.client"},
    "ssl": SHELL | {"nbdq.client", "nbdq.probe"},
    "uvloop": SHELL,
    "click": {"nbdq.cli"},
    "prometheus_client": {"nbdq.server.monitoring.metrics"},  # takes long to import, and only those wait who want it
    "logging": SHELL | {"nbdq.ops"},
    "argparse": set(),
    # construct declares what is cold: a parse of it on a hot path costs a hundred times a struct.
    "construct": {
        *("nbdq.qcow2.format", "nbdq.qcow2.fields", "nbdq.qcow2.extensions", "nbdq.qcow2.snapshots"),
        *("nbdq.qcow2.bitmaps.directory", "nbdq.qcow2.luks"),
        "nbdq.nbd.messages",
    },
    "fcntl": {"nbdq.locks", "nbdq.storage"},
    # Who deals with files deals with paths; nobody else does. A server owns the files of its sockets.
    "os": {
        *("nbdq.storage", "nbdq.locks", "nbdq.chain.resolve", "nbdq.chain.policy", "nbdq.chain.create"),
        *(
            "nbdq.chain.marker",
            "nbdq.ops.preflight",
            "nbdq.ops.snapshot",
            "nbdq.ops.repoint",
            "nbdq.ops.merge_back",
            *("nbdq.client", *SHELL),
        ),
    },
    "stat": {"nbdq.storage", "nbdq.chain.policy", "nbdq.chain.create", "nbdq.ops.preflight", *SHELL},
    "io": {"nbdq.cli"},
    "mmap": set(),  # a truncated image would kill the server with SIGBUS
    "pathlib": {"nbdq.cli"},
    "shutil": {"nbdq.cli.serve.captive"},
    "subprocess": set(),
    "tempfile": {"nbdq.cli.serve.captive", "nbdq.cli.qemu_nbd.disk"},
    "pickle": set(),
    # The wire protocol is a pure function of bytes.
    "threading": {"nbdq.pool", "nbdq.chain", "nbdq.qcow2", "nbdq.storage", "nbdq.ops", *SHELL},
    "queue": {"nbdq.pool"},
    "concurrent": set(),  # costs more for each job than most jobs here; nbdq.pool says how much
}

#: Functions of ``os`` that read or change files' contents; everything else goes through FileStorage.
FILE_IO = {
    *("open", "read", "readv", "pread", "preadv", "write", "writev", "pwrite", "pwritev", "sendfile", "splice"),
    *("lseek", "fsync", "fdatasync", "ftruncate", "truncate", "copy_file_range", "posix_fadvise", "posix_fallocate"),
}
MAY_DO_FILE_IO = {
    "nbdq.storage",
    "nbdq.chain.policy",  # walks to a file without following links, and hands its descriptor to FileStorage
    *("nbdq.cli.serve.lifecycle", "nbdq.cli.serve.detach"),  # the pid file, and descriptors that others wait at
}

LONGEST_MODULE = 450


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    name: str
    path: Path

    def __str__(self) -> str:
        return self.name

    @property
    def lines(self) -> int:
        return len(self.path.read_text().splitlines())

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.path)

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    def imports(self) -> Iterator[str]:
        """Absolute names of what the module imports; ``from package import module`` counts as the module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                name = "." * node.level + (node.module or "")
                package = self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]
                source = importlib.util.resolve_name(name, package) if node.level else name
                for alias in node.names:
                    submodule = f"{source}.{alias.name}"
                    yield submodule if submodule in _names() else source


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@cache
def _names() -> frozenset[str]:
    return frozenset(module.name for module in _modules())


def _within(name: str, packages: set[str]) -> bool:
    """Whether ``name`` is one of ``packages`` or lies in one; the bare ``nbdq`` means itself only."""
    return any(name == package or (package != "nbdq" and name.startswith(package + ".")) for package in packages)


def _home(name: str) -> str:
    """The box of the diagram that a module stands in: the longest entry of MAY_IMPORT that contains it."""
    return max((box for box in MAY_IMPORT if _within(name, {box})), key=len, default="")


every_module = pytest.mark.parametrize("module", _modules(), ids=str)


@every_module
def test_a_module_stands_in_the_diagram_and_imports_only_what_is_below_it(module: Module) -> None:
    home = _home(module.name)
    assert home, f"{module.name} has no place in MAY_IMPORT"
    allowed = MAY_IMPORT[home] | ({home} if home != "nbdq" else set())
    for name in module.imports():
        if name == "nbdq" or name.startswith("nbdq."):
            assert _within(name, allowed), f"{module.name} imports {name}"


@every_module
def test_a_module_imports_outside_things_only_where_they_belong(module: Module) -> None:
    for name in module.imports():
        users = RESERVED.get(name.partition(".")[0])
        assert users is None or _within(module.name, users), f"{module.name} imports {name}"


@pytest.mark.parametrize("name", sorted(MAY_IMPORT_ONLY))
def test_a_module_with_fewer_rights_keeps_to_them(name: str) -> None:
    for module in _modules():
        if module.name == name:
            ours = {imported for imported in module.imports() if imported.startswith("nbdq")}
            assert ours <= MAY_IMPORT_ONLY[name]


def test_no_module_imports_itself_through_others() -> None:
    graph = {module.name: {name for name in module.imports() if name in _names()} for module in _modules()}
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in import cycles or above them: {sorted(graph)}"


@every_module
def test_files_are_read_only_where_faults_can_be_injected(module: Module) -> None:
    if module.name in MAY_DO_FILE_IO:
        return
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"open", "io.open"}, f"{module.name}:{node.lineno} opens a file"
        assert called not in {f"os.{name}" for name in FILE_IO}, f"{module.name}:{node.lineno} calls {called}"


@every_module
def test_a_module_is_short_or_says_why_it_is_not(module: Module) -> None:
    """The docstring of a module above the limit has a sentence with its length in it ("…lines, because…")."""
    assert module.lines <= LONGEST_MODULE or " lines, because " in module.docstring, f"{module.lines} lines"


@every_module
def test_a_module_says_what_it_is(module: Module) -> None:
    assert module.docstring or not module.path.read_text().strip(), "no docstring"
