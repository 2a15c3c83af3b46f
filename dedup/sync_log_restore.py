"""Restoring the sync log: what may be durable in it alone goes back into the files that it was appended to.

Invariants:
- this is done under the store's lock, before anything that the log may name is read;
- the log is emptied when everything in it is in its files, durably; else nothing is changed, and the store is not
  opened, unless a repair, which has kept a copy, asks for what can be had;
- killed at any instant it can be done again: a part is always the same bytes in the same place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup import layout
from dedup.errors import Damaged, Unreadable
from dedup.layout import CHECKSUM_BYTES, checksum, know_version
from dedup.storage import Storage
from dedup.sync_log import (
    SYNC_LOG_ALIGNMENT,
    SYNC_LOG_BYTES,
    SYNC_LOG_ENTRY,
    SYNC_LOG_MAGIC,
    SYNC_LOG_NAME,
    SYNC_LOG_PART,
    Part,
    emptied,
)
from dedup.types import ContainerForm

log = logging.getLogger(__name__)

_OFFSET_MAX: Final = 1 << 62
_REMEDY: Final = "`rewindfs verify --repair` restores what it can, and keeps the log in quarantine/"

_Faults = list[tuple[Path, Damaged]]
"""What is damaged, missing or cannot be read: each file, and why."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One that is whole."""

    version: int
    parts: int
    series: int
    number: int
    body: bytes
    end: int
    """Where the next one begins."""


def restore(storage: Storage, store: Path, *, leaving: bool = False) -> list[Path]:
    """What the log has is in the store's files, and the log is empty, both DURABLE when it returns.

    Damaged, Unreadable: an entry, or a file that it has a part of, is missing, damaged or cannot be read; nothing was
    changed. `leaving`: what is so is left out, and the files of it are returned, the log's own name for an entry.
    UnknownFormat, StoreFull, StoreFailed.
    """
    path = store / SYNC_LOG_NAME
    try:
        fd = storage.open(path, os.O_RDWR)
    except FileNotFoundError:
        return []
    try:
        faults: _Faults = []
        with ExitStack() as stack:
            parts = list(_parts_of(_entries(storage, path, fd, faults), path, faults))
            opened = _opened(storage, parts, stack, faults)
            if faults and not leaving:
                raise faults[0][1]
            _write_back(storage, parts, opened)
        # Also where it looks empty: who emptied it may have been killed, or failed, before the disk had that.
        emptied(storage, path, fd)
    finally:
        storage.close(fd)
    return [file for file, _ in faults]


def is_waiting(storage: Storage, store: Path) -> bool:
    """Whether the log has something, and nobody has the store open for writing, who would have restored it."""
    path = store / SYNC_LOG_NAME
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if _entry_at(storage, fd, 0) is None:
            return False
    except Unreadable:
        return False  # nobody can tell; who writes will be told
    finally:
        storage.close(fd)
    try:
        lock = storage.open(store / layout.LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return storage.lock(lock, shared=True)
    finally:
        storage.close(lock)


# -- the entries -------------------------------------------------------------------------------------------------------


def _entries(storage: Storage, path: Path, fd: int, faults: _Faults) -> list[_Entry]:
    """Those of the log, in order. UnknownFormat."""
    found: list[_Entry] = []
    at = 0
    try:
        while (entry := _entry_at(storage, fd, at)) is not None:
            series = found[0].series if found else entry.series
            if (entry.series, entry.number) != (series, len(found)):
                break
            know_version(entry.version, path)
            found.append(entry)
            at = entry.end
    except Unreadable as error:
        faults.append((path, error))
    later = list(_later(storage, fd, at, found))
    if later and not faults:
        damage = Damaged(f"{path}: offset {at}: an entry is damaged, with whole ones behind it; {_REMEDY}")
        faults.append((path, damage))
    return found + later


def _entry_at(storage: Storage, fd: int, at: int) -> _Entry | None:
    """The whole entry that begins there. Unreadable."""
    header = SYNC_LOG_ENTRY
    head = storage.pread(fd, header.size, at)
    if not head.startswith(SYNC_LOG_MAGIC) or len(head) < header.size:
        return None
    _, version, _, parts, series, number, length, stored = header.struct.unpack(head)
    if length > SYNC_LOG_BYTES:
        return None
    body = storage.pread(fd, length, at + header.size)
    if checksum(head[:-CHECKSUM_BYTES] + body) != stored:
        return None
    end = at + -(-(header.size + length) // SYNC_LOG_ALIGNMENT) * SYNC_LOG_ALIGNMENT
    return _Entry(version, parts, series, number, body, end)


def _later(storage: Storage, fd: int, at: int, found: Sequence[_Entry]) -> Iterator[_Entry]:
    """Whole entries of the same series behind the first place that has none. An entry is begun when the one before it
    is durable: so that one was not just being written, it is damaged."""
    series = found[0].series if found else _series_at(storage, fd)
    for place in range(at + SYNC_LOG_ALIGNMENT, SYNC_LOG_BYTES, SYNC_LOG_ALIGNMENT) if series is not None else ():
        try:
            entry = _entry_at(storage, fd, place)
        except Unreadable:
            continue  # the room behind the log's end is written to before it is read
        if entry is not None and entry.series == series and entry.number > len(found):
            yield entry


def _series_at(storage: Storage, fd: int) -> int | None:
    """The series of a first entry that is not whole."""
    try:
        head = storage.pread(fd, SYNC_LOG_ENTRY.size, 0)
    except Unreadable:
        return None
    if not head.startswith(SYNC_LOG_MAGIC) or len(head) < SYNC_LOG_ENTRY.size:
        return None
    series: int = SYNC_LOG_ENTRY.struct.unpack(head)[4]
    return series


# -- their parts -------------------------------------------------------------------------------------------------------


def _parts_of(entries: Sequence[_Entry], path: Path, faults: _Faults) -> Iterator[Part]:
    for entry in entries:
        try:
            yield from list(_parts(entry, path))
        except Damaged as error:
            faults.append((path, error))


def _parts(entry: _Entry, path: Path) -> Iterator[Part]:
    """Damaged."""
    at, body = 0, entry.body
    for _ in range(entry.parts):
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


# -- the files ---------------------------------------------------------------------------------------------------------


def _opened(storage: Storage, parts: Sequence[Part], stack: ExitStack, faults: _Faults) -> dict[Path, int]:
    """Descriptors of the files that get their parts back."""
    opened: dict[Path, int] = {}
    for path in {part.path: None for part in parts}:
        try:
            fd = storage.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            if _was_cut_off(storage, path):
                log.warning("%s was cut off after a failed sync; the sync log has more of it, which is left", path)
            else:
                damage = Damaged(f"{path}: is missing, and the sync log has a part of it; put it back: {_REMEDY}")
                faults.append((path, damage))
            continue
        stack.callback(storage.close, fd)
        try:
            if _is_appended_to(storage, path, fd):
                opened[path] = fd
            else:
                log.warning("%s was sealed by a build that does not know the sync log, and has all of it", path)
        except Damaged as error:
            faults.append((path, error))
    return opened


def _was_cut_off(storage: Storage, path: Path) -> bool:
    """Whether it would be the last segment of a journal that is there: of such a one nothing is durable."""
    first = layout.segment_named(path.name)
    if first is None or not storage.exists(path.parent):
        return False
    there = [found for name in storage.listdir(path.parent) if (found := layout.segment_named(name)) is not None]
    return bool(there) and first > max(there)


def _is_appended_to(storage: Storage, path: Path, fd: int) -> bool:
    """False: it is a container that was sealed. Damaged, Unreadable, UnknownFormat."""
    head = storage.pread(fd, layout.CONTAINER_PAGE_BYTES, 0)
    container = layout.container_named(path.name)
    if container is None:
        if layout.unpack_segment_header(head, path).first_seq != layout.segment_named(path.name):
            raise Damaged(f"{path}: offset 0: the segment is another one")
        return True
    header = layout.unpack_container_header(head, path)
    if header.container != container:
        raise Damaged(f"{path}: offset 0: the file is container {header.container}")
    return header.form is ContainerForm.RAW


def _write_back(storage: Storage, parts: Sequence[Part], opened: dict[Path, int]) -> None:
    """Durably."""
    for part in parts:
        if part.path in opened:
            storage.pwritev(opened[part.path], [part.content], part.offset)
    for fd in opened.values():
        storage.datasync(fd)
