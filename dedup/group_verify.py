"""The checks of `verify` that belong to one group: its journal, its part of the index, its names.

Invariants:
- nothing that is appended after the verification began is looked at: `_until` is where the journal ended then, and what
  the index holds of that moment was read in one transaction;
- what lies at or before the last checkpoint's position must be whole; behind it, a last entry may be torn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from dedup import layout
from dedup.catalog import Catalog, Index, Txn
from dedup.damage import CATALOG, INDEX, JOURNAL, MANIFEST, Check, Damage
from dedup.errors import Damaged, UnknownFormat
from dedup.group_state import BASE_NAME, Checkpoint
from dedup.head_replay import LEAVES_MAX, HeadReplay
from dedup.index_compare import IndexCompare, IndexRefused, Replay, leaf_damage
from dedup.journal_reader import (
    FIRST_POSITION,
    JournalPosition,
    Scanned,
    SegmentFile,
    chain,
    follows,
    read,
    scan,
    scan_segment,
)
from dedup.layout import LEAF_BLOCKS, POINTER_KEY
from dedup.manifest import Manifest, read_manifest
from dedup.metadata_journal import EntryKind, Logged, decode
from dedup.pointer_map import FIRST_LEAF, SEQ_MAX, Addresses, LeafKey, split_key
from dedup.reachability import Reachability
from dedup.storage import Storage
from dedup.types import (
    BLOCK_BYTES,
    BaseAdvance,
    Consolidated,
    Gap,
    RunStart,
    Seq,
    Snapshot,
    SnapshotDelete,
    VolumeId,
    VolumeState,
)

Advance = Callable[[int], None]

_KEYS_PER_REQUEST: Final = 4096


class GroupVerifier:
    """Call `begin`, `journal`, `compare`, `versions`, `catalog`, in this order; each adds to the checks given here."""

    def __init__(
        self,
        storage: Storage,
        store_path: Path,
        index: Index | None,
        name: str,
        group_id: int | None,
        checks: Mapping[str, Check],
        slots: Reachability,
        *,
        leaves_max: int = LEAVES_MAX,
    ) -> None:
        """`index` is None when it cannot be opened, `group_id` when it does not know the group."""
        self.name = name
        self.group_id = group_id
        self._complete = False
        self._damaged = False
        self.broken_at: JournalPosition | None = None
        """Where the first bad entry of the journal starts."""
        self.missing: Seq | None = None
        """The index holds this seq, and the journal ends before it."""
        self._storage = storage
        self._index = index
        self._checks = checks
        self._slots = slots
        self._directory = store_path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        self._leaves_max = leaves_max
        self._catalog = None if index is None or group_id is None else Catalog(index, group_id)
        self._compare: IndexCompare | None = None
        self._replay: Replay | None = None
        self._anchor: Checkpoint | None = None
        self._names: dict[str, Snapshot] = {}
        self._gaps: list[Gap] = []
        self._runs: list[RunStart] = []
        self._volumes: dict[VolumeId, VolumeState] = {}
        self._manifest = Manifest()
        self._indexed = 0
        """Number of the manifest that the index is of."""
        self._segments: list[SegmentFile] = []
        self._until = FIRST_POSITION
        self._last = Seq(0)
        """The last seq that could be read."""
        self._tail_broken = False
        """Whether anything behind the last checkpoint is damaged."""
        self._previous: Seq | None = None
        self._kinds: dict[Seq, EntryKind] = {}
        """Of the entries that names stand for."""
        self._wanted: set[Seq] = set()
        self._base_advanced = False
        self._outdated: set[str] = set()
        """Names that the journal forgets, or moves, behind the last checkpoint: what they stood for may be thinned."""

    def begin(self) -> None:
        """Fixes the moment that is verified. Damaged when the index refuses to say it."""
        try:
            if self._catalog is not None:
                self._read_catalog(self._catalog)
        finally:
            # After the anchor was read, so that the end lies at or behind it.
            self._find_segments()
            if self._segments:
                last = self._segments[-1]
                self._until = JournalPosition(last.first, self._size(last), last.generation)

    def _read_catalog(self, catalog: Catalog) -> None:
        assert self._index is not None
        with self._index.read() as txn:
            anchor = catalog.anchor(txn, SEQ_MAX)
            self._names = catalog.snapshots(txn)
            self._gaps = catalog.gaps(txn)
            self._runs = catalog.runs(txn)
            self._indexed = catalog.journal_number(txn)
            if anchor is not None:
                self._volumes = catalog.volumes(txn, anchor.held)
        self._wanted = {snapshot.seq for snapshot in self._names.values()}
        if anchor is not None:
            self._compare = IndexCompare(self._index, catalog, self._checks[INDEX], self.name, anchor.held)
        self._anchor = anchor

    def _find_segments(self) -> None:
        check = self._checks[MANIFEST]
        check.items += 1
        try:
            self._manifest = read_manifest(self._storage, self._directory)
            self._segments = chain(self._storage, self._directory)
        except (Damaged, UnknownFormat) as error:
            check.add(Damage(str(error), layout.MANIFEST_NAME, self.name))
            self._journal_damage("the manifest does not say which segments there are", FIRST_POSITION)
        if self._indexed > self._manifest.number:
            what = f"the manifest is number {self._manifest.number}, the index is of number {self._indexed}"
            check.add(Damage(f"{what}: an older copy?", layout.MANIFEST_NAME, self.name))

    def _size(self, segment: SegmentFile) -> int:
        try:
            return self._storage.file_bytes(segment.path(self._directory))
        except FileNotFoundError:
            return 0

    @property
    def sound(self) -> bool:
        """Whether the journal was read to its end, and all of it is whole."""
        return self._complete and not self._damaged

    @property
    def last(self) -> Seq:
        """The last seq of the journal that could be read."""
        return self._last

    @property
    def bridged(self) -> bool:
        """Whether any damage of the journal lies before the last checkpoint, so that the store opens over it."""
        return self._anchor is not None and not self._tail_broken and self.missing is None

    @property
    def journal_bytes(self) -> int:
        """Bytes that `journal` will read."""
        return sum(map(self._size, self._segments))

    def _add(self, check: str, what: str) -> None:
        self._checks[check].add(Damage(what, group=self.name))

    # -- journal -----------------------------------------------------------------------------------------------------

    def journal(self, advance: Advance) -> None:
        """Reads every entry, and gathers what the other checks need. Damage in a segment: goes on in the next."""
        if self._compare is not None and self._indexed == self._manifest.number:
            head = HeadReplay(FIRST_LEAF, leaves_max=self._leaves_max)
            try:
                self._replay = Replay(head, self._compare.anchors(), self._compare.at_anchor)
            except IndexRefused as error:
                self._add(INDEX, str(error))
        self._previous = Seq(0)
        anchor = self._anchor
        for segment in self._segments:
            path = segment.path(self._directory)
            if self._previous is not None and segment.first != self._previous + 1:
                what = f"{path}: offset 0: seq {segment.first} does not follow seq {self._previous}"
                self._journal_damage(what, segment.start)
                self._tail_broken = self._tail_broken or anchor is None or segment.start > anchor.position
            for start, limit in self._parts(segment):
                try:
                    self._read_part(start, limit)
                except (Damaged, UnknownFormat) as damage:
                    self._journal_damage(str(damage), self._end_of(segment), path.name)
                    self._tail_broken = self._tail_broken or anchor is None or start >= anchor.position
                    self._previous = None
            self._check_row(segment)
            advance(self._size(segment))
        if anchor is not None and anchor.position > self._until:
            self.missing = anchor.held
            path = layout.segment_path(self._directory, anchor.position.segment, anchor.position.generation)
            what = f"{path}: offset {anchor.position.offset}: the journal ends before this, which the index holds"
            self._journal_damage(what, self._until)
        self._complete = True

    def _end_of(self, segment: SegmentFile) -> JournalPosition:
        """Where the last good entry of a segment in which one is bad ends."""
        end = segment.start
        try:
            for scanned in scan_segment(self._storage, self._directory, segment):
                end = scanned.position
        except (Damaged, UnknownFormat):
            pass
        return end

    def _whole(self, segment: SegmentFile) -> JournalPosition:
        return JournalPosition(segment.first, self._size(segment), segment.generation)

    def _parts(self, segment: SegmentFile) -> Iterator[tuple[JournalPosition, JournalPosition | None]]:
        """Stretches of a segment to scan: those with an end must be whole, the one without ends where it ends."""
        start = segment.start
        held: JournalPosition | None = None
        is_last = segment is self._segments[-1]
        if not is_last or segment.generation != layout.RAW_GENERATION:
            yield start, max(self._whole(segment), JournalPosition(start.segment, start.offset + 1, start.generation))
            return
        elif self._anchor is not None and self._anchor.position.segment == segment.first:
            held = min(self._anchor.position, self._until)
        if held is not None and held > start:
            yield start, held
            start = held
        if is_last and start < self._until:
            yield start, None

    def _read_part(self, start: JournalPosition, limit: JournalPosition | None) -> None:
        for scanned in scan(self._storage, self._directory, start, limit=limit):
            if scanned.position > self._until:
                return
            previous = self._previous
            if previous is not None and not follows(previous, scanned.kind, scanned.first_seq, scanned.seq):
                raise Damaged(f"{self._where(scanned)}: seq {scanned.first_seq} does not follow seq {previous}")
            try:
                self._take(decode(scanned.raw), scanned.position)
            except Damaged as error:
                raise Damaged(f"{self._where(scanned)}: {error}") from error
            self._previous = self._last = scanned.seq
            self._checks[JOURNAL].items += 1

    def _where(self, scanned: Scanned) -> str:
        return f"{scanned.segment.path(self._directory)}: offset {scanned.end - len(scanned.raw)}"

    def _journal_damage(self, what: str, position: JournalPosition, file: str | None = None) -> None:
        self._damaged = True
        self.broken_at = self.broken_at or position
        self._checks[JOURNAL].add(Damage(what, file, self.name))

    def _check_row(self, segment: SegmentFile) -> None:
        """A consolidated segment against what the manifest says of it."""
        check = self._checks[MANIFEST]
        for row in self._manifest.rows:
            if (row.first, row.generation) != segment or self._previous is None:
                continue
            check.items += 1
            size = self._size(segment)
            if (row.last, row.bytes) != (self._previous, size):
                what = f"says {row.bytes} bytes up to seq {row.last}, there are {size} up to seq {self._previous}"
                path = segment.path(self._directory)
                check.add(Damage(f"{path.parent / layout.MANIFEST_NAME}: {what} in {path.name}", path.name, self.name))

    def _take(self, logged: Logged, position: JournalPosition) -> None:
        for extent in logged.extents:
            self._slots.add(extent.addresses, extent.fingerprints)
        if logged.seq in self._wanted and logged.kind.consumes_seq:
            self._kinds[logged.seq] = logged.kind
        self._base_advanced = self._base_advanced or logged.kind is EntryKind.BASE_ADVANCE
        if self._anchor is None or position > self._anchor.position:
            self._outdated.update(_outdated_by(logged))
        if self._damaged or self._replay is None:
            return  # entries are missing, and what follows cannot be applied
        try:
            self._replay.take(logged, position)
        except IndexRefused as error:
            self._add(INDEX, str(error))
            self._replay = None

    # -- index -------------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Holds every checkpoint against the replay, window by window of the pointer maps."""
        compare, replay, anchor = self._compare, self._replay, self._anchor
        if self._catalog is None:
            if self._index is not None and self._previous:
                self._add(INDEX, f"the index does not know the group {self.name}; open the store for writing once")
            return
        if compare is None or replay is None or anchor is None:
            return
        if self._indexed < self._manifest.number:
            return  # a consolidation was cut short: the next writer brings the index up to the manifest
        if not self.sound and replay.anchor is not None:
            self._add(INDEX, "could not be checked: the journal is damaged")
            return
        if replay.anchor is not None:
            replay.begin_segment(Seq(replay.state.held + 1))  # a last segment without an entry yet
        if replay.anchor is not None:
            compare.add(f"the checkpoint of seq {replay.anchor.held} lies at no entry's end: {replay.anchor.position}")
            return
        compare.names(self._names, replay)
        compare.gaps(self._gaps, replay)
        compare.runs(self._runs, replay)
        head = replay.head
        compare.window(anchor.held, head, self._volumes)
        while head.end is not None:
            head = self._replay_window(compare, head.end, anchor.position)
            compare.window(anchor.held, head, self._volumes)

    def _replay_window(self, compare: IndexCompare, start: LeafKey, limit: JournalPosition) -> HeadReplay:
        replay = Replay(HeadReplay(start, leaves_max=self._leaves_max), compare.anchors(), compare.leaves_at_anchor)
        for logged, position in read(self._storage, self._directory, self._segments[0].start, limit=limit):
            replay.take(logged, position)
        return replay.head

    # -- pointers and names ------------------------------------------------------------------------------------------

    def versions(self) -> None:
        """Gathers the addresses of every version of every leaf that the index holds."""
        if self._catalog is None or self._index is None:
            return
        pointers = self._catalog.pointers
        before: tuple[LeafKey, Addresses] | None = None
        key = POINTER_KEY.pack(self._catalog.group_id, 0, 0, 0)
        while key:
            with self._index.read() as txn:
                found, key = _keys(self._index, txn, key)
                for volume, leaf, seq in found:
                    try:
                        addresses = pointers.leaf(txn, volume, leaf, seq)
                    except Damaged as error:
                        what = f"{error} (seq={seq})"
                        damage = leaf_damage(self.name, self._volumes, (volume, leaf), what, 0, LEAF_BLOCKS)
                        self._checks[INDEX].add(damage)
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
            elif gap.to_time is None:
                self._add(CATALOG, f"the gap {gap.first}..{gap.last} has no time at which it ended")

    def _name_fault(self, name: str, snapshot: Snapshot, base: Seq, held: Seq) -> str | None:
        kind = self._kinds.get(snapshot.seq)
        if name != snapshot.name:
            return f"is called {snapshot.name!r} inside"
        if not (base and base <= snapshot.seq <= held):
            return f"is no recovery point: those held are seq {base}..{held}"
        if not self.sound or name in self._outdated:
            # What the entry is, or was, cannot be said; where the journal is damaged its own check says why.
            return None
        if kind is None:
            return "names a seq at which no record ends"
        if kind is EntryKind.CONSOLIDATED or (snapshot.kind == BASE_NAME and self._base_advanced):
            return None  # the record itself was folded into it; a base that advanced is any recovery point
        expected = {"bookmark": EntryKind.BOOKMARK, BASE_NAME: EntryKind.RECONCILE_END}.get(snapshot.kind, kind)
        return None if kind is expected else f"names a record of kind {kind.name.lower()}"

    def first_naming(self, wanted: set[int]) -> Iterator[tuple[Seq, VolumeId, int, int]]:
        """(seq, volume, block, address) of the first record that wrote each wanted address. Damaged."""
        left = np.array(sorted(wanted), dtype=np.uint64)
        if not self._segments:
            return
        for logged, position in read(self._storage, self._directory, self._segments[0].start):
            if not len(left) or position > self._until:
                return
            for extent in logged.extents:
                found = np.isin(extent.addresses, left)
                for index in np.flatnonzero(found).tolist():
                    block = extent.offset // BLOCK_BYTES + index
                    yield logged.seq, extent.volume, block, int(extent.addresses[index])
                if found.any():
                    left = np.setdiff1d(left, extent.addresses)


def _outdated_by(logged: Logged) -> Iterable[str]:
    """Names for which the entry says something else than what came before it."""
    match logged.body:
        case SnapshotDelete(name=name):
            return (name,)
        case BaseAdvance():
            return (BASE_NAME,)
        case Consolidated(snapshots=snapshots, forgotten=forgotten):
            return (*forgotten, *(snapshot.name for snapshot in snapshots))
        case _:
            return ()


def _keys(index: Index, txn: Txn, start: bytes) -> tuple[list[tuple[VolumeId, int, Seq]], bytes]:
    """Up to _KEYS_PER_REQUEST keys of `start`'s group from `start` on, and the key to go on with, empty at the end."""
    found: list[tuple[VolumeId, int, Seq]] = []
    prefix = start[:2]
    with txn.cursor(index.db["pointers"]) as cursor:
        more = cursor.set_range(start)
        while more and cursor.key().startswith(prefix):
            if len(found) == _KEYS_PER_REQUEST:
                return found, cursor.key()
            _, volume, leaf, seq = split_key(cursor.key())
            found.append((volume, leaf, seq))
            more = cursor.next()
    return found, b""
