"""The spool: records on the first appliance's disk, in order, while the second appliance cannot be reached.

A directory for one group, with a lock and segments (see `spool_file`). Synchronous: call it from one thread at a time,
which is not the loop's.

Invariants:
- What it holds is `first_seq`..`last_seq` of one origin, frames without a hole; an empty spool has no segment.
- `synced_seq` is what a power cut leaves; nothing past it is told to anybody.
- A segment is durable before the next one exists, so only the last one may end in an entry that is not whole.
- Segments go oldest first, each durably before the next one: a crash leaves frames without a hole.
- Nothing is appended after a write or a sync has failed. A full disk is no such failure: nothing of that call stays.
- Bytes that do not match their checksum are never given out, nor is anything behind them.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from dedup.errors import StoreError, StoreFull
from dedup.storage import Storage
from dedup.types import Seq
from replication.errors import LocalProtocolError, SpoolBusy, SpoolDamaged, SpoolFailed
from replication.outbox import Frame
from replication.spool_file import (
    SEGMENT,
    Origin,
    SegmentHead,
    SegmentReader,
    entry_bytes,
    new_head,
    pack_entry,
    parse_head,
    segment_of,
    segment_path,
)
from replication.wire import Buffer

SPOOL_SEGMENT_BYTES: Final = 16 << 20
"""A segment that is so long is followed by another one."""
SPOOL_BYTES_MAX: Final = 4 << 30
"""What a spool holds unless told otherwise."""
LOCK_NAME: Final = "lock"
_SCAN_BYTES: Final = 1 << 20

log = logging.getLogger("rewindfs.spool")


@dataclass(slots=True)
class _Segment:
    head: SegmentHead
    bytes: int


class Spool:
    """An ordered log of frames on disk, bounded by `limit` bytes. Use `open`."""

    def __init__(self, storage: Storage, directory: Path, lock: int, limit: int) -> None:
        self.directory = directory
        self.limit = limit
        self.synced_seq = Seq(0)
        """Everything up to here survives a power cut; 0 when it is empty."""
        self.last_seq = Seq(0)
        """Of the newest frame; 0 when it is empty."""
        self.bytes = 0
        """What its files take."""
        self.damage = ""
        """What was found damaged when it was opened: which records are gone, in one line. Empty: nothing."""
        self.failed = ""
        """Why it takes nothing more."""
        self._storage = storage
        self._lock = lock
        self._segments: list[_Segment] = []
        self._fd = -1
        """Of the last segment."""
        self._synced = 0
        """Everything of the last segment before this offset is on the disk."""
        self._first_seq = Seq(0)
        self._reading: tuple[Seq, int] = (Seq(0), -1)
        """A segment that is read, and its descriptor."""
        self._cursor: tuple[Seq, Seq, int] = (Seq(0), Seq(0), 0)
        """Where the next record to be read is: it, its segment, the offset."""

    @classmethod
    def open(cls, directory: Path, limit: int = SPOOL_BYTES_MAX, storage: Storage | None = None) -> Spool:
        """The spool in that directory, which is made if absent. A torn end is cut off; what lies behind damage too, and
        `damage` says so. Raises SpoolBusy, SpoolFailed, UnknownFormat."""
        storage = storage or Storage()
        try:
            try:
                storage.mkdir(directory)
                storage.sync_directory(directory.parent)
            except FileExistsError:
                pass
            lock = storage.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT)
            try:
                if not storage.lock(lock):
                    raise SpoolBusy(f"{directory}: another process uses this spool; end it, or name another directory")
                spool = cls(storage, directory, lock, limit)
                spool._recover()
            except BaseException:
                storage.close(lock)
                raise
        except FileNotFoundError as error:
            raise SpoolFailed(f"{directory.parent}: there is no such directory; make it first") from error
        except StoreError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise SpoolFailed(f"{directory}: the spool cannot be opened: {_reason(error)}") from error
        return spool

    def close(self) -> None:
        """Gives the lock and all descriptors back. Promises nothing about what was not synced."""
        self._close_reading()
        for fd in (self._fd, self._lock):
            if fd >= 0:
                self._storage.close(fd)
        self._fd = self._lock = -1
        self.failed = self.failed or f"{self.directory}: the spool is closed"

    @property
    def origin(self) -> Origin | None:
        """Whose records it holds; None when it is empty."""
        return self._segments[0].head.origin if self._segments else None

    @property
    def first_seq(self) -> Seq:
        """The first record of the oldest frame; `last_seq` + 1 when it is empty."""
        return self._segments[0].head.first_seq if self._segments else Seq(self.last_seq + 1)

    @property
    def empty(self) -> bool:
        return not self._segments

    def append(self, frames: Sequence[Frame], origin: Origin) -> int:
        """Writes the frames behind what there is. How many were taken: fewer than all, perhaps none, when the limit is
        reached or the disk is full. Not durable before `sync`.

        Raises LocalProtocolError for a frame that does not follow or is of another origin, and SpoolFailed.
        """
        self._check_usable()
        self._check_follows(frames, origin)
        taken = self._fitting(frames)
        if not taken:
            return 0
        frames = frames[:taken]
        try:
            if self._needs_segment:
                self._start_segment(frames[0].first_seq, origin)
            self._write(frames)
        except StoreFull:
            if self.last_seq < self.first_seq and self._segments:
                self._remove_first()
            return 0
        except (StoreError, FileExistsError, FileNotFoundError) as error:
            self._fail(error)
        self.last_seq = frames[-1].seq
        return taken

    def sync(self) -> None:
        """Everything appended survives a power cut when it returns. Raises SpoolFailed: then `last_seq` falls back to
        what was synced before, and nothing is taken any more."""
        self._check_usable()
        if self.synced_seq == self.last_seq:
            return
        try:
            self._storage.datasync(self._fd)
        except StoreError as error:
            self._fail(error)
        self._synced = self._segments[-1].bytes
        self.synced_seq = self.last_seq

    def read(self, from_seq: Seq, bytes_max: int) -> list[Frame]:
        """The frames from record `from_seq` on, in order, at least one if there is one, and about `bytes_max` of them.
        The first one may begin before `from_seq`, when that is within an aggregate. [] past the end.

        Raises SpoolDamaged where the disk does not give back what was written: records before that were given out.
        """
        if not self.first_seq <= from_seq <= self.last_seq:
            return []
        at, segment, offset = self._cursor
        if at != from_seq:
            index = bisect_right(self._segments, from_seq, key=lambda segment: segment.head.first_seq) - 1
            at = segment = self._segments[index].head.first_seq
            offset = SEGMENT.size
        while True:
            try:
                entries = self._reader(segment).read(offset, at, bytes_max)
            except StoreError as error:
                path = segment_path(self.directory, segment)
                raise SpoolDamaged(f"{path}: record {at} cannot be read: {_reason(error)}") from error
            if not entries:
                following = self._after(segment)
                if following != at:
                    raise SpoolDamaged(f"{segment_path(self.directory, segment)}: records from {at} on are missing")
                segment, offset = following, SEGMENT.size
                continue
            at, offset = Seq(entries[-1].frame.seq + 1), entries[-1].end
            self._cursor = (at, segment, offset)
            if at > from_seq:
                return [entry.frame for entry in entries if from_seq <= entry.frame.seq <= self.last_seq]

    def can_drop(self, seq: Seq) -> bool:
        """Whether `drop_through` would remove anything. No IO."""
        if not self._segments:
            return False
        following = self._after(self._segments[0].head.first_seq)
        return (self.last_seq if following is None else following - 1) <= seq

    def drop_through(self, seq: Seq) -> None:
        """The records up to `seq` are needed no more: removes the segments that hold no others, durably, oldest first.
        Raises SpoolFailed."""
        while self.can_drop(seq):
            self._remove_first()

    def discard(self) -> None:
        """Removes everything it holds, durably. Raises SpoolFailed."""
        while self._segments:
            self._remove_first()

    # --- writing ---

    def _check_usable(self) -> None:
        if self.failed:
            raise SpoolFailed(self.failed)

    def _check_follows(self, frames: Sequence[Frame], origin: Origin) -> None:
        expected = Seq(self.last_seq + 1) if self._segments else None
        if self._segments and origin != self.origin:
            raise LocalProtocolError(f"the spool holds records of {self.origin}, not of {origin}")
        for frame in frames:
            if expected is not None and frame.first_seq != expected:
                raise LocalProtocolError(f"record {frame.first_seq} does not follow {expected - 1} in the spool")
            if frame.compare is not None:
                raise LocalProtocolError("a Compare is worth nothing in another session")
            expected = Seq(frame.seq + 1)

    @property
    def _needs_segment(self) -> bool:
        return not self._segments or self._segments[-1].bytes >= SPOOL_SEGMENT_BYTES

    def _fitting(self, frames: Sequence[Frame]) -> int:
        """How many of the frames the limit allows."""
        room = self.limit - self.bytes - (SEGMENT.size if self._needs_segment else 0)
        if entry_bytes(frames) <= room:
            return len(frames)
        for count, frame in enumerate(frames):
            room -= entry_bytes([frame])
            if room < 0:
                return count
        return len(frames)

    def _write(self, frames: Sequence[Frame]) -> None:
        segment = self._segments[-1]
        start = end = segment.bytes
        buffers: list[Buffer] = []
        for frame in frames:
            packed = pack_entry(frame, segment.head.seed, end, self._synced)
            buffers += packed
            end += sum(map(len, packed))
        try:
            self._storage.pwritev(self._fd, buffers, start)
        except StoreFull:
            # What it left is the same frames again, or their beginning: worth nothing, and harmless if it comes back.
            self._storage.truncate(self._fd, start)
            raise
        segment.bytes = end
        self.bytes += end - start

    def _start_segment(self, first_seq: Seq, origin: Origin) -> None:
        """A segment with nothing in it, durable, after the one before."""
        if self._segments:
            self.sync()
        path = segment_path(self.directory, first_seq)
        head, content = new_head(origin, first_seq)
        fd = self._storage.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._storage.pwritev(fd, [content], 0)
            self._storage.datasync(fd)
            self._storage.sync_directory(self.directory)
        except BaseException:
            self._storage.close(fd)
            self._storage.unlink(path)
            raise
        if self._fd >= 0:
            self._storage.close(self._fd)
        self._fd, self._synced = fd, SEGMENT.size
        self._segments.append(_Segment(head, SEGMENT.size))
        self.bytes += SEGMENT.size
        if len(self._segments) == 1:
            self.synced_seq = self.last_seq = Seq(first_seq - 1)

    def _remove_first(self) -> None:
        segment = self._segments[0]
        if self._reading[0] == segment.head.first_seq:
            self._close_reading()
        if self._cursor[1] == segment.head.first_seq:
            self._cursor = (Seq(0), Seq(0), 0)
        try:
            self._storage.unlink(segment_path(self.directory, segment.head.first_seq))
            self._storage.sync_directory(self.directory)
        except (StoreError, FileNotFoundError) as error:
            self._fail(error)
        del self._segments[0]
        self.bytes -= segment.bytes
        if not self._segments:
            self._storage.close(self._fd)
            self._fd, self.bytes = -1, 0
            self.synced_seq = self.last_seq = Seq(0)

    def _fail(self, error: Exception) -> NoReturn:
        self.failed = (
            f"{self.directory}: the spool takes nothing more: {_reason(error)}; look at its disk, then restart"
        )
        log.error("%s", self.failed)
        # What a failed sync was to write may be in memory only: it must not be told of.
        self.last_seq = self.synced_seq
        raise SpoolFailed(self.failed) from error

    # --- reading ---

    def _after(self, segment: Seq) -> Seq | None:
        """The segment that follows; None after the last one."""
        index = bisect_right(self._segments, segment, key=lambda segment: segment.head.first_seq)
        return self._segments[index].head.first_seq if index < len(self._segments) else None

    def _reader(self, first_seq: Seq) -> SegmentReader:
        index = bisect_right(self._segments, first_seq, key=lambda segment: segment.head.first_seq) - 1
        segment = self._segments[index]
        if self._reading[0] != first_seq or self._reading[1] < 0:
            self._close_reading()
            self._reading = (first_seq, self._open_segment(first_seq, os.O_RDONLY))
        return SegmentReader(self._storage, self._reading[1], segment.head, segment.bytes)

    def _open_segment(self, first_seq: Seq, flags: int) -> int:
        path = segment_path(self.directory, first_seq)
        try:
            return self._storage.open(path, flags)
        except FileNotFoundError as error:
            raise SpoolDamaged(f"{path}: the segment is missing") from error

    def _close_reading(self) -> None:
        if self._reading[1] >= 0:
            self._storage.close(self._reading[1])
        self._reading = (Seq(0), -1)

    # --- opening ---

    def _recover(self) -> None:
        names = self._storage.listdir(self.directory)
        found = sorted(first_seq for name in names if (first_seq := segment_of(name)) is not None)
        for index, first_seq in enumerate(found):
            path = segment_path(self.directory, first_seq)
            size = self._storage.file_bytes(path)
            try:
                head = self._head(first_seq)
            except SpoolDamaged as error:
                # The last one may have been cut off in its birth, before anything was told of it.
                self._cut_off(found[index:], "" if size <= SEGMENT.size and first_seq == found[-1] else str(error))
                break
            self._segments.append(_Segment(head, size))
            self.bytes += size
        if self._segments:
            self._recover_end()
        if self.damage:
            log.error("%s", self.damage)

    def _head(self, first_seq: Seq) -> SegmentHead:
        fd = self._open_segment(first_seq, os.O_RDONLY)
        try:
            path = segment_path(self.directory, first_seq)
            head = parse_head(self._storage.pread(fd, SEGMENT.size, 0), path)
        finally:
            self._storage.close(fd)
        if self._segments and head.origin != self.origin:
            raise SpoolDamaged(f"{path}: offset 0: records of {head.origin} behind those of {self.origin}")
        return head

    def _recover_end(self) -> None:
        """Finds the end of the last segment, cuts off what is behind it, and makes sure that the rest is durable."""
        segment = self._segments[-1]
        self._fd = self._open_segment(segment.head.first_seq, os.O_RDWR)
        reader = SegmentReader(self._storage, self._fd, segment.head)
        end, expected = SEGMENT.size, segment.head.first_seq
        try:
            while entries := reader.read(end, expected, _SCAN_BYTES):
                end, expected = entries[-1].end, Seq(entries[-1].frame.seq + 1)
        except SpoolDamaged as error:
            if reader.synced_after(end):
                self._say_damage(str(error))
            self._storage.truncate(self._fd, end)
        self._storage.datasync(self._fd)
        self.bytes += end - segment.bytes
        segment.bytes = self._synced = end
        self.synced_seq = self.last_seq = Seq(expected - 1)
        if self.last_seq < self.first_seq:
            self._remove_first()

    def _cut_off(self, segments: Sequence[Seq], damage: str) -> None:
        """Removes the segments from a damaged one on, the newest first, so that no crash leaves a hole."""
        for first_seq in reversed(segments):
            self._storage.unlink(segment_path(self.directory, first_seq))
            self._storage.sync_directory(self.directory)
        if damage:
            self._say_damage(damage)

    def _say_damage(self, damage: str) -> None:
        self.damage = f"{damage}; the spooled records from there on are lost, their regions will be reconciled"


def _reason(error: Exception) -> str:
    cause = error.__cause__
    return f"{cause.strerror}" if isinstance(cause, OSError) and cause.strerror else str(error)
