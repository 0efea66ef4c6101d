"""What may be on a medium after a power cut, and what a guest may then read: the model, without any disk."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nbdq.qcow2.bitmaps.bits import DirtyBits
from nbdq.storage import FileStorage
from tests.crash.guest import History, Verb
from tests.crash.recorder import SECTOR, Act, Entry, Recorder
from tests.crash.schedule import Deadlock, Schedule
from tests.crash.stamps import ELSEWHERE, GARBAGE, ZEROS, read_stamps, stamped
from tests.crash.states import Moment, Timeline, choices, everything, materialise

A, B, C = (bytes([letter]) * SECTOR for letter in b"ABC")


def _write(sector: int, data: bytes, *, begun: int, ended: int, file: int = 0) -> Entry:
    return Entry(file, Act.WRITE, sector * SECTOR, len(data), data, begun, ended)


def _sync(*, begun: int, ended: int, file: int = 0) -> Entry:
    return Entry(file, Act.SYNC, 0, 0, b"", begun, ended)


def _possible(entries: list[Entry], cut: int, initial: bytes = bytes(2 * SECTOR)) -> set[bytes]:
    """The first bytes of all sectors in every state that is chosen for one moment."""
    timeline = Timeline([initial], entries)
    moment = timeline.at(cut)
    generator = random.Random(1)
    states = (materialise(moment, fates)[0] for fates in choices(moment, None, generator, count=1000))
    return {bytes(state[::SECTOR]) for state in states}


def test_a_write_may_be_lost_until_a_sync_that_began_after_it_has_ended() -> None:
    entries = [_write(0, A, begun=1, ended=2), _sync(begun=3, ended=5)]
    assert _possible(entries, 4) == {b"\0\0", b"A\0"}
    assert _possible(entries, 5) == {b"A\0"}


def test_a_write_that_ended_after_the_sync_began_may_be_lost() -> None:
    entries = [_write(0, A, begun=1, ended=4), _sync(begun=3, ended=5)]
    assert _possible(entries, 6) == {b"\0\0", b"A\0"}


def test_writes_reach_the_medium_in_any_combination() -> None:
    entries = [_write(0, A, begun=1, ended=2), _write(1, B, begun=3, ended=4)]
    assert _possible(entries, 5) == {b"\0\0", b"A\0", b"\0B", b"AB"}


def test_a_later_write_to_the_same_place_wins_where_both_are_there() -> None:
    entries = [_write(0, A, begun=1, ended=2), _write(0, B, begun=3, ended=4)]
    assert _possible(entries, 5) == {b"\0\0", b"A\0", b"B\0"}


def test_a_durable_write_hides_an_uncertain_one_that_came_before_it() -> None:
    entries = [_write(0, A, begun=1, ended=9), _write(0, B, begun=2, ended=3), _sync(begun=4, ended=5)]
    assert _possible(entries, 6) == {b"B\0"}


def test_a_torn_write_leaves_any_of_its_sectors() -> None:
    assert _possible([_write(0, A + B, begun=1, ended=2)], 3) == {b"\0\0", b"A\0", b"\0B", b"AB"}


def test_the_files_of_a_disk_are_synced_each_by_itself() -> None:
    entries = [
        _write(0, A, begun=1, ended=2, file=0),
        _write(0, B, begun=3, ended=4, file=1),
        _sync(begun=5, ended=6, file=1),
    ]
    moment = Timeline([b"", b""], entries).at(7)
    assert [entry.file for entry in moment.pending] == [0]
    assert moment.certain[1] == B


def test_a_file_that_grew_may_be_long_and_empty() -> None:
    timeline = Timeline([b""], [_write(1, A, begun=1, ended=2)])
    moment = timeline.at(3)
    found = {bytes(materialise(moment, fates)[0]) for fates in choices(moment, None, random.Random(1), count=9)}
    assert found == {b"", bytes(2 * SECTOR), bytes(SECTOR) + A}


def test_a_punch_that_was_lost_leaves_what_was_there() -> None:
    punch = Entry(0, Act.ZERO, 0, SECTOR, b"", 1, 2, keeps_size=True)
    assert _possible([punch], 3, A + B) == {b"AB", b"\0B"}


def test_every_state_with_a_new_write_has_some_of_it() -> None:
    entries = [_write(0, A, begun=1, ended=2), _write(1, B + C, begun=3, ended=4)]
    moment = Timeline([bytes(3 * SECTOR)], entries).at(3)
    for fates in choices(moment, entries[1], random.Random(1), count=50):
        assert fates[1] is not None


def test_many_uncertain_writes_are_sampled_with_all_none_and_each_alone() -> None:
    entries = [_write(number, A, begun=number, ended=number) for number in range(1, 40)]
    moment = Timeline([bytes(64 * SECTOR)], entries).at(50)
    chosen = [tuple(fates) for fates in choices(moment, None, random.Random(1), count=400)]
    assert tuple(moment.whole()) in chosen
    assert tuple(moment.nothing()) in chosen
    kept = [sum(fate is not None for fate in fates) for fates in chosen]
    assert {1, 38} <= set(kept)
    assert len(set(chosen)) > 200


def test_the_storage_of_a_file_is_recorded_however_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * SECTOR))
    (tmp_path / "other").write_bytes(bytes(SECTOR))
    recorder = Recorder([path])
    with recorder.installed():
        for name in ("file", "other"):
            storage = FileStorage.open(str(tmp_path / name), writable=True)
            storage.write(SECTOR, A)
            storage.punch(0, SECTOR)
            storage.truncate(8 * SECTOR)
            storage.sync()
            storage.close()
    assert [entry.act for entry in recorder.entries] == [Act.WRITE, Act.ZERO, Act.LENGTH, Act.SYNC]
    moments = [moment for entry in recorder.entries for moment in (entry.begun, entry.ended)]
    assert moments == sorted(moments)


def test_what_was_recorded_and_applied_again_is_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(A)
    recorder = Recorder([path])
    generator = random.Random(3)
    with recorder.installed():
        storage = FileStorage.open(str(path), writable=True)
        for number in range(200):
            offset, length = generator.randrange(9000), generator.randrange(1, 5000)
            act = generator.choice(("write", "write", "punch", "zeros", "truncate", "reserve"))
            match act:
                case "write":
                    storage.write(offset, bytes([number]) * length)
                case "punch":
                    storage.punch(offset, length)
                case "zeros":
                    storage.write_zeros(offset, length, allocated=bool(number % 2))
                case "truncate":
                    storage.truncate(offset)
                case "reserve":
                    storage.reserve(offset, length)
        storage.close()
    moment = Timeline([A], recorder.entries).at(1 << 40)
    assert materialise(moment, moment.whole())[0] == path.read_bytes()


def test_a_full_medium_takes_nothing_behind_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(A)
    recorder = Recorder([path], limit=2 * SECTOR)
    with recorder.installed():
        storage = FileStorage.open(str(path), writable=True)
        storage.write(SECTOR, B)
        with pytest.raises(OSError, match="No space left"):
            storage.write(SECTOR, A + B)
        storage.close()
    assert path.read_bytes() == A + B


def test_a_stamp_tells_what_was_written_where() -> None:
    content = stamped(7, 0, 2) + bytes(SECTOR) + stamped(7, 9, 1) + stamped(8, 4, 1)[:-8] + b"\1" * 8
    assert read_stamps(content).tolist() == [7, 7, ZEROS, ELSEWHERE, GARBAGE]


class TestWhatAGuestMayRead:
    """One sector, written by requests that are answered, flushed, or under way."""

    def history(self, tmp_path: Path) -> History:
        (tmp_path / "file").touch()
        return History(Recorder([tmp_path / "file"]), np.array([5]), first_number=100)

    def do(self, history: History, *verbs: Verb) -> None:
        for verb in verbs:
            history.end(history.begin(verb, 0, 1))

    def allowed(self, history: History) -> list[int]:
        return history.allowed(1 << 40).of(0)

    def test_what_was_not_flushed_or_what_was_before(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        self.do(history, Verb.WRITE, Verb.WRITE)
        assert self.allowed(history) == [5, 100, 101]

    def test_the_last_of_what_was_flushed(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        self.do(history, Verb.WRITE, Verb.WRITE, Verb.FLUSH)
        assert self.allowed(history) == [101]

    def test_what_came_after_the_flush(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        self.do(history, Verb.WRITE, Verb.FLUSH, Verb.ZERO)
        assert self.allowed(history) == [ZEROS, 100]

    def test_anything_after_a_discard_but_nothing_older(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        self.do(history, Verb.WRITE, Verb.DISCARD, Verb.FLUSH)
        assert self.allowed(history) == [ZEROS, 100]

    def test_a_write_that_began_before_the_flush_and_ended_after_it_is_not_promised(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        request = history.begin(Verb.WRITE, 0, 1)
        self.do(history, Verb.FLUSH)
        history.end(request)
        assert self.allowed(history) == [5, 100]

    def test_a_flush_that_failed_promises_nothing(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        self.do(history, Verb.WRITE)
        history.end(history.begin(Verb.FLUSH), failed=True)
        assert self.allowed(history) == [5, 100]

    def test_either_of_two_writes_that_overlapped(self, tmp_path: Path) -> None:
        history = self.history(tmp_path)
        first = history.begin(Verb.WRITE, 0, 1)
        self.do(history, Verb.WRITE)
        history.end(first)
        self.do(history, Verb.FLUSH)
        assert self.allowed(history) == [100, 101]


def test_the_same_seed_gives_the_same_schedule_and_another_one_another() -> None:
    def order(seed: int) -> list[int]:
        schedule = Schedule(seed)
        steps: list[int] = []

        def work(number: int) -> None:
            for _ in range(10):
                steps.append(number)
                schedule.pause()

        schedule.run([partial(work, number) for number in range(3)])
        return steps

    orders = [order(seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_deadlock_is_found_and_not_waited_for() -> None:
    schedule = Schedule(1)
    with schedule.installed():
        locks = [DirtyBits(512, 9)._lock, DirtyBits(512, 9)._lock]

    def take(first: int, second: int) -> None:
        with locks[first]:
            for _ in range(20):
                schedule.pause()
            with locks[second]:
                pass

    with pytest.raises(Deadlock):
        schedule.run([lambda: take(0, 1), lambda: take(1, 0)])


@pytest.mark.parametrize(("offset", "length", "sectors"), [(0, 512, 1), (511, 2, 2), (100, 8, 1), (512, 1024, 2)])
def test_a_write_can_be_torn_at_the_sectors_of_the_medium(offset: int, length: int, sectors: int) -> None:
    entry = Entry(0, Act.WRITE, offset, length, bytes(length), 1, 2)
    assert everything(entry) == (1 << sectors) - 1


def test_nothing_certain_is_changed_by_a_state() -> None:
    moment = Moment(1, [bytearray(A)], (_write(0, B, begun=1, ended=2),), (False,))
    assert materialise(moment, [1])[0] == B
    assert moment.certain[0] == A
