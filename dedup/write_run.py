"""A run of small writes as columns: the same journal entries, made all at once.

Most of what a store takes are writes of one block each. One by one, what is made for each of them (its entry, the bytes
of that, its pointer) costs more than its block; in columns it costs a fifth of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, or_
from typing import Final

import numpy as np
import xxhash

from dedup.journal_entry import Addresses, EntryKind
from dedup.layout import (
    ADDRESS_BYTES,
    CHECKSUM_BYTES,
    ENTRY_HEADER,
    EXTENT_HEADER,
    FINGERPRINT_BYTES,
)
from dedup.storage import Buffer
from dedup.types import BLOCK_BYTES, VOLUME_BYTES_MAX, ClockRun, JournalId, Record, Seq, TimeNs, VolumeId, Write

_ZEROS: Final = attrgetter("zeros")
RUN_MIN: Final = 8
"""Fewer records than this are quicker one by one."""
_ENTRY: Final = np.dtype(
    [
        *((name, f"<{code}") for name, code in ENTRY_HEADER.fields),
        *((f"extent_{name}", f"<{code}") for name, code in EXTENT_HEADER.fields),
        ("address", "<u8"),
        ("fingerprint", f"V{FINGERPRINT_BYTES}"),
    ]
)
"""A WRITE entry with one extent of one block: it needs no padding."""
assert _ENTRY.itemsize == ENTRY_HEADER.size + EXTENT_HEADER.size + ADDRESS_BYTES + FINGERPRINT_BYTES


@dataclass(frozen=True, slots=True)
class SmallWrites:
    """The columns of records that are writes of one whole block each, of consecutive seqs and one clock run."""

    first_seq: Seq
    run: ClockRun
    times: Sequence[TimeNs]
    volumes: Sequence[VolumeId]
    offsets: np.ndarray[tuple[int], np.dtype[np.uint64]]
    data: Sequence[Buffer]

    @classmethod
    def of(cls, records: Sequence[Record], first_seq: Seq, run: ClockRun) -> SmallWrites | None:
        """None when they are anything else, or fewer than RUN_MIN."""
        if len(records) < RUN_MIN or set(map(type, records)) != {Write}:
            return None
        writes: Sequence[Write] = records  # type: ignore[assignment]  # just seen
        extents = [record.extent for record in writes]
        data: list[Buffer] = [extent.data for extent in extents]
        if set(map(len, data)) != {BLOCK_BYTES} or {record.run for record in writes} != {run}:
            return None
        if [record.seq for record in writes] != list(range(first_seq, first_seq + len(writes))):
            return None
        offsets = [extent.offset for extent in extents]
        # Blocks are of a power of two bytes: one bit below that is in all of them together, too.
        if reduce(or_, offsets) % BLOCK_BYTES or max(offsets) >= VOLUME_BYTES_MAX:
            return None
        if any(map(_ZEROS, extents)):
            return None
        times = [record.time for record in writes]
        volumes = [extent.volume for extent in extents]
        return cls(first_seq, run, times, volumes, np.array(offsets, np.uint64), data)


@dataclass(frozen=True, slots=True)
class WriteRun:
    """The journal entries of small writes, whose blocks are in place."""

    writes: SmallWrites
    journal: JournalId
    addresses: Addresses
    fingerprints: bytes

    def __len__(self) -> int:
        return len(self.writes.times)

    @property
    def first_seq(self) -> Seq:
        return self.writes.first_seq

    @property
    def seq(self) -> Seq:
        """The last one."""
        return Seq(self.writes.first_seq + len(self) - 1)

    def pointers(self) -> Iterator[tuple[VolumeId, list[int], list[int]]]:
        """For each volume the blocks that changed, in order, and the address of each."""
        blocks: list[int] = (self.writes.offsets // BLOCK_BYTES).tolist()
        addresses: list[int] = self.addresses.tolist()
        volumes = self.writes.volumes
        for volume in set(volumes):
            if volumes.count(volume) == len(volumes):
                yield volume, blocks, addresses
            else:
                own = [at for at, one in enumerate(volumes) if one == volume]
                yield volume, [blocks[at] for at in own], [addresses[at] for at in own]

    def encode(self, seed: int) -> bytes:
        """The entries' bytes in a segment of that seed: those of `journal_entry.encode`, one behind the other."""
        writes = self.writes
        rows = np.zeros(len(self), _ENTRY)
        rows["length"] = _ENTRY.itemsize
        rows["kind"] = EntryKind.WRITE
        rows["journal"] = self.journal
        rows["seq"] = rows["first_seq"] = np.arange(self.first_seq, self.seq + 1, dtype=np.uint64)
        rows["time"] = writes.times
        rows["run"] = writes.run
        rows["extents"] = 1
        rows["extent_volume"] = writes.volumes
        rows["extent_offset"] = writes.offsets
        rows["extent_length"] = BLOCK_BYTES
        rows["extent_blocks"] = 1
        rows["address"] = self.addresses
        rows["fingerprint"] = np.frombuffer(self.fingerprints, f"V{FINGERPRINT_BYTES}")
        raw = rows.tobytes()
        digest, width = xxhash.xxh3_64_intdigest, _ENTRY.itemsize
        rows["checksum"] = [digest(raw[at + CHECKSUM_BYTES : at + width], seed) for at in range(0, len(raw), width)]
        return rows.tobytes()
