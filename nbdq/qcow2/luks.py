"""The LUKS1 header of an encrypted image, as far as it describes itself (Q73). No keys, no decryption."""

from dataclasses import dataclass

from construct import Array, Bytes, Int16ub, Int32ub, Struct

from nbdq.errors import CorruptImage, InvalidImage, UnsupportedImage, printable
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

_MAGIC = b"LUKS\xba\xbe"
_SECTOR = 512
_SLOT_ACTIVE = 0x00AC71F3

_LUKS1 = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash" / Bytes(32),
    "payload_offset" / Int32ub,
    "key_length" / Int32ub,
    "master_key_digest" / Bytes(20),
    "master_key_salt" / Bytes(32),
    "master_key_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots"
    / Array(
        8,
        Struct(
            "state" / Int32ub,
            "iterations" / Int32ub,
            "salt" / Bytes(32),
            "key_offset" / Int32ub,
            "stripes" / Int32ub,
        ),
    ),
)


@dataclass(frozen=True)
class KeySlot:
    """One of the eight places for a passphrase."""

    active: bool
    iterations: int
    key_offset: int
    """Bytes from the start of the LUKS header."""
    stripes: int


@dataclass(frozen=True)
class LuksHeader:
    """How an image is encrypted, in the words of QEMU's ``QCryptoBlockInfoLUKS``."""

    cipher: str
    """Algorithm and key bits, such as ``aes-256``."""
    mode: str
    iv_generator: str
    iv_hash: str | None
    """Only where the generator needs one (``essiv``)."""
    hash: str
    payload_offset: int
    master_key_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]


def read_luks_header(storage: FileStorage, header: Header) -> LuksHeader | None:
    """The LUKS header that an image's extension points to; None if there is no extension.

    Raises:
        InvalidImage: there is something else.
        UnsupportedImage: a LUKS version other than 1.
        CorruptImage: the header is cut off.
        OSError: the file cannot be read.
    """
    if header.encryption is None:
        return None
    path, mend = storage.path, "without its LUKS header the image cannot be decrypted: restore it from a copy"
    raw = storage.read(header.encryption.offset, min(header.encryption.length, _LUKS1.sizeof()))
    if len(raw) < _LUKS1.sizeof():
        raise CorruptImage(path, f"the LUKS header has {len(raw)} bytes, less than {_LUKS1.sizeof()}", mend)
    luks = _LUKS1.parse(raw)
    if luks.magic != _MAGIC:
        raise InvalidImage(path, f"LUKS header magic is {luks.magic.hex()}, not {_MAGIC.hex()}", mend)
    if luks.version != 1:
        raise UnsupportedImage(path, f"LUKS version is {luks.version}, not 1", "convert the image with its own tool")
    mode, dash, generator = _text(luks.cipher_mode).partition("-")
    if not dash:
        raise InvalidImage(path, f"LUKS cipher mode is '{printable(mode)}', not MODE-GENERATOR", mend)
    generator, _, iv_hash = generator.partition(":")
    # In XTS mode the key is a pair of cipher keys.
    key_bits = luks.key_length * (4 if mode == "xts" else 8)
    return LuksHeader(
        cipher=f"{_text(luks.cipher_name)}-{key_bits}",
        mode=mode,
        iv_generator=generator,
        iv_hash=iv_hash if generator == "essiv" else None,
        hash=_text(luks.hash),
        payload_offset=luks.payload_offset * _SECTOR,
        master_key_iterations=luks.master_key_iterations,
        uuid=_text(luks.uuid),
        slots=tuple(
            KeySlot(slot.state == _SLOT_ACTIVE, slot.iterations, slot.key_offset * _SECTOR, slot.stripes)
            for slot in luks.slots
        ),
    )


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii", "backslashreplace")
