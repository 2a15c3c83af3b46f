"""What a group's journal says past the last checkpoint, when a writer opens the store.

Invariants:
- the journal is the truth: the state is what applying it gives, up to its first entry that is not whole, or whose
  blocks did not reach the disk, where nothing said that they had;
- a rebuild, of a group whose index was lost, cuts nothing off but a torn end, and can be killed and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup import layout
from dedup.catalog import Catalog, Txn
from dedup.consolidator import remove_dead
from dedup.errors import Damaged, Unreadable
from dedup.group_state import GroupState
from dedup.journal_reader import chain_of, segments
from dedup.layout import SEGMENT_HEADER_BYTES
from dedup.manifest import Manifest, read_manifest
from dedup.metadata_journal import EntryKind, JournalPosition, Logged, read
from dedup.overlay import Overlay
from dedup.pointer_map import SEQ_MAX
from dedup.reindex import ANCHOR_POINTERS, reindex
from dedup.synthesis import start_of
from dedup.types import HOLE, LOST, Address, Seq

if TYPE_CHECKING:
    from dedup.store import Store

log = logging.getLogger(__name__)

_REBUILD_POINTERS: Final = ANCHOR_POINTERS
"""Pointers after which a rebuild stores its progress: bounds its memory, and what a moment's synthesis replays."""


def recover(store: Store, catalog: Catalog, name: str) -> tuple[GroupState, JournalPosition | None]:
    """The group's state as its journal says, and where that goes on; None: it has no journal yet. Damaged, StoreFull,
    StoreFailed."""
    directory = store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
    _finish_consolidation(store, catalog, directory)
    if not any(layout.segment_named(found) for found in store.storage.listdir(directory)):
        return GroupState(), None
    with store.index.read() as txn:
        anchor = catalog.anchor(txn, SEQ_MAX)
        state, position = start_of(store.storage, directory, catalog, txn, anchor)
    # An anchor of records without a watermark is the progress of a rebuild that was cut off.
    rebuilds = anchor is None or (anchor.held > 0 and not store.index.has_watermark())
    replayed = 0
    for logged, after in read(store.storage, directory, position, torn=not rebuilds):
        # Without an index (a rebuild) nothing tells what was durable, and a block that rotted since is no reason to
        # cut history off there.
        if not rebuilds and not _blocks_are_whole(store, logged):
            log.warning("group %s: the journal is cut at seq %d: its blocks did not reach the disk", name, logged.seq)
            break
        more = logged.kind is EntryKind.CONSOLIDATED_MORE
        if rebuilds and not more and state.overlay.count >= _REBUILD_POINTERS:
            _store_progress(store, catalog, state, position)
        state.apply(logged)
        _note_fingerprints(store, logged)
        position = after
        replayed += 1
        if rebuilds and more and state.overlay.count >= _REBUILD_POINTERS:
            _store_pointers(store, catalog, state)
    if position.generation != layout.RAW_GENERATION:
        # All of it is consolidated: the next entry goes to the raw segment behind.
        position = JournalPosition(Seq(read_manifest(store.storage, directory).last + 1), SEGMENT_HEADER_BYTES)
    if replayed:
        log.info("group %s: %d journal entries replayed, up to seq %d", name, replayed, state.held)
    return state, position


def _finish_consolidation(store: Store, catalog: Catalog, directory: Path) -> None:
    """After a writer that was killed between a manifest and its index: indexes what is new; removes what is dead."""
    manifest = read_manifest(store.storage, directory)
    with store.index.read() as txn:
        indexed = catalog.journal_number(txn)
        lost = catalog.anchor(txn, SEQ_MAX) is None
    if indexed != manifest.number:
        with store.index.write() as txn:
            if lost:
                catalog.put_journal_number(txn, manifest.number)  # all of it will be replayed
            else:
                reindex(store.storage, directory, catalog, txn, manifest, names=True)
    _refuse_lost_beginning(store, directory, manifest)
    remove_dead(store.storage, directory, manifest)


def _refuse_lost_beginning(store: Store, directory: Path, manifest: Manifest) -> None:
    """Damaged when consolidated segments are there that a lost manifest named: they must not pass for dead ones."""
    files = chain_of(manifest, segments(store.storage, directory))
    begins = bool(files) and files[0].first == 1
    if not begins and any(map(layout.consolidated_named, store.storage.listdir(directory))):
        raise Damaged(
            f"{directory / layout.MANIFEST_NAME}: offset 0: the journal's beginning is missing: a lost manifest? put "
            "it back, or run `rewindfs verify --repair`"
        )


def _blocks_are_whole(store: Store, logged: Logged) -> bool:
    """Whether every block of an entry that was not durable at the last checkpoint has reached the disk."""
    for extent in logged.extents:
        for address in extent.addresses.tolist():
            if address == HOLE or store.watermark.covers(Address(address)):
                continue
            try:
                store.pool.read_block(Address(address))
            except Unreadable as damage:
                # It may well be there: no reason to cut history off. Whoever reads it is told.
                log.error("%s", damage)
            except Damaged as damage:
                log.warning("%s", damage)
                return False
    return True


def _note_fingerprints(store: Store, logged: Logged) -> None:
    width = layout.FINGERPRINT_BYTES
    for extent in logged.extents:
        if len(extent.addresses):
            store.spent(layout.container_of(Address(int(extent.addresses.max()))))
        for index, address in enumerate(extent.addresses.tolist()):
            if address not in (HOLE, LOST):
                store.fingerprints.note(extent.fingerprints[index * width : (index + 1) * width], Address(address))


def _store_pointers(store: Store, catalog: Catalog, state: GroupState) -> None:
    """The pointers of one large entry so far, in the middle of a rebuild."""
    _commit(store, lambda txn: catalog.put_pointers(txn, state.overlay, state.held))
    state.overlay = Overlay()


def _store_progress(store: Store, catalog: Catalog, state: GroupState, position: JournalPosition) -> None:
    """One checkpoint in the middle of a rebuild: the journal up to here was durable long ago."""
    _commit(store, lambda txn: catalog.put(txn, state, position))
    state.checkpointed()


def _commit(store: Store, put: Callable[[Txn], None]) -> None:
    store.fingerprints.freeze()
    with store.index.write() as txn:
        put(txn)
        store.fingerprints.commit(txn)
    store.fingerprints.committed()
