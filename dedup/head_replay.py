"""The head of a group as its journal alone says: what the index of the last checkpoint is held against.

Invariants:
- bounded: what is kept takes no more memory than `leaves_max` leaves as they are, but most are packed, as in a pointer
  map, so that far more fit. A replay covers a window of (volume, leaf), from `start` up to `end`, and what does not fit
  is left to a further replay that starts where this one ended;
- every leaf inside the window has had every entry applied that was taken.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import numpy as np

from dedup.layout import ADDRESS_BYTES, LEAF_BLOCKS
from dedup.overlay import Overlay
from dedup.pointer_map import FIRST_LEAF, Addresses, LeafKey, decode_whole, encode_whole
from dedup.types import VolumeId

LEAVES_MAX: Final = 16_384
"""64 MiB: the pointers of 32 GiB of written volumes per replay, of some TiB where they lie one behind the other."""
_LEAF_BYTES: Final = LEAF_BLOCKS * ADDRESS_BYTES
_KEPT_BYTES: Final = 256
"""What Python takes for a packed leaf besides its bytes: its key, and places in a dict, a set and a heap."""


class HeadReplay:
    """Pointers of every volume, leaf by leaf, after the overlays taken so far."""

    def __init__(self, start: LeafKey = FIRST_LEAF, *, leaves_max: int = LEAVES_MAX) -> None:
        self.start = start
        self.end: LeafKey | None = None
        """First leaf that did not fit; None when all did."""
        self.touched: set[LeafKey] = set()
        """Leaves of the window that changed since the caller last emptied this."""
        self._bytes_max = leaves_max * _LEAF_BYTES
        self._open_max = max(1, leaves_max // 4)
        self._open: OrderedDict[LeafKey, Addresses] = OrderedDict()
        """The leaves used last; the others are in `_packed`."""
        self._packed: dict[LeafKey, bytes] = {}
        self._packed_bytes = 0
        self._leaves: dict[VolumeId, set[int]] = {}
        self._largest: list[tuple[int, int]] = []

    def covers(self, key: LeafKey) -> bool:
        """Whether the leaf is inside the window."""
        return self.start <= key and (self.end is None or key < self.end)

    def take(self, overlay: Overlay) -> None:
        """Applies what an overlay says, as a checkpoint would: first the cut, then the pointers."""
        for volume in overlay.volumes:
            cut = overlay.cuts.get(volume)
            if cut is not None:
                self._cut(volume, cut)
            for leaf, indexes, addresses in overlay.leaves(volume):
                if self.covers((volume, leaf)):
                    self._opened((volume, leaf))[indexes] = addresses
                    self.touched.add((volume, leaf))
                    self._shrink()

    def _cut(self, volume: VolumeId, cut: int) -> None:
        first = cut // LEAF_BLOCKS
        for leaf in [leaf for leaf in self._leaves.get(volume, ()) if leaf >= first]:
            if self.covers((volume, leaf)):
                hidden = self._opened((volume, leaf))[max(0, cut - leaf * LEAF_BLOCKS) :]
                if hidden.any():
                    hidden[:] = 0
                    self.touched.add((volume, leaf))
                self._shrink()

    def _opened(self, key: LeafKey) -> Addresses:
        """The leaf, to be changed in place before the next `_shrink`."""
        held = self._open.get(key)
        if held is None:
            packed = self._packed.pop(key, None)
            if packed is None:
                held = np.zeros(LEAF_BLOCKS, dtype=np.uint64)
                self._leaves.setdefault(key[0], set()).add(key[1])
                heapq.heappush(self._largest, (-key[0], -key[1]))
            else:
                held = decode_whole(packed)
                self._packed_bytes -= len(packed) + _KEPT_BYTES
            self._open[key] = held
        self._open.move_to_end(key)
        return held

    def _shrink(self) -> None:
        """Packs the leaves used longest ago; drops the largest ones when they do not fit even so."""
        while len(self._open) > self._open_max:
            key, held = self._open.popitem(last=False)
            packed = self._packed[key] = encode_whole(held)
            self._packed_bytes += len(packed) + _KEPT_BYTES
        while len(self._open) * _LEAF_BYTES + self._packed_bytes > self._bytes_max:
            self._drop_largest()

    def _drop_largest(self) -> None:
        volume, leaf = (-part for part in heapq.heappop(self._largest))
        self.end = (VolumeId(volume), leaf)
        self._leaves[VolumeId(volume)].discard(leaf)
        self.touched.discard(self.end)
        if self._open.pop(self.end, None) is None:
            self._packed_bytes -= len(self._packed.pop(self.end)) + _KEPT_BYTES

    def leaf(self, key: LeafKey) -> Addresses:
        """The leaf's addresses; holes where nothing was put. For keys that it covers."""
        held = self._open.get(key)
        if held is not None:
            return held
        packed = self._packed.get(key)
        return np.zeros(LEAF_BLOCKS, dtype=np.uint64) if packed is None else decode_whole(packed)

    def leaves(self) -> Iterator[LeafKey]:
        """Every leaf of the window that was put, ascending."""
        for volume in sorted(self._leaves):
            for leaf in sorted(self._leaves[volume]):
                yield volume, leaf
