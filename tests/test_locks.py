"""Image locks between users of one file, each with its own open file description (L1-L10)."""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdq.errors import ImageError, ImageLocked
from nbdq.locks import (
    DATA_FILE_WRITER,
    RAW_WRITER,
    READER,
    TOLERANT_READER,
    WRITER,
    Claim,
    Locking,
    Permission,
    change_claim,
    lock_image,
)

#: A layer that is being committed and does not promise consistent reads (L6).
COMMITTING = Claim(READER.permissions, Permission.WRITE_UNCHANGED)

Opener = Callable[[], int]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"")  # the lock bytes lie beyond the end of the file (L9)
    return path


@pytest.fixture
def user(image: Path) -> Iterator[Opener]:
    """Opens the image once more and returns the descriptor."""
    opened: list[int] = []

    def open_image() -> int:
        opened.append(os.open(image, os.O_RDWR))
        return opened[-1]

    yield open_image
    for descriptor in opened:
        os.close(descriptor)


def flock(kind: int, start: int, length: int = 1) -> bytes:
    return struct.pack("@hhqqi0q", kind, os.SEEK_SET, start, length, 0)


def locked_bytes(observer: int) -> set[int]:
    """The bytes that anybody but ``observer`` holds."""
    answers = {byte: fcntl.fcntl(observer, fcntl.F_OFD_GETLK, flock(fcntl.F_WRLCK, byte)) for byte in range(300)}
    return {byte for byte, answer in answers.items() if struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK}


def is_granted(descriptor: int, claim: Claim) -> bool:
    try:
        return lock_image(descriptor, "image", claim)
    except ImageLocked:
        return False


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (READER, {100, 201, 203}),
        (TOLERANT_READER, {100}),
        (WRITER, {100, 101, 103, 201, 203}),
        (RAW_WRITER, {100, 101, 201, 203}),
        (DATA_FILE_WRITER, {100, 101, 103, 203}),
        (COMMITTING, {100, 200, 201, 203}),
    ],
    ids=["reader", "tolerant reader", "writer", "raw writer", "data file writer", "committing"],
)
def test_a_claim_shows_as_the_bytes_that_qemu_locks(user: Opener, claim: Claim, expected: set[int]) -> None:
    """L3, L6."""
    assert lock_image(user(), "image", claim)
    assert locked_bytes(user()) == expected


@pytest.mark.parametrize(
    ("first", "second", "granted"),
    [
        (READER, READER, True),
        (READER, TOLERANT_READER, True),
        (READER, WRITER, False),
        (READER, COMMITTING, False),
        (TOLERANT_READER, TOLERANT_READER, True),
        (TOLERANT_READER, WRITER, True),
        (TOLERANT_READER, COMMITTING, False),
        (WRITER, WRITER, False),
        (WRITER, COMMITTING, False),
        (RAW_WRITER, RAW_WRITER, False),
        (RAW_WRITER, WRITER, False),
        (RAW_WRITER, DATA_FILE_WRITER, False),
        (RAW_WRITER, READER, False),
        (DATA_FILE_WRITER, DATA_FILE_WRITER, False),
        (DATA_FILE_WRITER, WRITER, False),
        (DATA_FILE_WRITER, READER, False),
        (COMMITTING, COMMITTING, False),
    ],
)
def test_two_users_get_on_or_the_later_one_is_refused_in_either_order(
    user: Opener, first: Claim, second: Claim, granted: bool
) -> None:
    """L4."""
    for earlier, later in ((first, second), (second, first)):
        holder, newcomer = user(), user()
        assert is_granted(holder, earlier)
        assert is_granted(newcomer, later) == granted
        for descriptor in (holder, newcomer):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock(fcntl.F_UNLCK, 0, 0))


@pytest.mark.parametrize(
    ("holder", "newcomer", "words"),
    [
        (READER, WRITER, 'failed to get "write" lock'),
        (WRITER, READER, 'failed to get shared "write" lock'),
        (COMMITTING, READER, 'failed to get "consistent read" lock'),
        (Claim(Permission.RESIZE, WRITER.shared), READER, 'failed to get shared "resize" lock'),
    ],
)
def test_a_refusal_says_in_one_line_and_qemus_words_what_conflicts(
    user: Opener, holder: Claim, newcomer: Claim, words: str
) -> None:
    """L7."""
    lock_image(user(), "image", holder)
    with pytest.raises(ImageLocked) as caught:
        lock_image(user(), "/images/top.qcow2", newcomer)
    message = str(caught.value)
    assert message.startswith(f"/images/top.qcow2: {words}: another process uses the image; stop the other process")
    assert "\n" not in message
    # to tolerate a writer helps against a writer only
    assert ("--force-share" in message) == ("shared" in words)


def test_a_writer_who_is_refused_may_come_back_as_a_reader(user: Opener) -> None:
    """No switch lets two write; whether the other one writes, too, a writer cannot see."""
    for holder in (READER, WRITER):
        first, second = user(), user()
        lock_image(first, "image", holder)
        with pytest.raises(ImageLocked, match="stop the other process, or serve the image with -r/--read-only if"):
            lock_image(second, "image", WRITER)
        change_claim(first, "image", holder, TOLERANT_READER)


def test_a_refused_claim_leaves_nothing_behind(user: Opener) -> None:
    """L4."""
    holder, newcomer = user(), user()
    lock_image(holder, "image", READER)
    with pytest.raises(ImageLocked):
        lock_image(newcomer, "image", WRITER)
    assert locked_bytes(holder) == set()
    assert is_granted(user(), READER)


@pytest.mark.parametrize(
    ("old", "new"), [(READER, WRITER), (WRITER, READER), (WRITER, COMMITTING), (COMMITTING, TOLERANT_READER)]
)
def test_a_changed_claim_shows_as_if_it_had_been_the_first(user: Opener, old: Claim, new: Claim) -> None:
    """L5: a live snapshot makes a reader of the old top, a commit a writer of the base."""
    holder, other = user(), user()
    lock_image(holder, "image", old)
    assert change_claim(holder, "image", old, new)
    held = locked_bytes(other)
    fcntl.fcntl(holder, fcntl.F_OFD_SETLK, flock(fcntl.F_UNLCK, 0, 0))
    lock_image(holder, "image", new)
    assert locked_bytes(other) == held


def test_a_claim_that_cannot_grow_stays_what_it_was(user: Opener) -> None:
    """L5: the chain goes on being served, and locked, when a commit into its base is refused."""
    holder, other = user(), user()
    lock_image(holder, "image", READER)
    lock_image(other, "image", READER)
    with pytest.raises(ImageLocked, match='failed to get "write" lock'):
        change_claim(holder, "image", READER, WRITER)
    assert locked_bytes(other) == {100, 201, 203}
    assert change_claim(other, "image", READER, TOLERANT_READER)
    assert change_claim(holder, "image", READER, WRITER)


def test_a_claim_that_changes_is_never_without_what_both_have(user: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """L5: at no moment could a writer slip in, and nothing is given up before the new claim has been tested."""
    holder, observer = user(), user()
    lock_image(holder, "image", WRITER)
    seen: list[set[int]] = []
    original = fcntl.fcntl

    def watch(descriptor: int, command: int, argument: bytes) -> bytes:
        answer = original(descriptor, command, argument)
        if descriptor == holder:
            monkeypatch.undo()
            seen.append(locked_bytes(observer))
            monkeypatch.setattr(fcntl, "fcntl", watch)
        return answer

    monkeypatch.setattr(fcntl, "fcntl", watch)
    change_claim(holder, "image", WRITER, COMMITTING)
    monkeypatch.undo()
    assert seen[0] == {100, 101, 103, 200, 201, 203}
    assert seen[-1] == {100, 200, 201, 203}
    assert all(held >= {100, 201, 203} for held in seen)


def test_giving_up_rights_cannot_fail(user: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a snapshot that is done could not be reported as done."""
    holder, other = user(), user()
    lock_image(holder, "image", WRITER)
    fcntl.fcntl(other, fcntl.F_OFD_SETLK, flock(fcntl.F_RDLCK, 100, 200))  # contrary to everything, after the fact

    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, "No locks available")

    assert change_claim(holder, "image", WRITER, READER)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert change_claim(holder, "image", READER, TOLERANT_READER, Locking.ON)


def test_a_claim_ends_when_the_last_descriptor_of_its_opening_is_closed(image: Path, user: Opener) -> None:
    """L1."""
    holder = os.open(image, os.O_RDONLY)
    lock_image(holder, "image", READER)
    duplicate = os.dup(holder)
    os.close(holder)
    os.close(os.open(image, os.O_RDONLY))  # would drop a POSIX lock
    assert not is_granted(user(), WRITER)
    os.close(duplicate)
    assert is_granted(user(), WRITER)


def test_two_writers_who_come_at_the_same_time_never_both_get_the_image(user: Opener) -> None:
    """L4: each publishes before it looks, so both may lose but only one can win."""
    descriptors = [user(), user()]
    barrier = threading.Barrier(2)
    granted: list[int] = []

    def contend(descriptor: int) -> None:
        barrier.wait()
        if is_granted(descriptor, WRITER):
            granted.append(descriptor)

    for _ in range(100):
        granted.clear()
        threads = [threading.Thread(target=contend, args=(descriptor,)) for descriptor in descriptors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) <= 1
        for descriptor in granted:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock(fcntl.F_UNLCK, 0, 0))


def test_a_process_that_locks_the_whole_file_is_a_conflict(user: Opener) -> None:
    holder, newcomer = user(), user()
    fcntl.fcntl(holder, fcntl.F_OFD_SETLK, flock(fcntl.F_WRLCK, 0, 0))
    with pytest.raises(ImageLocked, match="another process locks the whole file"):
        lock_image(newcomer, "image", READER)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_served_unless_locking_is_demanded(
    user: Opener, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """L9."""

    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert not lock_image(user(), "image", READER, Locking.AUTO)
    assert not lock_image(user(), "image", READER, Locking.OFF)
    with pytest.raises(ImageError, match=r"^image: the file system cannot lock it .*; set locking to auto"):
        lock_image(user(), "image", READER, Locking.ON)


def test_with_locking_off_a_writer_is_neither_seen_nor_hindered(user: Opener) -> None:
    """L9."""
    holder, newcomer = user(), user()
    lock_image(holder, "image", WRITER)
    assert not lock_image(newcomer, "image", READER, Locking.OFF)
    assert locked_bytes(holder) == set()


def test_a_failure_that_is_not_about_locks_is_not_taken_for_one(user: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "medium error")

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="medium error"):
        lock_image(user(), "image", READER)
