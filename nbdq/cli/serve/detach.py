"""Going on in the background (``--fork``), as users of qemu-nbd expect it: who started us goes on when clients can
connect, or has seen on its stderr why they cannot."""

import os
import signal
import stat
import sys


class Background:
    """The process that serves, before and after it lets go of the one that started it."""

    def __init__(self) -> None:
        """Fork: in the child, return. The parent waits until the child is ready, or has ended, and raises SystemExit
        with 0 or the child's status; so no thread may run, and nothing may be open yet that has to be closed once.

        The child leads a session of its own, and keeps its directory, for paths may be relative.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        waiting, self._ready = os.pipe()
        process = os.fork()
        if process:
            os.close(self._ready)
            raise SystemExit(_wait_for(process, waiting))
        os.close(waiting)
        os.setsid()

    def let_go(self) -> None:
        """Clients can connect: leave the terminal, or the pipes, of whoever started us, and let it go on. A log that
        goes to a file stays, for nobody waits for the end of that."""
        sys.stdout.flush()
        sys.stderr.flush()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1) if stat.S_ISREG(os.fstat(2).st_mode) else (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
        os.write(self._ready, b"\n")
        os.close(self._ready)


def _wait_for(process: int, waiting: int) -> int:
    try:
        if os.read(waiting, 1):
            return 0
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return 128 - status if status < 0 else status or 1  # it ended without having served anybody
    except KeyboardInterrupt:
        os.kill(process, signal.SIGTERM)
        raise
