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
  whoever opens the store; a container is sealed, a segment consolidated or removed only after that;
- an entry that is not whole, or of another series, ends the log: it was being written, or is left of an earlier one;
- after a failed sync of the log nothing more is kept in it: the store stops.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from dedup import layout
from dedup.errors import Damaged, StoreFull
from dedup.layout import CHECKSUM_BYTES, FORMAT_VERSION, Fields, checksum, know_version
from dedup.storage import Buffer, Storage
from dedup.types import ContainerForm

log = logging.getLogger(__name__)

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

_OFFSET_MAX: Final = 1 << 62
_REMEDY: Final = "`rewindfs verify --repair` takes the log away, and with it what was in it alone"


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
        """Of the store at that path, whose log is empty: see `restore`."""
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
            if not _emptied(self._storage, self._path, self._fd):
                self.close()
            self._begin()

    def close(self) -> None:
        """Gives the descriptor back; what is kept stays."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._storage.close(fd)


def restore(storage: Storage, store: Path) -> list[Path]:
    """What the log has is in the store's files and the log is empty, both DURABLE when it returns; which files it has a
    part of and could not give it to. Under the store's lock, before what it names is read; killed, it is called again.

    Damaged, UnknownFormat: the log is not to be understood. StoreFull, StoreFailed.
    """
    path = store / SYNC_LOG_NAME
    try:
        fd = storage.open(path, os.O_RDWR)
    except FileNotFoundError:
        return []
    try:
        left = _write_back(storage, list(_kept(storage.pread(fd, SYNC_LOG_BYTES, 0), path)))
        # Also where it looks empty: who emptied it may have been killed, or failed, before the disk had that.
        _emptied(storage, path, fd)
    finally:
        storage.close(fd)
    return left


def restore_unwritten(storage: Storage, store: Path) -> None:
    """`restore` for those who read a store, where nobody has it open for writing, who would have done that. Errors as
    there."""
    path = store / SYNC_LOG_NAME
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        is_empty = storage.pread(fd, len(SYNC_LOG_MAGIC), 0) != SYNC_LOG_MAGIC
    finally:
        storage.close(fd)
    if is_empty:
        return
    lock = storage.open(store / layout.LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        if storage.lock(lock):
            restore(storage, store)
    finally:
        storage.close(lock)


def _write_back(storage: Storage, parts: Sequence[Part]) -> list[Path]:
    """Durably. Which files are missing, or of another form than what was appended to."""
    opened: dict[Path, int] = {}
    left: list[Path] = []
    with ExitStack() as stack:
        for path in {part.path: None for part in parts}:
            try:
                fd = storage.open(path, os.O_RDWR)
            except FileNotFoundError:
                left.append(path)
                continue
            stack.callback(storage.close, fd)
            if _is_raw(storage, path, fd):
                opened[path] = fd
            else:
                left.append(path)
        for part in parts:
            if part.path in opened:
                storage.pwritev(opened[part.path], [part.content], part.offset)
        for fd in opened.values():
            storage.datasync(fd)
    for path in left:
        log.error("%s is missing or damaged, and the sync log has a part of it", path)  # who reads it says what is lost
    return left


def _is_raw(storage: Storage, path: Path, fd: int) -> bool:
    """Whether it is appended to: a container was sealed since, if a build sealed it that does not know the log."""
    if layout.container_named(path.name) is None:
        return True
    try:
        header = layout.unpack_container_header(storage.pread(fd, layout.CONTAINER_PAGE_BYTES, 0), path)
    except Damaged:
        return False
    return header.form is ContainerForm.RAW


def _emptied(storage: Storage, path: Path, fd: int) -> bool:
    """Durably. False: a full disk does not let it be written to, and the file went."""
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


def _kept(content: bytes, path: Path) -> Iterator[Part]:
    """The parts of the log's entries, which its file's content has. Damaged, UnknownFormat."""
    at, first, header = 0, None, SYNC_LOG_ENTRY
    for expected in range(len(content) // SYNC_LOG_ALIGNMENT):
        head = content[at : at + header.size]
        if len(head) < header.size:
            return
        magic, version, _, count, series, number, length, stored = header.struct.unpack(head)
        body = content[at + header.size : at + header.size + length]
        first = series if first is None else first
        if magic != SYNC_LOG_MAGIC or checksum(head[:-CHECKSUM_BYTES] + body) != stored:
            return
        if (series, number) != (first, expected):
            return
        know_version(version, path)
        yield from _parts(body, count, path)
        at += -(-(header.size + length) // SYNC_LOG_ALIGNMENT) * SYNC_LOG_ALIGNMENT


def _parts(body: bytes, count: int, path: Path) -> Iterator[Part]:
    at = 0
    for _ in range(count):
        start = at + SYNC_LOG_PART.size
        if start > len(body):
            raise Damaged(f"{path}: an entry ends within its parts; {_REMEDY}")
        offset, length, name_length = SYNC_LOG_PART.struct.unpack_from(body, at)
        at = start + name_length + length
        file = _file(path.parent, body[start : start + name_length])
        if file is None or at > len(body) or offset + length > _OFFSET_MAX:
            raise Damaged(f"{path}: an entry names what nothing is ever appended to; {_REMEDY}")
        yield Part(file, offset, body[at - length : at])


def _file(store: Path, name: bytes) -> Path | None:
    """The file of that name, if it is one that the writer appends to: a store may come from anybody."""
    try:
        parts = name.decode("ascii").split("/")
    except UnicodeDecodeError:
        return None
    match parts:
        case [layout.CONTAINERS_NAME, file] if layout.container_named(file) is not None:
            return store.joinpath(*parts)
        case [layout.GROUPS_NAME, group, layout.JOURNAL_NAME, file] if layout.segment_named(file) is not None:
            return store.joinpath(*parts) if group.isprintable() and group.strip(".") else None
    return None
