"""The server behind one call of qemu-nbd: its disk, its export, and how long it serves."""

import asyncio
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace

import uvloop

from nbdq.block import BlockDevice
from nbdq.chain.bitmaps import find_bitmaps
from nbdq.chain.live import LiveChain
from nbdq.cli.qemu_nbd.arguments import Arguments
from nbdq.cli.qemu_nbd.disk import GUESSED_RAW, open_disk
from nbdq.cli.qemu_nbd.image import Image, parse_image
from nbdq.cli.serve.detach import Background
from nbdq.cli.serve.lifecycle import write_process_id
from nbdq.cli.serve.signals import StopSignals
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import TransmissionFlag
from nbdq.server.admission.access import Access
from nbdq.server.exports.export import Client, Export, Exports
from nbdq.server.exports.writing import DetectZeroes
from nbdq.server.limits import Limits
from nbdq.server.listener import Listener
from nbdq.server.server import Server
from nbdq.server.tls.credentials import Tls, TlsSettings
from nbdq.storage import share_one_heap

#: What "no limit" means: more than there are descriptors.
_ANY_NUMBER = 1 << 20


class _Exports(Exports):
    """Knows whether anybody came to use the export; a look at the list does not count."""

    was_entered = False

    def enter(self, export: Export, client: Client) -> None:
        """As :meth:`Exports.enter`."""
        super().enter(export, client)
        self.was_entered = True


def serve(arguments: Arguments, listeners: list[Listener], background: Background | None, signals: StopSignals) -> None:
    """Serve on ``listeners`` until a signal comes or the last client has left. When clients can connect, ``background``
    lets go of whoever started us. Everything written is durable on return.

    Raises:
        ExportError, ImageError, OSError: something cannot be opened, or saved in the end.
    """
    share_one_heap()
    tls = _open_tls(arguments)
    try:
        image = parse_image(arguments.file or "", format=arguments.format, image_opts=arguments.image_opts)
    except ExportError as error:
        raise ExportError(f"Failed to blk_new_open '{printable(arguments.file or '', 1024)}': {error}") from None
    with ExitStack() as undo:
        with signals.interruptible():
            image, chain, device = undo.enter_context(open_disk(arguments, image))
        runner = undo.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        exports = _Exports([_export(arguments, image, chain, device)])
        runner.run(_serve(arguments, exports, listeners, tls, background, signals))


def _open_tls(arguments: Arguments) -> Tls | None:
    credentials = arguments.credentials
    if credentials is None:
        return None
    if credentials.psk:
        return Tls(TlsSettings(psk_file=os.path.join(credentials.directory, "keys.psk")))
    return Tls(TlsSettings(certificates=credentials.directory, verify_peer=credentials.verify_peer))


def _export(arguments: Arguments, image: Image, chain: LiveChain, device: BlockDevice) -> Export:
    if arguments.bitmaps and device.size != chain.device.size:
        raise ExportError("a bitmap describes a whole disk; leave out the offset, or -B")
    export = Export.make(
        arguments.name or "",
        device,
        writable=not (arguments.read_only or image.read_only),
        description=arguments.description or "",
        bitmaps=find_bitmaps(chain.device, arguments.bitmaps),
        allocation_depth=arguments.allocation_depth,
        discard=arguments.discard,
        detect_zeroes=DetectZeroes(arguments.detect_zeroes),
    )
    if arguments.shared == 1:  # qemu-nbd's answer to clients that count on a second connection
        export.info = replace(export.info, flags=export.info.flags & ~TransmissionFlag.CAN_MULTI_CONN)
    if image.guessed and image.format == "raw":
        export.info = replace(export.info, minimum_block=512)
        sys.stderr.write(GUESSED_RAW.format(printable(image.path, 1024)))
    if arguments.tls_authz is not None:
        export.access = Access(subjects=arguments.subjects)
    return export


async def _serve(
    arguments: Arguments,
    exports: _Exports,
    listeners: list[Listener],
    tls: Tls | None,
    background: Background | None,
    signals: StopSignals,
) -> None:
    stop = asyncio.Event()
    signals.deliver(lambda count: stop.set())
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, stop.set)  # which is no reload here
    limits = Limits(
        handshake_seconds=arguments.handshake_seconds,
        connections=arguments.shared or _ANY_NUMBER,
        export_connections=0,
        peer_connections=0,
        tls_connections=0,
    )
    server = Server(exports, listeners, limits, tls=tls, clients_at_once=arguments.shared)

    def on_idle() -> None:
        if exports.was_entered and not arguments.persistent:
            stop.set()

    server.on_idle = on_idle
    try:
        server.start()
        if arguments.pid_file is not None:
            write_process_id(arguments.pid_file)  # and leave it behind: who starts qemu-nbd removes it
        os.chdir("/")  # so that no file system is kept busy
        if background is not None:
            background.let_go()
        await stop.wait()
    finally:
        await server.stop()
        signals.ignore()
