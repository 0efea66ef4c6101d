"""Where clients connect: places that the settings name, sockets that were opened for us, or a private one."""

from collections.abc import Sequence
from contextlib import ExitStack

import click

from nbdq.cli.serve.captive import private_path
from nbdq.cli.serve.settings import ListenSettings
from nbdq.nbd.constants import DEFAULT_PORT
from nbdq.server.activation import Inherited
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from nbdq.server.tls.credentials import TlsSettings


def open_listeners(
    places: Sequence[ListenSettings],
    inherited: Sequence[Inherited],
    tls: TlsSettings,
    *,
    captive: bool,
    undo: ExitStack,
) -> list[Listener]:
    """Listen at ``places``. Without any, on the sockets that are ``inherited``; without those on a private unix socket
    for a ``captive`` command, or else where the protocol expects a server. ``undo`` closes them all.

    Raises:
        click.UsageError: there are places, and sockets too.
        ExportError: a place cannot be had.
    """
    given = [one for one in inherited if one.role in ("nbd", "nbd-tls")]
    if given and places:
        raise click.UsageError(
            "clients connect to the sockets of socket activation; leave out --socket, --bind, --port and [[listen]]"
        )
    listeners = [Listener(one.socket, tls=tls.mode_of("require" if one.role == "nbd-tls" else None)) for one in given]
    if not given and not places:
        path = undo.enter_context(private_path()) if captive else None
        places = (ListenSettings(socket=path),)
    for place in places:
        mode = tls.mode_of(place.tls)
        if place.socket is not None:
            found = [listen_unix(place.socket, mode=place.mode, tls=mode)]
        else:
            found = listen_tcp(place.address, DEFAULT_PORT if place.port is None else place.port, tls=mode)
        for listener in found:
            undo.callback(listener.close)
        listeners += found
    return listeners


def one_of_role(inherited: Sequence[Inherited], role: str) -> Listener | None:
    """The socket that was opened for ``role``, which is no exports' one.

    Raises:
        click.UsageError: there are several.
    """
    given = [one for one in inherited if one.role == role]
    if len(given) > 1:
        raise click.UsageError(f"socket activation brings {len(given)} sockets named {role}; one is enough")
    return Listener(given[0].socket) if given else None
