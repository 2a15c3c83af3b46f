"""btrfs on one device, by its library: the default subvolume and those inside it.

A transaction is whole or not there, so what is shown is consistent always; what was only fsynced lies in a log of its
own, which is not replayed.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from dissect.btrfs.btrfs import Btrfs as Library
from dissect.btrfs.btrfs import INode
from dissect.btrfs.c_btrfs import c_btrfs

from fusefs.inside.filesystem import LINK_BYTES_MAX, SHOWN_TYPES, Corrupt, Node, Status
from fusefs.inside.image_stream import ImageStream

_ITEM: Final = struct.Struct("<17sQHHB")
_XATTR_PREFIX: Final = b"user."
_EMPTY: Final = 0
"""No subvolume: what a snapshot shows in the place of a subvolume of its original, an empty directory."""
_EMPTY_STATUS: Final = Status(stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0)


class Btrfs:
    """One file system. A node is a subvolume and an inode in it."""

    kind = "btrfs"

    def __init__(self, stream: ImageStream) -> None:
        self._library = Library(stream)
        self.unclean = "this btrfs has a log of what was synced last, which is not replayed" * bool(
            self._library.sb.log_root
        )
        self._inode = lru_cache(1024)(self._find_inode)
        self._open = lru_cache(16)(self._open_file)

    @property
    def root(self) -> Node:
        return _node(self._library.root)

    def status(self, node: Node) -> Status:
        if node[0] == _EMPTY:
            return _EMPTY_STATUS
        inode = self._inode(node)
        raw = inode.inode
        return Status(
            *(raw.mode, raw.uid, raw.gid, raw.nlink, raw.size if not stat.S_ISDIR(raw.mode) else 0, raw.nbytes),
            *(_time(raw.atime), _time(raw.mtime), _time(raw.ctime)),
        )

    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        if node[0] == _EMPTY:
            return
        for name, inode in self._inode(node).iterdir():
            found = _node(inode)
            if name in (".", "..") or inode.type not in SHOWN_TYPES:
                continue
            if found[0] != node[0] and not self._is_inside(found[0], node[0]):
                found = (_EMPTY, found[0], node[0])
            yield name.encode(errors="surrogateescape"), found

    def read(self, node: Node, offset: int, length: int) -> bytes:
        file = self._open(node)
        file.seek(offset)
        data: bytes = file.read(length)
        if len(data) != length:
            raise Corrupt(f"only {len(data)} of {length} bytes are there at {offset}")
        return data

    def readlink(self, node: Node) -> bytes:
        size = self._inode(node).size
        if not 0 < size <= LINK_BYTES_MAX:
            raise Corrupt(f"a symbolic link of {size} bytes")
        return self.read(node, 0, size)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        if node[0] == _EMPTY:
            return found
        cursor = self._inode(node).subvolume.tree.cursor()
        for _, item in cursor.iter(node[1], c_btrfs.BTRFS_XATTR_ITEM_KEY, 0, ignore_offset=True):
            data, at = bytes(item), 0
            while at < len(data):  # names of one hash share an item
                _, _, value_length, name_length, _ = _ITEM.unpack_from(data, at)
                at += _ITEM.size
                name = data[at : at + name_length]
                if name.startswith(_XATTR_PREFIX):
                    found[name] = data[at + name_length : at + name_length + value_length]
                at += name_length + value_length
        return found

    def _find_inode(self, node: Node) -> INode:
        subvolume, number = node
        inode = INode(self._library.open_subvolume(subvolume), number)
        if not inode.inode.nlink:
            raise Corrupt(f"inode {number} of subvolume {subvolume} is not in use")
        return inode

    def _is_inside(self, subvolume: int, parent: int) -> bool:
        """A snapshot has the names of the subvolumes in its original, but not those."""
        try:
            self._library._root_tree.find(subvolume, c_btrfs.BTRFS_ROOT_BACKREF_KEY, parent)
        except KeyError:
            return False
        return True

    def _open_file(self, node: Node) -> Any:
        return self._inode(node).open()


def _time(stamp: Any) -> int:
    seconds = int(stamp.sec)
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 1_000_000_000 + int(stamp.nsec)


def _node(inode: INode) -> Node:
    return int(inode.subvolume.objectid), int(inode.inum)
