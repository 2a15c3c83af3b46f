"""One file system inside an image, as all of them are shown."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

Node = tuple[int, ...]
"""What names an inode within its file system; hard links have one. Another of each file system's own choice."""

DIRECTORY_BYTES_MAX: Final = 256 << 20
"""Of a directory, where they have to be looked at together."""
LINK_BYTES_MAX: Final = 4095
"""Of a symbolic link's target, as in the kernel."""
SHOWN_TYPES: Final = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})
"""Devices, fifos and sockets are left out: they hold nothing to restore."""


class ImageError(Exception):
    """An image cannot be read as it asks to be. The message says what is wrong with it, not where it is."""


class Corrupt(ImageError):
    """What the file system says cannot be true."""


class Unsupported(ImageError):
    """It may be sound, but this does not read it."""


class NotReplayed(Unsupported):
    """Its log is not replayed here, and without that its inodes may lead to what is another file's by now."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"this {kind} was in use, and its log is not replayed here: without it a file may show another one's "
            "bytes; clone this moment (rewindfs clone) and mount the clone, which replays it"
        )


class NoFilesystem(ImageError):
    """There is none, or none that is known."""


@dataclass(frozen=True, slots=True)
class Status:
    """Of an inode: `mode` with its type; times in ns since 1970 UTC."""

    mode: int
    uid: int
    gid: int
    links: int
    size: int
    used_bytes: int
    atime: int
    mtime: int
    ctime: int


class Filesystem(Protocol):
    """Read-only. Whatever the image holds, a method answers or raises an exception, of any type."""

    @property
    def kind(self) -> str:
        """As in `mount -t`."""

    @property
    def unclean(self) -> str:
        """Why what is shown may be older than what was written; empty if it is not. A mount would show the same."""

    @property
    def root(self) -> Node:
        """The root directory."""

    def status(self, node: Node) -> Status:
        """Of any inode that `entries` gave."""

    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        """The names in a directory but for . and .."""

    def read(self, node: Node, offset: int, length: int) -> bytes:
        """Bytes of a file: exactly `length` of them, none of which is past its end."""

    def readlink(self, node: Node) -> bytes:
        """Where a symbolic link leads to."""

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """Extended attributes that a person can use."""


def signed32(value: int) -> int:
    """A u32 that stands for an i32."""
    return value - (1 << 32) if value >> 31 else value
