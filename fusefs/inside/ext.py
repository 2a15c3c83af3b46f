"""ext2, ext3 and ext4, with what their journal holds.

The library reads superblock, group descriptors and attributes. Inodes, the place of a file's bytes and directories are
read here: of holes, preallocated extents, small inodes and a directory's last entry the library has another opinion
than the kernel.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

from dissect.extfs.extfs import ExtFS, INode

from fusefs.inside.ext_journal import Journal
from fusefs.inside.filesystem import (
    DIRECTORY_BYTES_MAX,
    LINK_BYTES_MAX,
    SHOWN_TYPES,
    Corrupt,
    Node,
    Status,
    Unsupported,
    signed32,
)
from fusefs.inside.image_stream import ImageStream
from fusefs.inside.runs import Run, Runs

_ROOT: Final = 2
_CLEAN: Final = 1
_HAS_JOURNAL: Final = 0x4
_FILETYPE, _RECOVER, _EXTENTS = 0x2, 0x4, 0x40
_KNOWN_INCOMPAT: Final = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x10000 | 0x20000
"""filetype recover extents 64bit mmp flex_bg ea_inode csum_seed largedir encrypt casefold"""
_NAMES: Final = {0x1: "compression", 0x8: "journal_dev", 0x10: "meta_bg", 0x1000: "dirdata", 0x8000: "inline_data"}
_EXTENTS_FLAG, _INLINE_FLAG, _ENCRYPTED_FLAG = 0x80000, 0x10000000, 0x800
_EXTENT_MAGIC: Final = 0xF30A
_UNWRITTEN: Final = 0x8000
_DEPTH_MAX: Final = 5
_SHOWN_FILETYPES: Final = frozenset({0, 1, 2, 7})
"""Of directory entries: unknown, regular, directory, symbolic link."""
_XATTR_PREFIX: Final = "user."


@dataclass(frozen=True, slots=True)
class _Inode:
    status: Status
    flags: int
    body: bytes
    """Its 60 bytes of extents, block pointers or link."""
    acl_block: bool


class Ext:
    """One file system. Corrupt, Unsupported."""

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream
        self._open()
        needs_recovery = self._superblock.s_feature_incompat & _RECOVER
        self.unclean = ""
        if needs_recovery:
            if not self._superblock.s_feature_compat & _HAS_JOURNAL or not self._superblock.s_journal_inum:
                raise Unsupported("its journal was not replayed and is on another device")
            self._replay()
        elif not self._superblock.s_state & _CLEAN:
            self.unclean = f"this {self.kind} has no journal and was not cleanly unmounted"
        self._inode = lru_cache(4096)(self._read_inode)
        self._runs = lru_cache(64)(self._read_runs)

    @property
    def kind(self) -> str:
        return f"ext{self._library.type}"

    @property
    def root(self) -> Node:
        return (_ROOT,)

    def status(self, node: Node) -> Status:
        return self._inode(node[0]).status

    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        inode = self._inode(node[0])
        if not stat.S_ISDIR(inode.status.mode):
            raise NotADirectoryError
        if inode.status.size > DIRECTORY_BYTES_MAX or inode.status.size % self._block_bytes:
            raise Corrupt(f"a directory of {inode.status.size} bytes")
        _refuse_special(inode)
        runs = self._runs(node[0])
        for offset in range(0, inode.status.size, self._block_bytes):
            yield from self._names(runs.read(self._stream, offset, self._block_bytes))

    def read(self, node: Node, offset: int, length: int) -> bytes:
        _refuse_special(self._inode(node[0]))
        return self._runs(node[0]).read(self._stream, offset, length)

    def readlink(self, node: Node) -> bytes:
        inode = self._inode(node[0])
        size = inode.status.size
        if not stat.S_ISLNK(inode.status.mode) or not 0 < size <= LINK_BYTES_MAX:
            raise Corrupt(f"a symbolic link of {size} bytes")
        _refuse_special(inode)
        own = self._block_bytes if inode.acl_block else 0
        if size < len(inode.body) and inode.status.used_bytes == own:
            return inode.body[:size]
        return self.read(node, 0, size)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        inode = INode(self._library, node[0])
        if self._superblock.s_inode_size <= 128:
            return {}
        return {
            attribute.name.encode(errors="surrogateescape"): bytes(attribute.value)
            for attribute in inode.xattr
            if attribute.name.startswith(_XATTR_PREFIX)
        }

    def _open(self) -> None:
        """Reads the superblock, again once the journal is over it."""
        self._library = ExtFS(self._stream)
        self._superblock = superblock = self._library.sb
        strange = superblock.s_feature_incompat & ~_KNOWN_INCOMPAT
        if strange:
            names = [_NAMES.get(1 << bit, f"{1 << bit:#x}") for bit in range(32) if strange >> bit & 1]
            raise Unsupported(f"this {self.kind} has features that are not read here: {', '.join(names)}")
        if superblock.s_log_block_size > 6 or superblock.s_inode_size not in (128, 256, 512, 1024, 2048, 4096):
            raise Corrupt("a superblock with impossible sizes")
        self._block_bytes = int(self._library.block_size)

    def _replay(self) -> None:
        # The journal's own file is never in the journal.
        number, raw = int(self._superblock.s_journal_inum), self._stream
        inode, runs = self._read_inode(number), self._read_runs(number)
        journal = Journal(partial(runs.read, raw), inode.status.size, self._block_bytes, self._library.last_block)
        newer = journal.newer_blocks()
        blocks = {number: partial(journal.bytes_of, block) for number, block in newer.items()}
        self._stream = raw.replacing(self._block_bytes, blocks)
        self._open()

    def _read_inode(self, number: int) -> _Inode:
        superblock = self._superblock
        if not 1 <= number <= superblock.s_inodes_count:
            raise Corrupt(f"there is no inode {number}")
        group, index = divmod(number - 1, superblock.s_inodes_per_group)
        descriptor = self._library._read_group_desc(group)
        table = descriptor.bg_inode_table_lo | getattr(descriptor, "bg_inode_table_hi", 0) << 32
        place = table * self._block_bytes + index * superblock.s_inode_size
        data = self._stream.read_at(place, superblock.s_inode_size)
        mode, uid, size, atime, ctime, mtime, gid, links, used, flags = struct.unpack_from("<2H4I4x2H2I", data)
        acl, size_high = struct.unpack_from("<2I", data, 104)
        used_high, acl_high, uid_high, gid_high = struct.unpack_from("<4H", data, 116)
        if not links or not mode:
            raise Corrupt(f"inode {number} is not in use")
        extra = struct.unpack_from("<H", data, 128)[0] if len(data) > 128 else 0
        extras = [struct.unpack_from("<I", data, at)[0] if 128 + extra >= at + 4 else 0 for at in (140, 136, 132)]
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            size |= size_high << 32
        status = Status(
            *(mode, uid | uid_high << 16, gid | gid_high << 16, links, size, (used | used_high << 32) * 512),
            *(_time(seconds, extra) for seconds, extra in zip((atime, mtime, ctime), extras, strict=True)),
        )
        return _Inode(status, flags, data[40:100], bool(acl | acl_high << 32))

    def _read_runs(self, number: int) -> Runs:
        inode = self._read_inode(number)
        extents = inode.flags & _EXTENTS_FLAG
        blocks = self._extents(inode.body, _DEPTH_MAX + 1) if extents else self._pointers(inode)
        size = self._block_bytes
        return Runs(Run(block * size, self._place(place, count), count * size) for block, place, count in blocks)

    def _place(self, block: int, count: int) -> int:
        if block + count - 1 > self._library.last_block:
            raise Corrupt(f"blocks {block} and following are not in the file system")
        return block * self._block_bytes

    def _extents(self, node: bytes, above: int) -> Iterator[tuple[int, int, int]]:
        """Block of the file, block of the file system, count: of each extent that was written."""
        magic, count, _, depth = struct.unpack_from("<4H", node)
        if magic != _EXTENT_MAGIC or depth >= above or 12 + 12 * count > len(node):
            raise Corrupt("an extent tree that is none")
        for at in range(12, 12 + 12 * count, 12):
            if depth:
                _, low, high = struct.unpack_from("<2IH", node, at)
                place = self._place(low | high << 32, 1)
                yield from self._extents(self._stream.read_at(place, self._block_bytes), depth)
            else:
                block, length, high, low = struct.unpack_from("<I2HI", node, at)
                if length <= _UNWRITTEN:
                    yield block, low | high << 32, length

    def _pointers(self, inode: _Inode) -> Iterator[tuple[int, int, int]]:
        """The same of a file that has a list of blocks."""
        blocks = -(-inode.status.size // self._block_bytes)
        first = 0
        for index, place in enumerate(struct.unpack("<15I", inode.body)):
            level = max(0, index - 11)
            yield from self._pointed(place, first, level, blocks)
            first += (self._block_bytes // 4) ** level

    def _pointed(self, place: int, first: int, level: int, end: int) -> Iterator[tuple[int, int, int]]:
        if not place or first >= end:
            return
        if not level:
            yield first, place, 1
            return
        each = (self._block_bytes // 4) ** (level - 1)
        pointers = struct.unpack(
            f"<{self._block_bytes // 4}I", self._stream.read_at(self._place(place, 1), self._block_bytes)
        )
        for index, pointer in enumerate(pointers):
            yield from self._pointed(pointer, first + index * each, level - 1, end)

    def _names(self, block: bytes) -> Iterator[tuple[bytes, Node]]:
        """The entries of one block of a directory."""
        typed = self._superblock.s_feature_incompat & _FILETYPE
        at = 0
        while at < len(block):
            if at + 8 > len(block):
                raise Corrupt("a directory entry that does not fit its block")
            number, length, name_length, kind = struct.unpack_from("<IH2B", block, at)
            if length in (0, 65535) and len(block) == 1 << 16:
                length = len(block)
            if length % 4 or length < 8 or at + length > len(block) or 8 + name_length > length:
                raise Corrupt("a directory entry that does not fit its block")
            name = block[at + 8 : at + 8 + name_length]
            at += length
            if not number or name in (b".", b".."):
                continue
            if kind in _SHOWN_FILETYPES if typed else stat.S_IFMT(self._inode(number).status.mode) in SHOWN_TYPES:
                yield name, (number,)


def _refuse_special(inode: _Inode) -> None:
    if inode.flags & _ENCRYPTED_FLAG:
        raise Unsupported("it is encrypted")
    if inode.flags & _INLINE_FLAG:
        raise Unsupported("it lies inline")


def _time(seconds: int, extra: int) -> int:
    """The two low bits of `extra` are further bits of the seconds, the others nanoseconds."""
    return (signed32(seconds) + ((extra & 3) << 32)) * 1_000_000_000 + min(extra >> 2, 999_999_999)
