"""The blocks that a stretch of journal entries leaves behind: of each, the last address it got, and its fingerprint.

Invariants:
- at most `leaves_max` leaves are in memory: what does not fit, from `end` on, is left to a further pass over the same
  entries that starts there;
- every leaf inside the window has had every entry applied that was taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.layout import FINGERPRINT_BYTES, LEAF_BLOCKS
from dedup.metadata_journal import LoggedExtent
from dedup.pointer_map import FIRST_LEAF, LeafKey
from dedup.types import BLOCK_BYTES, VolumeId

LEAVES_MAX: Final = 4096
"""48 MiB: the blocks of 8 GiB of written volumes per pass."""

_UNSAID: Final = np.uint64((1 << 64) - 1)
"""Stands for a block that no entry named: no container has that number."""
_BLOCK: Final = np.dtype([("address", "<u8"), ("fingerprint", f"V{FINGERPRINT_BYTES}")])


class FoldedBlocks:
    """Blocks of every volume, leaf by leaf, of the window `start`..`end`."""

    def __init__(self, start: LeafKey = FIRST_LEAF, *, leaves_max: int = LEAVES_MAX) -> None:
        self.start = start
        self.end: LeafKey | None = None
        """First leaf that did not fit; None when all did."""
        self._leaves_max = leaves_max
        self._volumes: dict[VolumeId, dict[int, NDArray[np.void]]] = {}
        self._count = 0
        self._largest: list[tuple[int, int]] = []

    def put(self, extent: LoggedExtent) -> None:
        """The extent's blocks are what it says now."""
        first = extent.offset // BLOCK_BYTES
        marks = np.frombuffer(extent.fingerprints, dtype=f"V{FINGERPRINT_BYTES}")
        done = 0
        while done < len(extent.addresses):
            leaf, start = divmod(first + done, LEAF_BLOCKS)
            count = min(LEAF_BLOCKS - start, len(extent.addresses) - done)
            if self._covers((extent.volume, leaf)):
                held = self._leaf(extent.volume, leaf)
                held["address"][start : start + count] = extent.addresses[done : done + count]
                held["fingerprint"][start : start + count] = marks[done : done + count]
                if self._count > self._leaves_max:
                    self._drop_largest()
            done += count

    def cut(self, volume: VolumeId, block: int) -> None:
        """From `block` on nothing is known: the volume was cut there, which is said elsewhere."""
        leaves = self._volumes.get(volume, {})
        for leaf in [leaf for leaf in leaves if (leaf + 1) * LEAF_BLOCKS > block]:
            leaves[leaf]["address"][max(0, block - leaf * LEAF_BLOCKS) :] = _UNSAID

    def retire(self, volume: VolumeId) -> None:
        """The volume is gone, and no later moment has it."""
        self._count -= len(self._volumes.pop(volume, {}))
        self._largest = [key for key in self._largest if key[0] != -volume]
        heapq.heapify(self._largest)

    def _covers(self, key: LeafKey) -> bool:
        return self.start <= key and (self.end is None or key < self.end)

    def _leaf(self, volume: VolumeId, leaf: int) -> NDArray[np.void]:
        leaves = self._volumes.setdefault(volume, {})
        held = leaves.get(leaf)
        if held is None:
            held = leaves[leaf] = np.empty(LEAF_BLOCKS, dtype=_BLOCK)
            held["address"] = _UNSAID
            self._count += 1
            heapq.heappush(self._largest, (-volume, -leaf))
        return held

    def _drop_largest(self) -> None:
        volume, leaf = (-part for part in heapq.heappop(self._largest))
        self.end = (VolumeId(volume), leaf)
        del self._volumes[VolumeId(volume)][leaf]
        self._count -= 1

    def extents(self) -> Iterator[LoggedExtent]:
        """What is known, as extents of whole blocks, ascending; none crosses a leaf's border."""
        for volume in sorted(self._volumes):
            for leaf in sorted(self._volumes[volume]):
                held = self._volumes[volume][leaf]
                said = np.flatnonzero(held["address"] != _UNSAID)
                if not len(said):
                    continue
                for run in np.split(said, np.flatnonzero(np.diff(said) != 1) + 1):
                    first, count = int(run[0]), len(run)
                    blocks = held[first : first + count]
                    yield LoggedExtent(
                        volume,
                        (leaf * LEAF_BLOCKS + first) * BLOCK_BYTES,
                        count * BLOCK_BYTES,
                        np.ascontiguousarray(blocks["address"]),
                        np.ascontiguousarray(blocks["fingerprint"]).tobytes(),
                    )
