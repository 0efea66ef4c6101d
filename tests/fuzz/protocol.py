"""A state machine for a live server: up to four clients, who say right and wrong things, and an administrator.

    python -m tests.fuzz.protocol [--examples 500] [--steps 60] [--seed 1]

Every reply is judged, by the client for its form (``tests/server/client.py``) and by ``model`` for what it says. A
failure is printed as a program of the steps that lead to it. The test suite runs a small part of it.
"""

import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import click
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from nbdq.server.exports.export import Export
from tests.fuzz.model import UNIT, Model, Watch
from tests.server.client import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    EINVAL,
    ENOSPC,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PATIENCE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Disconnected,
    Reply,
)
from tests.server.harness import LoopServer, WritableDisk

ESHUTDOWN = 108
_CAPACITY = 256
_CLIENTS_MAX = 4
#: What may wait for one client, so that neither side has to wait for the other to take it.
_OUTSTANDING_MAX = 96 << 10
_NAMES = ("main", "second", "third")


class Disk(WritableDisk):
    """One of any size up to its capacity, whose requests take unequal times, and which hands out no views of itself."""

    def __init__(self, size: int) -> None:
        super().__init__(bytes(_CAPACITY * UNIT))
        self.size = size * UNIT

    def gather_cached(self, offset: int, length: int) -> list[Any] | None:
        pieces = super().gather_cached(offset, length)
        return None if pieces is None else [memoryview(bytes(piece)) for piece in pieces]

    def _pass(self, offset: int) -> None:
        super()._pass(offset)
        if not len(self.performed) % 3:
            time.sleep(0.001)  # so that others can overtake

    def resize(self, size: int) -> None:
        """``size`` units; what was cut off reads as zeros when it comes again."""
        self.content[size * UNIT :] = bytes(len(self.content) - size * UNIT)
        self.durable = self.durable[: size * UNIT] + bytes(len(self.content) - size * UNIT)
        self.size = size * UNIT


@dataclass(frozen=True)
class Wish:
    """A request; ``start`` and ``count`` in units, or in bytes for a READ that is not ``aligned``."""

    command: int
    start: int = 0
    count: int = 1
    flags: int = 0
    value: int = 1
    is_wrong: bool = False
    aligned: bool = True

    def within(self, size: int) -> "Wish":
        """The same at a place that begins in a disk of ``size`` units, or right behind its end."""
        size = (size + 1) * (1 if self.aligned else UNIT)
        return replace(self, start=self.start % size)

    @property
    def offset(self) -> int:
        return self.start * (UNIT if self.aligned else 1)

    @property
    def length(self) -> int:
        return self.count * (UNIT if self.aligned else 1)


def _wishes() -> st.SearchStrategy[Wish]:
    start = st.one_of(st.integers(0, 4), st.integers(0, _CAPACITY))  # often where others are, too
    count = st.integers(0, 6)
    value = st.integers(1, 255)
    return st.one_of(
        st.builds(Wish, st.just(READ), start, count),
        st.builds(Wish, st.just(READ), st.integers(0, 1 << 20), st.integers(1, 9000), aligned=st.just(False)),
        st.builds(Wish, st.just(WRITE), start, count, st.sampled_from((0, 0, FUA)), value),
        st.builds(
            Wish, st.just(WRITE_ZEROES), start, count, st.sampled_from((0, FUA, NO_HOLE, FAST_ZERO, NO_HOLE | FUA))
        ),
        st.builds(Wish, st.just(TRIM), start, count, st.sampled_from((0, FUA))),
        st.builds(Wish, st.just(FLUSH), st.just(0), st.just(0)),
        st.builds(Wish, st.just(CACHE), start, count),
        st.builds(Wish, st.just(BLOCK_STATUS), start, count, st.sampled_from((0, REQ_ONE))),
        st.builds(Wish, st.integers(8, 1000), start, count, is_wrong=st.just(True)),
        st.builds(
            Wish,
            st.sampled_from((READ, FLUSH, TRIM, CACHE, WRITE, WRITE_ZEROES, BLOCK_STATUS)),
            start,
            count,
            st.sampled_from((1 << 6, 1 << 9, 1 << 15)),
            is_wrong=st.just(True),
        ),
    )


@dataclass
class Sent:
    """A request that waits for its reply."""

    wish: Wish
    error: int
    """What the reply has to say."""
    seen: Watch | None = None
    """What a READ may return."""
    durable: Watch | None = None
    """What must be durable when the reply comes."""

    @property
    def changes(self) -> bool:
        return not self.error and self.wish.command in (WRITE, WRITE_ZEROES, TRIM) and self.wish.count > 0


@dataclass(eq=False)
class Connection:
    """A client in the transmission phase."""

    client: Client
    name: str
    writable: bool
    sent: dict[int, Sent] = field(default_factory=dict)
    waiting: int = 0
    """Bytes that may wait for it, or for the server."""

    def say(self, data: bytes) -> None:
        """Send, although the server may read it only later."""
        sock = self.client.socket
        sock.settimeout(None)  # with a time-out, Python would wait until three quarters of a unix socket are free
        sock.sendall(data)
        sock.settimeout(PATIENCE)


_SIZES = st.sampled_from((_CAPACITY, _CAPACITY - 1, 64, 9, 1))


class Protocol(RuleBasedStateMachine):
    """The steps."""

    @initialize(loop=st.sampled_from(("uvloop", "asyncio")), cached=st.booleans(), size=_SIZES)
    def begin(self, loop: str, cached: bool, size: int) -> None:
        self.model = Model(size)
        self.disk = Disk(size)
        self.disk.cached = cached
        self.exports = {"main": Export.writable("main", self.disk)}
        self.gates = [self.exports["main"].gate]
        self.server = LoopServer(self.exports["main"], loop=loop)
        self.server.__enter__()
        self.connections: list[Connection] = []
        self.paused: set[str] = set()

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        try:
            for connection in list(self.connections):
                self._collect(connection)
                connection.client.socket.close()
        except BaseException as error:
            self.server.__exit__(type(error), error, None)
            raise
        self.server.__exit__(None, None, None)

    # Clients.

    @precondition(lambda self: self.exports and len(self.connections) < _CLIENTS_MAX)
    @rule(name=st.integers(0, 2), style=st.sampled_from(("simple", "structured", "extended")), contexts=st.booleans())
    def connect(self, name: int, style: str, contexts: bool) -> None:
        chosen = list(self.exports)[name % len(self.exports)]
        wanted = ("base:allocation",) if contexts and style != "simple" else ()
        client = self.server.connect()
        client.go(chosen, structured=style != "simple", extended=style == "extended", contexts=wanted)
        assert client.size == self.model.size * UNIT
        export = self.exports[chosen]
        assert bool(client.flags & 2) == (export.writing is None)
        self.connections.append(Connection(client, chosen, export.writing is not None))

    @precondition(lambda self: self.connections)
    @rule(which=st.integers(0, 3), wishes=st.lists(_wishes(), min_size=1, max_size=12))
    def send(self, which: int, wishes: list[Wish]) -> None:
        connection = self._connection(which)
        said = b""
        for wish in (wish.within(self.model.size) for wish in wishes):
            cost = 64 + wish.length
            if connection.waiting + cost <= _OUTSTANDING_MAX and connection.client.outstanding < 100:
                connection.waiting += cost
                said += self._ask(connection, wish)
        connection.say(said)

    @precondition(lambda self: self.connections)
    @rule(
        which=st.integers(0, 3),
        reader=st.integers(0, 3),
        wishes=st.lists(_wishes(), min_size=1, max_size=6),
        again=st.permutations((WRITE, WRITE_ZEROES, TRIM)),
    )
    def change_and_look(self, which: int, reader: int, wishes: list[Wish], again: list[int]) -> None:
        """What one changes, and changes again, another reads when all is answered; and it is durable after a flush."""
        self.send(which, wishes)
        changed = [wish for wish in wishes if wish.aligned and not wish.is_wrong]
        for command in again:
            self.send(which, [replace(wish, command=command, flags=0) for wish in changed])
        self._collect(self._connection(which))
        looks = [Wish(READ, wish.start, wish.count) for wish in wishes if wish.aligned]
        self.send(reader, [Wish(FLUSH, 0, 0), *looks])
        self._collect(self._connection(reader))

    @precondition(lambda self: self.connections)
    @rule(which=st.integers(0, 3), start=st.integers(0, 200), count=st.integers(40, 200), value=st.integers(1, 255))
    def write_much(self, which: int, start: int, count: int, value: int) -> None:
        """More than one receive buffer holds, and its echo."""
        connection = self._connection(which)
        self._collect(connection)
        connection.say(self._ask(connection, Wish(WRITE, start, count, 0, value)))
        self._collect(connection)
        connection.say(self._ask(connection, Wish(READ, start, count)))
        self._collect(connection)

    @precondition(lambda self: self.connections)
    @rule(which=st.integers(0, 3))
    def collect(self, which: int) -> None:
        self._collect(self._connection(which))

    @precondition(lambda self: self.connections)
    @rule(
        which=st.integers(0, 3),
        garbage=st.sampled_from((b"", b"\x25\x60\x95\x12" + bytes(40), b"GET / HTTP/1.1\r\n" * 3)),
    )
    def end(self, which: int, garbage: bytes) -> None:
        """Good-bye, or what cannot be followed: all that was asked for before is answered (P93, P141)."""
        connection = self._connection(which)
        self._resume(connection.name)
        connection.say(garbage or connection.client.pack(DISC))
        self._collect(connection)
        assert connection.client.is_closed()
        self._forget(connection)

    @precondition(lambda self: self.connections)
    @rule(which=st.integers(0, 3))
    def vanish(self, which: int) -> None:
        """Close without a word and without taking replies: nobody is told which changes have happened."""
        connection = self._connection(which)
        self._resume(connection.name)
        connection.client.socket.close()
        self._forget(connection)

    # The administrator.

    @rule(wanted=st.booleans(), cached=st.booleans())
    def pause_or_resume(self, wanted: bool, cached: bool) -> None:
        """Hold clients back, or serve them, from now on at once or by the pool."""
        self.server.call(lambda: setattr(self.disk, "cached", cached))
        if not wanted:
            for name in list(self.paused):
                self._resume(name)
            return
        for name, export in self.exports.items():
            self.server.wait(lambda export=export: export.pause(None))
            self.paused.add(name)
        before = len(self.disk.performed), len(self.disk.changes)
        self.server.call(lambda: None)
        assert before == (len(self.disk.performed), len(self.disk.changes))

    @rule(size=_SIZES)
    def resize(self, size: int) -> None:
        """The protocol tells clients nothing, so what is on its way would be a matter of luck."""
        for connection in self.connections:
            self._collect(connection)

        def change() -> None:
            self.disk.resize(size)
            for export in self.exports.values():
                export.adopt(self.disk)

        self.server.call(change)
        self.model.resize(size)
        for connection in self.connections:
            connection.client.size = size * UNIT

    @rule(which=st.integers(0, 2), writable=st.booleans(), at_once=st.booleans())
    def add_or_remove_export(self, which: int, writable: bool, at_once: bool) -> None:
        name = _NAMES[which]
        if name in self.exports:
            self._remove_export(name, at_once=at_once)
            return
        self.exports[name] = self.server.call(lambda: Export.make(name, self.disk, writable=writable))
        self.server.call(lambda: self.server._server._exports.add(self.exports[name]))
        self.gates.append(self.exports[name].gate)

    def _remove_export(self, name: str, *, at_once: bool) -> None:
        """What clients have sent is answered or refused, and then they hang up; unless all have to go at once."""
        export = self.exports.pop(name)
        self.paused.discard(name)

        def remove() -> None:
            self.server._server._exports.delete(export)
            export.cut(at_once=at_once)

        self.server.call(remove)
        leaving = [connection for connection in self.connections if connection.name == name]
        for connection in leaving:
            with suppress(Disconnected, OSError) if at_once else nullcontext():
                while connection.client.outstanding:
                    self._judge(connection, connection.client.reply(), may_be_late=True)
                connection.say(connection.client.pack(DISC))
            assert connection.client.is_closed()
            connection.client.socket.close()
        self._forget(*leaving)

    # How it is done.

    def _connection(self, which: int) -> Connection:
        return self.connections[which % len(self.connections)]

    def _resume(self, name: str) -> None:
        if name in self.paused:
            self.paused.discard(name)
            self.server.call(self.exports[name].resume)

    def _ask(self, connection: Connection, wish: Wish) -> bytes:
        """The bytes of a request, which the model knows of from now on."""
        header = connection.client.pack(wish.command, wish.offset, wish.length, flags=wish.flags)
        sent = Sent(wish, self._error(connection, wish))
        connection.sent[int.from_bytes(header[8:16], "big")] = sent
        end = wish.start + wish.count
        if not sent.error:
            if wish.command == READ and wish.count:
                units = -(-(wish.offset + wish.length) // UNIT)
                sent.seen = self.model.watch(wish.offset // UNIT, units)
            elif wish.command == FLUSH and connection.writable:
                sent.durable = self.model.watch(0, self.model.size)
            elif sent.changes:
                if wish.flags & FUA:
                    sent.durable = self.model.watch(wish.start, end, without_present=True)
                value = wish.value if wish.command == WRITE else 0
                self.model.begin(connection, wish.start, end, value)
        return header + (bytes((wish.value,)) * wish.length if wish.command == WRITE else b"")

    def _error(self, connection: Connection, wish: Wish) -> int:
        """What the specification says of such a request (P82, P83, P86, P87, W4)."""
        command = wish.command
        changes = command in (WRITE, WRITE_ZEROES, TRIM)
        if command > BLOCK_STATUS:
            return EINVAL
        if changes and not connection.writable:
            return EPERM
        if command == BLOCK_STATUS and not connection.client.contexts:
            return EINVAL
        if wish.is_wrong:
            return EINVAL
        if command == FLUSH:
            return 0
        if wish.offset + wish.length > self.model.size * UNIT:
            return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
        return EINVAL if command == BLOCK_STATUS and not wish.length else 0

    def _collect(self, connection: Connection) -> None:
        """Take all replies that are outstanding."""
        self._resume(connection.name)
        while connection.sent:
            self._judge(connection, connection.client.reply())
        connection.waiting = 0

    def _judge(self, connection: Connection, reply: Reply, *, may_be_late: bool = False) -> None:
        """``may_be_late``: the server may have refused the request because the export had to go (P99)."""
        sent = connection.sent[reply.cookie]
        wish = sent.wish
        if may_be_late and reply.error == ESHUTDOWN:
            return
        del connection.sent[reply.cookie]
        assert reply.error == sent.error, f"{wish}: {reply}"
        if sent.changes:
            self.model.end(wish.start, wish.start + wish.count, happened=True)
        if sent.seen is not None:
            self._judge_content(wish, reply.data, sent.seen)
            self.model.stop(sent.seen)
        if sent.durable is not None:
            durable, watch = self.disk.durable, sent.durable
            for number, possible in enumerate(watch.possible, watch.start):
                assert durable[number * UNIT] in possible, f"{wish} is answered, and unit {number} is not durable"
            self.model.stop(watch)
        if wish.command == BLOCK_STATUS and not reply.error:
            assert all(flags == 0 for extents in reply.status.values() for _, flags in extents)

    def _judge_content(self, wish: Wish, data: bytes, watch: Watch) -> None:
        assert len(data) == wish.length
        for number, possible in enumerate(watch.possible, watch.start):
            piece = data[max(0, number * UNIT - wish.offset) : (number + 1) * UNIT - wish.offset]
            (value,) = set(piece)
            assert value in possible, f"unit {number} is {value}, not one of {possible}"

    def _forget(self, *connections: Connection) -> None:
        """They are gone; return when nothing that they asked for can happen any more."""
        for connection in connections:
            self.connections.remove(connection)
        self.server.wait_for_connections(len(self.connections))
        self.server.wait_for(self._is_quiet, "a request of a client that has gone is still in progress")
        for sent in [sent for connection in connections for sent in connection.sent.values()]:
            if sent.changes:
                self.model.end(sent.wish.start, sent.wish.start + sent.wish.count, happened=None)
            for watch in (sent.seen, sent.durable):
                if watch is not None:
                    self.model.stop(watch)

    def _is_quiet(self) -> bool:
        sessions = self.server.call(lambda: sum(len(gate._sessions) for gate in self.gates))
        return sessions == len(self.connections)


def explore(*, examples: int, steps: int, seed_number: int | None = None, shrink: bool = True) -> None:
    """Run the machine so many times, with at most so many steps each; the same ones each time without a seed."""
    machine = Protocol if seed_number is None else seed(seed_number)(Protocol)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=seed_number is None,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        ),
    )


@click.command()
@click.option("--examples", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", "seed_number", type=int, default=1, show_default=True)
def main(examples: int, steps: int, seed_number: int) -> None:
    """Let clients say right and wrong things to a live server."""
    explore(examples=examples, steps=steps, seed_number=seed_number)
    click.echo(f"{examples} examples of up to {steps} steps, seed {seed_number}: nothing found")


if __name__ == "__main__":
    main()
