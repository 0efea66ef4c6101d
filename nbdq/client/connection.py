"""A client's connection: dialled, greeted, and through option haggling to the transmission phase."""

import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from nbdq.client import wire
from nbdq.client.channel import Channel
from nbdq.client.session import Session
from nbdq.client.tls import tls_context, tls_hostname
from nbdq.client.wire import ExportDetails, Listed, OptionFailed, Reply
from nbdq.errors import ProtocolError
from nbdq.nbd.constants import ClientFlag, InfoType, Option, OptionReply, TransmissionFlag
from nbdq.nbd.uri import Uri

#: Everything that INFO and GO can tell.
EVERY_INFO: Final = (int(InfoType.NAME), int(InfoType.DESCRIPTION), int(InfoType.BLOCK_SIZE))

_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


def connect(uri: Uri, *, timeout: float, tls: ssl.SSLContext | None = None) -> "Connection":
    """Dial the server of ``uri``, exchange greetings, and encrypt if the URI demands that.

    Args:
        timeout: seconds until a server that does not answer counts as dead, for this and every later question.
        tls: how to encrypt, instead of what the URI's parameters say.

    Raises:
        OSError: nobody listens, or nobody answers in time.
        ProtocolError: what answers is no server that speaks (fixed) newstyle NBD.
        ExportError: the server refuses TLS, or a certificate of ours cannot be used.
    """
    connection = Connection(dial(uri, timeout=timeout))
    try:
        connection.greet()
        if uri.secure:
            connection.start_tls(tls or tls_context(uri), tls_hostname(uri))
    except BaseException:
        connection.close()
        raise
    return connection


def dial(uri: Uri, *, timeout: float) -> Channel:
    """A channel to the server of ``uri``, over which nothing was said yet.

    Raises:
        OSError: nobody listens there.
    """
    if uri.socket_path:
        dialled = socket.socket(socket.AF_UNIX)
        try:
            dialled.settimeout(timeout)
            dialled.connect(uri.socket_path)
        except OSError as error:
            dialled.close()
            error.filename = error.filename or str(uri)
            raise
    else:
        try:
            dialled = socket.create_connection((uri.host, uri.port), timeout)
            dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # P3
        except OSError as error:
            error.filename = error.filename or str(uri)
            raise
    return Channel(dialled, timeout=timeout)


class Connection:
    """One connection during the handshake. A context manager; leaving it closes the socket without a word.

    A question that the server answers with an error raises :class:`OptionFailed`, after which another may be asked;
    ProtocolError and OSError mean that the connection is of no more use.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.handshake_flags = 0
        """What the server offered in its hello."""
        self.client_flags = 0
        """What we answered."""
        self.structured = self.extended = False
        """Agreed for the transmission phase."""
        self._selected: tuple[str, dict[str, int]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close without a word; harmless when closed."""
        self.channel.close()

    def greet(self, flags: int = _FLAGS) -> None:
        """Take the hello and answer it with those of ``flags`` that the server offers (P10, P12)."""
        self.handshake_flags = wire.parse_hello(self.channel.receive(wire.HELLO.size))
        self.client_flags = flags & self.handshake_flags
        self.channel.send(self.client_flags.to_bytes(4, "big"))

    # One option at a time, as they are on the wire.

    def ask(self, option: int, data: bytes = b"") -> list[Reply]:
        """Send one option, and take every reply up to the final one, whatever they say.

        Raises:
            ProtocolError: a reply that cannot be one to this.
            OSError: the connection ended, or no answer came in time.
        """
        self.channel.send(wire.pack_option(option, data))
        return self.take_answer(option)

    def take_answer(self, option: int) -> list[Reply]:
        """Every reply up to the final one to an option that the caller has sent."""
        replies: list[Reply] = []
        total = 0
        while not (replies and replies[-1].is_final):
            if len(replies) == wire.MAXIMUM_OPTION_REPLIES or total > wire.MAXIMUM_ANSWER:
                what = f"{len(replies)} replies of {total} bytes and no end"
                raise ProtocolError(f"{wire.option_name(option)}: {what} (R-21)")
            header = self.channel.receive(wire.OPTION_REPLY.size)
            kind, length = wire.parse_reply_header(option, header)
            total += length
            replies.append(Reply(kind, self.channel.receive(length)))
        return replies

    def call(self, option: int, data: bytes = b"") -> list[Reply]:
        """The replies before the ACK.

        Raises:
            OptionFailed: there was none.
        """
        *replies, final = self.ask(option, data)
        if final.is_error:
            raise wire.parse_failure(option, final)
        return replies

    # What clients mean by them.

    def structured_reply(self) -> bool:
        """Ask for structured replies; whether the server has them."""
        return self._agree(Option.STRUCTURED_REPLY)

    def extended_headers(self) -> bool:
        """Ask for extended headers, which imply structured replies; whether the server has them (P40)."""
        return self._agree(Option.EXTENDED_HEADERS)

    def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Encrypt from here on; everything agreed so far is void (P61).

        Raises:
            OptionFailed: the server refuses.
            OSError: TLS cannot be established.
        """
        self._expect_nothing(Option.STARTTLS, self.call(Option.STARTTLS))
        if self.channel.unread:
            raise ProtocolError("the server sent plaintext behind its consent to TLS (P62)")
        self.channel.start_tls(context, hostname)
        self.structured = self.extended = False
        self._selected = None

    def list(self) -> Sequence[Listed]:
        """The exports that the server tells of (P32)."""
        replies = self.call(Option.LIST)
        for reply in replies:
            if reply.type != OptionReply.SERVER:
                raise ProtocolError(f"LIST is answered with {wire.reply_name(reply.type)} (P23)")
        return [wire.parse_server(reply.data) for reply in replies]

    def info(self, name: str | bytes, types: tuple[int, ...] = EVERY_INFO) -> ExportDetails:
        """What the server tells of an export (P33)."""
        return wire.parse_details(self.call(Option.INFO, wire.pack_info_request(name, types)))

    def list_meta_contexts(self, export: str, *queries: str) -> Sequence[str]:
        """The metadata contexts that match, all without queries (P41)."""
        replies = self.call(Option.LIST_META_CONTEXT, wire.pack_context_request(export, queries))
        return [name for _, name in self._parse_contexts(Option.LIST_META_CONTEXT, replies)]

    def set_meta_contexts(self, export: str, *queries: str) -> dict[str, int]:
        """Select metadata contexts for ``export``: the names that were, with their ids (P42, P44)."""
        self._selected = None
        replies = self.call(Option.SET_META_CONTEXT, wire.pack_context_request(export, queries))
        found = self._parse_contexts(Option.SET_META_CONTEXT, replies)
        contexts = {name: number for number, name in found}
        if len(contexts) != len(found) or len(set(contexts.values())) != len(found):
            raise ProtocolError(f"the metadata contexts {found} are not unique (P44)")
        self._selected = export, contexts
        return contexts

    def go(self, name: str, types: tuple[int, ...] = EVERY_INFO) -> Session:
        """Enter the transmission phase (P34); the session owns the channel from then on."""
        details = wire.parse_details(self.call(Option.GO, wire.pack_info_request(name, types)))
        return self.begin(name, details)

    def export_name(self, name: str) -> Session:
        """Enter the transmission phase by the old option, whose only error reply is a closed connection (P30)."""
        self.channel.send(wire.pack_option(Option.EXPORT_NAME, name.encode()))
        size, flags = wire.EXPORT_NAME_REPLY.unpack(self.channel.receive(wire.EXPORT_NAME_REPLY.size))
        if not self.client_flags & ClientFlag.NO_ZEROES and any(self.channel.receive(wire.EXPORT_NAME_ZEROES)):
            raise ProtocolError("the 124 zeroes of EXPORT_NAME are none (P30)")
        return self.begin(name, ExportDetails(wire.check_size(size), TransmissionFlag(flags)))

    def begin(self, name: str, details: ExportDetails) -> Session:
        """The session that follows once the server has agreed to transmission."""
        contexts = self._selected[1] if self._selected and self._selected[0] == name else {}  # P43
        return Session(self.channel, details, structured=self.structured, extended=self.extended, contexts=contexts)

    def abort(self) -> None:
        """Take leave; servers that just hang up are forgiven (P140)."""
        with suppress(OSError, OptionFailed, ProtocolError):
            self.call(Option.ABORT)
        self.close()

    def _agree(self, option: Option) -> bool:
        try:
            self._expect_nothing(option, self.call(option))
        except OptionFailed:
            return False
        self.structured = True
        self.extended |= option == Option.EXTENDED_HEADERS
        return True

    def _expect_nothing(self, option: Option, replies: Sequence[Reply]) -> None:
        if replies:
            raise ProtocolError(f"{option.name} is answered with {wire.reply_name(replies[0].type)} (P23)")

    def _parse_contexts(self, option: Option, replies: Sequence[Reply]) -> Sequence[tuple[int, str]]:
        for reply in replies:
            if reply.type != OptionReply.META_CONTEXT:
                raise ProtocolError(f"{option.name} is answered with {wire.reply_name(reply.type)} (P23)")
        return [wire.parse_meta_context(reply.data) for reply in replies]
