"""A guest in QEMU whose disk nbdq serves: the BIOS boots it, and its program reads a sector through the BIOS."""

import struct
from pathlib import Path

from tests.support.serving import serve
from tests.support.tools import execute, requires, run

#: Where the base keeps what the guest is to say, and the port of QEMU's exit device; its console is at E9h.
MESSAGE_SECTOR = 6000
EXIT = 0xF4

#: 16-bit code at 0x7c00: read a sector to 0x8000 (int 13h, ah=42h), print it up to its first zero, leave.
_CODE = [
    "31c0 8ed8 8ec0",  # xor ax, ax; mov ds, ax; mov es, ax
    "be 247c b442 cd13",  # mov si, packet; mov ah, 42h; int 13h, with the drive as the BIOS left it in dl
    "be 0080",  # mov si, 8000h
    "ac 84c0 7404 e6e9 ebf7",  # print: lodsb; test al, al; jz leave; out E9h, al; jmp print
    "b010 e6f4 f4 ebfd",  # leave: mov al, 10h; out F4h, al; hlt; jmp to the hlt
]
_PACKET_OFFSET = 0x24


def boot_sector() -> bytes:
    code = bytes.fromhex("".join(_CODE)).ljust(_PACKET_OFFSET, b"\x90")
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, MESSAGE_SECTOR)
    return (code + packet).ljust(510, b"\0") + b"\x55\xaa"


@requires("qemu-system-x86_64", "qemu-img", "qemu-io")
def test_a_guest_boots_from_the_overlay_and_reads_a_compressed_cluster_of_the_base(tmp_path: Path) -> None:
    boot, message = tmp_path / "boot", tmp_path / "message"
    boot.write_bytes(boot_sector())
    message.write_bytes(b"the guest speaks".ljust(512, b"\0"))
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
    cluster = MESSAGE_SECTOR * 512 // 65536 * 65536
    run("qemu-io", "-c", f"write -q -c -s {message} {cluster} 64k", base)  # the message in each of its sectors
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-c", f"write -q -s {boot} 0 512", top)
    with serve("-r", top) as server:
        machine = ["-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none"]
        devices = ["-debugcon", "stdio", "-device", f"isa-debug-exit,iobase={EXIT:#x},iosize=4"]
        disk = ["-drive", f"file={server.uri()},format=raw,if=virtio,readonly=on"]
        done = execute("qemu-system-x86_64", *machine, *devices, *disk)
    assert done.stdout == "the guest speaks", done.stderr
    assert done.returncode == (0x10 << 1 | 1), done.stderr  # as the exit device says that the guest said 10h
