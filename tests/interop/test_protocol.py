"""What an NBD client may do besides reading politely: old handshakes, wrong requests, many requests, rude departures.

The client is libnbd with its own checks turned off (``nbd.md`` 5.2), so that the mistakes reach the server.
"""

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

from tests.support.images import Layer, Variant, build
from tests.support.libnbd import nbdsh
from tests.support.serving import serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "nbdsh")

SIZE = 4 << 20
DISK = Variant(
    "disk",
    (
        Layer("4M", ("write 0 1M", "compress 2M 256k", "write 3M 64k")),
        Layer("4M", ("write 64k 64k", "zero 512k 64k", "write 4M-512 512")),
    ),
)


class Disk(NamedTuple):
    """An export called "disk" and the bytes that it must show."""

    socket: Path
    data: Path

    def script(self, text: str) -> str:
        return nbdsh(dedent(text), socket=self.socket, data=self.data)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp("disk")
    image = build(DISK, directory)
    run("qemu-img", "convert", "-O", "raw", image.top, directory / "raw")
    with serve("-r", "-A", "-x", "disk", "-D", "the words of the operator", image.top) as server:
        yield Disk(server.socket, directory / "raw")


def test_a_client_without_structured_replies_reads_the_disk(disk: Disk) -> None:
    """As the kernel's client does (K1)."""
    disk.script("""
        h.set_request_structured_replies(False)
        h.set_export_name("disk")
        h.connect_unix(socket)
        assert not h.get_structured_replies_negotiated()
        assert not h.can_df()
        for offset in range(0, len(data), 1 << 20):
            assert h.pread(1 << 20, offset) == data[offset : offset + (1 << 20)], offset
    """)


@pytest.mark.parametrize("flags", ["0", "nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE", "nbd.HANDSHAKE_FLAG_NO_ZEROES"])
def test_every_handshake_since_newstyle_leads_to_the_disk(disk: Disk, flags: str) -> None:
    """Without FIXED_NEWSTYLE there is EXPORT_NAME only; without NO_ZEROES 124 zeroes follow it (P13, P30)."""
    disk.script(f"""
        h.set_handshake_flags({flags})
        h.set_export_name("disk")
        h.connect_unix(socket)
        assert h.get_size() == len(data)
        assert h.is_read_only()
        assert h.pread(200_000, 40_000) == data[40_000:240_000]
    """)


def test_the_older_client_that_names_an_unknown_export_is_disconnected(disk: Disk) -> None:
    """EXPORT_NAME knows no error reply (P30)."""
    disk.script("""
        h.set_handshake_flags(0)
        h.set_export_name("nothing")
        failure(lambda: h.connect_unix(socket))
    """)


def test_a_client_is_told_which_export_there_is_not(disk: Disk) -> None:
    """P37."""
    disk.script("""
        h.set_export_name("nothing")
        error, text = failure(lambda: h.connect_unix(socket))
        assert error == "ENOENT" and "'nothing'" in text, text
    """)


def test_a_client_that_named_no_export_of_ours_may_name_another(disk: Disk) -> None:
    """P38."""
    disk.script("""
        h.set_opt_mode(True)
        h.connect_unix(socket)
        h.set_export_name("nothing")
        error, text = failure(h.opt_go)
        assert error == "ENOENT", text
        h.set_export_name("disk")
        h.opt_go()
        assert h.pread(512, 0) == data[:512]
    """)


def test_the_list_of_exports_can_be_asked_twice_and_aborted(disk: Disk) -> None:
    """P32: nbdkit 1.32 refuses the second."""
    disk.script("""
        h.set_opt_mode(True)
        h.connect_unix(socket)
        for _ in range(2):
            found = []
            h.opt_list(lambda name, text: found.append((name, text)))
            assert found == [("disk", "the words of the operator")], found
        h.opt_abort()
    """)


def test_info_tells_what_go_will_tell(disk: Disk) -> None:
    """P36."""
    disk.script("""
        h.set_opt_mode(True)
        h.set_full_info(True)
        h.set_export_name("disk")
        h.connect_unix(socket)

        def told():
            sizes = [h.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
            texts = [h.get_canonical_export_name(), h.get_export_description()]
            return h.get_size(), h.is_read_only(), h.can_multi_conn(), h.can_flush(), h.can_fua(), sizes, texts

        h.opt_info()
        first = told()
        h.opt_go()
        assert told() == first
        assert first[0] == len(data)
        assert first[-1] == ["disk", "the words of the operator"], first
    """)


def test_metadata_contexts_are_found_by_wildcard_and_by_name(disk: Disk) -> None:
    """P41, P45, P48."""
    disk.script("""
        h.set_opt_mode(True)
        h.set_export_name("disk")
        h.connect_unix(socket)

        def listed(*queries):
            h.clear_meta_contexts()
            for query in queries:
                h.add_meta_context(query)
            found = []
            h.opt_list_meta_context(found.append)
            return found

        private = ["layer", "compressed", "host-sector", "since:1"]  # host-offset needs extended headers
        private = ["x-nbdq:" + name for name in private]
        assert listed() == ["base:allocation", "qemu:allocation-depth", *private], listed()
        assert listed("x-nbdq:") == private
        assert listed("x-nbdq:since:") == ["x-nbdq:since:1"]
        assert listed("x-nbdq:host-offset") == []
        assert listed("base:") == ["base:allocation"]
        assert listed("qemu:") == ["qemu:allocation-depth"]
        assert listed("base:nothing", "x-unknown:thing") == []
    """)


def test_both_contexts_come_in_one_answer_and_req_one_asks_for_one_extent(disk: Disk) -> None:
    """P117."""
    disk.script("""
        h.add_meta_context("base:allocation")
        h.add_meta_context("qemu:allocation-depth")
        h.set_export_name("disk")
        h.connect_unix(socket)

        def status(length, offset, flags=0):
            found = {}
            h.block_status(length, offset, lambda context, at, extents, error: found.update({context: extents}), flags)
            return found

        whole = status(len(data), 0)
        assert sorted(whole) == ["base:allocation", "qemu:allocation-depth"]
        for extents in whole.values():
            assert sum(extents[::2]) == len(data), extents
        first = status(len(data), 0, nbd.CMD_FLAG_REQ_ONE)
        assert first == {"base:allocation": [512 << 10, 0], "qemu:allocation-depth": [64 << 10, 2]}, first
        inside = status(1000, 600_000, nbd.CMD_FLAG_REQ_ONE)
        assert [extents[0] for extents in inside.values()] == [1000, 1000], inside
    """)


def test_block_status_without_a_context_is_refused(disk: Disk) -> None:
    disk.script("""
        h.set_strict_mode(0)
        h.set_export_name("disk")
        h.connect_unix(socket)
        failure(lambda: h.block_status(512, 0, lambda *extents: None))
        assert h.pread(512, 0) == data[:512]
    """)


WRONG_REQUESTS = [
    ("reading past the end", "h.pread(512, len(data))", "EINVAL"),
    ("reading across the end", "h.pread(1024, len(data) - 512)", "EINVAL"),
    ("an offset whose sum with the length wraps around", "h.pread(1024, (1 << 64) - 512)", "EINVAL"),
    ("reading more than the maximum", "h.pread(33 << 20, 0)", "EINVAL"),
    ("an unknown flag", "h.pread(512, 0, 0x8000)", "EINVAL"),
    ("block status of nothing", "h.block_status(0, 0, lambda *extents: None)", "EINVAL"),
    ("block status past the end", "h.block_status(1 << 20, len(data), lambda *extents: None)", "EINVAL"),
    ("prefetching past the end", "h.cache(1024, len(data))", "EINVAL"),
    ("writing", "h.pwrite(bytes(512), 0)", "EPERM"),
    ("writing 1 MiB", "h.pwrite(bytes(1 << 20), 0)", "EPERM"),
    ("writing past the end", "h.pwrite(bytes(512), len(data))", "EPERM"),
    ("writing with FUA", "h.pwrite(bytes(512), 0, nbd.CMD_FLAG_FUA)", "EPERM"),
    ("zeroing", "h.zero(512, 0)", "EPERM"),
    ("zeroing quickly or not at all", "h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)", "EPERM"),
    ("trimming", "h.trim(512, 0)", "EPERM"),
]


@pytest.mark.parametrize(
    ("request_", "error", "structured"),
    [
        pytest.param(request, error, structured, id=f"{name}, {'structured' if structured else 'simple'} replies")
        for name, request, error in WRONG_REQUESTS
        for structured in (True, False)
        if structured or "block_status" not in request  # which only exists with structured replies
    ],
)
def test_a_wrong_request_is_answered_and_the_connection_survives(
    disk: Disk, request_: str, error: str, structured: bool
) -> None:
    """P84, P87, W4; read-only comes before everything else."""
    disk.script(f"""
        h.set_strict_mode(0)
        h.set_request_structured_replies({structured})
        h.add_meta_context("base:allocation")
        h.set_export_name("disk")
        h.connect_unix(socket)
        for _ in range(2):
            error, text = failure(lambda: {request_})
            assert error == {error!r}, (error, text)
            assert h.pread(512, 1 << 20) == data[1 << 20 : (1 << 20) + 512]
        h.shutdown()
    """)


def test_requests_of_no_bytes_and_of_no_effect_succeed(disk: Disk) -> None:
    """P86: not qemu's mistake to punish. FLUSH and FUA are harmless on a disk that nobody writes (P70, P83)."""
    disk.script("""
        h.set_strict_mode(0)
        h.set_export_name("disk")
        h.connect_unix(socket)
        assert h.pread(0, 0) == b""
        assert h.pread(0, len(data)) == b""
        h.flush()
        h.cache(len(data), 0)
        assert h.pread(512, 0, nbd.CMD_FLAG_FUA) == data[:512]
    """)


def test_reads_of_any_offset_and_length_are_exact(disk: Disk) -> None:
    """P88: the advertised minimum is one byte. Zeros, inflated clusters and short pieces of both layers are crossed."""
    disk.script("""
        import random
        seed = random.randrange(1 << 32)
        print("seed", seed)
        random.seed(seed)
        h.set_export_name("disk")
        h.connect_unix(socket)
        for _ in range(500):
            length = random.choice((1, 3, 511, 4097, 65_535, 300_001))
            offset = random.randrange(len(data) - length)
            assert h.pread(length, offset) == data[offset : offset + length], (seed, offset, length)
        assert h.pread(len(data), 0) == data
    """)


def test_a_structured_read_covers_the_range_once_in_chunks(disk: Disk) -> None:
    """P113: content chunks neither overlap nor leave anything out; with DF there is one."""
    disk.script("""
        h.set_export_name("disk")
        h.connect_unix(socket)
        for flags in (0, nbd.CMD_FLAG_DF):
            chunks = []
            note = lambda part, offset, kind, error: chunks.append((offset, len(part)))
            assert h.pread_structured(len(data), 0, note, flags) == data
            position = 0
            for offset, length in sorted(chunks):
                assert offset == position and length > 0, chunks
                position += length
            assert position == len(data)
            assert len(chunks) == 1 or not flags
    """)


def test_hundreds_of_requests_in_flight_are_each_answered_with_their_own_data(disk: Disk) -> None:
    """P89: answers may come in any order, never to the wrong request."""
    disk.script("""
        h.set_export_name("disk")
        h.connect_unix(socket)
        pending = {}
        for number in range(600):
            length = 1 + number * 517 % 40_000
            offset = number * 7_919 * 512 % (len(data) - length)
            buffer = nbd.Buffer(length)
            pending[h.aio_pread(buffer, offset)] = (buffer, offset, length)
        while pending:
            h.poll(-1)
            for cookie in [cookie for cookie in pending if h.aio_command_completed(cookie)]:
                buffer, offset, length = pending.pop(cookie)
                assert buffer.to_bytearray() == data[offset : offset + length], (offset, length)
    """)


def test_a_client_that_leaves_in_the_middle_of_replies_harms_nobody(disk: Disk) -> None:
    """P94."""
    disk.script("""
        other = nbd.NBD()
        other.set_export_name("disk")
        other.connect_unix(socket)
        for _ in range(20):
            h = nbd.NBD()
            h.set_export_name("disk")
            h.connect_unix(socket)
            for _ in range(60):
                h.aio_pread(nbd.Buffer(1 << 20), 0)
            h.poll(0)
            del h
            assert other.pread(4096, 1 << 20) == data[1 << 20 : (1 << 20) + 4096]
        other.shutdown()
    """)


def test_many_clients_read_the_same_disk_at_once(disk: Disk) -> None:
    disk.script("""
        handles = []
        for _ in range(50):
            handle = nbd.NBD()
            handle.set_export_name("disk")
            handle.connect_unix(socket)
            handles.append(handle)
        for number, handle in enumerate(handles):
            offset = number * 4096
            assert handle.pread(70_000, offset) == data[offset : offset + 70_000], number
        for handle in handles:
            handle.shutdown()
    """)
