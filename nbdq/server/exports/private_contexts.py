"""The metadata contexts of nbdq's own, ``x-nbdq:…`` (P47): where data lies, and what has changed since a layer.

docs/protocol.md has their bits, for those who write clients.
"""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nbdq.block import BlockDevice, Kind, Status
from nbdq.nbd.exports import ExportInfo
from nbdq.server.exports.contexts import Context, Flags, Ranges, context_of_status

_NAMESPACE = "x-nbdq:"
LAYER = "x-nbdq:layer"
COMPRESSED = "x-nbdq:compressed"
HOST_SECTOR = "x-nbdq:host-sector"
HOST_OFFSET = "x-nbdq:host-offset"
SINCE = "x-nbdq:since:"
"""Prefix; the number or name of a layer follows."""

# Bits of LAYER above the depth, which has the lower 16.
_DATA, _ZERO, _COMPRESSED = 1 << 16, 1 << 17, 1 << 18
#: Of HOST_OFFSET: there is one, in the lower bits.
_HAS_OFFSET = 1 << 63
_SECTOR_BITS = 9
_LAST_SECTOR = 0xFFFF_FFFF


def _table(*, number: type[np.generic], **values: int) -> Flags:
    flags = np.zeros(max(Kind) + 1, dtype=number)
    for name, value in values.items():
        flags[Kind[name]] = value
    return flags


_LAYER_FLAGS = _table(
    number=np.uint32,
    UNALLOCATED=_ZERO,
    UNALLOCATED_OFFSET=_ZERO,
    ZERO=_ZERO,
    ZERO_OFFSET=_ZERO,
    HOLE=_ZERO,
    DATA=_DATA,
    DATA_HOLE=_DATA | _ZERO,
    COMPRESSED=_DATA | _COMPRESSED,
)
_COMPRESSED_FLAGS = _table(number=np.uint32, COMPRESSED=1)
#: As in ``qemu-img map``: a compressed cluster begins anywhere, and no byte of the guest has a place of its own in it.
_OFFSET_FLAGS = _table(
    number=np.uint64,
    UNALLOCATED_OFFSET=_HAS_OFFSET,
    ZERO_OFFSET=_HAS_OFFSET,
    HOLE=_HAS_OFFSET,
    DATA=_HAS_OFFSET,
    DATA_HOLE=_HAS_OFFSET,
)


def _host_offset(status: Status) -> Flags:
    has = _OFFSET_FLAGS[status.kind]
    return np.where(has, status.host | has, np.uint64(0))


def _host_sector(status: Status) -> Flags:
    sector = np.minimum((status.host >> np.uint64(_SECTOR_BITS)) + np.uint64(1), np.uint64(_LAST_SECTOR))
    return np.where(_OFFSET_FLAGS[status.kind], sector, np.uint64(0)).astype(np.uint32)


#: Those that follow from block status alone.
PRIVATE: Mapping[str, Context] = {
    LAYER: context_of_status(lambda status: status.depth.astype(np.uint32) | _LAYER_FLAGS[status.kind]),
    COMPRESSED: context_of_status(lambda status: _COMPRESSED_FLAGS[status.kind]),
    HOST_SECTOR: context_of_status(_host_sector),
    HOST_OFFSET: context_of_status(_host_offset),
}


class ShownLayer(NamedTuple):
    """A layer of what an export shows."""

    identity: object
    """The same one for as long as the layer is part of the disk, wherever in it."""
    node_name: str | None
    """What an administrator calls it."""
    file_name: str
    """Without directories."""


def since_names(layers: Sequence[ShownLayer]) -> tuple[list[str], list[str]]:
    """The contexts that say what changed since each of ``layers``, top first: those to show, and further names of them.

    A layer is shown by its node name, or by its number, which is 1 for the one below the top. Its number and the name
    of its file mean it, too, if they mean no other; file names are not shown, because clients need not know them.
    """
    shown, hidden = [], []
    files = [layer.file_name for layer in layers]
    taken = {str(number) for number in range(len(layers))}
    for number, layer in enumerate(layers[1:], 1):
        name = layer.node_name
        if name is None or name in taken or not name.isprintable():
            shown.append(str(number))
        else:
            shown.append(name)
            hidden.append(str(number))
    taken.update(shown)
    hidden += [name for name in files[1:] if files.count(name) == 1 and name not in taken and name.isprintable()]
    return [SINCE + name for name in shown], [SINCE + name for name in hidden]


def with_private_contexts(info: ExportInfo, layers: Sequence[ShownLayer]) -> ExportInfo:
    """``info`` with what there is to know of ``layers``, in the place of what there was."""
    public = tuple(name for name in info.contexts if not name.startswith(_NAMESPACE))
    if not layers:
        return replace(info, contexts=public, passing_contexts=(), hidden_contexts=())
    shown, hidden = since_names(layers)
    return replace(
        info,
        contexts=(*public, *PRIVATE),
        passing_contexts=tuple(shown),
        hidden_contexts=tuple(hidden),
        wide_contexts=frozenset({HOST_OFFSET}),
    )


def context_since(name: str, layers_now: Callable[[], Sequence[ShownLayer]]) -> Context:
    """The context ``name``, one of :func:`since_names`; it goes on to mean the layer that it means now.

    Bit 0 is set where a layer above that one holds data or zeros: all that has to be copied on top of a copy of it.

    When the layer is gone, or the one above it, whose contents may have been merged into it, nobody can tell any more
    what changed since: the context fails with EINVAL.
    """
    layers = layers_now()
    number = _number(name.removeprefix(SINCE), layers)
    base, above = layers[number].identity, layers[number - 1].identity

    def ranges(device: BlockDevice, offset: int, length: int) -> Iterator[Ranges]:
        now = [layer.identity for layer in layers_now()]
        depth = now.index(base) if base in now else 0
        if not depth or now[depth - 1] is not above:
            raise OSError(errno.EINVAL, "the layer is gone, or was merged with the one above it")
        for status in device.status(offset, length):
            changed = (status.depth != 0) & (status.depth <= depth)
            yield status.start, changed.astype(np.uint32), status.end

    return ranges


def _number(name: str, layers: Sequence[ShownLayer]) -> int:
    if name.isascii() and name.isdecimal() and str(int(name)) == name and int(name) < len(layers):
        return int(name)
    by_node = [number for number, layer in enumerate(layers) if number and layer.node_name == name]
    return (by_node or [number for number, layer in enumerate(layers) if number and layer.file_name == name])[0]
