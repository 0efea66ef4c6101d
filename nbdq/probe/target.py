"""The server and export that are probed: how checks get to it, and what was learned of it beforehand."""

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from nbdq.client.channel import Channel
from nbdq.client.connection import EVERY_INFO, Connection, dial
from nbdq.client.session import Session
from nbdq.client.tls import tls_context, tls_hostname
from nbdq.client.transaction import Transaction, command_name, error_name
from nbdq.client.wire import BlockSizes, ExportDetails, OptionFailed, pack_info_request, parse_failure, reply_name
from nbdq.nbd.constants import ClientFlag, Command, Option, OptionReply, TransmissionFlag
from nbdq.nbd.uri import Uri
from nbdq.probe.findings import Deviation, NotApplicable, expect

#: What a client may rely on where a server does not say its block sizes (P126).
_DEFAULT_SIZES = BlockSizes(minimum=1, preferred=4096, maximum=32 << 20)

#: Seconds between two bytes.
_PAUSE = 0.001

#: Seconds in which a server comes to the point where it has to wait for its client, or notices that one has left.
SETTLE = 0.1

#: A name of which it is assumed that no export has it.
NO_EXPORT = "nbdq-probe: no export has this name"


@dataclass
class Mode:
    """How requests and replies look."""

    name: str
    structured: bool = False
    extended: bool = False


SIMPLE = Mode("simple replies")
STRUCTURED = Mode("structured replies", structured=True)
EXTENDED = Mode("extended headers", structured=True, extended=True)


@dataclass
class Target:
    """One export of one server, and what is known of the two."""

    uri: Uri
    timeout: float
    """Seconds until a server that does not answer counts as one that never will."""
    may_write: bool = False
    """What the export contains may be changed."""

    mode: Mode | None = None
    """What the check that runs is looking at, if it looks at several; to say with what it observed."""
    export: ExportDetails = field(init=False)
    """As GO, or else EXPORT_NAME, tells it to a client that asked for structured replies."""
    modes: list[Mode] = field(init=False)
    """Those that the server offers."""
    contexts: list[str] = field(init=False)
    """Metadata contexts of the export; empty if there are none, or nobody can say."""
    demands_tls: bool = False
    """Everything but STARTTLS is refused until the connection is encrypted."""
    serves_every_name: bool = False
    """There is no name that is unknown."""
    takes_several: bool = False
    """Several clients may be connected at once."""

    def __post_init__(self) -> None:
        self._tls = tls_context(self.uri) if self.uri.secure else None

    # Before the checks.

    def explore(self) -> None:
        """Learn what the checks need to know.

        Raises:
            OSError, ProtocolError: the server cannot be reached, or does not speak NBD.
            ExportError: it does not have the export.
        """
        self.modes, self.contexts = [SIMPLE], []
        self.export = ExportDetails(0, TransmissionFlag(0))
        try:
            self._explore()
        except OptionFailed as failure:
            if self.uri.secure or failure.reply != OptionReply.ERR_TLS_REQD:
                raise
            self.demands_tls = True

    def _explore(self) -> None:
        with self.connect() as connection:
            if connection.structured_reply():
                self.modes.append(STRUCTURED)
                with suppress(OptionFailed):  # there are servers without
                    names = connection.list_meta_contexts(self.uri.export)
                    self.contexts = [name for name in names if not name.endswith(":")]
            self.serves_every_name = not connection.ask(Option.INFO, info_data(NO_EXPORT))[-1].is_error
            self.export = go(connection, self.uri.export).export
        with self.connect() as connection:
            if connection.extended_headers():
                self.modes.append(EXTENDED)
        with self.connect(), suppress(TimeoutError, ConnectionError), self.connect():
            self.takes_several = True

    # Facts.

    @property
    def size(self) -> int:
        return self.export.size

    @property
    def sizes(self) -> BlockSizes:
        """What the server says of block sizes, or what holds without."""
        return self.export.block_sizes or _DEFAULT_SIZES

    @property
    def block(self) -> int:
        """A length that every request can have, if the export is that long."""
        return min(max(512, self.sizes.minimum), self.size)

    @property
    def last(self) -> int:
        """The offset of the last :attr:`block` that is aligned."""
        return (self.size - self.block) // self.sizes.minimum * self.sizes.minimum

    @property
    def end(self) -> int:
        """The end of that block; what is behind it, if anything, no request can reach."""
        return self.last + self.block

    def length(self, limit: int) -> int:
        """How many bytes from the start of the export one READ or WRITE may be about, ``limit`` at most."""
        length = min(limit, self.size, self.sizes.maximum)
        return length - length % self.sizes.minimum

    def has(self, flag: TransmissionFlag) -> bool:
        return flag in self.export.flags

    def need(self, condition: object, what: str) -> None:
        """End the check unless ``condition`` holds: without that, the rule is about nothing here."""
        if not condition:
            raise NotApplicable(what)

    def need_flag(self, flag: TransmissionFlag) -> None:
        """End the check unless the export advertises ``flag``."""
        self.need(self.has(flag), f"the export does not have {flag.name}")

    def need_several(self) -> None:
        """End the check unless two connections are to be had at once."""
        self.need(self.takes_several, "the server takes one client at a time")

    def need_writable(self, flag: TransmissionFlag = TransmissionFlag.HAS_FLAGS) -> None:
        """End the check unless the export can be written to in the way that ``flag`` advertises."""
        self.need(not self.has(TransmissionFlag.READ_ONLY), "the export is read-only")
        self.need_flag(flag)
        self.need(self.size >= self.block > 0, "the export is empty")

    # Connections, each closed when the block ends.

    @contextmanager
    def connect(self, flags: int = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)) -> Iterator[Connection]:
        """A connection in the handshake, encrypted if the URI says so. ``flags`` are those of the client."""
        connection = Connection(dial(self.uri, timeout=self.timeout))
        try:
            connection.greet(flags)
            if self._tls:
                self.need(flags & ClientFlag.FIXED_NEWSTYLE, "there is no TLS without fixed newstyle negotiation")
                connection.start_tls(self._tls, tls_hostname(self.uri))
            yield connection
        finally:
            connection.close()

    @contextmanager
    def plain(self) -> Iterator[Connection]:
        """A connection after the hello, not encrypted whatever the URI says."""
        connection = Connection(dial(self.uri, timeout=self.timeout))
        try:
            connection.greet()
            yield connection
        finally:
            connection.close()

    def tls(self) -> ssl.SSLContext:
        """How to encrypt."""
        self.need(self._tls, "the URI does not begin with nbds")
        assert self._tls is not None
        return self._tls

    @contextmanager
    def session(self, mode: Mode = SIMPLE, *contexts: str) -> Iterator[Session]:
        """A connection in the transmission phase, with the metadata contexts ``contexts``."""
        self.need(mode in self.modes, f"the server does not have {mode.name}")
        with self.connect() as connection:
            if mode.extended:
                expect(connection.extended_headers(), "EXTENDED_HEADERS was accepted before, and now it is not")
            elif mode.structured:
                expect(connection.structured_reply(), "STRUCTURED_REPLY was accepted before, and now it is not")
            if contexts:
                connection.set_meta_contexts(self.uri.export, *contexts)
            yield go(connection, self.uri.export)

    def sessions(self, *contexts: str) -> Iterator[Session]:
        """A session in every mode that the server has, one after another; with contexts, in those that know them."""
        for mode in self.modes:
            if contexts and not mode.structured:
                continue
            self.mode = mode
            with self.session(mode, *contexts) as session:
                yield session
        self.mode = None


def go(connection: Connection, name: str) -> Session:
    """Enter the transmission phase, by EXPORT_NAME with servers that do not know GO."""
    try:
        return connection.go(name)
    except OptionFailed as failure:
        if failure.reply != OptionReply.ERR_UNSUP:
            raise
    return connection.export_name(name)


def info_data(name: str | bytes) -> bytes:
    """The data of an INFO that asks for everything."""
    return pack_info_request(name, EVERY_INFO)


def drip(channel: Channel, data: bytes) -> None:
    """Send ``data`` byte by byte, with pauses in which a server that is quick sees each on its own."""
    for byte in data:
        channel.send(bytes([byte]))
        time.sleep(_PAUSE)


# What checks ask, and what they then look at.


def answer(connection: Connection, option: int, data: bytes = b"") -> int:
    """Ask one option and return the type of the final reply, whose text is looked at, too (P28)."""
    final = connection.ask(option, data)[-1]
    if final.is_error:
        parse_failure(option, final)
    if final.type == OptionReply.ERR_TLS_REQD:
        raise NotApplicable("the server demands TLS")
    return final.type


def expect_reply(observed: int, *allowed: OptionReply) -> None:
    """Deviate unless the final reply is one of ``allowed``."""
    expect(observed in allowed, f"the answer is {reply_name(observed)}")


def expect_in_sync(connection: Connection) -> None:
    """Deviate unless the server still takes options apart: an unknown one is refused as itself."""
    reply = answer(connection, 0x6E626471)
    expect(reply >> 31, f"what follows is answered with {reply_name(reply)}: the server has lost its place")


def expect_error(transaction: Transaction, *allowed: int) -> None:
    """Deviate unless a request failed with one of these errors."""
    if transaction.error not in allowed:
        raise Deviation(f"{command_name(transaction.command)} is answered with {error_name(transaction.error)}")


def expect_success(transaction: Transaction) -> Transaction:
    """Deviate unless a request succeeded."""
    expect_error(transaction, 0)
    return transaction


def expect_alive(session: Session, target: Target) -> None:
    """Deviate unless the connection is as usable as before."""
    try:
        transaction = session.call(Command.READ, 0, target.block)
        expect(not (transaction.error and target.size), f"the next READ fails with {error_name(transaction.error)}")
    except OSError as error:
        raise Deviation(f"the next request fails: {error.strerror or error}") from None
