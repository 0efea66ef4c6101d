#!/usr/bin/python3
"""Copy a disk, or what has changed of it, from one NBD server to another: a backup program in a page of libnbd.

    copy_changes.py SOURCE_URI TARGET_URI             all that is data
    copy_changes.py SOURCE_URI TARGET_URI BITMAP      what the dirty bitmap says has changed

Prints how many bytes it has read. The target must be as large as the source, and read as zeros or as the last backup.
"""

import sys

import nbd

#: Bytes of one request, and the length of one question about extents.
PIECE, STRETCH = 1 << 20, 1 << 30


def extents(disk, context):
    """(offset, length, flags) of the whole disk in a metadata context."""
    size, offset = disk.get_size(), 0
    while offset < size:
        found = {}
        disk.block_status(
            min(STRETCH, size - offset),
            offset,
            lambda name, at, entries, error, found=found: found.update({name: entries}),
        )
        lengths, flags = found[context][::2], found[context][1::2]
        for length, flag in zip(lengths, flags, strict=True):
            length = min(length, size - offset)
            yield offset, length, flag
            offset += length


def main(source_uri, target_uri, bitmap=None):
    dirty = f"qemu:dirty-bitmap:{bitmap}" if bitmap else None
    source, target = nbd.NBD(), nbd.NBD()
    source.add_meta_context(dirty or nbd.CONTEXT_BASE_ALLOCATION)
    source.connect_uri(source_uri)
    target.connect_uri(target_uri)
    if dirty and not source.can_meta_context(dirty):
        sys.exit(f"the server has no bitmap {bitmap} here: make a full backup")
    copied = 0
    for offset, length, flags in extents(source, dirty or nbd.CONTEXT_BASE_ALLOCATION):
        wanted = flags & 1 if dirty else not flags & nbd.STATE_ZERO
        if not wanted:
            continue
        for start in range(offset, offset + length, PIECE):
            count = min(PIECE, offset + length - start)
            target.pwrite(source.pread(count, start), start)
            copied += count
    target.flush()
    target.shutdown()
    source.shutdown()
    print(copied)


if __name__ == "__main__":
    main(*sys.argv[1:])
