"""XFS. The library reads superblock, inodes and trees; directories and the place of a file's bytes are read here: it
shows what a preallocated extent held before, and knows directory blocks of one block only.

Its log is not replayed; where it would have to be, nothing is shown: the kernel writes to the place of a removed file
long before the inode says that it is gone.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from dissect.xfs.xfs import XFS, INode, fsb_to_bb

from fusefs.inside.filesystem import (
    DIRECTORY_BYTES_MAX,
    LINK_BYTES_MAX,
    Corrupt,
    Node,
    NotReplayed,
    Status,
    Unsupported,
    signed32,
)
from fusefs.inside.image_stream import ImageStream
from fusefs.inside.runs import Run, Runs

_KNOWN_INCOMPAT: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""ftype spinodes meta_uuid bigtime nrext64 exchrange parent"""
_REALTIME_FLAG: Final = 0x1
_LOCAL: Final = 1
_SHOWN_FILETYPES: Final = frozenset({0, 1, 2, 7})
_BLOCK_MAGICS, _DATA_MAGICS = (b"XD2B", b"XDB3"), (b"XD2D", b"XDD3")
_FREE: Final = b"\xff\xff"
_SECTOR: Final = 512
_RECORD_MAGIC: Final = b"\xfe\xed\xba\xbe"
_RECORD_SECTORS_MAX: Final = 256 * 1024 // _SECTOR + 16
_UNMOUNT: Final = 0x20
_SUPERBLOCK_OPERATIONS: Final = 5
_BUFFER_ITEM: Final = b"\x3c\x12"


class Xfs:
    """One file system. Corrupt, Unsupported."""

    kind = "xfs"

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream
        self._library = XFS(stream)
        superblock = self._library.sb
        strange = superblock.sb_features_incompat & ~_KNOWN_INCOMPAT if self._library.version == 5 else 0
        if strange:
            raise Unsupported(f"this xfs has features that are not read here: {strange:#x}")
        self._block_bytes = int(self._library.block_size)
        self._directory_block = self._block_bytes << superblock.sb_dirblklog
        if self._directory_block > 1 << 16:
            raise Corrupt("a superblock with impossible sizes")
        self.unclean = ""
        if not self._log_is_clean():
            raise NotReplayed(self.kind)
        self._inode = lru_cache(1024)(self._read_inode)
        self._runs = lru_cache(64)(self._read_runs)

    @property
    def root(self) -> Node:
        return (int(self._library.sb.sb_rootino),)

    def status(self, node: Node) -> Status:
        raw = self._inode(node[0]).inode
        big = raw.di_version >= 3 and raw.di_flags2 & 0x8
        return Status(
            *(raw.di_mode, raw.di_uid, raw.di_gid, raw.di_nlink, raw.di_size, raw.di_nblocks * self._block_bytes),
            *(_time(stamp, big) for stamp in (raw.di_atime, raw.di_mtime, raw.di_ctime)),
        )

    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        inode = self._inode(node[0])
        if not stat.S_ISDIR(inode.inode.di_mode):
            raise NotADirectoryError
        if inode.inode.di_format == _LOCAL:
            names = self._short_names(inode.datafork().read(inode.size))
        else:
            names = self._block_names(node[0], int(inode.size))
        for name, number, kind in names:
            if name not in (b".", b"..") and kind in _SHOWN_FILETYPES:
                yield name, (number,)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        inode = self._inode(node[0]).inode
        if inode.di_flags & _REALTIME_FLAG:
            raise Unsupported("it lies on the realtime device")
        if inode.di_format == _LOCAL:
            raise Corrupt("a file that lies in its inode")
        return self._runs(node[0]).read(self._stream, offset, length)

    def readlink(self, node: Node) -> bytes:
        inode = self._inode(node[0])
        if not 0 < inode.size <= LINK_BYTES_MAX:
            raise Corrupt(f"a symbolic link of {inode.size} bytes")
        target: str = inode.link
        return target.encode(errors="surrogateescape")

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        return {}

    def _read_inode(self, number: int) -> INode:
        inode = self._library.get_inode(number)
        if not inode.inode.di_nlink or not inode.inode.di_mode:
            raise Corrupt(f"inode {number} is not in use")
        return inode

    def _read_runs(self, number: int) -> Runs:
        size = self._block_bytes
        return Runs(
            Run(offset * size, self._place(block), count * size)
            for offset, block, count, unwritten in self._inode(number)._iter_blocks()
            if not unwritten
        )

    def _place(self, block: int) -> int:
        superblock = self._library.sb
        group, within = fsb_to_bb(block, superblock.sb_agblklog)
        if group >= superblock.sb_agcount or within >= superblock.sb_agblocks:
            raise Corrupt(f"block {block} is not in the file system")
        return int((group * superblock.sb_agblocks + within) * self._block_bytes)

    # Directories: name, inode, type

    def _short_names(self, data: bytes) -> Iterator[tuple[bytes, int, int]]:
        count, wide = data[0], data[1]
        size = 8 if wide else 4
        at, typed = 2 + size, int(bool(self._library._has_ftype))
        for _ in range(count):
            length = data[at]
            name = data[at + 3 : at + 3 + length]
            at += 3 + length
            kind = data[at] if typed else 0
            number = data[at + typed : at + typed + size]
            at += typed + size
            if len(number) < size:
                raise Corrupt("a directory that is cut off")
            yield name, int.from_bytes(number), kind

    def _block_names(self, number: int, size: int) -> Iterator[tuple[bytes, int, int]]:
        if size > DIRECTORY_BYTES_MAX:
            raise Corrupt(f"a directory of {size} bytes")
        runs = self._runs(number)
        for offset in range(0, size, self._directory_block):
            yield from self._names(runs.read(self._stream, offset, self._directory_block))

    def _names(self, block: bytes) -> Iterator[tuple[bytes, int, int]]:
        magic, end = block[:4], len(block)
        if magic == bytes(4):
            return  # a hole: all of its names were removed
        if magic in _BLOCK_MAGICS:
            end -= 8 + 8 * int.from_bytes(block[-8:-4])
        elif magic not in _DATA_MAGICS:
            raise Corrupt("a directory block that is none")
        at = 64 if magic.endswith(b"3") else 16
        typed = int(bool(self._library._has_ftype))
        while at < end:
            if block[at : at + 2] == _FREE:
                length = int.from_bytes(block[at + 2 : at + 4])
            else:
                name_length = block[at + 8]
                length = -(-(8 + 1 + name_length + typed + 2) // 8) * 8
                name = block[at + 9 : at + 9 + name_length]
                yield name, int.from_bytes(block[at : at + 8]), block[at + 9 + name_length] if typed else 0
            at += length
            if not length or length % 8 or at > end:
                raise Corrupt("a directory entry that does not fit its block")

    # The log

    def _log_is_clean(self) -> bool:
        """Whether a replay would change no file: the log ends with an unmount; or, frozen or at rest, with records of
        the superblock alone, which it writes when everything else is in place."""
        superblock = self._library.sb
        sectors = superblock.sb_logblocks * self._block_bytes // _SECTOR
        if not superblock.sb_logstart or not sectors:
            return False  # on another device
        start = self._place(superblock.sb_logstart)

        def sector(number: int, count: int = 1) -> bytes:
            return self._stream.read_at(start + number * _SECTOR, count * _SECTOR)

        def cycle(number: int) -> int:
            head = sector(number)
            return int.from_bytes(head[4:8] if head[:4] == _RECORD_MAGIC else head[:4])

        # Sectors up to the head were written in one round more than those behind it.
        first, low, head = cycle(0), 0, sectors
        while low + 1 < head:
            middle = (low + head) // 2
            low, head = (middle, head) if cycle(middle) == first else (low, middle)
        tail = None
        for number in range(head - 1, max(-1, head - _RECORD_SECTORS_MAX), -1):
            if sector(number)[:4] != _RECORD_MAGIC:
                continue
            record = sector(number)
            # A header has a sector for each 32 KiB that a record may have.
            skipped = max(1, -(-int.from_bytes(record[320:324]) // (1 << 15))) if record[11] & 2 else 1
            record += sector(number + skipped, 2) if number + skipped + 2 <= sectors else b""
            if tail is None:
                if _operations(record)[:1] and _operations(record)[0][0] & _UNMOUNT:
                    return True
                # Where it would begin to replay; whatever lies in an earlier round is more than a few records.
                tail = int.from_bytes(record[28:32]) if record[24:28] == record[4:8] else -1
            if tail < 0 or not _is_superblock(record):
                return False
            if number <= tail:
                return number == tail
        return False


def _operations(record: bytes) -> list[tuple[int, bytes]]:
    """Flags and bytes of each operation of a record: its first sector and two of operations. None if it is longer."""
    count, at = int.from_bytes(record[40:44]), _SECTOR
    found = []
    for _ in range(min(count, _SUPERBLOCK_OPERATIONS + 1)):
        length = int.from_bytes(record[at + 4 : at + 8])
        if at + 12 + length > len(record):
            return []
        found.append((record[at + 9], record[at + 12 : at + 12 + length]))
        at += 12 + length
    return found


def _is_superblock(record: bytes) -> bool:
    """Whether a record is a transaction that changes block 0 and nothing else: start, header, which, what, commit."""
    operations = [data for _, data in _operations(record)]
    if len(operations) != _SUPERBLOCK_OPERATIONS:
        return False
    _, header, which, what, _ = operations
    return header[:4] == b"NART" and which[:2] == _BUFFER_ITEM and which[8:16] == bytes(8) and what[:4] == b"XFSB"


def _time(stamp: int, big: int) -> int:
    return stamp - (1 << 31) * 1_000_000_000 if big else signed32(stamp >> 32) * 1_000_000_000 + (stamp & 0xFFFFFFFF)
