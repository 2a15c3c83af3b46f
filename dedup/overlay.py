"""An overlay: the pointers that changed after a checkpoint, in memory, over the pointer maps of that checkpoint.

The writer's head and a reader's past moment are the same thing: maps, and an overlay of the records that followed.

Invariants:
- `blocks` holds the newest address of each block that changed; it wins over everything older;
- from `cuts[volume]` on, older pointers are hidden: the volume was cut to there, and what is not in `blocks` is a hole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.types import HOLE, Address, VolumeId


class Overlay:
    """Changed pointers of a group's volumes. Bounded by its owner: a checkpoint is due long before it grows large."""

    __slots__ = ("blocks", "count", "cuts")

    def __init__(self) -> None:
        self.blocks: dict[VolumeId, dict[int, int]] = {}
        self.cuts: dict[VolumeId, int] = {}
        self.count = 0
        """Pointers put since the start, repeated ones too: what a checkpoint will have to write, at most."""

    def put(self, volume: VolumeId, first_block: int, addresses: Addresses) -> None:
        """Blocks first_block.. now have `addresses`."""
        blocks = self.blocks.get(volume)
        if blocks is None:
            blocks = self.blocks[volume] = {}
        count = len(addresses)
        if count == 1:
            blocks[first_block] = int(addresses[0])
        else:
            blocks.update(zip(range(first_block, first_block + count), addresses.tolist(), strict=True))
        self.count += count

    def put_each(self, volume: VolumeId, blocks: Sequence[int], addresses: Sequence[int]) -> None:
        """The blocks now have these addresses; of one that is twice in there, the last."""
        self.blocks.setdefault(volume, {}).update(zip(blocks, addresses, strict=True))
        self.count += len(blocks)

    def cut(self, volume: VolumeId, block: int) -> None:
        """From `block` on the volume is holes."""
        self.cuts[volume] = min(block, self.cuts.get(volume, block))
        blocks = self.blocks.get(volume)
        if blocks:
            for gone in [number for number in blocks if number >= block]:
                del blocks[gone]

    def get(self, volume: VolumeId, block: int) -> Address | None:
        """The block's address, or None when what lies under the overlay decides."""
        blocks = self.blocks.get(volume)
        if blocks is not None:
            address = blocks.get(block)
            if address is not None:
                return Address(address)
        cut = self.cuts.get(volume)
        return HOLE if cut is not None and block >= cut else None

    def cover(self, volume: VolumeId, first_block: int, addresses: Addresses) -> None:
        """Lays the overlay over `addresses`, the older pointers of blocks first_block.. (changed in place)."""
        count = len(addresses)
        cut = self.cuts.get(volume)
        if cut is not None and cut < first_block + count:
            addresses[max(0, cut - first_block) :] = HOLE
        blocks = self.blocks.get(volume)
        if not blocks:
            return
        if len(blocks) < count:
            for block, address in blocks.items():
                if first_block <= block < first_block + count:
                    addresses[block - first_block] = address
            return
        for index in range(count):
            changed = blocks.get(first_block + index)
            if changed is not None:
                addresses[index] = changed

    def pointers(self, volume: VolumeId) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Addresses]:
        """What a checkpoint writes: the blocks that changed, ascending, and their addresses."""
        blocks = self.blocks.get(volume, {})
        numbers = np.fromiter(blocks.keys(), dtype=np.int64, count=len(blocks))
        addresses = np.fromiter(blocks.values(), dtype=np.uint64, count=len(blocks))
        order = np.argsort(numbers)
        return numbers[order], addresses[order]

    def leaves(self, volume: VolumeId) -> Iterator[tuple[int, np.ndarray[tuple[int], np.dtype[np.uint16]], Addresses]]:
        """The same by leaves: (leaf, indexes within it, addresses), ascending."""
        numbers, addresses = self.pointers(volume)
        leaf_of = numbers // LEAF_BLOCKS
        starts = np.flatnonzero(np.diff(leaf_of, prepend=-1))
        for start, end in pairwise([*starts.tolist(), len(numbers)]):
            leaf = int(leaf_of[start])
            yield leaf, (numbers[start:end] - leaf * LEAF_BLOCKS).astype(np.uint16), addresses[start:end]

    def leaf_numbers(self, volume: VolumeId) -> set[int]:
        """The leaves that `leaves` gives."""
        return {block // LEAF_BLOCKS for block in self.blocks.get(volume, ())}

    @property
    def volumes(self) -> set[VolumeId]:
        """Volumes with anything to say."""
        return self.blocks.keys() | self.cuts.keys()

    def copy(self) -> Overlay:
        """An independent copy, for a view of the head."""
        twin = Overlay()
        twin.blocks = {volume: dict(blocks) for volume, blocks in self.blocks.items()}
        twin.cuts = dict(self.cuts)
        twin.count = self.count
        return twin
