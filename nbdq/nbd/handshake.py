"""The handshake: from the server's hello to the transmission phase, or to the end of the connection.

A machine without I/O: bytes go in, option replies come out, at whatever pieces the network delivers (P5). Knows the
order of option haggling, what has to happen under TLS, and what a selection of metadata contexts survives. Must not
know sockets, time, how TLS works, or what is behind an export.

What ends a connection here, and nothing else does (P141):

- lost sync: a client flag we did not offer (P12), a wrong option magic (P20), an option too long to discard (P25), more
  options than an honest client needs (P16), anything behind STARTTLS before it is answered (P62). These are a
  :class:`ProtocolError`.
- ABORT, an EXPORT_NAME that fails (P30), and any other option of a client without fixed newstyle (P13), for which the
  protocol has no other answer. These are ``finished``.
"""

import struct
from collections.abc import Generator, Sequence
from enum import StrEnum

from nbdq.errors import ProtocolError, printable
from nbdq.nbd import messages
from nbdq.nbd.constants import (
    IHAVEOPT,
    NBDMAGIC,
    ClientFlag,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReply,
)
from nbdq.nbd.ending import Cause, Ending
from nbdq.nbd.exports import ExportDirectory, ExportInfo, Negotiated
from nbdq.nbd.messages import OptionRefused

#: Bytes of option data that are buffered, and that are read only to be discarded; beyond, the connection ends (R-05).
MAXIMUM_OPTION = 64 << 10
MAXIMUM_DISCARD = 1 << 20

#: Metadata contexts that one client may select (reliability 3.2).
MAXIMUM_CONTEXTS = 16

#: Replies of one call to :meth:`Handshake.receive`, and those to one option more. A LIST may have thousands, and a few
#: KiB hold hundreds of LISTs.
_REPLIES_AT_ONCE = 256

_HELLO = struct.pack(">QQH", NBDMAGIC, IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_CLIENT_FLAGS = struct.Struct(">I")
_CLIENT_FLAGS_OFFERED = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)  # the inverse of an IntFlag lacks bits
_OPTION = struct.Struct(">QII")


class TlsMode(StrEnum):
    """What the clients of one listener may and must do (P64)."""

    OFF = "off"
    """NOTLS: there is no TLS, and nothing demands it."""
    ALLOW = "allow"
    """SELECTIVETLS: clients may, and exports may demand it."""
    REQUIRE = "require"
    """FORCEDTLS: without TLS a client learns nothing, not even names."""


class Handshake:
    """One client's handshake: send :meth:`hello`, then feed :meth:`receive` until ``negotiated`` or ``finished``."""

    def __init__(self, exports: ExportDirectory, *, tls: TlsMode = TlsMode.OFF, maximum_options: int = 32) -> None:
        """``maximum_options`` bounds what a client may ask in all; listing exports permits as many again for each."""
        self.negotiated: Negotiated | None = None
        """Set once transmission begins; the replies of that call to :meth:`receive` are still to be sent."""
        self.finished = False
        """Close the connection once the replies are sent."""
        self.ending: Ending | None = None
        """Why ``finished``."""
        self.starting_tls = False
        """The replies of that call to :meth:`receive` are the last in the clear: once they are sent TLS begins, and
        when that stands :meth:`secured` is called, before anything else."""
        self.has_more = False
        """There were so many replies that more options may be here already: once they are sent, call :meth:`receive`
        with nothing."""
        self.leftover = b""
        """What was received behind the handshake, set with ``negotiated``: the start of transmission."""

        self._exports = exports
        self._tls = tls
        self._secure = False
        self._budget = self._options_per_export = maximum_options
        self._listed = False
        self._fixed = False  # the client understands option replies (P13)
        self._padded = True  # the client wants the 124 zeroes of EXPORT_NAME (P30)
        self._structured = False
        self._extended = False  # extended headers, which imply structured replies (P40)
        self._selected_from: ExportInfo | None = None
        self._selected_contexts: tuple[tuple[int, str], ...] = ()
        self._shutting_down = False

        self._buffer = bytearray()  # never holds more than one option and what receive() was given last
        self._replies: list[bytes] = []
        self._conversation = self._converse()
        next(self._conversation)

    def hello(self) -> bytes:
        """The 18 bytes with which the server opens (P10)."""
        return _HELLO

    def receive(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Go on with what the client sent. A few KiB at a time bound the work and the replies of one call.

        Returns:
            Complete option replies, each of which has to reach the client in one send (N2).

        Raises:
            ProtocolError: sync with the client is lost. Where the same ``data`` earned replies before that, they are
                returned instead, as they would have been had it come in pieces; ``finished`` and ``ending`` tell.
        """
        assert self.negotiated is None
        assert not self.starting_tls
        if self.finished:
            return []
        self._buffer += data
        self.has_more = False
        try:
            next(self._conversation, None)
        except ProtocolError as error:
            self._finish(Cause.PROTOCOL, str(error))
            if not self._replies:
                raise
        replies, self._replies = self._replies, []
        return replies

    def secured(self) -> None:
        """TLS has begun: what was agreed in the clear, perhaps with somebody in between, is forgotten (P61, R-14)."""
        assert self.starting_tls
        self.starting_tls = False
        self._secure = True
        self._structured = self._extended = False
        self._selected_from, self._selected_contexts = None, ()
        self._listed = False  # there may be more to see now

    def shut_down(self) -> None:
        """Answer further options with ERR_SHUTDOWN, except ABORT (P99)."""
        self._shutting_down = True

    # The conversation reads from top to bottom like section 1.2 of the specification; each bare ``yield`` waits for
    # receive() to bring more.

    def _converse(self) -> Generator[None]:
        (flags,) = _CLIENT_FLAGS.unpack((yield from self._take(_CLIENT_FLAGS.size)))
        if flags & ~_CLIENT_FLAGS_OFFERED:
            raise ProtocolError(f"client flags {flags:#x} include one that was not offered")
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._padded = not flags & ClientFlag.NO_ZEROES
        while self.negotiated is None and not self.finished:
            if len(self._replies) >= _REPLIES_AT_ONCE and self._buffer:
                self.has_more = True
                yield
            magic, option, length = _OPTION.unpack((yield from self._take(_OPTION.size)))
            if magic != IHAVEOPT:
                raise ProtocolError(f"an option begins with {magic:#018x} instead of the magic {IHAVEOPT:#x}")
            self._spend(1)
            if length > MAXIMUM_DISCARD:
                raise ProtocolError(
                    f"option {_name(option)} has {length} bytes of data; the limit is {MAXIMUM_DISCARD}"
                )
            if length > MAXIMUM_OPTION:
                yield from self._skip(length)
                self._respond(option, None)
            else:
                self._respond(option, (yield from self._take(length)))

    def _take(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _skip(self, count: int) -> Generator[None]:
        while len(self._buffer) < count:
            count -= len(self._buffer)
            self._buffer.clear()
            yield
        del self._buffer[:count]

    def _spend(self, cost: int) -> None:
        """Take ``cost`` from what this client may still ask; a stream of cheap options must not buy much work (P16)."""
        self._budget -= cost
        if self._budget < 0:
            raise ProtocolError("the client haggles over more options than any honest one needs")

    def _finish(self, cause: Cause, text: str) -> None:
        self.finished = True
        self.ending = Ending(cause, text)

    def _respond(self, option: int, data: bytes | None) -> None:
        """Answer one option; ``data`` is None if it was too long to keep."""
        try:
            self._answer(option, data)
        except OptionRefused as refused:
            if refused.reply == OptionReply.ERR_TLS_REQD and self._tls is TlsMode.OFF:
                refused = OptionRefused(OptionReply.ERR_POLICY, refused.text)  # it would have to be on offer (P64)
            if self._fixed and option != Option.EXPORT_NAME:
                self._replies.append(messages.error(option, refused))
            else:  # the protocol has no error reply for these (P13, P30)
                self._finish(Cause.REFUSED, f"{_name(option)} refused: {refused.text}")

    def _answer(self, option: int, data: bytes | None) -> None:
        if option == Option.SET_META_CONTEXT:  # replaces the selection even if it fails, however it fails (P42)
            self._selected_from, self._selected_contexts = None, ()
        if not self._fixed and option != Option.EXPORT_NAME:
            raise OptionRefused(OptionReply.ERR_POLICY, "the client did not agree to fixed newstyle negotiation")
        if option == Option.ABORT:  # whatever it carries (P26)
            self._replies.append(messages.ack(option))
            self._finish(Cause.ABORT, "the client sent ABORT")
            return
        if self._tls is TlsMode.REQUIRE and not self._secure and option != Option.STARTTLS:
            raise OptionRefused(OptionReply.ERR_TLS_REQD, "this server is for clients that use TLS")
        if self._shutting_down:
            raise OptionRefused(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        if data is None:
            raise OptionRefused(OptionReply.ERR_TOO_BIG, f"option data is limited to {MAXIMUM_OPTION} bytes")
        match option:
            case Option.EXPORT_NAME:
                self._export_name(data)
            case Option.LIST:
                self._list(data)
            case Option.INFO | Option.GO:
                self._info(option, data)
            case Option.STRUCTURED_REPLY:
                _require_empty(data)
                if self._extended:  # P39
                    raise OptionRefused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are agreed already")
                self._structured = True
                self._replies.append(messages.ack(option))
            case Option.EXTENDED_HEADERS:
                _require_empty(data)
                self._structured = self._extended = True
                self._replies.append(messages.ack(option))
            case Option.LIST_META_CONTEXT:
                self._list_meta_context(data)
            case Option.SET_META_CONTEXT:
                self._set_meta_context(data)
            case Option.STARTTLS:
                self._start_tls(data)
            case _:
                raise OptionRefused(OptionReply.ERR_UNSUP, f"option {_name(option)} is not supported")

    def _start_tls(self, data: bytes) -> None:
        _require_empty(data)
        if self._secure:
            raise OptionRefused(OptionReply.ERR_INVALID, "TLS is in use already")  # P60
        if self._tls is TlsMode.OFF:
            raise OptionRefused(OptionReply.ERR_POLICY, "this server does not offer TLS")
        self._exports.check_room_for_tls()
        if self._buffer:  # an honest client waits for the reply; somebody else may have put this here (P62, R-14)
            raise ProtocolError(f"{len(self._buffer)} bytes came behind STARTTLS before it was answered")
        self._replies.append(messages.ack(Option.STARTTLS))
        self.starting_tls = True

    def _export_name(self, data: bytes) -> None:
        if self._extended:  # P30, P122
            raise OptionRefused(OptionReply.ERR_INVALID, "with extended headers there is only GO")
        export = self._find(messages.decode_text(data))
        flags = export.wire_flags(structured=self._structured)
        self._replies.append(messages.export_name(size=export.size, flags=flags, padded=self._padded))
        self._begin_transmission(export)

    def _list(self, data: bytes) -> None:
        _require_empty(data)
        exports = self._exports.list()
        if not self._listed:  # clients such as qemu-nbd --list go on to ask about each
            self._listed = True
            self._budget += self._options_per_export * len(exports)
        self._spend(len(exports))
        self._replies += [messages.server(export.name, export.description) for export in exports]
        self._replies.append(messages.ack(Option.LIST))

    def _info(self, option: int, data: bytes) -> None:
        request = messages.parse_info_request(data)
        export = self._find(request.export)
        if InfoType.NAME in request.types:
            self._replies.append(messages.info_text(option, InfoType.NAME, export.name))
        if InfoType.DESCRIPTION in request.types and export.description:
            self._replies.append(messages.info_text(option, InfoType.DESCRIPTION, export.description))
        self._replies += [
            messages.info_block_size(
                option,
                minimum=export.minimum_block,
                preferred=export.preferred_block,
                maximum=export.maximum_block,
            ),
            messages.info_export(option, size=export.size, flags=self._agreed(export).flags),
            messages.ack(option),
        ]
        if option == Option.GO:
            self._begin_transmission(export)

    def _list_meta_context(self, data: bytes) -> None:
        export, queries = self._meta_context_request(data)
        self._replies += [
            messages.meta_context(Option.LIST_META_CONTEXT, 0, context)  # the id means nothing here (P41)
            for context in self._listed_contexts(export, queries)
        ]
        self._replies.append(messages.ack(Option.LIST_META_CONTEXT))

    def _listed_contexts(self, export: ExportInfo, queries: Sequence[str]) -> list[str]:
        """What LIST shows: without queries everything but what is hidden (P41), which has to be named."""
        listed = (*export.contexts, *export.passing_contexts)
        meant = [name for name in listed if not queries or any(_means(query, name) for query in queries)]
        return [name for _, name in export.contexts_for([*queries, *meant], extended=self._extended)]

    def _set_meta_context(self, data: bytes) -> None:
        if not self._structured:
            raise OptionRefused(OptionReply.ERR_INVALID, "metadata contexts need STRUCTURED_REPLY first")
        export, queries = self._meta_context_request(data)
        selected = export.contexts_for(queries, extended=self._extended)
        if len(selected) > MAXIMUM_CONTEXTS:
            text = f"{len(selected)} metadata contexts selected; the limit is {MAXIMUM_CONTEXTS}"
            raise OptionRefused(OptionReply.ERR_TOO_BIG, text)
        self._selected_from, self._selected_contexts = export, selected
        self._replies += [messages.meta_context(Option.SET_META_CONTEXT, *context) for context in selected]
        self._replies.append(messages.ack(Option.SET_META_CONTEXT))

    def _meta_context_request(self, data: bytes) -> tuple[ExportInfo, tuple[str, ...]]:
        request = messages.parse_meta_context_request(data)
        for query in request.queries:
            if ":" not in query:  # P45
                text = f"query '{printable(query)}' has no namespace; try 'base:allocation'"
                raise OptionRefused(OptionReply.ERR_INVALID, text)
        return self._find(request.export), request.queries

    def _find(self, name: str) -> ExportInfo:
        export = self._exports.find(name)
        if export is None:
            text = f"no export is named '{printable(name)}'" if name else "there is no default export; give a name"
            raise OptionRefused(OptionReply.ERR_UNKNOWN, text)
        return export

    def _agreed(self, export: ExportInfo) -> Negotiated:
        contexts: tuple[tuple[int, str], ...] = ()
        before = self._selected_from
        if before is not None and before.name == export.name:  # one for another export counts for nothing (P43)
            contexts = export.still_offered(self._selected_contexts, before)
        return Negotiated(export, self._structured, contexts, self._extended)

    def _begin_transmission(self, export: ExportInfo) -> None:
        self.negotiated = self._agreed(export)
        self.leftover = bytes(self._buffer)
        self._buffer.clear()


def _name(option: int) -> str:
    """The option as a log should show it."""
    try:
        return Option(option).name
    except ValueError:
        return str(option)


def _require_empty(data: bytes) -> None:
    """Refuse data with an option for which the protocol defines none (P26)."""
    if data:
        raise OptionRefused(
            OptionReply.ERR_INVALID, f"the option carries {len(data)} bytes; it is defined without data"
        )


def _means(query: str, context: str) -> bool:
    """Whether a LIST query that ends in a colon means ``context``: the wildcard of a namespace (P45, P48)."""
    return query.endswith(":") and context.startswith(query)
