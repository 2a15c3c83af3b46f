"""The head of a group as its journal alone says: what the index of the last checkpoint is held against.

Invariants:
- at most LEAVES_MAX leaves are in memory: a replay covers a window of (volume, leaf), from `start` up to `end`, and
  what does not fit is left to a further replay that starts where this one ended;
- every leaf inside the window has had every entry applied that was taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

import numpy as np

from dedup.layout import LEAF_BLOCKS
from dedup.overlay import Overlay
from dedup.pointer_map import Addresses
from dedup.types import VolumeId

LEAVES_MAX: Final = 16_384
"""64 MiB: the pointers of 32 GiB of written volumes per replay."""

LeafKey = tuple[VolumeId, int]
FIRST_LEAF: Final[LeafKey] = (VolumeId(0), 0)


class HeadReplay:
    """Pointers of every volume, leaf by leaf, after the overlays taken so far."""

    def __init__(self, start: LeafKey = FIRST_LEAF, *, leaves_max: int = LEAVES_MAX) -> None:
        self.start = start
        self.end: LeafKey | None = None
        """First leaf that did not fit; None when all did."""
        self.touched: set[LeafKey] = set()
        """Leaves of the window that changed since the caller last emptied this."""
        self._leaves_max = leaves_max
        self._volumes: dict[VolumeId, dict[int, Addresses]] = {}
        self._count = 0
        self._largest: list[tuple[int, int]] = []

    def covers(self, key: LeafKey) -> bool:
        """Whether the leaf is inside the window."""
        return self.start <= key and (self.end is None or key < self.end)

    def take(self, overlay: Overlay) -> None:
        """Applies what an overlay says, as a checkpoint would: first the cut, then the pointers."""
        for volume in overlay.volumes:
            cut = overlay.cuts.get(volume)
            if cut is not None:
                for leaf, held in self._volumes.get(volume, {}).items():
                    hidden = held[max(0, min(LEAF_BLOCKS, cut - leaf * LEAF_BLOCKS)) :]
                    if hidden.any():
                        hidden[:] = 0
                        self.touched.add((volume, leaf))
            for leaf, indexes, addresses in overlay.leaves(volume):
                if self.covers((volume, leaf)):
                    self._leaf(volume, leaf)[indexes] = addresses
                    self.touched.add((volume, leaf))
                    if self._count > self._leaves_max:
                        self._drop_largest()

    def _leaf(self, volume: VolumeId, leaf: int) -> Addresses:
        leaves = self._volumes.setdefault(volume, {})
        held = leaves.get(leaf)
        if held is None:
            held = leaves[leaf] = np.zeros(LEAF_BLOCKS, dtype=np.uint64)
            self._count += 1
            heapq.heappush(self._largest, (-volume, -leaf))
        return held

    def _drop_largest(self) -> None:
        volume, leaf = (-part for part in heapq.heappop(self._largest))
        self.end = (VolumeId(volume), leaf)
        del self._volumes[VolumeId(volume)][leaf]
        self.touched.discard(self.end)
        self._count -= 1

    def leaf(self, key: LeafKey) -> Addresses:
        """The leaf's addresses; holes where nothing was put. For keys that it covers."""
        held = self._volumes.get(key[0], {}).get(key[1])
        return np.zeros(LEAF_BLOCKS, dtype=np.uint64) if held is None else held

    def leaves(self) -> Iterator[LeafKey]:
        """Every leaf of the window that was put, ascending."""
        for volume in sorted(self._volumes):
            for leaf in sorted(self._volumes[volume]):
                yield volume, leaf
