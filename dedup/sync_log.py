"""The sync log: what was appended since the last sync becomes durable by one write to one file, while it is little.

A sync of the files themselves is one for the container and then one for the journal, and each has the file system
commit the file's new length. Who waits for DURABLE with each small write, as a data base does, waits for both. The log
takes the same bytes in one entry, written over room that the file has already, so that one sync of data alone is all
that the disk is asked for (measured: 115 µs instead of 430). The files are synced later, many such syncs at once. What
InnoDB's doublewrite buffer, the ZFS intent log and PostgreSQL's recycled WAL segments have in common is the method.

Invariants:
- the entries from the file's beginning on hold, in order, all that was appended since the files were synced, up to
  where the last entry ends: written over the files they give what was there;
- the log is empty, durably, before a file that it names is replaced: whoever syncs the files empties it, and so does
  whoever opens the store (`sync_log_restore`); a container is sealed, a segment consolidated or removed after that;
- an entry is begun only when the one before it is durable;
- after a failed sync of the log nothing more is kept in it: the store stops.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from dedup.errors import StoreFull
from dedup.layout import CHECKSUM_BYTES, FORMAT_VERSION, Fields, checksum
from dedup.storage import Buffer, Storage

SYNC_LOG_NAME: Final = "synclog"
SYNC_LOG_MAGIC: Final = b"rwSYNCL\n"
SYNC_LOG_ENTRY: Final = Fields(
    "sync log entry",
    ("magic", "8s"),
    ("version", "H"),
    ("reserved", "2s"),
    ("parts", "I"),
    ("series", "Q"),
    ("number", "Q"),
    ("bytes", "Q"),
    ("checksum", "Q"),
)
SYNC_LOG_PART: Final = Fields("sync log part", ("offset", "Q"), ("bytes", "I"), ("path_bytes", "I"))
SYNC_LOG_BYTES: Final = 4 << 20
"""Size of the file. When it is full the files are synced: after some hundred entries, or of the largest, 30."""
SYNC_LOG_ENTRY_BYTES_MAX: Final = 128 << 10
"""Of what an entry takes, with what says where it belongs but the paths. To write so much twice costs about what a sync
less saves."""
SYNC_LOG_ALIGNMENT: Final = 4096
"""Entries begin at multiples of it: no entry is on a page that another one is written to."""
ROOM_RETRY_SECONDS: Final = 60.0
"""For so long the log is not tried again where the disk had no room for it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes as they were written to a file of the store."""

    path: Path
    offset: int
    content: bytes


class Unsynced:
    """What was appended to the store's files since it was last taken, as long as an entry of the log takes it. Safe to
    share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[Part] = []
        self._bytes = 0

    def note(self, path: Path, offset: int, buffers: Sequence[Buffer]) -> None:
        """These were written there, one after the other: to be called after that, and before anybody is told."""
        with self._lock:
            if self._bytes > SYNC_LOG_ENTRY_BYTES_MAX:
                return
            self._bytes += SYNC_LOG_PART.size + sum(map(len, buffers))
            if self._bytes > SYNC_LOG_ENTRY_BYTES_MAX:
                self._parts = []
            else:
                self._parts.append(Part(path, offset, b"".join(buffers)))

    def take(self) -> list[Part] | None:
        """All of it, in order; None: it is more than an entry takes. What is noted from now on is for the next one."""
        with self._lock:
            parts = self._parts if self._bytes <= SYNC_LOG_ENTRY_BYTES_MAX else None
            self._parts, self._bytes = [], 0
        return parts


class SyncLog:
    """The writer's side. One thread at a time calls `keep` and `empty`, and others `unsynced` beside it."""

    def __init__(self, storage: Storage, store: Path) -> None:
        """Of the store at that path, whose log is empty: see `sync_log_restore`."""
        self.unsynced = Unsynced()
        self._storage = storage
        self._store = store
        self._path = store / SYNC_LOG_NAME
        self._fd = -1
        self._full_until = 0.0
        self._begin()

    def _begin(self) -> None:
        self._series = secrets.randbits(64)
        self._number = 0
        self._end = 0

    def keep(self, parts: Sequence[Part]) -> bool:
        """The parts are DURABLE when it returns. False: there is no room for them. StoreFailed."""
        entry = _packed(parts, self._store, self._series, self._number)
        if self._end + len(entry) > SYNC_LOG_BYTES or time.monotonic() < self._full_until:
            return False
        try:
            if self._fd < 0:
                self._fd = self._opened()
            self._storage.pwritev(self._fd, [entry], self._end)
        except StoreFull:  # when the file is made, or where a file system does not write in place
            self._full_until = time.monotonic() + ROOM_RETRY_SECONDS
            return False
        self._storage.datasync(self._fd)
        self._number += 1
        self._end += len(entry)
        return True

    def _opened(self) -> int:
        """The file, all of which was written to once. StoreFull leaves none; StoreFailed may."""
        fd = self._storage.open(self._path, os.O_RDWR | os.O_CREAT)
        try:
            if self._storage.size(fd) != SYNC_LOG_BYTES:
                self._storage.truncate(fd, 0)
                self._storage.pwritev(fd, [bytes(SYNC_LOG_BYTES)], 0)
                self._storage.datasync(fd)
            self._storage.sync_directory(self._store)
        except BaseException as error:
            self._storage.close(fd)
            if isinstance(error, StoreFull):
                self._storage.unlink(self._path)  # somebody else may need the room
            raise
        return fd

    def empty(self) -> None:
        """To be called when the files are synced. DURABLE when it returns; costs nothing when it is. StoreFailed."""
        if self._number:
            if not emptied(self._storage, self._path, self._fd):
                self.close()
            self._begin()

    def close(self) -> None:
        """Gives the descriptor back; what is kept stays."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._storage.close(fd)


def emptied(storage: Storage, path: Path, fd: int) -> bool:
    """The log is empty, DURABLE. False: a full disk does not let it be written to, and the file went."""
    try:
        storage.pwritev(fd, [bytes(SYNC_LOG_ALIGNMENT)], 0)
        storage.datasync(fd)
    except StoreFull:
        storage.unlink(path)
        storage.sync_directory(path.parent)
        return False
    return True


def _packed(parts: Sequence[Part], store: Path, series: int, number: int) -> bytes:
    """An entry, with zeros up to where the next one begins."""
    packed: list[bytes] = []
    for part in parts:
        name = _name(part.path, store)
        packed += (SYNC_LOG_PART.struct.pack(part.offset, len(part.content), len(name)), name, part.content)
    body = b"".join(packed)
    head = SYNC_LOG_ENTRY.struct.pack(SYNC_LOG_MAGIC, FORMAT_VERSION, b"", len(parts), series, number, len(body), 0)
    head = head[:-CHECKSUM_BYTES]
    entry = b"".join((head, checksum(head + body).to_bytes(CHECKSUM_BYTES, "little"), body))
    return entry + bytes(-len(entry) % SYNC_LOG_ALIGNMENT)


@lru_cache(maxsize=64)
def _name(path: Path, store: Path) -> bytes:
    return str(path.relative_to(store)).encode()
