"""The server behind one call of qemu-nbd: from its options until the last client leaves or a signal comes."""

import asyncio
import errno
import logging
import os
import signal
from dataclasses import replace

import uvloop

from nbdq.block import BlockDevice
from nbdq.chain.bitmaps import find_bitmaps
from nbdq.chain.live import LiveChain
from nbdq.cli.detach import Background
from nbdq.cli.lifecycle import process_id_in
from nbdq.cli.qemu_nbd.arguments import Arguments
from nbdq.cli.qemu_nbd.disk import open_disk
from nbdq.cli.qemu_nbd.image import Image, parse_image
from nbdq.cli.qemu_nbd.listing import port_number
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import TransmissionFlag
from nbdq.server.activation import inherited_sockets
from nbdq.server.export import Client, Export, Exports
from nbdq.server.limits import Limits
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from nbdq.server.server import Server
from nbdq.storage import share_one_heap

#: Options that say where clients connect, which nobody may say if a socket was handed to us.
_PLACES = {
    "--socket": "Unix socket",
    "--bind": "The interface",
    "--port": "TCP port number",
    "--selinux-label": "SELinux label",
}
#: What "no limit" means: more than there are descriptors.
_ANY_NUMBER = 1 << 20
_FOR_EVER_SECONDS = 1e9


class _Exports(Exports):
    """Knows whether anybody came to use the export; a look at the list does not count."""

    was_entered = False

    def enter(self, export: Export, client: Client) -> None:
        """As :meth:`Exports.enter`."""
        super().enter(export, client)
        self.was_entered = True


def serve(arguments: Arguments) -> None:
    """Serve as ``arguments`` say; with ``--fork`` this returns in the child, and ends the parent (SystemExit).

    Raises:
        ExportError, ImageError, OSError: something cannot be opened, or saved in the end.
    """
    logging.basicConfig(format="qemu-nbd: %(message)s", level=logging.WARNING)
    if arguments.selinux_label is not None:
        raise ExportError("SELinux support not enabled in this binary")
    listeners = _activated(arguments)
    background = Background() if arguments.fork else None
    share_one_heap()
    listeners = listeners or _listen(arguments)
    try:
        image = parse_image(arguments.file or "", format=arguments.format, image_opts=arguments.image_opts)
    except ExportError as error:
        raise ExportError(f"Failed to blk_new_open '{printable(arguments.file or '', 1024)}': {error}") from None
    try:
        with (
            open_disk(arguments, image) as (chain, device),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            exports = _Exports([_export(arguments, image, chain, device)])
            runner.run(_serve(arguments, exports, listeners, background))
    finally:
        for listener in listeners:
            listener.close()


def _export(arguments: Arguments, image: Image, chain: LiveChain, device: BlockDevice) -> Export:
    whole = device.size == chain.device.size
    if arguments.bitmaps and not whole:
        raise ExportError("a bitmap describes a whole disk; leave out the offset, or -B")
    export = Export.make(
        arguments.name or "",
        device,
        writable=not (arguments.read_only or image.read_only),
        description=arguments.description or "",
        bitmaps=find_bitmaps(chain.device, arguments.bitmaps),
        allocation_depth=arguments.allocation_depth,
        discard=arguments.discard,
        detect_zeroes=arguments.detect_zeroes,
    )
    if arguments.shared == 1:  # qemu-nbd's answer to clients that count on a second connection
        export.info = replace(export.info, flags=export.info.flags & ~TransmissionFlag.CAN_MULTI_CONN)
    return export


def _activated(arguments: Arguments) -> list[Listener]:
    """The socket that was opened for us, if one was."""
    inherited = inherited_sockets()
    if not inherited:
        return []
    for option, what in _PLACES.items():
        if option in arguments.seen:
            raise ExportError(f"{what} can't be set when using socket activation")
    if len(inherited) > 1:
        raise ExportError("qemu-nbd does not support socket activation with LISTEN_FDS > 1")
    return [Listener(inherited[0].socket)]


def _listen(arguments: Arguments) -> list[Listener]:
    """Listen where the options say; a unix socket has the mode that the umask leaves it, as qemu-nbd's."""
    try:
        if arguments.socket is None:
            return listen_tcp(arguments.address or "0.0.0.0", port_number(arguments.port))
        mask = os.umask(0)
        os.umask(mask)
        return [listen_unix(arguments.socket, mode=0o777 & ~mask)]
    except ExportError as error:
        raise ExportError(_bind_failure(arguments, error)) from None


def _bind_failure(arguments: Arguments, error: ExportError) -> str:
    """The reason, behind what programs look for in qemu-nbd's message."""
    if arguments.socket is not None:
        return f"Failed to bind socket to {printable(arguments.socket)}: {error}"
    busy = os.strerror(errno.EADDRINUSE)
    if busy in str(error):
        return f"Failed to find an available port: {busy}"
    return str(error)


async def _serve(
    arguments: Arguments, exports: _Exports, listeners: list[Listener], background: Background | None
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    clients = arguments.shared or _ANY_NUMBER
    limits = Limits(
        handshake_seconds=arguments.handshake_seconds or _FOR_EVER_SECONDS,
        connections=clients,
        export_connections=0,
        peer_connections=0,
        tls_connections=0,
    )
    server = Server(exports, listeners, limits, clients_at_once=arguments.shared)

    def on_idle() -> None:
        if exports.was_entered and not arguments.persistent:
            stop.set()

    server.on_idle = on_idle
    try:
        server.start()
        with process_id_in(None if arguments.pid_file is None else os.path.abspath(arguments.pid_file)):
            os.chdir("/")  # so that no file system is kept busy
            if background is not None:
                background.let_go()
            await stop.wait()
    finally:
        await server.stop()
