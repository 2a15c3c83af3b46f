"""One group of the store being written: its head, its journal, its names.

Invariants:
- `held` names the last entry in the journal, `durable` the last one that is synced; both only grow, except that
  recovery may find less than an earlier process held;
- `state` is what applying the journal up to `held` gives; it changes only after the journal has the entries;
- the head's pointers are `state.overlay` over the pointer maps of the last checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from dedup import layout
from dedup.catalog import Catalog
from dedup.errors import NameRefused, StoreError, StoreFailed, UnknownName
from dedup.granularity import check_granularity
from dedup.group_recovery import recover
from dedup.group_state import BASE_NAME, GroupState, owner_entry
from dedup.held_range import HeldRange, addresses_in
from dedup.metadata_journal import FIRST_POSITION, EntryKind, JournalPosition, JournalWriter, Logged
from dedup.moment import Latest, check_name, default_name, parse_time
from dedup.pointer_map import SEQ_MAX, Addresses
from dedup.reader import GroupReader, StoreReader
from dedup.types import (
    BASE_JOURNAL,
    BLOCK_BYTES,
    HOLE,
    Address,
    BaseAdvance,
    ClockRun,
    Epoch,
    JournalCreate,
    JournalSpec,
    JournalUse,
    Moment,
    Owner,
    Record,
    Seq,
    Snapshot,
    SnapshotCreate,
    SnapshotDelete,
    TimeNs,
    VolumeId,
    VolumeState,
)
from dedup.write_run import WriteRun

if TYPE_CHECKING:
    from dedup.store import Store

log = logging.getLogger(__name__)

StoreEntry = SnapshotCreate | SnapshotDelete | BaseAdvance | JournalCreate | JournalUse | Owner
"""What the store journals by itself."""
_HEAD_LEAVES_MAX: Final = 256
"""Leaves of the last checkpoint's maps kept decoded for completing partial blocks: 1 MiB."""


class GroupWriter:
    """The writer's side of one group. Its methods are called one at a time; `sync` may run beside them."""

    def __init__(
        self, store: Store, name: str, catalog: Catalog, state: GroupState, journal: JournalWriter, durable: Seq
    ) -> None:
        self.store = store
        self.directory = store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        self.name = name
        self.catalog = catalog
        self.state = state
        self.journal = journal
        self._durable = durable
        self._durable_position = journal.position
        self._head_leaves: dict[tuple[VolumeId, int], Addresses | None] = {}
        self._first_owner = ""  # of a group that has no record yet: journalled with the first ones

    @classmethod
    def open(cls, store: Store, name: str) -> GroupWriter:
        """Makes the group, or recovers it: the journal is replayed from the last checkpoint and a torn end cut off."""
        directory = store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        for made in (directory.parent, directory):
            if not store.storage.exists(made):
                store.storage.mkdir(made)
            # One that is there, too: whoever made it may have ended before it was durable.
            store.storage.sync_directory(made.parent)
        store.storage.sync_directory(directory)
        with store.index.read() as txn:
            group_id = store.index.group_ids(txn).get(name)
        if group_id is None:
            is_new = not any(layout.segment_named(found) for found in store.storage.listdir(directory))
            with store.index.write() as txn:
                group_id = store.index.add_group(txn, name)
                if is_new:
                    # From its first record on, a group without an anchor is one whose index was lost.
                    Catalog(store.index, group_id).put(txn, GroupState(), FIRST_POSITION)
        catalog = Catalog(store.index, group_id)
        state, position = recover(store, catalog, name)
        journal = JournalWriter.open(store.storage, directory, position, store.sync_log.unsynced)
        try:
            journal.sync()
        except BaseException:
            journal.close()
            raise
        return cls(store, name, catalog, state, journal, state.held)

    # -- what is held ------------------------------------------------------------------------------------------------

    @property
    def held(self) -> Seq:
        """The last seq in the journal (RECEIVED)."""
        return self.state.held

    @property
    def durable(self) -> Seq:
        """The last seq that is synced (DURABLE)."""
        return self._durable

    @property
    def epoch(self) -> Epoch:
        return self.state.epoch

    @property
    def owners(self) -> tuple[str, ...]:
        """The agents that fed the group; the last one feeds it now."""
        return (self._first_owner,) if self._first_owner else self.state.owners

    @property
    def time(self) -> TimeNs:
        """Time of the last record."""
        return self.state.time

    @property
    def run(self) -> ClockRun:
        return self.state.run

    @property
    def has_base(self) -> bool:
        """Whether the base snapshot exists, so that there are recovery points."""
        return bool(self.state.base)

    @property
    def reconciling(self) -> bool:
        """Whether a gap is open."""
        return self.state.reconciling

    @property
    def next_volume(self) -> VolumeId:
        return self.state.next_volume

    @property
    def position(self) -> JournalPosition:
        """Where the journal goes on."""
        return self.journal.position

    def volumes(self) -> list[VolumeState]:
        """The volumes that exist at `held`, by id."""
        return [self.state.volumes[volume] for volume in sorted(self.state.volumes)]

    def ingest(self, records: Sequence[Record]) -> None:
        """Takes records in seq order; RECEIVED when it returns, all of them or none.

        OutOfOrder, StoreFull (nothing kept, try again when there is room), StoreFailed (open the store anew).
        """
        if records:
            self.store.log_records(self, records)

    def append(self, entries: Sequence[Logged]) -> None:
        """Journals entries whose blocks are in place, then applies them."""
        if self._first_owner:
            entries = [*entries, owner_entry(entries[-1], self._first_owner)]
        self.journal.append(entries)
        self._first_owner = ""
        for entry in entries:
            self.state.apply(entry)

    def append_run(self, run: WriteRun) -> None:
        """The same for a run of small writes: never the first that a group gets."""
        self.journal.append_run(run)
        self.state.apply_run(run)

    def is_durable(self, held: Seq, position: JournalPosition) -> None:
        """Up to there, by a sync that the store has made."""
        self._durable, self._durable_position = held, position

    def discard_after_durable(self, why: str) -> None:
        """After a failed sync: nothing is journalled any more, and what is not durable is cut off: it was not kept."""
        try:
            self.journal.give_up(why, self._durable_position)
        except StoreError as error:
            log.critical("group %s: cannot cut the journal back to seq %d: %s", self.name, self._durable, error)

    def checkpointed(self) -> None:
        """The index holds the state now."""
        self.state.checkpointed()
        self._head_leaves.clear()

    # -- the head ----------------------------------------------------------------------------------------------------

    def head_address(self, volume: VolumeId, block: int) -> Address:
        """Where the block is as of `held`."""
        found = self.state.overlay.get(volume, block)
        if found is not None:
            return found
        leaf, index = divmod(block, layout.LEAF_BLOCKS)
        addresses = self._head_leaf(volume, leaf)
        return HOLE if addresses is None else Address(int(addresses[index]))

    def _head_leaf(self, volume: VolumeId, leaf: int) -> Addresses | None:
        """As of the last checkpoint."""
        key = (volume, leaf)
        if key not in self._head_leaves:
            if len(self._head_leaves) >= _HEAD_LEAVES_MAX:
                self._head_leaves.clear()
            with self.store.index.read() as txn:
                self._head_leaves[key] = self.catalog.pointers.leaf(txn, volume, leaf, SEQ_MAX)
        return self._head_leaves[key]

    def head_block(self, volume: VolumeId, block: int) -> bytes:
        """The block as of `held`, checked. Damaged if its stored bytes are not what they were."""
        address = self.head_address(volume, block)
        return layout.ZERO_BLOCK if address == HOLE else self.store.pool.read_block(address)

    def held_range(self, volume: VolumeId, offset: int, blocks: int) -> HeldRange:
        """`blocks` blocks at `offset` (aligned) as of `held`; past the end they are zeros. UnknownName."""
        if volume not in self.state.volumes:
            raise UnknownName(f"group {self.name} has no volume {volume}")
        first = offset // BLOCK_BYTES
        addresses = addresses_in(partial(self._head_leaf, volume), first, blocks)
        self.state.overlay.cover(volume, first, addresses)
        return HeldRange(self.store.pool, addresses)

    # -- names -------------------------------------------------------------------------------------------------------

    def reader(self) -> GroupReader:
        """A reader of this group that shares the writer's index."""
        store = StoreReader(self.store.path, self.store.storage, self.store.index, self.store.pool)
        return GroupReader(store, self.name, self.catalog.group_id)

    def name_exists(self, name: str) -> bool:
        """Whether a bookmark or snapshot has this name."""
        if name in self.state.new_snapshots:
            return self.state.new_snapshots[name] is not None
        with self.store.index.read() as txn:
            return self.catalog.snapshot(txn, name) is not None

    def snapshot_count(self) -> int:
        with self.store.index.read() as txn:
            return self.catalog.names_count(txn, self.state.new_snapshots)

    def create_snapshot(
        self,
        name: str | None = None,
        at: str = "latest",
        volume: str | None = None,
        keep_ns: int = 0,
    ) -> Snapshot:
        """Keeps the recovery point `at` (TIME) under `name`; reads no source byte and writes no block (`no-copy`).

        Retention forgets the name `keep_ns` from now; 0: it is kept until it is deleted.

        Journalled and durable when it returns, and a checkpoint is due then: before anything else is held, if who reads
        the snapshot is to have nothing to replay. NameRefused, MomentRefused, BadTime, UnknownName.
        """
        if name is not None:
            check_name(name)
        is_head = isinstance((spec := parse_time(at)).where, Latest) and not spec.flush
        moment, volumes = (self._head_point() if is_head else None) or self._point(at)
        chosen = None
        if volume is not None:
            state = volumes.get(volume)
            if state is None:
                raise UnknownName(f"group {self.name} had no volume {volume!r} at seq={moment.seq}")
            chosen = state.volume
        name = name or default_name(moment.time)
        if self.name_exists(name):
            raise NameRefused(f"group {self.name} already has a snapshot or bookmark {name!r}; choose another name")
        keep_until = TimeNs(time.time_ns() + keep_ns) if keep_ns else None
        self._journal_store_entry(
            EntryKind.SNAPSHOT_CREATE,
            SnapshotCreate(self.held, self.time, self.run, name, moment.seq, moment.time, chosen, keep_until),
        )
        return Snapshot(name, moment.seq, moment.time, "snapshot", chosen, keep_until)

    def _head_point(self) -> tuple[Moment, dict[str, VolumeState]] | None:
        """The head and its volumes by path; None if it is no recovery point."""
        state = self.state
        if not state.base or state.held < state.base or state.reconciling:
            return None
        volumes = {volume.path: volume for volume in state.volumes.values()}
        return Moment(self.name, state.held, state.time, state.point), volumes

    def _point(self, at: str) -> tuple[Moment, dict[str, VolumeState]]:
        """The same of what TIME names. MomentRefused, BadTime, UnknownName."""
        self.store.checkpoint()  # nothing is to be replayed then
        reader = self.reader()
        moment = reader.resolve(at)
        return moment, reader.volumes_at(moment.seq)

    def delete_snapshot(self, name: str) -> None:
        """Forgets the name; durable when it returns. The base cannot be deleted. UnknownName, NameRefused."""
        if name == BASE_NAME:
            raise NameRefused("the base snapshot cannot be deleted: every other snapshot points into it")
        if not self.name_exists(name):
            raise UnknownName(f"group {self.name} has no snapshot or bookmark {name!r}")
        self._journal_store_entry(EntryKind.SNAPSHOT_DELETE, SnapshotDelete(self.held, self.time, self.run, name))

    # -- data journals -----------------------------------------------------------------------------------------------

    def create_journal(self, name: str, granularity_ns: int) -> JournalSpec:
        """A further data journal of the group, which receives once it is used; durable when it returns.

        NameRefused, BadGranularity.
        """
        spec = self.add_journal(name, granularity_ns)
        self.store.sync()
        return spec

    def use_journal(self, name: str) -> JournalSpec:
        """What follows `held` goes to that data journal, and the others stay able to receive; durable when it returns.

        UnknownName.
        """
        spec = self.switch_journal(name)
        self.store.sync()
        return spec

    def add_journal(self, name: str, granularity_ns: int) -> JournalSpec:
        """As `create_journal`, but RECEIVED when it returns, for a caller that shares a sync with others."""
        check_name(name)
        check_granularity(granularity_ns)
        if any(spec.name == name for spec in self.state.journals):
            raise NameRefused(f"group {self.name} already has a data journal {name!r}; choose another name")
        spec = JournalSpec(self.store.free_journal(), name, granularity_ns)
        self._append_store_entry(EntryKind.JOURNAL_CREATE, JournalCreate(self.held, self.time, self.run, spec))
        return spec

    def switch_journal(self, name: str) -> JournalSpec:
        """As `use_journal`, but RECEIVED when it returns. Nothing is journalled for the one that is in use already."""
        spec = next((spec for spec in self.state.journals if spec.name == name), None)
        if spec is None:
            known = ", ".join(spec.name for spec in self.state.journals)
            raise UnknownName(f"group {self.name} has no data journal {name!r}; it has: {known}")
        if spec.journal != self.state.journal:
            use = JournalUse(self.held, self.time, self.run, spec.journal)
            self._append_store_entry(EntryKind.JOURNAL_USE, use)
        return spec

    # -- who feeds it ------------------------------------------------------------------------------------------------

    def set_owner(self, agent: str) -> None:
        """What follows `held` comes from this agent; durable when it returns, where there is a record already.
        StoreFull, StoreFailed."""
        if not self.held:
            self._first_owner = agent  # an entry of seq 0 would lie before the journal's beginning
        elif self.owners[-1:] != (agent,):
            self._journal_store_entry(EntryKind.OWNER, Owner(self.held, self.time, self.run, agent))

    # -- history -----------------------------------------------------------------------------------------------------

    def complete_segment(self) -> None:
        """What comes next begins a new segment, so that those so far can be consolidated. StoreFull, StoreFailed."""
        self.store.refuse_if_failed()
        try:
            self.journal.rotate(self.held)
        except StoreFailed as error:
            self.store.fail(str(error))
            raise

    def advance_base(self, base: Seq, base_time: TimeNs) -> None:
        """The base snapshot is that recovery point now, and no earlier one can be restored; durable when it returns."""
        self._journal_store_entry(EntryKind.BASE_ADVANCE, BaseAdvance(self.held, self.time, self.run, base, base_time))

    def _journal_store_entry(self, kind: EntryKind, body: StoreEntry) -> None:
        self._append_store_entry(kind, body)
        self.store.sync()

    def _append_store_entry(self, kind: EntryKind, body: StoreEntry) -> None:
        self.store.refuse_if_failed()
        try:
            self.append([Logged(kind, self.held, self.held, self.time, self.run, BASE_JOURNAL, (), body)])
        except StoreFailed as error:
            self.store.fail(str(error))
            raise

    def close(self) -> None:
        self.journal.close()
