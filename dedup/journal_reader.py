"""Reading the metadata journal: every entry from a position on, verified, in bounded memory.

Any number of readers beside the writer, in other processes too; nothing here changes a file. See `metadata_journal`
for the invariants that are relied on here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import xxhash

from dedup.errors import Damaged
from dedup.journal_entry import KINDS, EntryKind, Logged, decode
from dedup.layout import (
    ADDRESS_BYTES,
    CHECKSUM_BYTES,
    ENTRY_BYTES_MAX,
    ENTRY_HEADER,
    ENTRY_HEADER_BYTES,
    ENTRY_PADDING_MASK,
    EXTENT_HEADER,
    EXTENT_HEADER_BYTES,
    FINGERPRINT_BYTES,
    RAW_GENERATION,
    SEGMENT_HEADER_BYTES,
    checksum,
    segment_named,
    segment_path,
    unpack_segment_header,
)
from dedup.manifest import Manifest, read_manifest
from dedup.storage import Storage
from dedup.types import ClockRun, JournalId, Seq, TimeNs, VolumeId

_LAST_ENTRY_BYTES: Final = 1 << 16
"""Where the last entry of a segment is looked for first: nearly all are far smaller."""
_EXTENTS: Final = struct.Struct("<I")
"""The last field of an entry's header."""
CHUNK_BYTES: Final = 1 << 20
"""Read at a time, once it is a long way; more only for one entry that is larger."""
FIRST_CHUNK_BYTES: Final = 1 << 16
"""Read first: who goes back to one moment needs a few entries behind a checkpoint. Each further read is four times as
long."""


@dataclass(frozen=True, slots=True, order=True)
class JournalPosition:
    """A place between entries: the first seq of a segment, an offset in its file, and which file that is."""

    segment: Seq
    offset: int
    generation: int = RAW_GENERATION


FIRST_POSITION: Final = JournalPosition(Seq(1), SEGMENT_HEADER_BYTES)
"""Where the first entry of a group's life goes."""


class SegmentFile(NamedTuple):
    """One segment of the journal: the first seq that it holds, and which of its files."""

    first: Seq
    generation: int = RAW_GENERATION

    def path(self, directory: Path) -> Path:
        return segment_path(directory, self.first, self.generation)

    @property
    def start(self) -> JournalPosition:
        """Where its first entry starts."""
        return JournalPosition(self.first, SEGMENT_HEADER_BYTES, self.generation)


class Scanned(NamedTuple):
    """An entry's header, its checksum verified; `raw` is the whole entry, for `extents_of` and `decode`."""

    kind: EntryKind
    first_seq: Seq
    seq: Seq
    time: TimeNs
    run: ClockRun
    journal: JournalId
    raw: memoryview
    segment: SegmentFile
    end: int
    """Offset of the entry's end in the segment's file."""

    @property
    def position(self) -> JournalPosition:
        """The position after the entry."""
        return JournalPosition(self.segment.first, self.end, self.segment.generation)

    def extents(self) -> list[tuple[VolumeId, int, int]]:
        """(volume, offset, length) of each of its extents, without where their blocks are. Damaged as `extents_of`."""
        found, at = [], ENTRY_HEADER_BYTES
        for _ in range(_EXTENTS.unpack_from(self.raw, ENTRY_HEADER_BYTES - _EXTENTS.size)[0]):
            if at + EXTENT_HEADER_BYTES > len(self.raw):
                raise Damaged(f"the entry of seq {self.seq}: its extents do not fit it")
            volume, _, offset, length, blocks = EXTENT_HEADER.struct.unpack_from(self.raw, at)
            found.append((volume, offset, length))
            at += EXTENT_HEADER_BYTES + blocks * (ADDRESS_BYTES + FINGERPRINT_BYTES)
        return found


def segments(storage: Storage, directory: Path) -> list[Seq]:
    """The first seqs of the raw segments that are there, ascending; none when the directory is not there."""
    try:
        names = storage.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(first for name in names if (first := segment_named(name)) is not None)


def chain(storage: Storage, directory: Path) -> list[SegmentFile]:
    """The segments that make up the journal now, in order: what the manifest names, then the raw ones behind. Damaged.

    A manifest that is replaced between the two looks is noticed and both are done again: what the first one named may
    be gone.
    """
    manifest = read_manifest(storage, directory)
    while True:
        raw = segments(storage, directory)
        again = read_manifest(storage, directory)
        if again.number == manifest.number:
            break
        manifest = again
    return chain_of(manifest, raw)


def chain_of(manifest: Manifest, raw: Sequence[Seq]) -> list[SegmentFile]:
    """The segments of a journal with that manifest, of which the raw segments are these."""
    found = [SegmentFile(row.first, row.generation) for row in manifest.rows]
    return found + [SegmentFile(first) for first in raw if first > manifest.last]


def first_position(storage: Storage, directory: Path) -> JournalPosition:
    """Where the oldest entry starts, or will start."""
    found = chain(storage, directory)
    return found[0].start if found else FIRST_POSITION


def scan(
    storage: Storage,
    directory: Path,
    start: JournalPosition,
    *,
    limit: JournalPosition | None = None,
    torn: bool = False,
    files: Sequence[SegmentFile] | None = None,
) -> Iterator[Scanned]:
    """Every entry from `start` on, in order, its checksum and its place in the sequence verified.

    Sees everything appended before the first step. Ends before an entry at the end of the last segment that is not
    whole: one that is being written, or was when a process died. Damaged (naming file and offset) for anything else
    that is not an entry, so also for a bad entry with a whole one somewhere behind it.

    `torn` is for the writer's recovery after a power cut, which may leave later pages of a segment without earlier
    ones: then the first bad entry of the last segment is the end, whatever follows. `limit` is a position known to be
    held: the scan ends there, and anything bad or missing before it is Damaged. `files` is the chain to read, if it is
    not the one that the directory has now.
    """
    known = chain(storage, directory) if files is None else files
    found = [segment for segment in known if segment.first >= start.segment]
    if not found and start == FIRST_POSITION and limit is None:
        return
    if not found or found[0] != (start.segment, start.generation):
        path = segment_path(directory, start.segment, start.generation)
        raise Damaged(f"{path}: offset {start.offset}: the segment is missing")
    previous = Seq(start.segment - 1) if start.offset == SEGMENT_HEADER_BYTES else None
    for index, segment in enumerate(found):
        if limit is not None and segment.first > limit.segment:
            return
        if previous is None and index > 0:
            # The scan began at the end of a segment: its last seq says whether this one follows.
            before = _SegmentScan(storage, directory, found[0], False, False)
            previous = before.seq_before(start.offset)
        if previous is not None and segment.first - 1 != previous:
            raise Damaged(f"{segment.path(directory)}: offset 0: the segment before it ends at seq {previous}")
        is_last = index == len(found) - 1 and segment.generation == RAW_GENERATION
        stop = limit.offset if limit is not None and limit.segment == segment.first else None
        if index > 0:
            previous = Seq(segment.first - 1)
        one = _SegmentScan(storage, directory, segment, is_last and limit is None, torn)
        for scanned in one.entries(start.offset if index == 0 else SEGMENT_HEADER_BYTES, previous, stop):
            previous = scanned.seq
            yield scanned
    if limit is not None and found[-1].first < limit.segment:
        raise Damaged(f"{segment_path(directory, limit.segment)}: offset {limit.offset}: the segment is missing")


def read(
    storage: Storage,
    directory: Path,
    start: JournalPosition,
    *,
    limit: JournalPosition | None = None,
    torn: bool = False,
    files: Sequence[SegmentFile] | None = None,
) -> Iterator[tuple[Logged, JournalPosition]]:
    """Like `scan`, whole values: each entry with the position after it."""
    for scanned in scan(storage, directory, start, limit=limit, torn=torn, files=files):
        yield decoded(scanned, directory), scanned.position


def decoded(scanned: Scanned, directory: Path) -> Logged:
    """The whole value of an entry of the journal at `directory`. Damaged names file and offset."""
    try:
        return decode(scanned.raw)
    except Damaged as error:
        path = scanned.segment.path(directory)
        raise Damaged(f"{path}: offset {scanned.end - len(scanned.raw)}: {error}") from error


def scan_segment(storage: Storage, directory: Path, segment: SegmentFile) -> Iterator[Scanned]:
    """Every entry of one segment, whether the chain has it or not; Damaged for whatever is not whole, its end too."""
    try:
        size = storage.file_bytes(segment.path(directory))
    except FileNotFoundError as error:
        raise Damaged(f"{segment.path(directory)}: offset 0: the segment is missing") from error
    one = _SegmentScan(storage, directory, segment, False, False)
    return one.entries(SEGMENT_HEADER_BYTES, Seq(segment.first - 1), size)


class _SegmentScan:
    """One pass over one segment's file."""

    def __init__(
        self, storage: Storage, directory: Path, segment: SegmentFile, tail_may_be_torn: bool, torn: bool
    ) -> None:
        self._storage = storage
        self._path = segment.path(directory)
        self._segment = segment
        self._tail_may_be_torn = tail_may_be_torn
        self._torn = torn
        self._fd = -1
        self._seed = 0

    def entries(self, offset: int, previous: Seq | None, stop: int | None) -> Iterator[Scanned]:
        try:
            self._fd = self._storage.open(self._path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise Damaged(f"{self._path}: offset {offset}: the segment is missing") from error
        try:
            size = self._storage.size(self._fd)
            if size < offset and not (self._tail_may_be_torn and offset == SEGMENT_HEADER_BYTES):
                raise self._damaged(size, f"the segment ends before offset {offset}")
            if size <= SEGMENT_HEADER_BYTES and self._tail_may_be_torn:
                return  # just made, or not even that: nothing was ever acknowledged in it
            header = unpack_segment_header(self._storage.pread(self._fd, SEGMENT_HEADER_BYTES, 0), self._path)
            if header.first_seq != self._segment.first:
                raise self._damaged(0, f"the segment is that of seq {header.first_seq}")
            self._seed = header.seed
            yield from self._chunks(offset, previous, stop)
        finally:
            self._storage.close(self._fd)

    def seq_before(self, offset: int) -> Seq:
        """The seq of the entry that ends at `offset`. Damaged when none does."""
        try:
            self._fd = self._storage.open(self._path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise Damaged(f"{self._path}: offset {offset}: the segment is missing") from error
        try:
            header = unpack_segment_header(self._storage.pread(self._fd, SEGMENT_HEADER_BYTES, 0), self._path)
            for reach in (_LAST_ENTRY_BYTES, ENTRY_BYTES_MAX):
                base = max(SEGMENT_HEADER_BYTES, offset - reach)
                tail = self._storage.pread(self._fd, offset - base, base)
                words = np.frombuffer(tail, dtype="<u8", count=len(tail) // 8)
                left = np.uint64(len(tail)) - np.arange(len(words), dtype=np.uint64) * np.uint64(8)
                ends_here = (words[1:] & np.uint64(0xFFFFFFFF)) == left[:-1]
                for index in np.flatnonzero(ends_here)[::-1].tolist():
                    raw = memoryview(tail)[index * 8 :]
                    if checksum(raw[CHECKSUM_BYTES:], header.seed) == int(words[index]):
                        return Seq(int(words[index + 2]))
        finally:
            self._storage.close(self._fd)
        raise self._damaged(offset, "no entry ends here")

    def _chunks(self, base: int, previous: Seq | None, stop: int | None) -> Iterator[Scanned]:
        want = min(FIRST_CHUNK_BYTES, CHUNK_BYTES)
        retried = -1
        while stop is None or base < stop:
            chunk = self._storage.pread(self._fd, want, base)
            view = memoryview(chunk)
            at = 0
            fault: str | None = None
            need = 0
            for scanned, length in self._whole_entries(view, base, previous):
                if scanned is None:
                    need = length
                    break
                previous = scanned.seq
                at += length
                yield scanned
                if stop is not None and base + at >= stop:
                    break
            base += at
            if stop is not None and base >= stop:
                if base > stop:
                    raise self._damaged(stop, "no entry ends here")
                return
            left = len(chunk) - at
            at_end = len(chunk) < want
            if need < 0:
                fault = "not an entry, or one that does not match its checksum"
            elif at_end and left:
                fault = "the entry is cut short"
            elif at_end:
                break
            if fault is None:
                want = max(min(4 * want, CHUNK_BYTES), need)
            elif base != retried:
                # The writer may have cut a failed append off and written over it while this chunk was read.
                retried = base
                want = CHUNK_BYTES
            else:
                if self._is_tail(base, previous):
                    return
                raise self._damaged(base, fault)
        if stop is not None and base < stop:
            raise self._damaged(base, f"the segment ends before offset {stop}")

    def _whole_entries(self, view: memoryview, base: int, previous: Seq | None) -> Iterator[tuple[Scanned | None, int]]:
        """(entry, its length) of each whole entry; then (None, bytes needed) if more is needed, (None, -1) if bad."""
        unpack = ENTRY_HEADER.struct.unpack_from
        digest = xxhash.xxh3_64_intdigest
        seed = self._seed
        segment = self._segment
        have = len(view)
        at = 0
        while have - at >= ENTRY_HEADER_BYTES:
            stored, length, number, flags, journal, seq, first_seq, at_time, run, _ = unpack(view, at)
            end = at + length
            if not ENTRY_HEADER_BYTES <= length <= ENTRY_BYTES_MAX or length & 7 or not 0 < number < len(KINDS):
                yield None, -1
                return
            if end > have:
                yield None, length
                return
            raw = view[at:end]
            if digest(raw[CHECKSUM_BYTES:], seed) != stored or flags > ENTRY_PADDING_MASK:
                yield None, -1
                return
            kind = KINDS[number]
            assert kind is not None
            if first_seq > seq or (previous is not None and not follows(previous, kind, first_seq, seq)):
                raise self._damaged(base + at, f"seq {first_seq}..{seq} does not follow seq {previous}")
            previous = seq
            yield Scanned(kind, first_seq, seq, at_time, run, journal, raw, segment, base + end), length
            at = end

    def _is_tail(self, offset: int, previous: Seq | None) -> bool:
        """Whether what is bad at `offset` is merely the end of the journal."""
        if not self._tail_may_be_torn:
            return False
        return self._torn or not self._entryfollows(offset + 8, previous)

    def _entryfollows(self, offset: int, previous: Seq | None) -> bool:
        """Whether a whole later entry starts anywhere at or after `offset` (a multiple of 8)."""
        size = self._storage.size(self._fd)
        lowest = 1 if previous is None else previous
        highest = lowest + (1 << 32)
        while offset + ENTRY_HEADER_BYTES <= size:
            chunk = self._storage.pread(self._fd, CHUNK_BYTES, offset)
            words = np.frombuffer(chunk, dtype="<u8", count=len(chunk) // 8)
            count = len(words) - ENTRY_HEADER_BYTES // 8 + 1
            if count <= 0:
                break
            lengths = words[1 : count + 1] & np.uint64(0xFFFFFFFF)
            seqs = words[2 : count + 2]
            likely = (lengths >= ENTRY_HEADER_BYTES) & (lengths <= ENTRY_BYTES_MAX) & (lengths & np.uint64(7) == 0)
            likely &= (seqs >= lowest) & (seqs <= highest) & (words[3 : count + 3] <= seqs)
            for index in np.flatnonzero(likely):
                raw = self._storage.pread(self._fd, int(lengths[index]), offset + int(index) * 8)
                stored = int.from_bytes(raw[:CHECKSUM_BYTES], "little")
                if len(raw) == lengths[index] and checksum(raw[CHECKSUM_BYTES:], self._seed) == stored:
                    return True
            offset += count * 8
        return False

    def _damaged(self, offset: int, what: str) -> Damaged:
        return Damaged(f"{self._path}: offset {offset}: {what}")


def follows(previous: Seq, kind: EntryKind, first_seq: int, seq: int) -> bool:
    """Whether an entry may come after seq `previous`."""
    if kind.consumes_seq:
        return first_seq == previous + 1
    return first_seq == seq == previous
