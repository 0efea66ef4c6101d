"""A server under mixed load from several clients; for longer ones see ``soak.py``."""

import os

import pytest

from tests.interop.soak import DISKS, soak
from tests.support.tools import requires

pytestmark = [requires("qemu-img", "qemu-io"), pytest.mark.timeout(3600)]

SEED = int(os.environ.get("NBDQ_SEED", "1"))
TURNS = int(os.environ.get("NBDQ_SOAK_TURNS", "5"))


def test_many_clients_write_for_a_while_and_the_server_grows_neither_memory_nor_descriptors() -> None:
    print(f"seed {SEED}")
    figures = soak(DISKS["overlay"], seed=SEED, go_on=lambda turns: turns < TURNS)
    print(figures)
    figures.judge()
