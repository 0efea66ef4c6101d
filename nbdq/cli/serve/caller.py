"""Whoever started this process: what it brought along, and what it wants to hear."""

import sys
from collections.abc import Iterable

from nbdq.cli.serve.detach import Background
from nbdq.cli.serve.lifecycle import StartSettings, tell_ready
from nbdq.server.activation import inherited_sockets
from nbdq.server.notify import Notifier


class Caller:
    """A shell, a script, a service manager, a client that starts a server for itself."""

    def __init__(self, wanted: StartSettings) -> None:
        """To be made before anything is opened, and before there are threads: with ``fork`` only the child returns.

        Raises:
            ExportError: the sockets that we were given are not what we were told.
            SystemExit: in the parent, once the child can be left alone, or has failed.
        """
        self.notifier = Notifier.of_environment()
        self.sockets = inherited_sockets()
        self._wanted = wanted
        self._background = Background() if wanted.fork else None

    def tell_ready(self, uris: Iterable[str]) -> None:
        """Clients can connect, and find exports at ``uris``: tell everybody but the service manager, who hears from
        :attr:`notifier` for as long as we run."""
        belongs_to_others = self._wanted.run is not None or bool(self.sockets)
        if self._wanted.print_uri or (self._wanted.print_uri is None and not belongs_to_others):
            for uri in uris:
                print(uri)
        sys.stdout.flush()
        if self._background is not None:
            self._background.let_go()
        if self._wanted.ready_fd is not None:
            tell_ready(self._wanted.ready_fd)
