"""What the records of a batch do to the blocks of volumes, over the head, before any of it is stored or journalled.

A block that a record covers only in part is completed from what is there, so that a pointer always names a whole block.

Invariants:
- records are taken in order; a record later in a batch sees what an earlier one wrote (`order`);
- bytes of a volume's last block past its size are zeros.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol

from dedup.errors import Damaged, StoreError
from dedup.group_state import GroupState
from dedup.layout import ZERO_BLOCK
from dedup.pointer_map import Addresses
from dedup.types import (
    BLOCK_BYTES,
    Aggregate,
    Attributes,
    Correct,
    Create,
    Extent,
    Reconcile,
    Record,
    Rename,
    Resize,
    Retire,
    VolumeId,
    Write,
)

log = logging.getLogger(__name__)

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Rotten:
    """A block that should have been completed from the head, whose bytes there are damaged: it becomes LOST, so that
    reading it fails, and replication goes on. Whatever covers it whole heals it.

    It does not keep its pointer: what that names may be healed, or read again, and lacks what was written in part."""


Block = Bytes | Rotten


class HeadReader(Protocol):
    """The head of a group, as far as ingest needs it."""

    def head_block(self, volume: VolumeId, block: int) -> bytes:
        """The block as of the last record journalled. Damaged."""
        ...


@dataclass(slots=True, eq=False)
class Piece:
    """One extent of a record as whole blocks; `addresses` and `fingerprints` once they are placed."""

    volume: VolumeId
    offset: int
    length: int
    blocks: list[Block]
    addresses: Addresses = field(init=False)
    fingerprints: bytes = field(init=False)


@dataclass(slots=True)
class Staging:
    """What the records of a batch have done so far, over the head."""

    head: GroupState
    read_head: HeadReader
    blocks: dict[tuple[VolumeId, int], Block] = field(default_factory=dict)
    cuts: dict[VolumeId, int] = field(default_factory=dict)
    sizes: dict[VolumeId, int] = field(default_factory=dict)
    retired: set[VolumeId] = field(default_factory=set)

    def size(self, volume: VolumeId) -> int:
        """The volume's size so far. StoreError if it does not exist: such a record must not get into the journal."""
        size = self.sizes.get(volume)
        if size is not None:
            return size
        state = self.head.volumes.get(volume)
        if state is None or volume in self.retired:
            raise StoreError(f"a record names volume {volume}, which does not exist")
        return state.size

    def block(self, volume: VolumeId, number: int) -> Block:
        staged = self.blocks.get((volume, number))
        if staged is not None:
            return staged
        cut = self.cuts.get(volume)
        if cut is not None and number >= cut:
            return ZERO_BLOCK
        state = self.head.volumes.get(volume)
        # A volume made in this batch has no head; neither has what lies past the head's end.
        if state is None or number * BLOCK_BYTES >= state.size:
            return ZERO_BLOCK
        try:
            return self.read_head.head_block(volume, number)
        except Damaged as damage:
            log.error("volume %d, block %d is lost until it is written whole: %s", volume, number, damage)
            return Rotten()

    def create(self, volume: VolumeId, size: int) -> None:
        """A volume begins. StoreError when its number is taken, or was."""
        if volume < self.head.next_volume or volume in self.sizes:
            raise StoreError(f"a record creates volume {volume}, which there has been already")
        self.sizes[volume] = size

    def retire(self, volume: VolumeId) -> None:
        self.size(volume)
        self.sizes.pop(volume, None)
        self.retired.add(volume)

    def resize(self, volume: VolumeId, size: int) -> list[Piece]:
        """Cuts or grows; the last block that remains is completed with zeros: the piece to store, if there is one."""
        old = self.size(volume)
        self.sizes[volume] = size
        if size >= old:
            return []
        number, kept = divmod(size, BLOCK_BYTES)
        pieces: list[Piece] = []
        tail = self.block(volume, number) if kept else ZERO_BLOCK
        cut = number + bool(kept)
        self.cuts[volume] = min(cut, self.cuts.get(volume, cut))
        for gone in [key for key in self.blocks if key[0] == volume and key[1] >= cut]:
            del self.blocks[gone]
        if kept:
            zeroed = tail if isinstance(tail, Rotten) else bytes(tail[:kept]) + bytes(BLOCK_BYTES - kept)
            self.blocks[volume, number] = zeroed
            pieces.append(Piece(volume, number * BLOCK_BYTES, kept, [zeroed]))
        return pieces

    def write(self, extent: Extent) -> Piece:
        """The extent as whole blocks: its edges completed from what is there."""
        volume, offset, length = extent.volume, extent.offset, extent.length
        end = offset + length
        self.sizes[volume] = max(self.size(volume), end)
        first, skip = divmod(offset, BLOCK_BYTES)
        if skip == 0 and length == BLOCK_BYTES and not extent.zeros:
            blocks: list[Block] = [extent.data]
        else:
            blocks = self._cut_to_blocks(extent, first, skip, end)
        for index, block in enumerate(blocks, first):
            self.blocks[volume, index] = block
        return Piece(volume, offset, length, blocks)

    def _cut_to_blocks(self, extent: Extent, first: int, skip: int, end: int) -> list[Block]:
        count = -(-end // BLOCK_BYTES) - first
        if extent.zeros:
            if skip == 0 and end % BLOCK_BYTES == 0:
                return [ZERO_BLOCK] * count
            data = memoryview(bytes(extent.zeros))
        else:
            data = memoryview(extent.data)
        blocks: list[Block] = []
        at = -skip
        for number in range(first, first + count):
            if at >= 0 and at + BLOCK_BYTES <= len(data):
                blocks.append(data[at : at + BLOCK_BYTES])
            else:
                old = self.block(extent.volume, number)
                if isinstance(old, Rotten):
                    blocks.append(old)
                    at += BLOCK_BYTES
                    continue
                whole = bytearray(old)
                start, stop = max(0, at), min(len(data), at + BLOCK_BYTES)
                whole[start - at : stop - at] = data[start:stop]
                blocks.append(whole)
            at += BLOCK_BYTES
        return blocks


def pieces_of(staging: Staging, record: Record) -> list[Piece]:
    """What the record has to have stored. StoreError for a volume that is not there, or is made a second time."""
    match record:
        case Write(extent=extent) | Reconcile(extent=extent):
            return [staging.write(extent)]
        case Aggregate(extents=extents):
            return [staging.write(extent) for extent in extents]
        case Resize(volume=volume, size=size):
            return staging.resize(volume, size)
        case Correct(size=size, extent=extent):
            cut = staging.resize(extent.volume, size)
            return [*cut, staging.write(extent)] if extent.length else cut
        case Create(volume=volume, size=size):
            staging.create(volume, size)
        case Retire(volume=volume):
            staging.retire(volume)
        case Rename(moves=moves, retired=gone):
            for volume in gone:
                staging.retire(volume)
            for volume, _ in moves:
                staging.size(volume)
        case Attributes(volume=volume):
            staging.size(volume)
    return []
