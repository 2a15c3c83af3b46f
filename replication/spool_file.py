"""A segment of the spool: its name, its header, its entries. PROTOCOL.md shows the same as tables.

Little-endian, without padding. A segment is named by the first seq it holds. An entry's checksum is seeded with the
segment's own random seed and with the entry's offset, so that one of another place is never taken for it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from dedup.errors import UnknownFormat
from dedup.layout import Fields, checksum
from dedup.storage import Storage
from dedup.types import Aggregate, Correct, Epoch, Flush, Heartbeat, Reconcile, Seq, TimeNs, Write
from replication.errors import SpoolDamaged
from replication.frame_head import HEADER, MessageType
from replication.frame_layout import RARE
from replication.messages import FRAME_BYTES_MAX
from replication.outbox import FRAME_OVERHEAD_BYTES, Frame
from replication.wire import Buffer

SPOOL_VERSION: Final = 1
SEGMENT_MAGIC: Final = b"RWNDSPL\0"
ENTRY_MAGIC: Final = b"RWSE"

SEGMENT: Final = Fields(
    "spool segment header",
    ("magic", "8s"),
    ("version", "I"),
    ("epoch", "I"),
    ("first_seq", "Q"),
    ("seed", "Q"),
    ("agent", "255s"),
    ("group", "255s"),
    ("store", "255s"),
    ("reserved", "3s"),
    ("checksum", "Q"),
)
ENTRY: Final = Fields(
    "spool entry",
    ("checksum", "Q"),
    ("magic", "4s"),
    ("frame_bytes", "I"),
    ("synced", "I"),
    ("reserved", "I"),
    ("first_seq", "Q"),
    ("seq", "Q"),
    ("time", "Q"),
)
SEGMENT_SUFFIX: Final = ".rwq"
_CHECKSUM_BYTES: Final = 8
_NAME: Final = re.compile(r"(\d{20})" + re.escape(SEGMENT_SUFFIX))
_CLASSES: Final[dict[int, type]] = {
    MessageType.WRITE: Write,
    MessageType.AGGREGATE: Aggregate,
    MessageType.RECONCILE: Reconcile,
    MessageType.CORRECT: Correct,
    MessageType.FLUSH: Flush,
    MessageType.HEARTBEAT: Heartbeat,
    **{kind: cls for cls, (kind, _limit) in RARE.items() if kind >= MessageType.WRITE},
}
"""The record of each type of frame that a spool holds."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose records these are, and for which store. A spool holds records of one origin only."""

    group: str
    agent: str
    epoch: Epoch
    store: str
    """What the second appliance's Welcome called its store."""


@dataclass(frozen=True, slots=True)
class SegmentHead:
    """What the header says."""

    origin: Origin
    first_seq: Seq
    seed: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One frame of a segment."""

    frame: Frame
    end: int
    """Offset behind it."""
    synced: int
    """Everything before this offset was on the disk when the entry was written."""


def segment_path(directory: Path, first_seq: Seq) -> Path:
    return directory / f"{first_seq:020d}{SEGMENT_SUFFIX}"


def segment_of(name: str) -> Seq | None:
    """The first seq of the segment of that name; None when it is no segment's."""
    found = _NAME.fullmatch(name)
    return Seq(int(found[1])) if found else None


def new_head(origin: Origin, first_seq: Seq) -> tuple[SegmentHead, bytes]:
    """A header and its bytes. The caller has checked the lengths, as the protocol does for Hello and Welcome."""
    seed = secrets.randbits(63)
    texts = origin.agent.encode(), origin.group.encode(), origin.store.encode()
    fields = (SEGMENT_MAGIC, SPOOL_VERSION, origin.epoch, first_seq, seed, *texts, b"", 0)
    content = SEGMENT.struct.pack(*fields)[:-_CHECKSUM_BYTES]
    return SegmentHead(origin, first_seq, seed), content + checksum(content).to_bytes(_CHECKSUM_BYTES, "little")


def parse_head(data: bytes, path: Path) -> SegmentHead:
    """Raises SpoolDamaged, and UnknownFormat for a version that is not known here."""
    if len(data) < SEGMENT.size or data[:8] != SEGMENT_MAGIC:
        raise SpoolDamaged(f"{path}: offset 0: no header of a spool segment")
    _, version, epoch, first_seq, seed, agent, group, store, _, found = SEGMENT.struct.unpack_from(data)
    if version != SPOOL_VERSION:
        raise UnknownFormat(f"{path}: a spool of format {version}, this version knows {SPOOL_VERSION}; use a newer one")
    if checksum(data[: SEGMENT.size - _CHECKSUM_BYTES]) != found:
        raise SpoolDamaged(f"{path}: offset 0: the header does not match its checksum")
    if segment_path(path.parent, first_seq) != path:
        raise SpoolDamaged(f"{path}: offset 0: the header is that of record {first_seq}")
    texts = (text.rstrip(b"\0").decode() for text in (group, agent, store))
    return SegmentHead(Origin(next(texts), next(texts), Epoch(epoch), next(texts)), Seq(first_seq), seed)


def pack_entry(frame: Frame, seed: int, offset: int, synced: int) -> list[Buffer]:
    """The frame as an entry at `offset`; its buffers are not copied."""
    frame_bytes = sum(map(len, frame.buffers))
    fields = (0, ENTRY_MAGIC, frame_bytes, synced, 0, frame.first_seq, frame.seq, frame.time)
    head = ENTRY.struct.pack(*fields)[_CHECKSUM_BYTES:]
    state = xxhash.xxh3_64(head, seed=seed ^ offset)
    for buffer in frame.buffers:
        state.update(buffer)
    return [state.intdigest().to_bytes(_CHECKSUM_BYTES, "little") + head, *frame.buffers]


class SegmentReader:
    """The entries of one segment. Reads up to `end`, which the caller may raise; None is the end of the file."""

    def __init__(self, storage: Storage, fd: int, head: SegmentHead, end: int | None = None) -> None:
        self._storage = storage
        self._fd = fd
        self._seed = head.seed
        self.end = end

    def read(self, offset: int, expected: Seq, bytes_max: int) -> list[Entry]:
        """The whole entries from `offset` on, of which the first begins at record `expected`: at least one, and about
        `bytes_max` of them; none where the segment ends there. Their frames share the memory that was read.

        Raises SpoolDamaged, which names the offset, where the first one is not whole; entries before such a one are
        returned first.
        """
        data = self._pread(offset, max(bytes_max, ENTRY.size))
        if len(data) >= ENTRY.size:
            length = ENTRY.size + min(ENTRY.struct.unpack_from(data)[2], FRAME_BYTES_MAX)
            if length > len(data):
                data = self._pread(offset, length)
        entries: list[Entry] = []
        view = memoryview(data)
        at = 0
        while at < len(data):
            entry = self._entry(view, at, offset + at, expected)
            if entry is None:
                if not entries:
                    path = self._storage.path_of(self._fd)
                    raise SpoolDamaged(f"{path}: offset {offset}: record {expected} is not whole")
                break
            entries.append(entry)
            at = entry.end - offset
            expected = Seq(entry.frame.seq + 1)
        return entries

    def synced_after(self, offset: int) -> bool:
        """Whether an entry behind the bad one at `offset` says that the bad one was on the disk: damage then, and not
        a torn end. For one segment as it is found, so all of it is read."""
        data = self._pread(0, self._storage.size(self._fd))
        view = memoryview(data)
        at = data.find(ENTRY_MAGIC, offset + 1)
        while at >= 0:
            entry = self._entry(view, at - _CHECKSUM_BYTES, at - _CHECKSUM_BYTES, None)
            if entry is not None and entry.synced > offset:
                return True
            at = data.find(ENTRY_MAGIC, at + 1)
        return False

    def _pread(self, offset: int, length: int) -> bytes:
        if self.end is not None:
            length = min(length, self.end - offset)
        return self._storage.pread(self._fd, length, offset) if length > 0 else b""

    def _entry(self, data: memoryview, at: int, offset: int, expected: Seq | None) -> Entry | None:
        """The entry at `at`, which is `offset` of the segment; None where none is whole."""
        if at + ENTRY.size > len(data):
            return None
        found, magic, frame_bytes, synced, _, first_seq, seq, time = ENTRY.struct.unpack_from(data, at)
        start, stop = at + ENTRY.size, at + ENTRY.size + frame_bytes
        if magic != ENTRY_MAGIC or not HEADER.size <= frame_bytes <= FRAME_BYTES_MAX or stop > len(data):
            return None
        if xxhash.xxh3_64_intdigest(data[at + _CHECKSUM_BYTES : stop], self._seed ^ offset) != found:
            return None
        kind = _CLASSES.get(data[start + 4])
        if kind is None or seq < first_seq or (expected is not None and first_seq != expected):
            return None
        frame = Frame(
            kind, Seq(first_seq), Seq(seq), TimeNs(time), [data[start:stop]], frame_bytes + FRAME_OVERHEAD_BYTES
        )
        return Entry(frame, offset + ENTRY.size + frame_bytes, synced)


def entry_bytes(frames: Sequence[Frame]) -> int:
    """What the frames take in a segment."""
    return sum(ENTRY.size + sum(map(len, frame.buffers)) for frame in frames)
