"""``nbdq`` on the command line, run in this process: hundreds of calls would otherwise mostly wait for interpreters."""

from pathlib import Path

from click.testing import CliRunner, Result

from nbdq.cli import main


def run_nbdq(*words: str | Path) -> Result:
    """Run a verb to its end, whatever its exit status; an exception that reaches the top is a bug and raised here."""
    result = CliRunner().invoke(main, [str(word) for word in words], prog_name="nbdq")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def nbdq(*words: str | Path) -> str:
    """Run a verb that must succeed; return its standard output."""
    result = run_nbdq(*words)
    assert result.exit_code == 0, f"nbdq {' '.join(map(str, words))}: status {result.exit_code}\n{result.stderr}"
    return result.stdout
