"""A server that is killed at its work loses nothing that it promised, and leaves at most leaks behind.

The ordinary run kills a few times; ``NBDQ_KILLS=500 NBDQ_SEED=$RANDOM ./run-tests tests/interop/test_kill.py`` often.
"""

import itertools
import os
import random
import tempfile
import threading
from pathlib import Path

import pytest

from tests.random.twins import raw_contents
from tests.server.client import Client, Disconnected
from tests.support.images import Image, Layer, Variant, build
from tests.support.load import Ledger, LoadClient
from tests.support.operations import random_operations
from tests.support.scratch import scratch
from tests.support.serving import PATIENCE, Server
from tests.support.tools import execute, requires
from tests.support.writing import read_in_process

pytestmark = [requires("qemu-img", "qemu-io"), pytest.mark.timeout(3600)]

SEED = int(os.environ.get("NBDQ_SEED", "1"))
KILLS = int(os.environ.get("NBDQ_KILLS", "20"))
#: Seconds that a server may live under load; it is killed at any moment of them.
LIFE = 0.25

BASE = Layer("4M", ("write 0 2M", "compress 3M 512k"))
DISKS = (
    Variant("plain", (Layer("4M"),)),
    Variant("small-clusters", (Layer("4M", (), "cluster_size=4k"),)),
    Variant("many-refcount-blocks", (Layer("2M", (), "cluster_size=512,refcount_bits=64"),)),
    Variant("over-a-base", (BASE, Layer("4M", ("compress 1M 1M",)))),
    Variant("subclusters-over-a-base", (BASE, Layer("4M", (), "extended_l2=on"))),
    Variant("snapshot", (Layer("4M", ("write 0 3M", "snapshot before"), "cluster_size=16k"),)),
)


@pytest.mark.parametrize("variant", DISKS, ids=str)
def test_killing_a_busy_server_again_and_again_loses_nothing_that_was_flushed(variant: Variant) -> None:
    with scratch() as directory:
        image = build(variant, directory)
        ledger = Ledger(raw_contents(image), cluster_size=variant.layers[-1].cluster_size)
        requests = 0
        for life in range(-(-KILLS // len(DISKS))):
            seed = f"{SEED}:{variant}:{life}"
            print(f"seed {seed}")
            requests += _live_and_die(image, ledger, random.Random(seed), number=life * 1_000_000)
            check = execute("qemu-img", "check", "-f", "qcow2", image.top)
            assert check.returncode in (0, 3), check.stdout + check.stderr
            content = raw_contents(image)
            assert read_in_process(image) == content
            ledger.judge(content)
        assert requests, "no server ever answered"


def _live_and_die(image: Image, ledger: Ledger, generator: random.Random, *, number: int) -> int:
    """Start a server, load it, and kill it; return how many requests it answered."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        server = Server(image.top, directory=Path(directory))
        Server.running.append(server)
        try:
            server.wait_until_ready()
            operations = random_operations(
                generator.randrange(1 << 30),
                3000,
                size=len(ledger.durable),
                cluster_size=ledger.cluster_size,
                number=number,
                whole_sectors=True,
            )
            load = LoadClient(Client(str(server.socket)).go(), ledger)
            load.play(operations[:5])
            end = threading.Timer(generator.uniform(0, LIFE), server.process.kill)
            end.start()
            with pytest.raises((Disconnected, OSError)):
                load.play(itertools.chain(operations[5:], itertools.cycle(operations)))
            end.join(PATIENCE)
            assert "Traceback" not in server.stderr, server.stderr
            return load.answered
        finally:
            Server.running.remove(server)
            server.kill()
