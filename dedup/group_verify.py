"""The checks of `verify` that belong to one group: its journal, its part of the index, its names.

Invariants:
- nothing that is appended after the verification began is looked at: `_until` is where the journal ended then, and what
  the index holds of that moment was read in one transaction;
- what lies at or before the last checkpoint's position must be whole; behind it, a last entry may be torn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from dedup import layout
from dedup.catalog import Catalog, Index, Txn
from dedup.damage import Check, Damage
from dedup.errors import Damaged, UnknownFormat
from dedup.group_state import BASE_NAME, Checkpoint, GroupState, RunStart
from dedup.head_replay import FIRST_LEAF, LEAVES_MAX, HeadReplay, LeafKey
from dedup.journal_reader import FIRST_POSITION, JournalPosition, Scanned, follows, read, scan, segments
from dedup.layout import LEAF_BLOCKS, POINTER_KEY, SEGMENT_HEADER_BYTES, segment_path
from dedup.metadata_journal import EntryKind, Logged, decode
from dedup.pointer_map import SEQ_MAX, Addresses
from dedup.reachability import Reachability, consecutive
from dedup.reader import StoreReader
from dedup.types import BLOCK_BYTES, Gap, Seq, Snapshot, VolumeId, VolumeState

Advance = Callable[[int], None]

JOURNAL: Final = "journal"
POINTERS: Final = "pointers-resolve"
INDEX: Final = "index-equals-journal"
CATALOG: Final = "catalog"

_DRAIN_POINTERS: Final = 1 << 15
_DRAIN_RECORDS: Final = 1 << 13
"""What the replay's overlay holds at most before it goes into the leaves."""
_KEYS_PER_REQUEST: Final = 4096


class _Replayed:
    """What replaying the journal gives, beside pointers; the overlay goes where `head` has it."""

    def __init__(self, head: HeadReplay) -> None:
        self.head = head
        self.state = GroupState()
        self.names: dict[str, Snapshot] = {}
        self.gaps: dict[int, Gap] = {}
        self.runs: dict[int, RunStart] = {}

    def take(self, logged: Logged) -> None:
        self.state.apply(logged)
        if self.state.overlay.count >= _DRAIN_POINTERS or self.state.records >= _DRAIN_RECORDS:
            self.drain()

    def drain(self) -> None:
        state = self.state
        self.head.take(state.overlay)
        for name, snapshot in state.new_snapshots.items():
            if snapshot is None:
                self.names.pop(name, None)
            else:
                self.names[name] = snapshot
        self.gaps.update((gap.first, gap) for gap in state.new_gaps)
        self.runs.update((run.run, run) for run in state.new_runs)
        state.checkpointed()


class GroupVerifier:
    """Call `begin`, `journal`, `compare`, `versions`, `catalog`, in this order; each adds to the checks given here."""

    def __init__(
        self,
        store: StoreReader,
        name: str,
        group_id: int | None,
        checks: dict[str, Check],
        slots: Reachability,
        *,
        leaves_max: int = LEAVES_MAX,
    ) -> None:
        self.name = name
        self.group_id = group_id
        self._store = store
        self._checks = checks
        self._slots = slots
        self._directory = store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        self._leaves_max = leaves_max
        self._sound = True
        """Whether the journal could be read to its end."""
        self._replayed = _Replayed(HeadReplay(FIRST_LEAF, leaves_max=leaves_max))
        self._at_anchor: tuple[Checkpoint, dict[VolumeId, VolumeState]] | None = None
        self._after_anchor = False
        self._previous: Seq | None = None
        self._kinds: dict[Seq, EntryKind] = {}
        """Of the entries that names stand for."""
        self._wanted: set[Seq] = set()

    def begin(self) -> None:
        """Fixes the moment that is verified. Damaged when the index refuses to say it."""
        self._anchor: Checkpoint | None = None
        self._names: dict[str, Snapshot] = {}
        self._gaps: list[Gap] = []
        self._runs: list[RunStart] = []
        self._volumes: dict[VolumeId, VolumeState] = {}
        self._catalog = None if self.group_id is None else Catalog(self._store.index, self.group_id)
        try:
            if self._catalog is not None:
                self._read_catalog(self._catalog)
        finally:
            # After the anchor was read, so that the end lies at or behind it.
            self._segments = segments(self._store.storage, self._directory)
            self._until = JournalPosition(self._segments[-1], self._size(-1)) if self._segments else FIRST_POSITION

    def _read_catalog(self, catalog: Catalog) -> None:
        with self._store.index.read() as txn:
            self._anchor = catalog.anchor(txn, SEQ_MAX)
            self._names = catalog.snapshots(txn)
            self._gaps = catalog.gaps(txn)
            self._runs = catalog.runs(txn)
            if self._anchor is not None:
                self._volumes = catalog.volumes(txn, self._anchor.held)
        self._wanted = {snapshot.seq for snapshot in self._names.values()}

    def _size(self, index: int) -> int:
        return segment_path(self._directory, self._segments[index]).stat().st_size

    @property
    def journal_bytes(self) -> int:
        """Bytes that `journal` will read."""
        return sum(self._size(index) for index in range(len(self._segments)))

    def _add(self, check: str, what: str, **where: str | int) -> None:
        self._checks[check].add(Damage(what, group=self.name, **where))  # type: ignore[arg-type]

    # -- journal -----------------------------------------------------------------------------------------------------

    def journal(self, advance: Advance) -> None:
        """Reads every entry, and gathers what the other checks need. Damage in a segment: goes on in the next."""
        if self._anchor is not None and self._anchor.position > self._until:
            at = self._anchor.position
            path = segment_path(self._directory, at.segment)
            self._journal_damage(f"{path}: offset {at.offset}: the journal ends before this, which the index holds")
        self._previous = Seq(0)
        for index, first in enumerate(self._segments):
            path = segment_path(self._directory, first)
            if self._previous is not None and first != self._previous + 1:
                self._journal_damage(f"{path}: offset 0: seq {first} does not follow seq {self._previous}")
            try:
                for start, limit in self._parts(index):
                    self._read_part(start, limit)
            except (Damaged, UnknownFormat) as damage:
                self._journal_damage(str(damage), path.name)
                self._previous = None
            advance(self._size(index))

    def _parts(self, index: int) -> Iterator[tuple[JournalPosition, JournalPosition | None]]:
        """Stretches of a segment to scan: those with an end must be whole, the one without ends where it ends."""
        start: JournalPosition = JournalPosition(self._segments[index], SEGMENT_HEADER_BYTES)
        held: JournalPosition | None = None
        if index < len(self._segments) - 1:
            held = JournalPosition(start.segment, self._size(index))
        elif self._anchor is not None and self._anchor.position.segment == start.segment:
            held = min(self._anchor.position, self._until)
        if held is not None and held > start:
            yield start, held
            start = held
        if index == len(self._segments) - 1 and start < self._until:
            yield start, None

    def _read_part(self, start: JournalPosition, limit: JournalPosition | None) -> None:
        for scanned in scan(self._store.storage, self._directory, start, limit=limit):
            if scanned.position > self._until:
                return
            previous = self._previous
            if previous is not None and not follows(previous, scanned.kind, scanned.first_seq, scanned.seq):
                raise Damaged(f"{self._where(scanned)}: seq {scanned.first_seq} does not follow seq {previous}")
            self._previous = scanned.seq
            try:
                self._take(decode(scanned.raw), scanned.position)
            except Damaged as error:
                raise Damaged(f"{self._where(scanned)}: {error}") from error
            self._checks[JOURNAL].items += 1

    def _where(self, scanned: Scanned) -> str:
        return f"{segment_path(self._directory, scanned.segment)}: offset {scanned.end - len(scanned.raw)}"

    def _journal_damage(self, what: str, file: str | None = None) -> None:
        self._sound = False
        self._checks[JOURNAL].add(Damage(what, file, self.name))

    def _take(self, logged: Logged, position: JournalPosition) -> None:
        for extent in logged.extents:
            self._slots.add(extent.addresses, extent.fingerprints)
        if logged.seq in self._wanted and logged.kind.consumes_seq:
            self._kinds[logged.seq] = logged.kind
        if not self._sound:
            return  # entries are missing: what follows cannot be applied
        if self._after_anchor:
            self._replayed.state.apply(logged)
            self._replayed.state.checkpointed()
            return
        self._replayed.take(logged)
        if self._anchor is not None and position == self._anchor.position:
            self._replayed.drain()
            self._at_anchor = self._replayed.state.checkpoint(position), dict(self._replayed.state.volumes)
            self._after_anchor = True

    # -- index -------------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Holds the last checkpoint against the replay, window by window of the pointer maps."""
        check = self._checks[INDEX]
        if self._catalog is None:
            if self._previous:
                self._add(INDEX, f"the index does not know the group {self.name}; open the store for writing once")
            return
        if self._anchor is None:
            return
        if self._at_anchor is None:
            self._add(INDEX, "could not be checked: the journal is damaged")
            return
        checkpoint, volumes = self._at_anchor
        check.items += 1
        if checkpoint != self._anchor:
            self._add(INDEX, f"the checkpoint of seq {self._anchor.held} says other than the journal: {self._anchor}")
        self._compare_volumes(volumes)
        self._compare_each("name", self._names, self._replayed.names)
        self._compare_each("gap", {gap.first: gap for gap in self._gaps}, self._replayed.gaps)
        self._compare_each("clock run", {run.run: run for run in self._runs}, self._replayed.runs)
        head = self._replayed.head
        self._compare_window(self._catalog, self._anchor.held, head)
        while head.end is not None:
            head = self._replay_window(head.end, self._anchor.position)
            self._compare_window(self._catalog, self._anchor.held, head)

    def _compare_volumes(self, volumes: dict[VolumeId, VolumeState]) -> None:
        for number in sorted({*volumes, *self._volumes}):
            self._checks[INDEX].items += 1
            expected, held = volumes.get(number), self._volumes.get(number)
            if expected != held:
                path = (expected or held or VolumeState(number, "", 0, 0, 0, 0)).path
                self._add(INDEX, f"the index says {held}, the journal {expected}", volume=path)

    def _compare_each(self, what: str, held: Mapping[Any, object], said: Mapping[Any, object]) -> None:
        for key in sorted({*held, *said}):
            self._checks[INDEX].items += 1
            if held.get(key) != said.get(key):
                self._add(INDEX, f"{what} {key}: the index says {held.get(key)}, the journal {said.get(key)}")

    def _replay_window(self, start: LeafKey, limit: JournalPosition) -> HeadReplay:
        replayed = _Replayed(HeadReplay(start, leaves_max=self._leaves_max))
        for logged, _ in read(self._store.storage, self._directory, FIRST_POSITION, limit=limit):
            replayed.take(logged)
        replayed.drain()
        return replayed.head

    def _compare_window(self, catalog: Catalog, seq: Seq, head: HeadReplay) -> None:
        with self._store.index.read() as txn:
            previous: LeafKey | None = None
            for key in heapq.merge(head.leaves(), self._indexed_leaves(catalog, txn, head)):
                if key == previous:
                    continue
                previous = key
                self._checks[INDEX].items += 1
                try:
                    held = catalog.pointers.leaf(txn, *key, seq)
                except Damaged as error:
                    self._leaf_damage(INDEX, key, str(error), 0, LEAF_BLOCKS)
                    continue
                said = head.leaf(key)
                differs = np.flatnonzero(said if held is None else held != said)
                for first, count in consecutive(differs):
                    shown = 0 if held is None else int(held[first])
                    what = f"the pointer map says {_shown(shown)}, the journal {_shown(int(said[first]))}"
                    self._leaf_damage(INDEX, key, what, first, count)

    def _indexed_leaves(self, catalog: Catalog, txn: Txn, head: HeadReplay) -> Iterator[LeafKey]:
        """Leaves of the window that the index has, ascending."""
        volume = _next_volume(self._store.index, txn, catalog.group_id, head.start[0])
        while volume is not None:
            first = head.start[1] if volume == head.start[0] else 0
            for leaf in catalog.pointers.leaves(txn, volume, first):
                if not head.covers((volume, leaf)):
                    return
                yield volume, leaf
            volume = _next_volume(self._store.index, txn, catalog.group_id, VolumeId(volume + 1))

    def _leaf_damage(self, check: str, key: LeafKey, what: str, first: int, count: int) -> None:
        volume, leaf = key
        state = self._volumes.get(volume)
        self._add(
            check,
            what,
            volume=f"volume {volume}" if state is None else state.path,
            offset=(leaf * LEAF_BLOCKS + first) * BLOCK_BYTES,
            length=count * BLOCK_BYTES,
        )

    # -- pointers and names ------------------------------------------------------------------------------------------

    def versions(self) -> None:
        """Gathers the addresses of every version of every leaf that the index holds."""
        if self._catalog is None:
            return
        pointers = self._catalog.pointers
        before: tuple[LeafKey, Addresses] | None = None
        key = POINTER_KEY.pack(self._catalog.group_id, 0, 0, 0)
        while key:
            with self._store.index.read() as txn:
                found, key = _keys(self._store.index, txn, key)
                for volume, leaf, seq in found:
                    try:
                        addresses = pointers.leaf(txn, volume, leaf, seq)
                    except Damaged as error:
                        self._leaf_damage(POINTERS, (volume, leaf), f"{error} (seq={seq})", 0, LEAF_BLOCKS)
                        continue
                    if addresses is None:
                        continue
                    # Each version has most of its pointers from the one before.
                    same_leaf = before is not None and before[0] == (volume, leaf)
                    self._slots.add(addresses[addresses != before[1]] if before and same_leaf else addresses)
                    before = (volume, leaf), addresses

    def catalog(self) -> None:
        """Names and gaps of the last checkpoint."""
        check = self._checks[CATALOG]
        held = Seq(0) if self._anchor is None else self._anchor.held
        base = Seq(0) if self._anchor is None else self._anchor.base
        for name, snapshot in sorted(self._names.items()):
            check.items += 1
            fault = self._name_fault(name, snapshot, base, held)
            if fault is not None:
                check.add(Damage(f"{snapshot.kind} {name!r} of seq {snapshot.seq} {fault}", None, self.name, name))
        for gap in self._gaps:
            check.items += 1
            if gap.last is None or not 0 < gap.first <= gap.last <= held:
                self._add(CATALOG, f"the gap {gap.first}..{gap.last} does not lie within seq 1..{held}")

    def _name_fault(self, name: str, snapshot: Snapshot, base: Seq, held: Seq) -> str | None:
        kind = self._kinds.get(snapshot.seq)
        if name != snapshot.name:
            return f"is called {snapshot.name!r} inside"
        if not (base and base <= snapshot.seq <= held):
            return f"is no recovery point: those held are seq {base}..{held}"
        if not self._sound:
            return None  # what the entry is cannot be said; the journal's own check says why
        if kind is None:
            return "names a seq at which no record ends"
        expected = {"bookmark": EntryKind.BOOKMARK, BASE_NAME: EntryKind.RECONCILE_END}.get(snapshot.kind, kind)
        return None if kind is expected else f"names a record of kind {kind.name.lower()}"

    def first_naming(self, wanted: set[int]) -> Iterator[tuple[Seq, VolumeId, int, int]]:
        """(seq, volume, block, address) of the first record that wrote each wanted address. Damaged."""
        left = np.array(sorted(wanted), dtype=np.uint64)
        for logged, position in read(self._store.storage, self._directory, FIRST_POSITION):
            if not len(left) or position > self._until:
                return
            for extent in logged.extents:
                found = np.isin(extent.addresses, left)
                for index in np.flatnonzero(found).tolist():
                    block = extent.offset // BLOCK_BYTES + index
                    yield logged.seq, extent.volume, block, int(extent.addresses[index])
                if found.any():
                    left = np.setdiff1d(left, extent.addresses)


def _shown(where: int) -> str:
    return f"container {where >> layout.SLOT_BITS} slot {where & layout.SLOT_MASK}" if where else "a hole"


def _next_volume(index: Index, txn: Txn, group_id: int, first: VolumeId) -> VolumeId | None:
    """The first volume at or after `first` that has a pointer map."""
    with txn.cursor(index.db["pointers"]) as cursor:
        if not cursor.set_range(POINTER_KEY.pack(group_id, first, 0, 0)):
            return None
        group, volume, _, _ = POINTER_KEY.unpack(cursor.key())
        return VolumeId(volume) if group == group_id else None


def _keys(index: Index, txn: Txn, start: bytes) -> tuple[list[tuple[VolumeId, int, Seq]], bytes]:
    """Up to _KEYS_PER_REQUEST keys of `start`'s group from `start` on, and the key to go on with, empty at the end."""
    found: list[tuple[VolumeId, int, Seq]] = []
    prefix = start[:2]
    with txn.cursor(index.db["pointers"]) as cursor:
        more = cursor.set_range(start)
        while more and cursor.key().startswith(prefix):
            if len(found) == _KEYS_PER_REQUEST:
                return found, cursor.key()
            _, volume, leaf, seq = POINTER_KEY.unpack(cursor.key())
            found.append((VolumeId(volume), leaf, Seq(seq)))
            more = cursor.next()
    return found, b""
