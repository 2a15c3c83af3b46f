"""The index of a stretch of history that was consolidated: derived anew from the journal as it is now.

Invariants:
- one transaction: a reader sees the anchors, volumes and pointers of the stretch as they were, or as they are now;
- what the index says of every moment behind the stretch is the same before and after;
- nothing but the new journal segments is needed: so a writer that was killed between the manifest and this transaction
  does it when it opens the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Txn
from dedup.errors import Damaged
from dedup.group_state import GroupState
from dedup.journal_reader import JournalPosition, SegmentFile, chain_of, read, segments
from dedup.layout import LEAF_BLOCKS, MANIFEST_NAME
from dedup.manifest import Manifest, SegmentRow
from dedup.metadata_journal import EntryKind
from dedup.overlay import Overlay
from dedup.pointer_map import SEQ_MAX, LeafKey
from dedup.storage import Storage
from dedup.synthesis import state_before
from dedup.types import Seq, VolumeId

ANCHOR_POINTERS: Final = 16_384
"""Pointers between two anchors: what a moment's synthesis replays at most."""
ANCHOR_RECORDS: Final = 8_192
_FLUSH_POINTERS: Final = 1 << 18
"""Pointers of one consolidated stretch that are held in memory before they go into the transaction."""


def reindex(
    storage: Storage, directory: Path, catalog: Catalog, txn: Txn, manifest: Manifest, *, names: bool = False
) -> None:
    """Brings the group's index up to `manifest`, which is the journal's now or becomes it. The caller commits, synced.

    With `names` the index may be older than the end of the new segments, and gets the names that it lacks, too; the
    caller replays what follows, in which some of them may be forgotten again.

    Damaged when the new segments cannot be read, or the index is of a later manifest: then nothing may be committed.
    """
    indexed = catalog.journal_number(txn)
    if indexed > manifest.number:
        raise Damaged(
            f"{directory / MANIFEST_NAME}: offset 0: the manifest is number {manifest.number}, the index is of number "
            f"{indexed}: an older copy? put the latest one back, or run `rewindfs verify --repair`"
        )
    files = chain_of(manifest, segments(storage, directory))
    newest = catalog.anchor(txn, SEQ_MAX) if names else None
    names_from = SEQ_MAX if newest is None else newest.held
    for rows in _stretches(manifest, indexed):
        _Stretch(storage, directory, catalog, txn, rows, files, names_from).run()
    catalog.put_journal_number(txn, manifest.number)


def _stretches(manifest: Manifest, indexed: int) -> Iterator[Sequence[SegmentRow]]:
    """Rows newer than what is indexed, in groups of neighbours."""
    group: list[SegmentRow] = []
    for row in manifest.rows:
        if row.generation > indexed:
            group.append(row)
        elif group:
            yield group
            group = []
    if group:
        yield group


class _Stretch:
    """Neighbouring new segments, and the transaction in which they are indexed."""

    def __init__(
        self,
        storage: Storage,
        directory: Path,
        catalog: Catalog,
        txn: Txn,
        rows: Sequence[SegmentRow],
        files: Sequence[SegmentFile],
        names_from: Seq,
    ) -> None:
        """`names_from`: checkpoints from that seq on are put with their names."""
        self._names_from = names_from
        self._storage = storage
        self._directory = directory
        self._catalog = catalog
        self._txn = txn
        self._files = files
        self._after = Seq(rows[0].first - 1)
        self._last = rows[-1].last
        self._segment = SegmentFile(rows[0].first, rows[0].generation)
        self._forgotten: set[LeafKey] = set()
        """Leaves whose old versions of this stretch are dropped."""
        self._retired: set[VolumeId] = set()
        """Volumes that are gone at its end: what was written in the window in which they went is gone with them."""
        self._end = JournalPosition(rows[-1].first, rows[-1].bytes, rows[-1].generation)

    def run(self) -> None:
        old = self._catalog.anchor(self._txn, self._last)
        self._catalog.forget_anchors(self._txn, self._after, self._last)
        if not self._after:
            self._catalog.forget_gaps(self._txn, self._last)
        state = self._anchors()
        if old is None or old.held != self._last:
            self._mend_next(state)
        for volume, leaf in self._forgotten:
            self._catalog.pointers.settle(self._txn, volume, leaf, self._last)

    def _anchors(self) -> GroupState:
        """Replays the stretch, with an anchor now and then, and one at its end. The state there."""
        state = state_before(self._storage, self._directory, self._catalog, self._txn, self._segment, self._files)
        # The checkpoint at that seq may lie behind entries that consume none, which are folded into what follows now.
        if self._catalog.move_anchor(self._txn, state.checkpoint(self._segment.start)):
            state.checkpointed()  # what it wrote is as of that seq, whichever entries of it came first
        position = self._segment.start
        for logged, after in read(self._storage, self._directory, position, limit=self._end, files=self._files):
            more = logged.kind is EntryKind.CONSOLIDATED_MORE
            if not more and position != self._segment.start and _due(state):
                self._put(state, position)
            state.apply(logged)
            position = after
            if logged.kind in _BULKY and state.overlay.count >= _FLUSH_POINTERS:
                self._forget(state)
                self._catalog.put_pointers(self._txn, state.overlay, state.held)
                state.overlay = Overlay()
        self._put(state, self._end)
        return state

    def _mend_next(self, state: GroupState) -> None:
        """Where there was no anchor at the stretch's end, the one behind it began within the stretch. What was written
        in it and cut away behind it was nothing to that one: now it is seen at the end, and has to be cut off there.
        What was written to a volume that went within the stretch was something to it, and is nothing any more."""
        behind = self._catalog.anchor_after(self._txn, self._last)
        if behind is None:
            return
        for logged, _ in read(self._storage, self._directory, self._end, files=self._files):
            if logged.seq > behind.held:
                break
            state.apply(logged)
        pointers = self._catalog.pointers
        for volume in self._retired:
            for leaf in list(pointers.leaves(self._txn, volume)):
                pointers.forget(self._txn, volume, leaf, self._last, behind.held)
        for volume, block in state.overlay.cuts.items():
            for leaf in list(pointers.leaves(self._txn, volume, block // LEAF_BLOCKS)):
                said = pointers.leaf(self._txn, volume, leaf, behind.held)
                if said is not None:
                    right = said.copy()
                    state.overlay.cover(volume, leaf * LEAF_BLOCKS, right)
                    wrong = np.flatnonzero(right != said).astype(np.uint16)
                    if len(wrong):
                        pointers.put(self._txn, volume, leaf, behind.held, wrong, right[wrong])

    def _forget(self, state: GroupState) -> None:
        """Drops the stretch's old versions of each leaf before anything new is said of it, or read from it.

        Those of a leaf that nothing is said of stay: what they say was right at their seq, and still is.
        """
        pointers = self._catalog.pointers
        leaves = {(volume, leaf) for volume in state.overlay.volumes for leaf in state.overlay.leaf_numbers(volume)}
        retired = {one.volume for one in state.new_volumes.values() if one.retired}
        self._retired |= retired
        cut = dict(state.overlay.cuts) | dict.fromkeys(retired, 0)
        for volume, block in cut.items():
            leaves.update((volume, leaf) for leaf in pointers.leaves(self._txn, volume, block // LEAF_BLOCKS))
        for volume, leaf in sorted(leaves - self._forgotten):
            pointers.forget(self._txn, volume, leaf, self._after, self._last)
        self._forgotten |= leaves

    def _put(self, state: GroupState, position: JournalPosition) -> None:
        self._forget(state)
        put = self._catalog.put if state.held >= self._names_from else self._catalog.put_anchor
        put(self._txn, state, position)
        state.checkpointed()


_BULKY: Final = frozenset({EntryKind.CONSOLIDATED, EntryKind.CONSOLIDATED_MORE})


def _due(state: GroupState) -> bool:
    return state.overlay.count >= ANCHOR_POINTERS or state.records >= ANCHOR_RECORDS
