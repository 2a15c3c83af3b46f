"""Where two images differ, from their pointers alone: no block is read, and no leaf that cannot differ is looked at.

Of one volume at two moments the keys of the pointer maps say which leaves have a version between the two anchors; with
what both overlays change, that is all that can differ. Of two volumes every leaf with a pointer is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from dedup.catalog import Catalog, Index, Txn
from dedup.history import ByteRange
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses, Leaves, distinct_leaves
from dedup.synthesis import View, VolumePointers
from dedup.types import BLOCK_BYTES, HOLE, Seq, VolumeId

_LEAVES_PER_REQUEST: Final = 256
_LEAF_BYTES: Final = LEAF_BLOCKS * BLOCK_BYTES
_HOLES: Final[Addresses] = np.full(LEAF_BLOCKS, HOLE, dtype=np.uint64)


def indexed_leaves(catalog: Catalog, txn: Txn, old: View | None, new: View, volume: VolumeId) -> Leaves:
    """The leaves of `volume` that may differ between two views, the later last, ascending: those with a version between
    the views' anchors, and those that their overlays may change."""
    pointers = catalog.pointers
    leaves: list[Iterable[int]] = [
        pointers.changed_leaves(txn, volume, Seq(0) if old is None else old.anchor, new.anchor)
    ]
    for view in (old, new):
        if view is not None:
            overlay = view.state.overlay
            leaves.append(overlay.leaf_numbers(volume))
            if volume in overlay.cuts:
                leaves.append(pointers.leaves(txn, volume, overlay.cuts[volume] // LEAF_BLOCKS))
    return distinct_leaves(*leaves)


def differing_ranges(
    index: Index, catalog: Catalog, old: VolumePointers | None, new: VolumePointers | None, start: int, end: int
) -> Iterator[ByteRange]:
    """The ranges of blocks from byte `start` to byte `end` whose pointers differ; None is all holes.

    Ascending, adjacent ones joined. A transaction lasts for some hundred leaves. MomentGone, Damaged.
    """
    with index.read() as txn:
        leaves = _leaves(catalog, txn, old, new)
    leaves = leaves[(leaves >= start // _LEAF_BYTES) & (leaves * _LEAF_BYTES < end)]
    at = stop = 0
    for low in range(0, len(leaves), _LEAVES_PER_REQUEST):
        with index.read() as txn:
            blocks = _differing_blocks(txn, old, new, leaves[low : low + _LEAVES_PER_REQUEST])
        for first, last in _runs(blocks):
            if first * BLOCK_BYTES != stop:
                yield from _cut(at, stop, start, end)
                at = first * BLOCK_BYTES
            stop = (last + 1) * BLOCK_BYTES
    yield from _cut(at, stop, start, end)


def _cut(at: int, stop: int, start: int, end: int) -> Iterator[ByteRange]:
    low, high = max(at, start), min(stop, end)
    if low < high:
        yield ByteRange(low, high - low)


def _leaves(catalog: Catalog, txn: Txn, old: VolumePointers | None, new: VolumePointers | None) -> Leaves:
    if old is not None and new is not None and old.volume == new.volume:
        earlier, later = sorted((old.view, new.view), key=lambda view: view.state.held)
        return indexed_leaves(catalog, txn, earlier, later, old.volume)
    return distinct_leaves(*(side.written_leaves(txn) for side in (old, new) if side is not None))


def _differing_blocks(
    txn: Txn, old: VolumePointers | None, new: VolumePointers | None, leaves: Leaves
) -> npt.NDArray[np.int64]:
    """The blocks of the leaves whose pointers differ, ascending."""
    was, now = (
        np.stack([_HOLES if side is None else side.leaf(txn, leaf) for leaf in leaves.tolist()]) for side in (old, new)
    )
    rows, places = np.nonzero(was != now)
    found: npt.NDArray[np.int64] = leaves[rows] * LEAF_BLOCKS + places
    return found


def _runs(blocks: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The first and the last of each run of consecutive blocks."""
    ends = np.flatnonzero(np.diff(blocks) != 1)
    firsts, lasts = blocks[np.append(0, ends + 1)[: len(blocks)]], blocks[np.append(ends, -1)[: len(blocks)]]
    return zip(firsts.tolist(), lasts.tolist(), strict=True)
