"""What exports demand of clients, and what those hear who do not meet it (R-07, R-11, R-16, P37, P64)."""

import os
import socket
import threading
from collections.abc import Callable

import pytest

from nbdq.errors import ExportError
from nbdq.nbd.exports import Negotiated
from nbdq.server.admission.access import Access
from nbdq.server.admission.census import Census
from nbdq.server.admission.entrance import Entrance
from nbdq.server.admission.peer import Identity, Peer, host_of
from nbdq.server.exports.export import Export, Exports
from nbdq.server.limits import Limits
from tests.server.client import EXPORT_NAME, LIST, Client, handshake, option
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk

UNKNOWN, POLICY = 0x80000006, 0x80000002


def remote(address: str) -> Peer:
    return Peer(1, address, host=host_of(address))


def local(user: int, *groups: int) -> Peer:
    return Peer(1, "unix", user=user, group=groups[0] if groups else user, groups=frozenset(groups))


def proven(subject: str, *names: str) -> Peer:
    peer = remote("192.0.2.1")
    peer.secure, peer.identity = True, Identity(subject, frozenset(names))
    return peer


def admits(access: Access, peer: Peer) -> bool:
    return not access.objection(peer) and not access.mistrust(peer)


@pytest.mark.parametrize(
    ("networks", "address", "admitted"),
    [
        (["192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.20.1", False),
        (["192.0.2.1"], "192.0.2.10", False),  # CVE-2013-6410: no prefix of the text
        (["192.0.2.1"], "192.0.2.1", True),
        (["192.0.2.0/24"], "::ffff:192.0.2.7", True),
        (["::ffff:192.0.2.0/120"], "192.0.2.7", True),
        (["::ffff:192.0.2.0/120"], "192.0.3.7", False),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["::/0"], "2001:db8::1", True),
        (["2001:db8::/32"], "2001:db8:ffff::1", True),
        (["2001:db8::/32"], "2001:db9::1", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["10.0.0.0/8", "192.0.2.0/24"], "192.0.2.1", True),
    ],
)
def test_networks_are_those_of_both_families(networks: list[str], address: str, admitted: bool) -> None:
    """R-11."""
    assert admits(Access.of(networks=networks), remote(address)) is admitted


@pytest.mark.parametrize(
    ("access", "peer", "admitted"),
    [
        (Access.of(users=[1000]), local(1000), True),
        (Access.of(users=[1000]), local(0), False),
        (Access.of(users=["root"]), local(0), True),
        (Access.of(groups=[100]), local(1000, 1000, 100), True),
        (Access.of(groups=[100]), local(1000, 1000), False),
        (Access.of(users=[1], groups=[100]), local(2, 100), True),
        (Access.of(users=[1000]), remote("127.0.0.1"), False),
        (Access.of(networks=["127.0.0.0/8"]), local(0), False),
        (Access.of(networks=["127.0.0.0/8"], users=[0]), local(0), True),
        (Access.of(networks=["127.0.0.0/8"], users=[0]), remote("127.0.0.1"), True),
        (Access(), remote("192.0.2.1"), True),
        (Access(), local(1234), True),
    ],
)
def test_a_demand_on_one_kind_of_client_keeps_the_other_out(access: Access, peer: Peer, admitted: bool) -> None:
    assert admits(access, peer) is admitted


def test_an_objection_is_about_what_was_demanded() -> None:
    """It is what the log says, and an operator who never named a user must not look for one."""
    assert "only clients of certain networks" in Access.of(networks=["127.0.0.0/8"]).objection(local(0))
    assert "only clients on unix sockets" in Access.of(users=[0]).objection(remote("127.0.0.1"))


@pytest.mark.parametrize(
    ("patterns", "peer", "admitted"),
    [
        (["CN=laptop,O=Example"], proven("CN=laptop,O=Example"), True),
        (["CN=laptop"], proven("CN=laptop,O=Example"), False),
        (["CN=laptop*"], proven("CN=laptop,O=Example"), True),
        (["*,O=Example"], proven("CN=laptop,O=Example"), True),
        (["cn=laptop,O=Example"], proven("CN=laptop,O=Example"), False),
        (["DNS:*.example.com"], proven("", "DNS:a.example.com", "IP:192.0.2.1"), True),
        (["DNS:*.example.com"], proven("DNS=x", "DNS:example.org"), False),
        (["PSK:alice", "PSK:bob"], proven("", "PSK:bob"), True),
        (["PSK:alice"], proven("", "PSK:alice2"), False),
        (["*"], remote("192.0.2.1"), False),
        (["*"], Peer(1, "x", secure=True), False),
    ],
)
def test_who_proves_what_is_held_against_the_whole_subject_and_every_name(
    patterns: list[str], peer: Peer, admitted: bool
) -> None:
    """R-16; without a proof there is nothing that a pattern could match."""
    assert admits(Access.of(subjects=patterns), peer) is admitted


def test_all_demands_must_be_met() -> None:
    access = Access.of(tls=True, networks=["192.0.2.0/24"], subjects=["CN=a"])
    assert admits(access, proven("CN=a"))
    assert not admits(access, proven("CN=b"))
    elsewhere = proven("CN=a")
    elsewhere.host = host_of("198.51.100.1")
    assert not admits(access, elsewhere)


@pytest.mark.parametrize(
    "words",
    [
        {"networks": ["192.0.2.1/24"]},
        {"networks": ["example.com"]},
        {"networks": []},
        {"users": ["nobody-of-this-name"]},
        {"users": []},
        {"groups": ["nobody-of-this-name"]},
        {"subjects": []},
    ],
    ids=str,
)
def test_words_that_mean_nothing_or_anything_are_refused(words: dict[str, list[str]]) -> None:
    with pytest.raises(ExportError):
        Access.of(**words)  # type: ignore[arg-type]


def answers(client: Client, said: bytes, last: int) -> list[tuple[int, int, bytes]]:
    """What a client is answered to its options, up to the answer to one of code ``last``."""
    client.socket.sendall(said)
    client.hello()
    found = []
    while not found or found[-1][0] != last or found[-1][1] in (2, 3):
        found.append(client.option_reply())
    return found


def test_an_export_for_others_does_not_exist_in_any_answer(loop: str, disk: MemoryDisk) -> None:
    """P37: what a client hears of it is what it hears of a name that nobody has."""
    secret = Export.read_only("secret", disk, access=Access.of(users=[os.getuid() + 1]))
    with LoopServer(Export.read_only("open", disk), secret, loop=loop) as server:
        listed = answers(server.connect(), handshake()[:4] + option(LIST), LIST)
        assert [data[4:] for _, reply, data in listed if reply == 2] == [b"open"]
        heard = {}
        for name in ("secret", "absent"):
            (heard[name],) = answers(server.connect(), handshake(name, structured=False), 7)
            legacy = server.connect()
            legacy.socket.sendall(handshake()[:4] + option(EXPORT_NAME, name.encode()))
            legacy.hello()
            assert legacy.is_closed()
        assert heard["secret"][1] == UNKNOWN
        assert heard["secret"][2].replace(b"secret", b"absent") == heard["absent"][2]
        assert server.connect().go("open").read(0, 512) == CONTENT[:512]


def test_what_is_demanded_changes_for_who_comes_and_cuts_nobody(loop: str, disk: MemoryDisk) -> None:
    export = Export.read_only("", disk, access=Access.of(users=[os.getuid()]))
    with LoopServer(export, loop=loop) as server:
        early = server.connect().go()
        server.call(lambda: setattr(export, "access", Access.of(networks=["192.0.2.0/24"])))
        assert answers(server.connect(), handshake(structured=False), 7)[0][1] == UNKNOWN
        assert early.read(0, 512) == CONTENT[:512]


def test_demands_that_changed_while_a_client_was_being_told_of_an_export_hold(disk: MemoryDisk) -> None:
    export = Export.read_only("", disk)
    entrance = Entrance(Exports([export]), remote("192.0.2.1"), Census(Limits()))
    info = entrance.find("")
    assert info is not None
    assert entrance.chosen(Negotiated(info, False, ())) is export
    export.access = Access.of(networks=["198.51.100.0/24"])
    assert entrance.chosen(Negotiated(info, False, ())) is None


def test_an_export_that_demands_tls_says_so_where_it_can_be_had_only_to_those_who_may_come_near(
    loop: str, disk: MemoryDisk
) -> None:
    """P64; here it cannot be had."""
    near = Export.read_only("near", disk, access=Access.of(tls=True, networks=["127.0.0.0/8"]))
    far = Export.read_only("far", disk, access=Access.of(tls=True, networks=["192.0.2.0/24"]))
    with LoopServer(near, far, loop=loop, tcp=True) as server:
        assert answers(server.connect(), handshake("near", structured=False), 7)[0][1] == POLICY
        assert answers(server.connect(), handshake("far", structured=False), 7)[0][1] == UNKNOWN


def test_networks_are_asked_of_real_addresses(loop: str, disk: MemoryDisk) -> None:
    exports = [
        Export.read_only(name, disk, access=Access.of(networks=[network]))
        for name, network in (("here", "127.0.0.1"), ("there", "127.0.0.2"))
    ]
    with LoopServer(*exports, loop=loop, tcp=True) as server:
        for source, name in (("127.0.0.1", "here"), ("127.0.0.2", "there")):
            client = server.connect()
            client.socket.close()
            client.socket = socket.create_connection(server.address, source_address=(source, 0))
            assert client.go(name).read(0, 512) == CONTENT[:512]
            client.socket.close()
        assert answers(server.connect(), handshake("there", structured=False), 7)[0][1] == UNKNOWN


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become other users")
def test_users_and_groups_are_those_of_the_process_that_connects(loop: str, disk: MemoryDisk) -> None:
    """SO_PEERCRED and SO_PEERGROUPS: the moment of connecting counts."""
    exports = [
        Export.read_only("user", disk, access=Access.of(users=[4321])),
        Export.read_only("group", disk, access=Access.of(groups=[5432])),
    ]
    with LoopServer(*exports, loop=loop) as server:
        path = str(server.address)
        for directory in (path, os.path.dirname(path)):
            os.chmod(directory, 0o777)
        for user, groups, expected in (
            (4321, [1], {"user": True, "group": False}),
            (1234, [1, 5432], {"user": False, "group": True}),
            (1234, [1], {"user": False, "group": False}),
        ):
            for name, admitted in expected.items():
                code = as_user(user, groups, lambda name=name: Client(path).go(name).socket.close())
                assert (code == 0) is admitted, (user, groups, name)


def as_user(user: int, groups: list[int], act: Callable[[], None]) -> int:
    """The exit status of a process of that user which does so; 0 if it succeeds."""
    process = os.fork()
    if not process:
        try:
            os.setgroups(groups)
            os.setgid(1)
            os.setuid(user)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_strangers_cost_no_access_to_the_disk(loop: str) -> None:
    """R-07."""
    disk = MemoryDisk(CONTENT, cached=False)
    limits = Limits(peer_connections=0)
    with LoopServer(Export.read_only("", disk, access=Access.of(users=[1])), loop=loop, limits=limits) as server:
        threads = [
            threading.Thread(target=answers, args=(server.connect(), handshake(structured=False), 7)) for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not disk.performed
        assert not disk.pieces_gathered
