"""Synthesis: the image of a volume at any moment, as pointers. Reads no source byte and writes no block (`no-copy`).

A moment is an anchor (the last checkpoint at or before it) and an overlay (the journal entries between). What the
overlay does not say, the pointer maps as of the anchor do, and what they do not say is a hole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Txn
from dedup.group_state import Checkpoint, GroupState
from dedup.layout import LEAF_BLOCKS
from dedup.metadata_journal import JournalPosition, Logged, SegmentFile, chain, first_position, read
from dedup.pointer_map import Addresses, Leaves, distinct_leaves
from dedup.storage import Storage
from dedup.types import Seq, VolumeId, VolumeState

LEAVES_MAX: Final = 1024
"""Decoded leaves that one image keeps: 4 MiB, the pointers of 2 GiB of a volume."""


@dataclass(frozen=True, slots=True)
class View:
    """A group at a seq: where its pointer maps are read (`anchor`), and what followed (`state`: not to be changed)."""

    anchor: Seq
    state: GroupState

    def volume(self, volume: VolumeId) -> VolumeState | None:
        """The volume then, or None if it did not exist."""
        return self.state.volumes.get(volume)


def start_of(
    storage: Storage, directory: Path, catalog: Catalog, txn: Txn, anchor: Checkpoint | None
) -> tuple[GroupState, JournalPosition]:
    """The state at an anchor (None: the group's beginning) and the journal position that follows it."""
    if anchor is None:
        return GroupState(), first_position(storage, directory)
    return catalog.state(txn, anchor), anchor.position


def state_before(
    storage: Storage,
    directory: Path,
    catalog: Catalog,
    txn: Txn,
    segment: SegmentFile,
    files: Sequence[SegmentFile] | None = None,
) -> GroupState:
    """The state at the segment's beginning; its overlay and `new_*` are what followed the anchor before it. Damaged.

    `files` is the journal's chain, if it is not the one that the directory has now.
    """
    before = Seq(segment.first - 1)
    anchor = catalog.anchor(txn, before)
    if anchor is not None and anchor.held and anchor.position > segment.start:
        # Made behind entries of the segment that consume no seq: it says what they say, too.
        anchor = catalog.anchor(txn, Seq(anchor.held - 1))
    files = chain(storage, directory) if files is None else files
    if anchor is None:
        state, start = GroupState(), files[0].start
    else:
        state, start = catalog.state(txn, anchor), anchor.position
    if state.held < before:
        for logged, _ in read(storage, directory, start, limit=segment.start, files=files):
            state.apply(logged)
    return state


def view_at(
    storage: Storage, directory: Path, catalog: Catalog, txn: Txn, stop: Callable[[Logged], bool], after: Seq
) -> View:
    """Synthesizes the group before the first entry for which `stop` is true.

    `after` is a seq at or before that entry: one backward seek finds the anchor before it, and what is replayed is at
    most one checkpoint's entries when it is close.
    """
    anchor = catalog.anchor(txn, after)
    state, start = start_of(storage, directory, catalog, txn, anchor)
    for logged, _ in read(storage, directory, start):
        if stop(logged):
            break
        state.apply(logged)
    return View(Seq(0) if anchor is None else anchor.held, state)


class VolumePointers:
    """The pointers of one volume at one view, with a bounded cache of decoded leaves."""

    def __init__(
        self, view: View, catalog: Catalog, volume: VolumeId, check: Callable[[Txn], None] | None = None
    ) -> None:
        """`check` raises where the pointer maps that a transaction sees are no longer those of the view."""
        self.view = view
        self._catalog = catalog
        self.volume = volume
        self._check = check
        self._leaves: OrderedDict[int, Addresses] = OrderedDict()

    def leaf(self, txn: Txn, leaf: int) -> Addresses:
        """The addresses of one leaf, LEAF_BLOCKS long; not to be changed by the caller."""
        cached = self._leaves.get(leaf)
        if cached is not None:
            self._leaves.move_to_end(leaf)
            return cached
        if self._check is not None:
            self._check(txn)
        found = self._catalog.pointers.leaf(txn, self.volume, leaf, self.view.anchor)
        addresses = np.zeros(LEAF_BLOCKS, dtype=np.uint64) if found is None else found
        self.view.state.overlay.cover(self.volume, leaf * LEAF_BLOCKS, addresses)
        self._leaves[leaf] = addresses
        if len(self._leaves) > LEAVES_MAX:
            self._leaves.popitem(last=False)
        return addresses

    def cached(self, first_block: int, count: int) -> Addresses | None:
        """What `addresses` would return, if that needs no transaction."""
        leaf, start = divmod(first_block, LEAF_BLOCKS)
        if start + count > LEAF_BLOCKS:
            return None
        found = self._leaves.get(leaf)
        return None if found is None else found[start : start + count]

    def addresses(self, txn: Txn, first_block: int, count: int) -> Addresses:
        """The addresses of blocks first_block.. (count ≥ 1)."""
        first_leaf, start = divmod(first_block, LEAF_BLOCKS)
        last_leaf = (first_block + count - 1) // LEAF_BLOCKS
        if first_leaf == last_leaf:
            return self.leaf(txn, first_leaf)[start : start + count]
        whole = np.concatenate([self.leaf(txn, leaf) for leaf in range(first_leaf, last_leaf + 1)])
        return whole[start : start + count]

    def written_leaves(self, txn: Txn) -> Leaves:
        """Every leaf that may hold a pointer which is not a hole, ascending."""
        if self._check is not None:
            self._check(txn)
        indexed = self._catalog.pointers.all_leaves(txn, self.volume)
        followed = self.view.state.overlay.leaf_numbers(self.volume)
        return distinct_leaves(indexed.tolist(), followed) if followed else indexed
