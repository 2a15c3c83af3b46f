"""Writing consolidated segments: complete files that a manifest may name.

Invariants:
- a file is complete, durable and read back before `finish` returns its row;
- until a manifest names it, it is dead: what a failure leaves of it is removed with the next opening of the store.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import xxhash

from dedup.errors import Damaged
from dedup.journal_entry import Logged, decode, encode
from dedup.journal_reader import SegmentFile, scan_segment
from dedup.layout import SEGMENT_HEADER_BYTES, SegmentHeader, pack_segment_header
from dedup.manifest import SegmentRow
from dedup.storage import Storage
from dedup.types import JournalId, Seq, TimeNs

_BUFFER_BYTES: Final = 1 << 20


class SegmentBuilder:
    """One new segment file. Append, then `finish` or `discard`."""

    def __init__(self, storage: Storage, directory: Path, first: Seq, generation: int) -> None:
        """Makes the file; an unfinished one of that name is overwritten. StoreFull, StoreFailed."""
        self._storage = storage
        self._directory = directory
        self._segment = SegmentFile(first, generation)
        self._path = self._segment.path(directory)
        self._header = SegmentHeader(first, secrets.randbits(64), TimeNs(time.time_ns()))
        self._fd = storage.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._pending: list[bytes] = [pack_segment_header(self._header)]
        self._pending_bytes = SEGMENT_HEADER_BYTES
        self._written = 0
        self._newest = TimeNs(0)
        self._last = Seq(first - 1)
        self._digest = xxhash.xxh3_128()

    @property
    def bytes(self) -> int:
        """Bytes so far."""
        return self._written + self._pending_bytes

    def append(self, entries: Sequence[Logged]) -> None:
        """Takes entries in the order of the journal. StoreFull, StoreFailed."""
        for entry in entries:
            encoded = encode(entry, self._header.seed)
            self._digest.update(encoded)
            self._pending.append(encoded)
            self._pending_bytes += len(encoded)
            self._last = entry.seq
            self._newest = max(self._newest, entry.time)
            if self._pending_bytes >= _BUFFER_BYTES:
                self._write()

    def _write(self) -> None:
        self._storage.pwritev(self._fd, self._pending, self._written)
        self._written += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def finish(self, window_ns: int, journal: JournalId) -> SegmentRow:
        """Its row, once it is durable and reads back as what was appended. Damaged, StoreFull, StoreFailed."""
        self._write()
        self._storage.datasync(self._fd)
        self.close()
        self._storage.sync_directory(self._directory)
        found = xxhash.xxh3_128()
        for scanned in scan_segment(self._storage, self._directory, self._segment):
            found.update(encode(decode(scanned.raw), self._header.seed))
        if found.digest() != self._digest.digest():
            raise Damaged(f"{self._path}: offset 0: the new segment does not read back as it was written; try again")
        segment = self._segment
        return SegmentRow(
            segment.first, self._last, segment.generation, window_ns, self._newest, self._written, journal
        )

    def close(self) -> None:
        """Gives the descriptor back, if `finish` did not."""
        if self._fd >= 0:
            self._storage.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Removes what there is of the file."""
        self.close()
        self._storage.unlink(self._path)
