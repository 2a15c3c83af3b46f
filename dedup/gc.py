"""Garbage collection: mark what any kept moment names, sweep the rest, beside ingest.

In this order, for one collection:

1. *begin*: from here on ingest notes every address that a hit shares; then the store settles (`Store.settle`). What is
   in the journal and the index now is all that can be named without being new or noted;
2. *mark*: every address in the journal of every group, up to where it was settled, and in every version of every
   pointer map. Containers that were open then, or made since, are not looked at: all in them is live;
3. *condemn*: slots that are neither marked nor noted leave the fingerprint index, in one synced commit, while nobody
   looks anything up: no later hit can name them. Ingest, too, knows them until the end, and shares none of them,
   whatever an index that is damaged says;
4. *rewrite*: the container is sealed anew without them, or removed when nothing is left; the index, which had to
   remember those that it did not have in a run yet, forgets them.

Invariants:
- `pointers-resolve`: a slot leaves its container only after 1 to 3 have said that nothing names it, nor ever will;
- killed between any two steps, the store is sound, and a later collection finds the same slots dead again: what step 3
  took from the index is named by nothing, and so is never found in it again;
- a mark that could not read everything condemns nothing: it ends in Damaged.

Steps 1 and 3 are `Collection`, called with the store to itself; 2 and 4 are `Collector`, which may be another process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import layout
from dedup.catalog import Index
from dedup.container import ContainerReader
from dedup.container_size import ContainerSize, examine
from dedup.errors import Damaged, StoreError, UnknownFormat
from dedup.journal_reader import JournalPosition, first_position, scan
from dedup.layout import FINGERPRINT_BYTES, POINTER_KEY, SLOT_BITS
from dedup.metadata_journal import LoggedExtent, extents_of
from dedup.pins import pinned
from dedup.pointer_map import named_by
from dedup.reachability import consecutive
from dedup.sealed import seal
from dedup.slot_marks import SlotMarks, Slots
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, Address, ContainerForm, ContainerId
from dedup.worker_lock import worker_lock

if TYPE_CHECKING:
    from dedup.store import Store

log = logging.getLogger(__name__)

DEAD_SHARE_MIN: Final = 0.25
"""A container is rewritten when so much of it is dead: less would be much work for little room."""
CONDEMNED_MAX: Final = 1024
"""Fingerprints that one step takes from the index: some 20 ms with the store to itself."""
_ENTRIES_PER_BREATH: Final = 256
_VERSIONS_PER_REQUEST: Final = 4096

Breathe = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Boundary:
    """What was settled when a collection began: containers below `next_container` that are not `open`, and each group's
    journal up to its position."""

    next_container: ContainerId
    open: tuple[ContainerId, ...]
    positions: dict[str, JournalPosition]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A container worth rewriting. `slots` it holds, `dead` of them; `free_bytes` is what that should free on disk."""

    container: ContainerId
    slots: int
    dead: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a mark found. Of the containers looked at: blocks that are live and dead; `rewrites`, wholly dead first."""

    containers: int
    live_blocks: int
    dead_blocks: int
    rewrites: tuple[Rewrite, ...]

    @property
    def free_bytes(self) -> int:
        return sum(one.free_bytes for one in self.rewrites)

    @property
    def removed(self) -> int:
        """Containers of which nothing stays."""
        return sum(one.dead == one.slots for one in self.rewrites)


@dataclass(frozen=True, slots=True)
class Dead:
    """Slots of one container that the mark found dead, and their fingerprints, 16 bytes each."""

    container: ContainerId
    slots: tuple[int, ...]
    fingerprints: bytes

    def pieces(self, size: int = CONDEMNED_MAX) -> Iterator[Dead]:
        """The same, at most `size` slots at a time."""
        for at in range(0, len(self.slots), size):
            marks = self.fingerprints[at * FINGERPRINT_BYTES : (at + size) * FINGERPRINT_BYTES]
            yield Dead(self.container, self.slots[at : at + size], marks)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did. `freed_bytes` on disk; `skipped`: why containers stayed as they were; `postponed`: the
    readers that pin everything, for which the rest of the sweep is left for another time."""

    plan: Plan
    freed_bytes: int = 0
    skipped: tuple[str, ...] = ()
    postponed: tuple[str, ...] = ()


def collected_fields(done: Collected, *, dry_run: bool) -> dict[str, object]:
    """The document of the command `gc`. `freed_bytes` of a dry run is what would be freed, before compression."""
    plan = done.plan
    planned = {
        "containers": plan.containers,
        "removed": plan.removed,
        "rewritten": len(plan.rewrites) - plan.removed,
        "live_blocks": plan.live_blocks,
        "dead_blocks": plan.dead_blocks,
        "free_bytes": plan.free_bytes,
    }
    return {
        "planned": planned,
        "freed_bytes": plan.free_bytes if dry_run else done.freed_bytes,
        "dry_run": dry_run,
        "skipped": list(done.skipped),
        "postponed": list(done.postponed),
    }


class Collection:
    """The writer's side of one collection. Every method is called with the store to itself, none takes long."""

    def __init__(self, store: Store, noted: SlotMarks, condemned: SlotMarks, boundary: Boundary) -> None:
        """Use `begin`."""
        self._store = store
        self._noted = noted
        self._condemned = condemned
        self.boundary = boundary

    @classmethod
    def begin(cls, store: Store) -> Collection:
        """Step 1. StoreError when another one is under way, StoreFull, StoreFailed."""
        if store.ingest.shared is not None:
            raise StoreError(f"{store.path}: a garbage collection is under way already; wait for its end")
        noted = store.ingest.shared = SlotMarks()
        try:
            settled = store.settle()
        except BaseException:
            store.ingest.shared = None
            raise
        positions = {group.name: group.position for group in store.groups}
        condemned = store.ingest.condemned = SlotMarks()
        return cls(store, noted, condemned, Boundary(settled.next_container, tuple(sorted(settled.open)), positions))

    def condemn(self, dead: Dead) -> tuple[int, ...]:
        """Step 3 for one piece: those of its slots that may go; DURABLE when it returns. StoreFull, StoreFailed."""
        noted = set(self._noted.slots(dead.container).tolist())
        first = dead.container << SLOT_BITS
        entries = []
        condemned = []
        for index, slot in enumerate(dead.slots):
            if slot not in noted:
                condemned.append(slot)
                mark = dead.fingerprints[index * FINGERPRINT_BYTES : (index + 1) * FINGERPRINT_BYTES]
                entries.append((mark, Address(first + slot)))
        if not entries:
            return ()
        self._store.refuse_if_failed()
        self._condemned.add_each(where for _, where in entries)
        with self._store.index.write() as txn:
            self._store.fingerprints.remove(txn, sorted(entries))
        return tuple(condemned)

    def postponed(self) -> tuple[str, ...]:
        """The readers that pin everything now; while there are any, nothing is swept.

        A look without the barrier is enough: what such a reader finds is in the journal, and so was marked, or is
        newer; history that leaves the journal is what the barrier guards.
        """
        return pinned(self._store.storage, self._store.path).holders

    def rewritten(self, container: ContainerId) -> None:
        """Step 4 is done, or broke off: the next read of the container opens its file anew."""
        self._store.pool.forget(container)

    def swept(self, container: ContainerId) -> None:
        """Step 4 is done, and DURABLE: what was condemned need not be remembered. StoreFull, StoreFailed."""
        self._store.refuse_if_failed()
        self._store.fingerprints.forget_gone(container)

    def end(self) -> None:
        """Ingest notes nothing any more, and nothing more may be condemned."""
        if self._store.ingest.shared is self._noted:
            self._store.ingest.shared = self._store.ingest.condemned = None


class Collector:
    """The computing side: marks and rewrites. It reads the store beside its writer, under the `worker_lock`."""

    def __init__(
        self, storage: Storage, store: Path, index: Index, boundary: Boundary, breathe: Breathe = lambda: None
    ) -> None:
        self._storage = storage
        self._groups = store / layout.GROUPS_NAME
        self._containers = store / layout.CONTAINERS_NAME
        self._index = index
        self._boundary = boundary
        self._breathe = breathe
        self.live = SlotMarks()

    def mark(self) -> Plan:
        """Step 2. Damaged when a journal or the index cannot be read whole: nothing may be condemned then."""
        for name, position in self._boundary.positions.items():
            self._mark_journal(self._groups / name / layout.JOURNAL_NAME, position)
        self._mark_pointers()
        return self.plan()

    def mark_extents(self, extents: Iterable[LoggedExtent]) -> None:
        """These are live; for a look at what is not written so."""
        for extent in extents:
            self.live.add(extent.addresses)
        self._breathe()

    def _mark_journal(self, directory: Path, limit: JournalPosition) -> None:
        start = first_position(self._storage, directory)
        for count, scanned in enumerate(scan(self._storage, directory, start, limit=limit)):
            for extent in extents_of(scanned.raw):
                self.live.add(extent.addresses)
            if count % _ENTRIES_PER_BREATH == 0:
                self._breathe()

    def _mark_pointers(self) -> None:
        start: bytes | None = POINTER_KEY.pack(0, 0, 0, 0)
        while start is not None:
            self._breathe()
            start = self._mark_versions(start)

    def _mark_versions(self, start: bytes) -> bytes | None:
        """Marks a bounded number of versions, and returns the key to go on with."""
        with self._index.read() as txn, txn.cursor(self._index.db["pointers"]) as cursor:
            more = cursor.set_range(start)
            for _ in range(_VERSIONS_PER_REQUEST):
                if not more:
                    return None
                self.live.add(named_by(cursor.value()))
                more = cursor.next()
            return cursor.key() if more else None

    def plan(self) -> Plan:
        """What could be swept by what was marked so far."""
        live = dead = looked_at = 0
        rewrites = []
        found = self._numbers()
        for container in found:
            if container >= self._boundary.next_container or container in self._boundary.open:
                continue
            self._breathe()
            try:
                size = examine(self._storage, self._containers, container)
            except (Damaged, UnknownFormat) as damage:
                log.error("not collected: %s", damage)
                continue
            looked_at += 1
            marked = len(self.live.slots(container))
            held = size.slots
            if self._is_worthwhile(held, held - marked):
                held = len(self._held(container))  # a raw one's size says only how many there may be
            live += marked
            dead += max(0, held - marked)
            is_end = container == found[-1] and not held  # see `rewrite`
            if self._is_worthwhile(held, held - marked) and not is_end:
                rewrites.append(Rewrite(container, held, held - marked, _free_bytes(size, held, held - marked)))
        rewrites.sort(key=lambda one: (one.dead != one.slots, one.container))
        return Plan(looked_at, live, dead, tuple(rewrites))

    def _numbers(self) -> list[ContainerId]:
        """The containers that are there, ascending."""
        names = self._storage.listdir(self._containers)
        return sorted(number for name in names if (number := layout.container_named(name)) is not None)

    @staticmethod
    def _is_worthwhile(held: int, dead: int) -> bool:
        return dead >= held * DEAD_SHARE_MIN and (dead > 0 or held == 0)

    def _held(self, container: ContainerId) -> Slots:
        reader = ContainerReader.open(self._storage, self._containers, container)
        try:
            return np.array(reader.slots(), dtype=np.int64)
        finally:
            reader.close()

    def dead(self, container: ContainerId) -> Dead:
        """The slots that are filled and not marked. Damaged when a marked one is not there: that is for `verify`."""
        live = self.live.slots(container)
        reader = ContainerReader.open(self._storage, self._containers, container)
        try:
            held = np.array(reader.slots(), dtype=np.int64)
            missing = np.setdiff1d(live, held)
            if len(missing):
                path = layout.container_path(self._containers, container)
                raise Damaged(f"{path}: slot {missing[0]} is named and not there; left as it is, see `rewindfs verify`")
            slots = np.setdiff1d(held, live)
            marks = b"".join([reader.fingerprints(slot, count) for slot, count in consecutive(slots)])
        finally:
            reader.close()
        return Dead(container, tuple(slots.tolist()), marks)

    def rewrite(self, container: ContainerId, condemned: tuple[int, ...]) -> int:
        """Step 4: the container without these slots. DURABLE when it returns the bytes freed on disk.

        One of which nothing stays is removed, but the last: an empty one keeps its place, so that no number is given
        again, whatever becomes of the index.

        Damaged (a live block is: the container stays as it was), StoreFull, StoreFailed.
        """
        before = examine(self._storage, self._containers, container).disk_bytes
        kept = np.setdiff1d(self._held(container), np.array(condemned, dtype=np.int64))
        if len(np.setdiff1d(self.live.slots(container), kept)):
            raise ValueError(f"container {container}: a marked slot was condemned")
        if len(kept) or container == self._numbers()[-1]:
            seal(self._storage, self._containers, container, kept.tolist(), breathe=self._breathe)
            return before - examine(self._storage, self._containers, container).disk_bytes
        self._storage.unlink(layout.container_path(self._containers, container))
        self._storage.sync_directory(self._containers)
        return before


def _free_bytes(size: ContainerSize, held: int, dead: int) -> int:
    """What rewriting should free, without what compression will add to it."""
    if dead == held:
        return size.disk_bytes
    if size.form is ContainerForm.RAW:
        return min(dead * BLOCK_BYTES, size.disk_bytes)
    return size.disk_bytes * dead // held


def collect(store: Store, *, dry_run: bool = False) -> Collected:
    """A whole collection in this process, which has the store to itself. Damaged, StoreBusy, StoreFull, StoreFailed.

    What it did before an error stays done.
    """
    with worker_lock(store.storage, store.path):
        collection = Collection.begin(store)
        try:
            collector = Collector(store.storage, store.path, store.index, collection.boundary)
            plan = collector.mark()
            if dry_run:
                return Collected(plan)
            return _sweep(collection, collector, plan)
        finally:
            collection.end()


def _sweep(collection: Collection, collector: Collector, plan: Plan) -> Collected:
    freed = 0
    skipped: list[str] = []
    for planned in plan.rewrites:
        if holders := collection.postponed():
            return Collected(plan, freed, tuple(skipped), holders)
        try:
            condemned: list[int] = []
            for piece in collector.dead(planned.container).pieces():
                condemned += collection.condemn(piece)
            if condemned or planned.slots == 0:
                freed += collector.rewrite(planned.container, tuple(condemned))
                collection.swept(planned.container)
        except Damaged as damage:
            log.error("not collected: %s", damage)
            skipped.append(str(damage))
        finally:
            collection.rewritten(planned.container)
    return Collected(plan, freed, tuple(skipped))
