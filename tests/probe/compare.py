"""Probe nbdq and its peers, and print docs/conformance.md: ``python -m tests.probe.compare > docs/conformance.md``.

A peer that crashes is started again, so that every check is made.
"""

import contextlib
import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nbdq import __version__
from nbdq.nbd.uri import Uri
from nbdq.probe.check import Check, Level
from nbdq.probe.run import Result, Verdict, run, select
from nbdq.probe.target import Target
from tests.support.pki import Authority
from tests.support.tools import SEARCH_PATH
from tests.support.tools import run as run_tool

_PATIENCE = 30
_ORDER = (Level.MUST, Level.SHOULD, Level.PRACTICE)


@dataclass(frozen=True)
class Setup:
    """One server as it is run."""

    product: str
    what: str
    """What it serves, and how; for the reader."""
    command: tuple[str, ...]
    """With ``{d}`` for the working directory."""
    export: str = ""
    secure: bool = False
    configuration: str = ""
    """Contents of ``{d}/config``."""


_QEMU = ("qemu-nbd", "-t", "-e", "8", "-k", "{d}/socket", "-x", "disk")
_QEMU_TLS = ("--object", "tls-creds-x509,id=tls0,endpoint=server,dir={d}/pki,verify-peer=no", "--tls-creds", "tls0")
_NBDKIT = ("nbdkit", "-f", "-U", "{d}/socket")
_NBDKIT_TLS = ("--tls=require", "--tls-certificates={d}/pki")
_NBDQ = (sys.executable, "-m", "nbdq", "serve", "-k", "{d}/socket")
_NBD_SERVER = """[generic]
  allowlist = true
  unixsock = {d}/socket
  listenaddr = 127.0.0.1
  port = {port}
[disk]
  exportname = {d}/disk.raw
  flush = true
  fua = true
  trim = true
[read-only]
  exportname = {d}/disk.raw
  readonly = true
"""
_NBD_SERVER_TLS = _NBD_SERVER.replace(
    "[disk]",
    "  certfile = {d}/pki/server-cert.pem\n  keyfile = {d}/pki/server-key.pem\n  cacertfile = {d}/pki/ca-cert.pem\n"
    "  force_tls = true\n[disk]",
)

SETUPS = (
    Setup("nbdq", "qcow2, writable", (*_NBDQ, "-A", "-x", "disk", "{d}/disk.qcow2"), "disk"),
    Setup("nbdq", "qcow2, read-only", (*_NBDQ, "-r", "-A", "-x", "disk", "{d}/disk.qcow2"), "disk"),
    Setup("nbdq", "raw, writable", (*_NBDQ, "-f", "raw", "{d}/disk.raw")),
    Setup(
        "nbdq",
        "qcow2, writable, TLS demanded",
        (*_NBDQ, "--tls", "require", "--tls-creds", "{d}/pki", "--no-tls-verify-peer", "{d}/disk.qcow2"),
        secure=True,
    ),
    Setup("qemu-nbd", "qcow2, writable", (*_QEMU, "-A", "-f", "qcow2", "{d}/disk.qcow2"), "disk"),
    Setup("qemu-nbd", "qcow2, read-only", (*_QEMU, "-r", "-A", "-f", "qcow2", "{d}/disk.qcow2"), "disk"),
    Setup("qemu-nbd", "raw, writable", (*_QEMU, "-f", "raw", "{d}/disk.raw"), "disk"),
    Setup(
        "qemu-nbd",
        "qcow2, writable, TLS demanded",
        (*_QEMU, *_QEMU_TLS, "-f", "qcow2", "{d}/disk.qcow2"),
        "disk",
        secure=True,
    ),
    Setup("nbdkit", "memory, writable", (*_NBDKIT, "memory", "64M")),
    Setup("nbdkit", "file, writable", (*_NBDKIT, "file", "{d}/disk.raw")),
    Setup("nbdkit", "file, read-only", (*_NBDKIT, "-r", "file", "{d}/disk.raw")),
    Setup("nbdkit", "memory, writable, TLS demanded", (*_NBDKIT, *_NBDKIT_TLS, "memory", "64M"), secure=True),
    Setup("nbd-server", "file, writable", ("nbd-server", "-C", "{d}/config"), "disk", configuration=_NBD_SERVER),
    Setup("nbd-server", "file, read-only", ("nbd-server", "-C", "{d}/config"), "read-only", configuration=_NBD_SERVER),
    Setup(
        "nbd-server",
        "file, writable, TLS demanded",
        ("nbd-server", "-C", "{d}/config"),
        "disk",
        secure=True,
        configuration=_NBD_SERVER_TLS,
    ),
)


def _free_port() -> int:
    """A TCP port for a server that insists on one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(setup: Setup, directory: Path) -> Iterator[Uri]:
    """The server, started again whenever it ends, until the block does."""
    path = directory / "socket"
    configuration = setup.configuration.replace("{d}", str(directory)).replace("{port}", str(_free_port()))
    (directory / "config").write_text(configuration)
    command = [word.replace("{d}", str(directory)) for word in setup.command]
    daemon = setup.product == "nbd-server"  # goes to the background, whatever one says
    if daemon:
        command += ["-p", str(directory / "pid")]
    ending = threading.Event()
    current: list[subprocess.Popen[bytes]] = []

    def supervise() -> None:
        while not ending.is_set():
            path.unlink(missing_ok=True)
            current[:] = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PATH": SEARCH_PATH},
                )
            ]
            current[0].wait()
            if daemon:
                return

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    try:
        deadline = time.monotonic() + _PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline, f"{' '.join(command)}: no socket"
            time.sleep(0.05)
        time.sleep(0.3)  # a moment later it listens
        query = {"tls-certificates": str(directory / "client"), "tls-hostname": "localhost"} if setup.secure else {}
        yield Uri(secure=setup.secure, socket_path=str(path), export=setup.export, query=query)
    finally:
        ending.set()
        if daemon:
            os.kill(int((directory / "pid").read_text()), signal.SIGTERM)
        else:
            current[0].terminate()
        supervisor.join(_PATIENCE)


def probe(setup: Setup) -> list[Result]:
    """Every check against a fresh disk behind this server."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as name:
        directory = Path(name)
        if setup.secure:
            authority = Authority(directory / "authority")
            authority.server(directory / "pki")
            authority.client(directory / "client")
        (directory / "disk.raw").write_bytes(b"\1" * (4 << 20) + bytes(60 << 20))
        run_tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", directory / "disk.raw", directory / "disk.qcow2")
        with running(setup, directory) as uri:
            return list(run(Target(uri, 5.0, may_write=True), select(())))


_INTRODUCTION = """\
`nbdq probe URI` tests whether an NBD server keeps the rules of the protocol, by speaking to it: {count} checks, each \
of one rule. `nbdq probe --list` shows them all. The same checks were run against nbdq and the NBD servers that \
Debian 12 has, each in several set-ups. This page is what came out on {date}; `python -m tests.probe.compare` makes \
it anew. Numbers such as P24 are those by which nbdq's source and tests cite the rules.

- **MUST** and **SHOULD** are the words of the NBD specification. A rule of the form of replies always is a MUST, and \
so is that a client's fault does not end the connections of others.
- **practice** is what is not in the specification: what clients rely on, or what keeps a server safe from them. A \
server that does otherwise breaks no rule.
- Where a client breaks a MUST of its own, a server may hang up; then it is no deviation that it did, unless the \
specification asks for an error.
- Every deviation of a peer was looked at by hand and held against the text of the specification.
"""

#: What lies behind a deviation, found in a peer's source or in what it said as it ended: check, product → cause.
_CAUSES = {
    ("texts-of-errors", "qemu-nbd"): "it cuts the name after 80 bytes, here in the middle of a character.",
    ("requests-before-disconnecting", "qemu-nbd"): "at DISC it shuts the socket down in both directions at once.",
    ("writes-beyond-the-end", "qemu-nbd"): "whatever it refuses before it is begun is answered with EINVAL.",
    ("read-only-says-eperm", "qemu-nbd"): "as above.",
    ("wrong-request-magic", "qemu-nbd"): "the wrong request is answered with EINVAL, and what follows is the next.",
    (
        "client-that-does-not-listen",
        "nbdkit",
    ): 'the process ends with "raw_send_socket: Assertion `sock >= 0\' failed".',
    ("flags-of-writes-that-do-not-belong", "nbdkit"): (
        'with FAST_ZERO that was not advertised, the process ends with "backend_zero: Assertion '
        "`c->can_fast_zero == 1' failed\"; for TLS see the next."
    ),
    ("data-of-a-refused-write", "nbdkit"): "with TLS it skips the data in the socket below, where it is encrypted.",
    ("writes-beyond-the-end", "nbdkit"): "as above.",
    ("tls-before-version-1-2", "qemu-nbd"): "it leaves the versions to GnuTLS, which has them in its defaults.",
    ("tls-before-version-1-2", "nbdkit"): "as above.",
    (
        "tls-before-version-1-2",
        "nbd-server",
    ): "its source asks for TLS 1.2 alone, which is not in force: 1.3 works, too.",
    ("data-where-none-belongs", "nbd-server"): "it answers LIST with ERR_INVALID, and then with the list.",
    ("data-of-starttls", "nbd-server"): "it takes the length in the wrong order of bytes, and waits for so many.",
    ("info-says-what-go-says", "nbd-server"): "it looks at the file only when it is asked to GO.",
    ("inconsistent-lengths", "nbd-server"): "it reads the name as long as it says to be, from what follows.",
    ("names-that-are-no-strings", "nbd-server"): "it refuses a name of 4097 bytes, and then reads it once more.",
}


@dataclass
class Row:
    """What one check has found of all servers."""

    check: Check
    level: Level
    cells: dict[str, str] = field(default_factory=dict)
    observed: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Product and what it did → the set-ups in which it did."""


def versions() -> dict[str, str]:
    """Who was probed."""
    found = {"nbdq": __version__}
    for product, option in (("qemu-nbd", "--version"), ("nbdkit", "--version"), ("nbd-server", "-V")):
        done = subprocess.run([product, option], capture_output=True, text=True, check=False)
        words = (done.stdout + done.stderr).splitlines()[0].split()
        found[product] = next((word for word in words if word[0].isdigit()), "?")
    return found


def main() -> None:
    """Print the page."""
    for tool in ("qemu-nbd", "nbdkit", "nbd-server", "certtool"):
        assert shutil.which(tool, path=SEARCH_PATH), f"{tool} is not installed"
    products = list(dict.fromkeys(setup.product for setup in SETUPS))
    rows: dict[str, Row] = {}
    counts: dict[str, dict[Level, set[str]]] = {product: {level: set() for level in Level} for product in products}
    passed: dict[str, set[str]] = {product: set() for product in products}
    for setup in SETUPS:
        print(f"{setup.product}: {setup.what}", file=sys.stderr)
        for result in probe(setup):
            name = result.check.name
            if result.verdict is Verdict.OK:
                passed[setup.product].add(name)
            if result.verdict is not Verdict.DEVIATES:
                continue
            row = rows.setdefault(name, Row(result.check, result.check.level))
            worst = min(result.level, counts_level(counts[setup.product], name) or result.level, key=_ORDER.index)
            for level in Level:
                counts[setup.product][level].discard(name)
            counts[setup.product][worst].add(name)
            row.cells[setup.product] = worst.value
            row.level = min(row.level, worst, key=_ORDER.index)
            row.observed.setdefault((setup.product, result.observed), []).append(setup.what)
    print(_page(products, rows, counts, passed))


def _wrapped(text: str) -> list[str]:
    """Lines as long as those of the other pages."""
    return [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, 118) or [""]]


def counts_level(counts: dict[Level, set[str]], name: str) -> Level | None:
    """At which level ``name`` is counted already."""
    return next((level for level, names in counts.items() if name in names), None)


def _page(
    products: list[str],
    rows: dict[str, Row],
    counts: dict[str, dict[Level, set[str]]],
    passed: dict[str, set[str]],
) -> str:
    version = versions()
    heads = [f"{product} {version[product]}" for product in products]
    lines = [
        "# Conformance",
        "",
        *_wrapped(_INTRODUCTION.format(count=len(select(())), date=datetime.date.today())),
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(products),
        *(
            f"| rules not kept: {level.value} | " + " | ".join(str(len(counts[p][level])) for p in products) + " |"
            for level in _ORDER
        ),
        "| rules kept, of those that could be tested | "
        + " | ".join(
            f"{len(passed[p] - set().union(*counts[p].values()))} of {len(passed[p].union(*counts[p].values()))}"
            for p in products
        )
        + " |",
        "",
        "## Rules that somebody does not keep",
        "",
        "| rule | " + " | ".join(products) + " |",
        "|---|" + "---|" * len(products),
    ]
    ordered = sorted(rows.values(), key=lambda row: _ORDER.index(row.level))
    for row in ordered:
        cells = [row.cells.get(p) or ("kept" if row.check.name in passed[p] else "–") for p in products]
        lines.append(f"| {row.check.rule} ({', '.join(row.check.items)}) | " + " | ".join(cells) + " |")
    lines += ["", "`–`: the rule is about something that the server does not have.", "", "## What was observed", ""]
    for row in ordered:
        lines += [f"**{row.check.rule}** (`{row.check.name}`)", ""]
        lines += [f"- {product} ({'; '.join(what)}): {text}" for (product, text), what in row.observed.items()]
        causes = {product: _CAUSES.get((row.check.name, product)) for product, _ in row.observed}
        lines += [f"- Cause in {product}: {cause}" for product, cause in causes.items() if cause]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
