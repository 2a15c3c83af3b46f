"""FUSE inode numbers and the files of the source that they stand for.

Invariants:
- `one-node-per-file`: a file of the source has at most one node, found by (st_dev, st_ino). The node's O_PATH
  descriptor keeps the file alive, so as long as the node exists no other file can have that pair: a reused inode
  number is never taken for the file that had it before.
- `numbers-never-return`: FUSE numbers come from a counter, so a number the kernel still remembers names one file ever.
- `lookups`: a node lives while the kernel holds `lookups` references, given by replies and taken back by forget. The
  root lives as long as the map.

Everything is synchronous. Nothing touches a disk: the files are in the kernel's inode cache, being open.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from dataclasses import dataclass
from pathlib import Path

import pyfuse3

from dedup.types import PATH_BYTES_MAX

FileKey = tuple[int, int]
"""(st_dev, st_ino) of a file of the source; names one file for as long as something holds it open."""


@dataclass(slots=True, eq=False)
class Node:
    """A file, directory or other entry of the source that the kernel knows by `number`."""

    number: int
    fd: int
    """O_PATH | O_NOFOLLOW descriptor: names the file itself, whatever its path has become; also when unlinked."""
    key: FileKey
    mode: int
    """st_mode at the first lookup: only the file type is certain to stay."""
    lookups: int

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def proc_path(self) -> bytes:
        """A path for system calls that refuse O_PATH descriptors. It names the file itself, symlinks included."""
        return b"/proc/self/fd/%d" % self.fd


class InodeMap:
    """The nodes of one mount. Holds one descriptor per node the kernel knows: raises the limit as far as allowed."""

    def __init__(self, source: Path) -> None:
        """Opens the source directory. OSError when it is none."""
        _raise_descriptor_limit()
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.fstat(fd)
        self.root = Node(pyfuse3.ROOT_INODE, fd, (status.st_dev, status.st_ino), status.st_mode, 1)
        self._by_number: dict[int, Node] = {self.root.number: self.root}
        self._by_key: dict[FileKey, Node] = {self.root.key: self.root}
        self._next_number = self.root.number + 1

    def __len__(self) -> int:
        return len(self._by_number)

    def node(self, number: int) -> Node:
        """The node of a number that the kernel may use. ESTALE when it has been forgotten."""
        node = self._by_number.get(number)
        if node is None:
            raise OSError(errno.ESTALE, "no such inode", str(number))
        return node

    def find(self, key: FileKey) -> Node | None:
        """The node of a file of the source, if the kernel knows it."""
        return self._by_key.get(key)

    def adopt(self, fd: int, status: os.stat_result) -> Node:
        """Counts one lookup of the file behind the O_PATH descriptor `fd`, which belongs to the map from here."""
        key = (status.st_dev, status.st_ino)
        node = self._by_key.get(key)
        if node is not None:
            os.close(fd)  # never the last descriptor of the file: the node has one
            node.lookups += 1
            return node
        node = Node(self._next_number, fd, key, status.st_mode, 1)
        self._next_number += 1
        self._by_number[node.number] = node
        self._by_key[key] = node
        return node

    def forget(self, number: int, lookups: int) -> int | None:
        """Takes back lookups. Returns the descriptor to close when none is left: closing an unlinked file may block."""
        node = self._by_number.get(number)
        if node is None or node is self.root:
            return None
        node.lookups -= lookups
        if node.lookups > 0:
            return None
        del self._by_number[number]
        del self._by_key[node.key]
        return node.fd

    def path(self, directory: Node, name: bytes = b"") -> str:
        """Where `name` in a directory is now, relative to the source, undecodable bytes as surrogates.

        ENOENT when the directory has been removed, ESTALE when it was moved out of the source behind the mount,
        ENAMETOOLONG. True until the next rename: callers hold off renames while they rely on it.
        """
        if not os.fstat(directory.fd).st_nlink:
            raise OSError(errno.ENOENT, "directory was removed", os.fsdecode(name))
        if directory is self.root:
            return _checked(name)
        root, here = os.readlink(self.root.proc_path), os.readlink(directory.proc_path)
        inside = root.rstrip(b"/") + b"/"
        if not here.startswith(inside):
            raise OSError(errno.ESTALE, "directory has left the source", os.fsdecode(here))
        relative = here.removeprefix(inside)
        return _checked(relative + b"/" + name if name else relative)

    def close(self) -> None:
        """Closes every descriptor. Numbers and nodes mean nothing afterwards."""
        for node in self._by_number.values():
            os.close(node.fd)
        self._by_number.clear()
        self._by_key.clear()


def _checked(path: bytes) -> str:
    if len(path) > PATH_BYTES_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return os.fsdecode(path)


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
