"""A file that is only appended to, as a store's container is, with nothing beside it: a part of the floors."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from dedup.container import NEAR_BYTES, STREAM_BYTES
from dedup.storage import Buffer, Storage
from dedup.sync_log import SyncLog


class PlainLog:
    """Large pieces begin their way to the disk at once, and leave memory once they lie NEAR_BYTES behind. What is
    little when it is synced is written to a sync log beside it, and only that is synced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._storage = Storage()
        self._log = SyncLog(self._storage, path.parent)
        self._fd = self._storage.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.bytes = 0

    def append(self, data: Buffer) -> None:
        self._storage.pwritev(self._fd, [data], self.bytes)
        if len(data) >= STREAM_BYTES:
            self._storage.begin_write_back(self._fd, self.bytes, len(data))
            if self.bytes >= NEAR_BYTES:
                self._storage.forget_cached(self._fd, self.bytes - NEAR_BYTES, len(data))
        self._log.unsynced.note(self._path, self.bytes, [data])
        self.bytes += len(data)

    def sync(self) -> None:
        unsynced = self._log.unsynced.take()
        if unsynced is None or not self._log.keep(unsynced):
            self._storage.datasync(self._fd)
            self._log.empty()

    def __enter__(self) -> PlainLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        self._storage.close(self._fd)
