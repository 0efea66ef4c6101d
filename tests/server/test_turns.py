"""Long answers to strangers' options: one at a time, and others in between (P16)."""

import asyncio
import struct
from itertools import pairwise

from nbdq.nbd.constants import Option
from nbdq.server.exports.export import Export
from nbdq.server.turns import Turns
from tests.server.client import READ, option
from tests.server.harness import LoopServer, MemoryDisk

CONTENT = bytes(1 << 20)
ACK = 1


def test_pieces_come_in_order_and_others_have_the_loop_for_longer_than_they() -> None:
    async def main() -> list[int]:
        loop, done = asyncio.get_running_loop(), []
        turns, times = Turns(loop), []

        def piece(number: int) -> None:
            begun = loop.time()
            while loop.time() - begun < 0.01:
                pass
            done.append(number)
            times.append((begun, loop.time()))
            if number < 3:
                turns.wait(lambda: piece(number + 3))

        for number in range(3):
            turns.wait(lambda number=number: piece(number))  # type: ignore[misc]
        while len(done) < 6:
            await asyncio.sleep(0)
        for (_, ended), (begun, _) in pairwise(times):
            assert begun - ended >= 0.03
        return done

    assert asyncio.run(main()) == [0, 1, 2, 3, 4, 5]


def test_clients_that_ask_for_long_lists_again_and_again_are_all_answered(loop: str) -> None:
    exports = [Export.read_only(f"disk{number}", MemoryDisk(CONTENT)) for number in range(600)]
    with LoopServer(*exports, loop=loop) as server:
        greedy = [server.connect() for _ in range(3)]
        for client in greedy:
            client.hello()
            client.socket.sendall(struct.pack(">I", 3) + option(Option.LIST) * 10)
        healthy = server.connect().go("disk1")
        healthy.send(READ, 0, 512)
        assert healthy.reply().data == bytes(512)
        for client in greedy:
            for _ in range(10):
                while client.option_reply()[1] != ACK:
                    pass
