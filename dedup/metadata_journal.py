"""The metadata journal of one group: the truth of the store, and its write-ahead log.

A directory of segments named by the first seq they hold, each a header and entries (see `journal_entry`). One
`JournalWriter` appends; any number of readers, in other processes too, `read` or `scan` beside it (`journal_reader`;
all of the journal's names can be had from here).

Invariants:
- `order`: entries are in seq order without a hole; each segment is named by the seq that follows the one before it;
- a segment is durable before the next one exists, so only the last one may end in an entry that is not whole;
- what lies past the writer's position was never acknowledged: it is cut off, durably, before anything is appended;
- nothing is appended after a sync or a cut has failed: what is on the disk is then unknown until it is read anew.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dedup.errors import Damaged, OutOfOrder, StoreError, StoreFailed
from dedup.journal_entry import (
    Addresses,
    EntryKind,
    Logged,
    LoggedExtent,
    decode,
    encode,
    extents_of,
    kind_of,
)
from dedup.journal_reader import (
    FIRST_POSITION,
    JournalPosition,
    Scanned,
    SegmentFile,
    chain,
    first_position,
    follows,
    read,
    scan,
    segments,
)
from dedup.layout import (
    SEGMENT_BYTES_MAX,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    pack_segment_header,
    segment_path,
    unpack_segment_header,
)
from dedup.storage import Storage
from dedup.sync_log import Unsynced
from dedup.types import Seq, TimeNs
from dedup.write_run import WriteRun

__all__ = [
    "FIRST_POSITION",
    "Addresses",
    "EntryKind",
    "JournalPosition",
    "JournalWriter",
    "Logged",
    "LoggedExtent",
    "Scanned",
    "SegmentFile",
    "chain",
    "decode",
    "encode",
    "extents_of",
    "first_position",
    "kind_of",
    "read",
    "scan",
    "segments",
]


class JournalWriter:
    """The one writer of a group's journal.

    Everything is called by one thread at a time, but `sync` and `give_up`, which may run beside the others.
    """

    def __init__(
        self,
        storage: Storage,
        directory: Path,
        fd: int,
        header: SegmentHeader,
        position: JournalPosition,
        unsynced: Unsynced,
    ) -> None:
        """Use `open`."""
        self._storage = storage
        self._directory = directory
        self._unsynced = unsynced
        self._fd = fd
        self._seed = header.seed
        self._position = position
        self._path = segment_path(directory, position.segment)
        self._last: Seq | None = Seq(header.first_seq - 1) if position.offset == SEGMENT_HEADER_BYTES else None
        self._failed: str | None = None
        # Held while a descriptor is synced or closed: a sync must not meet a number that was given out anew.
        self._sync_lock = threading.Lock()
        # Held by an append from its first look to its last step, so that `give_up` comes before or after all of it.
        self._append_lock = threading.Lock()

    @classmethod
    def open(
        cls, storage: Storage, directory: Path, position: JournalPosition | None, unsynced: Unsynced | None = None
    ) -> JournalWriter:
        """Continues at `position`, of a raw segment; what lies behind it is cut off, durably, before this returns.
        What is appended is noted in `unsynced`.

        None starts the journal of a new group (the directory is there): Damaged if one with entries is there already.
        Damaged, UnknownFormat, StoreFull, StoreFailed.
        """
        unsynced = unsynced or Unsynced()
        if position is None or (position == FIRST_POSITION and _is_unborn(storage, directory)):
            cls._remove_unborn(storage, directory)
            fd, header = _make_segment(storage, directory, Seq(1))
            return cls(storage, directory, fd, header, FIRST_POSITION, unsynced)
        path = segment_path(directory, position.segment)
        try:
            fd = storage.open(path, os.O_RDWR)
        except FileNotFoundError as error:
            raise Damaged(f"{path}: offset {position.offset}: the segment is missing") from error
        try:
            header = unpack_segment_header(storage.pread(fd, SEGMENT_HEADER_BYTES, 0), path)
            if header.first_seq != position.segment:
                raise Damaged(f"{path}: offset 0: the segment is that of seq {header.first_seq}")
            writer = cls(storage, directory, fd, header, position, unsynced)
            writer._cut(position)
        except BaseException:
            storage.close(fd)
            raise
        return writer

    @staticmethod
    def _remove_unborn(storage: Storage, directory: Path) -> None:
        """Removes a first segment that a crash left without an entry."""
        found = segments(storage, directory)
        if not found:
            return
        path = segment_path(directory, found[0])
        if found != [1] or not _is_unborn(storage, directory):
            raise Damaged(f"{path}: offset {SEGMENT_HEADER_BYTES}: a new journal was asked for where one is")
        storage.unlink(path)

    @property
    def position(self) -> JournalPosition:
        """The end of the last entry appended."""
        return self._position

    def append(self, entries: Sequence[Logged]) -> None:
        """Appends all the entries with one write, or none. RECEIVED when it returns, DURABLE after the next `sync`.

        StoreFull: nothing was kept and the journal goes on where it was. StoreFailed: open the store anew.
        OutOfOrder: an entry does not follow the one before it. May start a new segment, which syncs the old one.
        """
        if not entries:
            return
        with self._append_lock:
            self._check_usable()
            last = self._last
            for entry in entries:
                if (
                    last is not None
                    and (entry.kind is not EntryKind.WRITE or entry.first_seq != last + 1)
                    and not follows(last, entry.kind, entry.first_seq, entry.seq)
                ):
                    seqs = f"{entry.first_seq}..{entry.seq}"
                    raise OutOfOrder(f"seq {seqs} ({entry.kind.name}) does not follow seq {last}")
                last = entry.seq
            if self._position.offset >= SEGMENT_BYTES_MAX:
                self._rotate(Seq(entries[0].first_seq - 1 if entries[0].kind.consumes_seq else entries[0].seq))
            self._write([encode(entry, self._seed) for entry in entries])
            self._last = last

    def append_run(self, run: WriteRun) -> None:
        """As `append` of its entries."""
        with self._append_lock:
            self._check_usable()
            if self._last is not None and run.first_seq != self._last + 1:
                raise OutOfOrder(f"seq {run.first_seq}..{run.seq} (WRITE) does not follow seq {self._last}")
            if self._position.offset >= SEGMENT_BYTES_MAX:
                self._rotate(Seq(run.first_seq - 1))
            self._write([run.encode(self._seed)])
            self._last = run.seq

    def _write(self, encoded: list[bytes]) -> None:
        try:
            self._storage.pwritev(self._fd, encoded, self._position.offset)
        except StoreError as error:
            self._take_back(error)
            raise
        self._unsynced.note(self._path, self._position.offset, encoded)
        self._position = JournalPosition(self._position.segment, self._position.offset + sum(map(len, encoded)))

    def _take_back(self, cause: StoreError) -> None:
        """After a failed write: cuts off what it left. Synced, so that it cannot return under what is written next."""
        if isinstance(cause, StoreFailed):
            self._failed = str(cause)
        try:
            self._storage.truncate(self._fd, self._position.offset)
            self._storage.datasync(self._fd)
        except StoreError as error:
            self._failed = str(error)
            raise StoreFailed(str(error)) from cause

    def rotate(self, last: Seq) -> bool:
        """Starts the segment that follows seq `last`, the last one appended, unless the one so far has no seq yet.

        The segment so far is complete then, and durable. False when there was nothing to complete. StoreFull,
        StoreFailed.
        """
        with self._append_lock:
            self._check_usable()
            before = self._position.segment
            self._rotate(last)
            return self._position.segment != before

    def _rotate(self, last: Seq) -> None:
        """Starts the segment of `last` + 1, after making the one so far durable."""
        first = Seq(last + 1)
        if first == self._position.segment:
            return  # only entries without a seq of their own so far: its name would be the same
        self.sync()
        try:
            fd, header = _make_segment(self._storage, self._directory, first)
        except StoreFailed as error:
            self._failed = str(error)
            raise
        old, self._fd = self._fd, fd
        self._seed = header.seed
        self._position = JournalPosition(first, SEGMENT_HEADER_BYTES)
        self._path = segment_path(self._directory, first)
        with self._sync_lock:
            self._storage.close(old)

    def sync(self) -> None:
        """Every entry appended before the call is DURABLE when it returns. Callable from any thread. StoreFailed."""
        with self._sync_lock:
            self._check_usable()
            # A segment left behind meanwhile was synced before `_fd` changed.
            try:
                self._storage.datasync(self._fd)
            except StoreFailed as error:
                self._failed = str(error)
                raise

    def give_up(self, why: str, position: JournalPosition) -> None:
        """After a failure: nothing is appended any more, and what lies after `position` is cut off as far as the disk
        allows, so that the next writer does not take for kept what never became durable. Callable beside `append`, from
        any thread. StoreError when it cannot be cut."""
        with self._append_lock:
            self._failed = self._failed or why
            if self._fd >= 0 and position < self._position:
                self._cut_back(position)

    def truncate_to(self, position: JournalPosition) -> None:
        """Takes back, durably, everything after `position` (the end of an entry). Damaged, StoreFailed."""
        self._check_usable()
        self._cut_back(position)

    def _cut_back(self, position: JournalPosition) -> None:
        if position > self._position:
            raise ValueError(f"{position} lies after {self._position}")
        if position.segment != self._position.segment:
            path = segment_path(self._directory, position.segment)
            fd = self._storage.open(path, os.O_RDWR)
            header = unpack_segment_header(self._storage.pread(fd, SEGMENT_HEADER_BYTES, 0), path)
            with self._sync_lock:
                old, self._fd = self._fd, fd
                self._storage.close(old)
            self._seed = header.seed
        self._position = position
        self._path = segment_path(self._directory, position.segment)
        self._last = Seq(position.segment - 1) if position.offset == SEGMENT_HEADER_BYTES else None
        self._cut(position)

    def _cut(self, position: JournalPosition) -> None:
        path = segment_path(self._directory, position.segment)
        size = self._storage.size(self._fd)
        if size < position.offset:
            raise Damaged(f"{path}: offset {size}: the segment ends before offset {position.offset}")
        later = [first for first in segments(self._storage, self._directory) if first > position.segment]
        try:
            for first in reversed(later):  # the last first: what is left is without a hole at any instant
                self._storage.unlink(segment_path(self._directory, first))
            if later:
                self._storage.sync_directory(self._directory)
            if size > position.offset:
                self._storage.truncate(self._fd, position.offset)
                self._storage.datasync(self._fd)
        except StoreError as error:
            self._failed = str(error)
            raise

    def close(self) -> None:
        """Gives the descriptor back. Not a sync."""
        with self._sync_lock:
            if self._fd >= 0:
                self._storage.close(self._fd)
            self._fd = -1
            self._failed = self._failed or "the journal is closed"

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise StoreFailed(self._failed)


def _is_unborn(storage: Storage, directory: Path) -> bool:
    """Whether the first segment of a group's life holds no entry: it may not even have its header."""
    try:
        fd = storage.open(segment_path(directory, Seq(1)), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return storage.size(fd) <= SEGMENT_HEADER_BYTES
    finally:
        storage.close(fd)


def _make_segment(storage: Storage, directory: Path, first: Seq) -> tuple[int, SegmentHeader]:
    """A new segment, header and name durable. StoreFull leaves no file behind; StoreFailed may."""
    path = segment_path(directory, first)
    header = SegmentHeader(first, secrets.randbits(64), TimeNs(time.time_ns()))
    try:
        fd = storage.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError as error:
        raise StoreFailed(f"{path}: a segment of that name is there already; open the store anew") from error
    try:
        storage.pwritev(fd, [pack_segment_header(header)], 0)
        storage.datasync(fd)
        storage.sync_directory(directory)
    except BaseException:
        storage.close(fd)
        storage.unlink(path)
        raise
    return fd, header
