"""Who is let in: limits of connections, and what happens to those beyond them (reliability.md 3.2)."""

import contextlib
import time

import pytest

from nbdq.server.admission.census import Census, source_of
from nbdq.server.admission.peer import Peer, host_of
from nbdq.server.exports.export import Export
from nbdq.server.limits import Limits
from tests.server.client import ACK, LIST, PATIENCE, Client, Disconnected, handshake, option
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk

POLICY = "refused with 0x80000002"


def refused(client: Client, name: str = "") -> Client:
    """Ask for an export and be told that there are enough clients; the handshake goes on."""
    client.socket.sendall(handshake(name))
    with pytest.raises(AssertionError, match=POLICY):
        client.finish_handshake()
    return client


def go_on(client: Client, name: str = "") -> None:
    """Ask again in the same handshake, without the client flags."""
    client.socket.sendall(handshake(name)[4:])
    while client.option_reply()[:2] != (7, 1):
        pass
    client.structured = True


@pytest.mark.parametrize(
    ("limits", "maximum"),
    [
        (Limits(connections=2), 0),
        (Limits(peer_connections=2), 0),
        (Limits(export_connections=2), 0),
        (Limits(export_connections=1), 2),
    ],
    ids=["all together", "one user", "one export", "an export with a number of its own"],
)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_who_is_one_too_many_is_told_so_and_can_have_the_place_of_who_leaves(
    loop: str, disk: MemoryDisk, limits: Limits, maximum: int, tcp: bool
) -> None:
    export = Export.read_only("", disk, maximum_connections=maximum)
    with LoopServer(export, loop=loop, limits=limits, tcp=tcp) as server:
        served = [server.connect().go() for _ in range(2)]
        waiting = refused(server.connect())
        assert served[0].read(0, 512) == CONTENT[:512]
        served.pop().socket.close()
        server.wait_for_connections(2)
        go_on(waiting)
        assert waiting.read(0, 512) == CONTENT[:512]
        refused(server.connect())


@pytest.mark.parametrize(
    ("limits", "name"), [(Limits(connections=1), "connections"), (Limits(peer_connections=1), "peer-connections")]
)
def test_the_log_names_the_limit_that_was_reached(
    disk: MemoryDisk, limits: Limits, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with LoopServer(Export.read_only("", disk), limits=limits) as server, caplog.at_level("WARNING", "nbdq"):
        server.connect().go()
        refused(server.connect())
    assert f"(limit {name})" in caplog.text


def test_an_export_that_is_full_keeps_nobody_from_the_others(loop: str, disk: MemoryDisk) -> None:
    exports = Export.read_only("small", disk, maximum_connections=1), Export.read_only("large", disk)
    with LoopServer(*exports, loop=loop) as server:
        server.connect().go("small")
        go_on(refused(server.connect(), "small"), "large")


def test_a_limit_of_nothing_is_none(loop: str, disk: MemoryDisk) -> None:
    limits = Limits(peer_connections=0, export_connections=0, handshake_seconds=0)
    with LoopServer(Export.read_only("", disk), loop=loop, limits=limits) as server:
        for _ in range(130):
            server.connect().go()


def test_a_crowd_of_silent_clients_makes_room_for_honest_ones_before_their_deadline(
    loop: str, disk: MemoryDisk
) -> None:
    limits = Limits(handshake_seconds=10 * PATIENCE, pending_handshakes=4, crowded_handshake_seconds=0.05)
    with LoopServer(Export.read_only("", disk), loop=loop, limits=limits) as server:
        silent = [server.connect() for _ in range(12)]
        honest = server.connect().go()
        assert honest.read(0, 512) == CONTENT[:512]
        for client in silent[:9]:
            client.hello()
            assert client.is_closed()
        time.sleep(0.3)
        assert server.negotiating == 3, "nobody waits any more, so nobody has to go"


def test_whoever_has_most_handshakes_makes_room_and_the_oldest_of_them_first() -> None:
    class Member:
        def shut_down(self) -> None: ...
        def abort(self, ending: object = None) -> None: ...

    census = Census(Limits(crowded_handshake_seconds=2))
    modest, first, second = Member(), Member(), Member()
    for when, (member, address) in enumerate([(modest, "192.0.2.1"), (first, "192.0.2.2"), (second, "192.0.2.2")]):
        census.accepted(member, Peer(when, address, host=host_of(address)), when)
    assert census.displaceable() == (first, 1 + 2)
    census.limits = Limits(pending_handshakes=3, crowded_handshake_seconds=2)
    assert census.displaceable() == (first, 1 + 0.2), "sooner, because they fill more than half of the places"
    census.left(first)
    assert census.displaceable()[0] is modest


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_a_client_is_known_by_what_it_cannot_choose_of_its_address(one: str, other: str, same: bool) -> None:
    """R-11; whoever has an IPv6 network has all 2^64 addresses of it."""
    sources = {source_of(Peer(0, address, host=host_of(address))) for address in (one, other)}
    assert (len(sources) == 1) is same


def test_limits_that_change_hold_for_those_who_come(loop: str, disk: MemoryDisk) -> None:
    with LoopServer(Export.read_only("", disk), loop=loop, limits=Limits(connections=1)) as server:
        first = server.connect().go()
        waiting = refused(server.connect())
        server.call(lambda: server._server.limit(Limits(connections=2, process_bytes=4 << 20)))
        go_on(waiting)
        server.call(lambda: server._server.limit(Limits(connections=1)))
        assert first.read(0, 512) == waiting.read(0, 512) == CONTENT[:512]
        refused(server.connect())


def test_lists_that_are_asked_for_all_at_once_come_one_after_the_other(loop: str, disk: MemoryDisk) -> None:
    """R-05: each is made when the one before has left, so that nobody holds many of them, nor holds up others."""
    exports = [Export.read_only(str(number), disk) for number in range(400)]
    with LoopServer(*exports, loop=loop) as server:
        client = server.connect()
        client.socket.sendall(handshake()[:4] + option(LIST) * 20)
        client.hello()
        for _ in range(20):
            names = [client.option_reply()[2][4:].decode() for _ in exports]
            assert names == [export.info.name for export in exports]
            assert client.option_reply() == (LIST, ACK, b"")
        go_on(client, "399")


def test_more_options_than_the_limit_end_a_handshake(loop: str, disk: MemoryDisk) -> None:
    with LoopServer(Export.read_only("", disk), loop=loop, limits=Limits(options=3)) as server:
        client = server.connect()
        client.socket.sendall(handshake()[:4] + 4 * (b"IHAVEOPT" + bytes([0, 0, 0, 99, 0, 0, 0, 0])))
        client.hello()
        with contextlib.suppress(Disconnected):
            for _ in range(3):
                client.option_reply()
        assert client.is_closed()
