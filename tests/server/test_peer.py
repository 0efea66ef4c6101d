"""Who a client is said to be."""

import socket

import pytest

from nbdq.server.admission.peer import Peer


@pytest.mark.parametrize(
    ("family", "address", "shown"),
    [
        (socket.AF_INET, ("192.0.2.1", 40000), "192.0.2.1:40000"),
        (socket.AF_INET6, ("2001:db8::1", 40000, 0, 0), "[2001:db8::1]:40000"),
        (socket.AF_INET6, ("fe80::1%eth0", 40000, 0, 2), "[fe80::1%eth0]:40000"),
    ],
)
def test_the_port_of_a_client_can_be_told_from_its_address(
    family: socket.AddressFamily, address: tuple[object, ...], shown: str
) -> None:
    with socket.socket(family) as sock:
        assert str(Peer.of(sock, address, 7)) == f"#7 {shown}"
