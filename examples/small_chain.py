"""Make a chain of two QCOW2 images without qemu-img, serve it, read it back as a client does, and say what happened.

    python examples/small_chain.py [DIRECTORY]

The images stay in DIRECTORY if one is named. Everything is small enough to be read in one sitting: a QCOW2 image is
six kinds of clusters, and an NBD client is a handshake, a request and a reply.
"""

import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from nbdq.qcow2.format import Header, build_header

CLUSTER_SIZE = 64 << 10
COPIED = 1 << 63  # in L1 and L2 entries: the refcount of what this points to is exactly one
READS_AS_ZEROS = 1
GUEST_SIZE = 4 << 20


def make_image(path: Path, clusters: dict[int, bytes], *, backing: Path | None = None) -> None:
    """Write an image that holds ``clusters`` (guest cluster index to content; an empty one reads as zeros).

    The file, in clusters: header, refcount table, refcount block, L1 table, L2 table, then the data in order.
    """
    header = Header(
        cluster_bits=CLUSTER_SIZE.bit_length() - 1,
        size=GUEST_SIZE,
        l1_size=1,
        l1_table_offset=3 * CLUSTER_SIZE,
        refcount_table_offset=1 * CLUSTER_SIZE,
        refcount_table_clusters=1,
        backing_name=backing.name if backing else None,
        backing_format="qcow2" if backing else None,
    )
    l2_table = [0] * (CLUSTER_SIZE // 8)
    data = []
    for index, content in clusters.items():
        if content:
            l2_table[index] = (5 + len(data)) * CLUSTER_SIZE | COPIED
            data.append(content)
        else:
            l2_table[index] = READS_AS_ZEROS
    refcounts = [1] * (5 + len(data))
    parts = [
        build_header(header),
        struct.pack(">Q", 2 * CLUSTER_SIZE),
        struct.pack(f">{len(refcounts)}H", *refcounts),
        struct.pack(">Q", 4 * CLUSTER_SIZE | COPIED),
        struct.pack(f">{len(l2_table)}Q", *l2_table),
        *data,
    ]
    path.write_bytes(b"".join(part.ljust(CLUSTER_SIZE, b"\0") for part in parts))


class Client:
    """The least NBD client: newstyle handshake, READ with simple replies, DISC."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(socket_path))
        magic, option_magic, _flags = struct.unpack(">8s8sH", self._receive(18))
        assert magic == b"NBDMAGIC"
        assert option_magic == b"IHAVEOPT"
        name = b""
        go = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(go)) + go)
        self.size = 0
        while True:
            _magic, _option, reply, length = struct.unpack(">QIII", self._receive(20))
            payload = self._receive(length)
            if reply == 1:  # ACK: from here on requests and replies
                break
            assert reply == 3, payload.decode()
            if payload[:2] == b"\0\0":  # the size and the flags of the export
                self.size = struct.unpack(">HQH", payload)[1]

    def read(self, offset: int, length: int) -> bytes:
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        _magic, error, _cookie = struct.unpack(">IIQ", self._receive(16))
        assert error == 0, error
        return self._receive(length)

    def close(self) -> None:
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
        self._socket.close()

    def _receive(self, length: int) -> bytes:
        received = self._socket.recv(length, socket.MSG_WAITALL)
        assert len(received) == length, "the server hung up"
        return received


def main(directory: Path) -> None:
    base, top = directory / "base.qcow2", directory / "top.qcow2"

    def text(words: str) -> bytes:
        return (words.encode() * CLUSTER_SIZE)[:CLUSTER_SIZE]

    make_image(base, {0: text("base, cluster 0. "), 1: text("base, cluster 1. "), 2: text("base, cluster 2. ")})
    make_image(top, {1: text("top, cluster 1. "), 2: b"", 63: text("top, the last cluster. ")}, backing=base)
    print(f"made {base.name} and {top.name}, whose backing file it is; guest size {GUEST_SIZE >> 20} MiB")

    with tempfile.TemporaryDirectory(prefix="nbdq-") as place:  # short: the path of a socket has 107 bytes
        path = Path(place, "socket")
        command = [sys.executable, "-m", "nbdq", "serve", "-k", str(path), str(top)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                uri = server.stdout.readline().strip()
                if not uri:
                    raise SystemExit("the server did not start")
                print("serving at", uri)
                client = Client(path)
                assert client.size == GUEST_SIZE
                for index, words, source in (
                    (0, "base, cluster 0. ", "from the base"),
                    (1, "top, cluster 1. ", "from the overlay, which hides the base"),
                    (2, "", "zeros: a zero cluster of the overlay hides the base"),
                    (3, "", "zeros: in no image"),
                    (63, "top, the last cluster. ", "from the overlay"),
                ):
                    found = client.read(index * CLUSTER_SIZE, CLUSTER_SIZE)
                    assert found == (text(words) if words else bytes(CLUSTER_SIZE)), index
                    print(f"guest cluster {index:2} reads as expected: {source}")
                client.close()
            finally:
                server.terminate()
        assert server.returncode == 0, f"the server ended with status {server.returncode}"
    print("the server ended when it was told to")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))
