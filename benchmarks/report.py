"""The table, for a terminal or for a README, and the machine that it is true of."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from results import CaseResult

TOOLS = ("qemu-nbd", "fio", "nbdcopy", "nbdkit")


def machine(work_dir: Path) -> Mapping[str, str]:
    """What a reader must know to compare figures with their own."""
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "images on": _filesystem(work_dir),
        "Python": platform.python_version(),
        "nbdq": version("nbdq"),
    }
    return facts | {tool: _tool_version(tool) for tool in TOOLS}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _filesystem(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    below = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(below)[1]


def _tool_version(tool: str) -> str:
    try:
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    except OSError:
        return "absent"
    return said.splitlines()[0].removeprefix(tool).strip(" -")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else f"{value:.3g}"


def _target(result: CaseResult) -> str:
    if result.case.at_most is not None:
        return f"≤ {result.case.at_most:g} {result.case.workload.unit.value}"
    return "–" if result.case.at_least is None else f"≥ {result.case.at_least:.3g}"


def _rows(results: Sequence[CaseResult], columns: Sequence[str]) -> list[list[str]]:
    rows = [["case", "unit", *columns, "ratio", "min–max", "target", "met?", "notes"]]
    for result in results:
        ratio = result.ratio()
        met = {True: "yes", False: "MISSED", None: "–"}[result.met()]
        notes = result.doubts()
        notes += [f"{label}: {_number(result.median(label))}" for label in result.measurements if label not in columns]
        rows.append(
            [
                result.case.id,
                result.case.workload.unit.value,
                *(_number(result.median(label)) for label in columns),
                f"{ratio.value:.2f}" if ratio else "–",
                f"{ratio.low:.2f}–{ratio.high:.2f}" if ratio else "–",
                _target(result),
                met,
                f"COULD NOT RUN: {' '.join(result.failure.split())}" if result.failure else "; ".join(notes),
            ]
        )
    return rows


def progress_line(result: CaseResult) -> str:
    """One finished case, for whoever watches."""
    header, row = _rows([result], [result.ours])
    cells = dict(zip(header, row, strict=True))
    figures = (
        f"{cells[result.ours]} {cells['unit']}, ratio {cells['ratio']}, target {cells['target']}, met: {cells['met?']}"
    )
    return f"{result.case.id}: {figures}  {cells['notes']}".rstrip()


def plain_table(results: Sequence[CaseResult], columns: Sequence[str]) -> str:
    rows = _rows(results, columns)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    first, last = 0, len(rows[0]) - 1
    lines = []
    for row in rows:
        cells = [
            cell if column == last else cell.ljust(widths[column]) if column == first else cell.rjust(widths[column])
            for column, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(results: Sequence[CaseResult], columns: Sequence[str], facts: Mapping[str, str]) -> str:
    header, *rows = _rows(results, columns)
    alignment = ["---", "---", *("---:" for _ in header[2:-1]), "---"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, alignment, *rows))
    return f"{'; '.join(f'{name} {value}' for name, value in facts.items())}.\n\n{table}"
