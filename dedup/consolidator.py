"""The writer's part of a consolidation: what makes a folded piece count, and what then may go.

Invariants:
- the barrier is shut from the look at the pins until the index is committed: no reader gets a moment in between;
- the order is: new files durable (they are, when they come here), index computed, manifest renamed, index committed,
  old files unlinked. A writer killed after the rename finds the difference when it opens the store, and finishes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dedup import layout
from dedup.catalog import Txn
from dedup.consolidation import (
    Folded,
    GroupHistory,
    Piece,
    SegmentAges,
    fold_next,
    replaced,
)
from dedup.errors import Damaged, StoreFailed, StoreFull
from dedup.group_state import BASE_NAME
from dedup.journal_reader import SegmentFile
from dedup.manifest import Manifest, read_manifest, write_manifest
from dedup.pins import PinBarrier, Pinned
from dedup.pointer_map import SEQ_MAX
from dedup.reindex import reindex
from dedup.retention import Policy
from dedup.storage import Storage
from dedup.types import Seq, TimeNs

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a consolidation did: `freed_bytes` of journal; `postponed` are pieces that a reader needs a moment in."""

    pieces: int = 0
    freed_bytes: int = 0
    postponed: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.pieces + other.pieces, self.freed_bytes + other.freed_bytes, self.postponed + other.postponed
        )


def history_of(group: GroupWriter, txn: Txn) -> GroupHistory:
    """The group's history as its writer sees it."""
    return GroupHistory(group.store.storage, group.directory, group.catalog, txn, group.state)


def forget_names(group: GroupWriter, now: TimeNs) -> None:
    """Forgets the snapshots whose time is up by both clocks, this host's and the agent's. StoreFull, StoreFailed."""
    with group.store.index.read() as txn:
        names = history_of(group, txn).names()
    for name, snapshot in names.items():
        if snapshot.keep_until is not None and snapshot.keep_until <= min(now, group.time) and name != BASE_NAME:
            group.delete_snapshot(name)


def commit_piece(group: GroupWriter, folded: Folded) -> bool | None:
    """Puts a folded piece in the place of what it was made of; durable when it returns.

    False, and nothing changed, when a reader needs a moment in it, or one got a name after it was folded; None when a
    reader is just pinning: try the same again soon, or `discard_pieces`. Damaged, StoreFull: nothing changed either.
    StoreFailed: the store has to be opened anew, which finishes it or finds nothing of it.
    """
    store, directory = group.store, group.directory
    store.refuse_if_failed()
    with store.index.read() as txn:
        anchor = group.catalog.anchor(txn, SEQ_MAX)
    if anchor is None or anchor.held <= folded.piece.stretch.last:
        # What gets an anchor must be durable, with its blocks, and the names made right behind its end in the index;
        # and a sync that fails cuts no file that is gone.
        store.checkpoint()
    before = read_manifest(store.storage, directory)
    try:
        manifest = replaced(before, folded)
        barrier = PinBarrier(store.storage, store.path)
        try:
            with barrier.shut() as pinned:
                unknown = pinned is None
                if pinned is None or _named_since(group, folded) or _in_use(group, folded.piece, pinned):
                    manifest = before
                else:
                    _commit(group, folded, manifest)
        finally:
            barrier.close()
    except StoreFailed as error:
        store.fail(str(error))
        raise
    except (Damaged, StoreFull):
        remove_dead(store.storage, directory, before)
        raise
    if unknown:
        return None
    remove_dead(store.storage, directory, manifest)
    return manifest is not before


def discard_pieces(group: GroupWriter) -> None:
    """Removes what was folded and not committed. StoreFailed."""
    store, directory = group.store, group.directory
    remove_dead(store.storage, directory, read_manifest(store.storage, directory))


def _commit(group: GroupWriter, folded: Folded, manifest: Manifest) -> None:
    store = group.store
    if folded.base is not None:
        group.advance_base(*folded.base)
    renamed = False
    try:
        with store.index.write() as txn:
            reindex(store.storage, group.directory, group.catalog, txn, manifest)
            write_manifest(store.storage, group.directory, manifest)
            renamed = True
    except StoreFull as error:
        if renamed:
            raise StoreFailed(f"{error}; then open the store anew") from error
        raise


def _named_since(group: GroupWriter, folded: Folded) -> bool:
    """Whether a moment of the piece has a name now that it had not when the piece was folded without it."""
    with group.store.index.read() as txn:
        named = history_of(group, txn).named_in(folded.piece.stretch)
        return not named <= {*folded.named, folded.piece.stretch.last}


def _in_use(group: GroupWriter, piece: Piece, pinned: Pinned) -> bool:
    """Whether a reader needs anything of the piece: a moment in it, or one that is replayed from a checkpoint in it.

    Not from one at the moment itself: that may be younger than the pin, and the reader's view older.
    """
    if pinned.everything:
        return True
    with group.store.index.read() as txn:
        for name, seq in pinned.moments:
            if name == group.name and seq > piece.stretch.after:
                anchor = group.catalog.anchor(txn, Seq(max(0, seq - 1)))
                if anchor is None or anchor.held <= piece.stretch.last:
                    return True
    return False


def consolidate(group: GroupWriter, policy: Policy, now: TimeNs) -> Outcome:
    """Thins one group as the policy says, piece by piece, in this process, which has the store to itself.

    Each piece counts when it is committed. Damaged, StoreFull, StoreFailed.
    """
    forget_names(group, now)
    group.complete_segment()
    known: dict[SegmentFile, SegmentAges] = {}
    outcome = Outcome()
    postponed: set[Seq] = set()
    while True:
        with group.store.index.read() as txn:
            folded = fold_next(history_of(group, txn), policy, now, known, postponed)
        if folded is None:
            return replace(outcome, postponed=len(postponed))
        if commit_piece(group, folded):
            outcome += Outcome(1, folded.freed_bytes)
        else:
            discard_pieces(group)
            postponed.add(folded.piece.stretch.last)


def remove_dead(storage: Storage, directory: Path, manifest: Manifest) -> None:
    """Unlinks the files that are not of the journal: replaced ones, and what a crash left of new ones. StoreFailed."""
    kept = {(row.first, row.generation) for row in manifest.rows}
    for name in storage.listdir(directory):
        first = layout.segment_named(name)
        file = layout.consolidated_named(name) if first is None else (first, layout.RAW_GENERATION)
        dead = name.endswith(layout.TEMPORARY_SUFFIX) or (file is not None and file not in kept)
        if dead and (first is None or first <= manifest.last):
            storage.unlink(directory / name)
