"""Storages that fail on purpose."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from dedup.errors import StoreFailed, StoreFull
from dedup.storage import Buffer, Storage


class FaultyStorage(Storage):
    """Counts the calls that change something, and refuses the one told to, after tearing it.

    `refuse_write_after` bytes more may be written, then every write raises StoreFull having written only those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuse_write_after: int | None = None
        self.refuse_sync = False
        self.refuse_truncate = False
        self.synced: list[Path] = []
        self.reads: list[int] = []

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self.reads.append(length)
        return super().pread(fd, length, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        if self.refuse_write_after is None:
            super().pwritev(fd, buffers, offset)
            return
        whole = b"".join(bytes(buffer) for buffer in buffers)
        part = whole[: self.refuse_write_after]
        super().pwritev(fd, [part], offset)
        self.refuse_write_after -= len(part)
        if len(part) < len(whole):
            raise StoreFull(f"{self.path_of(fd)}: {os.strerror(errno.ENOSPC)}")

    def datasync(self, fd: int) -> None:
        if self.refuse_sync:
            raise StoreFailed(f"{self.path_of(fd)}: sync failed: {os.strerror(errno.EIO)}")
        super().datasync(fd)
        self.synced.append(self.path_of(fd))

    def truncate(self, fd: int, size: int) -> None:
        if self.refuse_truncate:
            raise StoreFailed(f"{self.path_of(fd)}: {os.strerror(errno.EIO)}")
        super().truncate(fd, size)


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))
