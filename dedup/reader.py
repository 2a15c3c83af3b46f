"""Reading a store beside its writer: groups, recovery points, snapshots and images. Any number of processes.

Invariants:
- nothing here writes but this process's pins: not the index, not the journal, not a container;
- a transaction lasts one request; the journal's tail past the checkpoint is read too, so a reader sees all that was
  journalled before `refresh`;
- an incomplete last entry of the journal is the end, not damage;
- history that is thinned out meanwhile is read again, and what is pinned is not thinned out (`group_views`, `pins`);
- a moment in a gap is refused, with the nearest recovery points on both sides (`gap-is-said`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dedup import layout, resolution
from dedup.catalog import Catalog, Index, Txn
from dedup.changes import Changes
from dedup.container_pool import ContainerPool
from dedup.difference import differing_ranges
from dedup.errors import UnknownName
from dedup.gaps import Gaps
from dedup.group_state import GroupState
from dedup.group_views import DatedView, GroupViews
from dedup.history import ByteRange, GroupMoment
from dedup.image import Image
from dedup.journal_reader import Scanned
from dedup.manifest import read_manifest
from dedup.marker import read_marker
from dedup.metadata_journal import Logged
from dedup.pins import Pinning, ReaderPins
from dedup.points import Points, Stretch, points_of, routes_needed_since, stretches
from dedup.stamps import Stamps
from dedup.storage import Storage
from dedup.sync_log_restore import is_waiting
from dedup.synthesis import View, VolumePointers
from dedup.types import BLOCK_BYTES, Gap, Moment, PointKind, RunStart, Seq, Snapshot, TimeNs, VolumeId, VolumeState
from dedup.usage import StoreUsage, measure

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class StoreReader:
    """A store opened for reading."""

    def __init__(
        self, path: Path, storage: Storage, index: Index, pool: ContainerPool, pins: ReaderPins | None = None
    ) -> None:
        """Over parts that are open. `pins` None: nothing is pinned."""
        self.path = path
        self.storage = storage
        self.index = index
        self.pool = pool
        self.pins = pins
        self.lock = threading.Lock()
        self._groups: dict[str, GroupReader] = {}

    @property
    def uuid(self) -> str:
        """Tells any two stores apart. Damaged."""
        return read_marker(self.storage, self.path).uuid.hex()

    @classmethod
    def open(cls, path: Path, storage: Storage | None = None, *, pinning: Pinning = Pinning.EVERYTHING) -> StoreReader:
        """Opens the store at `path`. What `pinning` says is not thinned out or swept until `close`.

        NotAStore, UnknownFormat, Damaged; StoreBusy, StoreFull, StoreFailed when it cannot be pinned.
        """
        storage = storage or Storage()
        read_marker(storage, path)
        if is_waiting(storage, path):
            log.warning(
                "%s: what became durable last may be in the sync log alone, as after a power cut, and is not seen then "
                "until the second appliance was started there once, or `rewindfs verify --repair` was run",
                path,
            )
        pins = None
        if pinning is not Pinning.NOTHING:
            pins = ReaderPins.open(path, storage, everything=pinning is Pinning.EVERYTHING)
        try:
            index = Index(path / layout.INDEX_NAME, writer=False)
        except BaseException:
            if pins is not None:
                pins.close()
            raise
        return cls(path, storage, index, ContainerPool(storage, path / layout.CONTAINERS_NAME), pins)

    def groups(self) -> list[str]:
        """The names of all groups, sorted."""
        with self.index.read() as txn:
            return sorted(self.index.group_ids(txn))

    def group(self, name: str | None = None) -> GroupReader:
        """The group of that name; None is the only one. UnknownName lists what there is."""
        groups = self.groups()
        if name is None:
            if len(groups) != 1:
                found = (
                    f"holds the groups {', '.join(groups)}; name one with --group" if groups else "holds no group yet"
                )
                raise UnknownName(f"{self.path} {found}")
            name = groups[0]
        if name not in groups:
            raise UnknownName(f"{self.path} holds no group {name!r}; it holds: {', '.join(groups) or 'none'}")
        if name not in self._groups:
            with self.index.read() as txn:
                self._groups[name] = GroupReader(self, name, self.index.group_ids(txn)[name])
        return self._groups[name]

    def usage(self) -> StoreUsage:
        """Sizes now, every group refreshed; walks the store's files."""
        groups = [self.group(name) for name in self.groups()]
        for group in groups:
            group.refresh()
        logical = sum(group.state.logical_bytes for group in groups)
        return measure(self.path, logical, sum(group.snapshot_count() for group in groups))

    def close(self) -> None:
        self.pool.close()
        self.index.close()
        if self.pins is not None:
            self.pins.close()


class GroupReader:
    """One group of a store that may be written meanwhile. Not for two threads at once (its images are)."""

    def __init__(self, store: StoreReader, name: str, group_id: int) -> None:
        self.name = name
        self._store = store
        self._catalog = Catalog(store.index, group_id)
        self._directory = store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        self._changes = Changes(store.storage, self._directory, self._catalog)
        self._paths: tuple[tuple[int, frozenset[str]], frozenset[str]] = (0, frozenset()), frozenset()
        self._views = GroupViews(store.storage, store.index, self._catalog, self._directory, name, store.pins)

    def refresh(self) -> None:
        """Sees everything that was journalled before this call."""
        self._views.refresh()

    @property
    def store_uuid(self) -> str:
        """As `StoreReader.uuid`."""
        return self._store.uuid

    @property
    def held(self) -> Seq:
        """The last record, as of the last refresh."""
        return self.state.held

    @property
    def covered_until(self) -> TimeNs:
        """Nothing happened after the last record until this time."""
        return self.state.time

    @property
    def state(self) -> GroupState:
        """The state at `held`; not to be changed."""
        return self._views.state

    def enter(self) -> None:
        """From here to `leave` no history is changed, so that `hold` does not wait. Any thread.

        May wait while the writer changes it: StoreBusy.
        """
        if self._store.pins is not None:
            self._store.pins.enter()

    def leave(self) -> None:
        """Ends one `enter`. Any thread."""
        if self._store.pins is not None:
            self._store.pins.leave()

    @property
    def rewritten(self) -> tuple[int, int]:
        """Differs from what it was if history may have been thinned out between two refreshes."""
        return self._views.rewritten

    # -- names, gaps, clock runs -------------------------------------------------------------------------------------

    def gaps(self) -> list[Gap]:
        """All gaps behind the base by seq; the last may be open."""
        with self._store.index.read() as txn:
            return Gaps(self._catalog, txn, self.state).all()

    def gap_at(self, seq: Seq) -> Gap | None:
        """The gap that the seq is in."""
        with self._store.index.read() as txn:
            return Gaps(self._catalog, txn, self.state).at(seq)

    def gap_during(self, time: TimeNs, after: Seq, last: Seq) -> Gap | None:
        """The gap that begins in after+1..last, seqs of one clock run, and in which that time is."""
        with self._store.index.read() as txn:
            return Gaps(self._catalog, txn, self.state).during(time, after, last)

    def snapshot_count(self) -> int:
        """How many names there are."""
        with self._store.index.read() as txn:
            return self._catalog.names_count(txn, self.state.new_snapshots)

    def snapshots(self) -> list[Snapshot]:
        """All catalogued recovery points by seq: the base, bookmarks, snapshots."""
        return self._named(b"")

    def bookmarks(self) -> list[Snapshot]:
        """The bookmarks by seq."""
        kind = PointKind.BOOKMARK.value
        return [found for found in self._named(kind.encode()) if found.kind == kind]

    def _named(self, having: bytes) -> list[Snapshot]:
        """At least those whose values have these bytes, by seq."""
        with self._store.index.read() as txn:
            named = self._catalog.snapshots(txn, having)
        for name, snapshot in self.state.new_snapshots.items():
            if snapshot is None:
                named.pop(name, None)
            else:
                named[name] = snapshot
        return sorted(named.values(), key=lambda snapshot: (snapshot.seq, snapshot.name))

    def snapshot(self, name: str) -> Snapshot | None:
        """The catalogued recovery point of that name."""
        if name in self.state.new_snapshots:
            return self.state.new_snapshots[name]
        with self._store.index.read() as txn:
            return self._catalog.snapshot(txn, name)

    def paths(self) -> frozenset[str]:
        """Every path that a volume has had; the same object as before where none came."""
        new = frozenset(self.state.new_paths)
        with self._store.index.read() as txn:
            key = self._catalog.paths_count(txn), new
            if key != self._paths[0]:
                self._paths = key, new.union(self._catalog.paths(txn))
        return self._paths[1]

    def runs(self) -> list[RunStart]:
        """All clock runs, in order."""
        with self._store.index.read() as txn:
            runs = {run.run: run for run in self._catalog.runs(txn)}
        runs.update((run.run, run) for run in self.state.new_runs)
        return [runs[run] for run in sorted(runs)]

    # -- moments -----------------------------------------------------------------------------------------------------

    def view(self, seq: Seq) -> View:
        """The group at the last record at or before `seq` that the history still tells from others.

        Whether it is a recovery point is not asked.
        """
        return self._views.at(seq).view

    def view_before(self, stop: Callable[[Logged], bool], run: RunStart, time: TimeNs) -> View:
        """The group before the first entry for which `stop` is true; that entry is behind `time` of the clock run."""
        with self._store.index.read() as txn:
            anchor = self._catalog.anchor_by_time(txn, run, time) or self._catalog.anchor(txn, run.first)
        return self._views.before(stop, Seq(0) if anchor is None else anchor.held).view

    def first_from(self, seq: Seq) -> View | None:
        """The group at the first record that ends at or after `seq`; None when there is none yet."""
        return self._views.first_from(seq)

    def moment(self, view: View) -> Moment:
        """The view's recovery point."""
        return Moment(self.name, view.state.held, view.state.time, view.state.point)

    def resolve(self, text: str, *, now: TimeNs | None = None) -> Moment:
        """The recovery point that TIME names, everything journalled before the call included.

        BadTime, UnknownName; MomentRefused names the nearest recovery points.
        """
        self.refresh()
        return resolution.resolve(self, text, now)

    def hold(self, seq: Seq) -> None:
        """Keeps the moment until `release`, as often as it is held. `seq` is that of a `Moment`.

        MomentGone when it has been thinned out. May wait while the writer changes history: StoreBusy.
        """
        self._views.hold(seq)

    def hold_again(self, seq: Seq) -> bool:
        """As `hold`, of a moment that is held; False when it is not. Never waits. Any thread."""
        return self._views.hold_again(seq)

    def require(self, seq: Seq) -> None:
        """MomentGone unless history, as of the last refresh, still tells the moment from others."""
        self._views.require(seq)

    def release(self, seq: Seq) -> None:
        """Ends one `hold`. Never waits."""
        self._views.release(seq)

    def close_idle(self) -> None:
        """Closes containers of the store that nobody used lately: what was replaced gives its room back. Any thread."""
        self._store.pool.close_idle()

    def stamped(self, step: Callable[[Stamps], _T]) -> _T:
        """As `GroupViews.stamped`."""
        return self._views.stamped(step)

    def scanned_since(self, time: TimeNs, step: Callable[[GroupState, Iterator[Scanned]], _T]) -> _T:
        """As `GroupViews.scanned`, from a checkpoint on behind which every record of that time or later lies."""
        runs = self.runs()
        with self._store.index.read() as txn:
            ends = [*(run.previous_time for run in runs[1:]), self.state.time]
            run = next((run for run, end in zip(runs, ends, strict=True) if end >= time), None)
            anchor = None
            if run is not None and time > 0:
                anchor = self._catalog.anchor_by_time(txn, run, TimeNs(time - 1))
                anchor = anchor or self._catalog.anchor(txn, Seq(run.first - 1))
        after = self.held if run is None else Seq(0) if anchor is None else anchor.held
        return self._views.scanned(after, step)

    def points(self) -> Points:
        """What can be restored now."""
        self.refresh()
        return points_of(self)

    def stretches(self) -> list[Stretch]:
        """The history by granularity and data journal, in order."""
        manifest = read_manifest(self._store.storage, self._directory)
        with self._store.index.read() as txn:
            routes = [*self._catalog.routes(txn, routes_needed_since(manifest)), *self.state.new_routes]
        return list(stretches(manifest, routes, self.state.journals, self.held))

    # -- volumes -----------------------------------------------------------------------------------------------------

    def volumes_at(self, seq: Seq) -> dict[str, VolumeState]:
        """Path → volume, of those that existed at `seq`."""
        return self.group_at(seq).volumes

    def group_at(self, seq: Seq) -> GroupMoment:
        """The group at the last record at or before `seq` that the history still tells from others."""
        state = self._views.listed(seq)
        moment = Moment(self.name, state.held, state.time, state.point)
        return GroupMoment(moment, {volume.path: volume for volume in state.volumes.values()})

    def image(self, volume: VolumeId, seq: Seq) -> Image:
        """The volume at `seq`. UnknownName if it did not exist then.

        Reading it raises MomentGone once the moment is thinned out; while it is held, it is not.
        """
        dated, state = self._volume_at(volume, seq)
        pointers = self._pointers(dated, volume)
        then = dated.view.state
        label = f"{state.path} at seq={then.held}"
        return Image(self._store.index, self._store.pool, self._store.lock, pointers, state.size, then.time, label)

    def pointers(self, volume: VolumeId, seq: Seq) -> VolumePointers:
        """The volume's pointers at `seq`, for which the same holds as for `image`."""
        return self._pointers(self._views.at(seq), volume)

    def _pointers(self, dated: DatedView, volume: VolumeId) -> VolumePointers:
        def check(txn: Txn) -> None:
            self._views.check(txn, dated)

        return VolumePointers(dated.view, self._catalog, volume, check)

    def differing(
        self, old: tuple[VolumeId, Seq] | None, new: tuple[VolumeId, Seq] | None, start: int = 0
    ) -> Iterator[ByteRange]:
        """As `History.differing`."""
        (before, before_size), (after, after_size) = self._side(old), self._side(new)
        return differing_ranges(self._store.index, self._catalog, before, after, start, max(before_size, after_size))

    def _side(self, one: tuple[VolumeId, Seq] | None) -> tuple[VolumePointers | None, int]:
        """The pointers and the size of one side of a comparison. UnknownName."""
        if one is None:
            return None, 0
        dated, state = self._volume_at(*one)
        return self._pointers(dated, state.volume), state.size

    def _volume_at(self, volume: VolumeId, seq: Seq) -> tuple[DatedView, VolumeState]:
        """The volume as it was, and the view that says so. UnknownName if it did not exist then."""
        dated = self._views.at(seq)
        state = dated.view.volume(volume)
        if state is None:
            raise UnknownName(f"group {self.name} had no volume {volume} at seq={seq}")
        return dated, state

    def changed_bytes(self, volume: VolumeId, old: Seq | None, new: Seq) -> int:
        """Bytes of blocks whose pointers differ between two moments (None: compared with nothing)."""
        after = self.pointers(volume, new)
        before = None if old is None else self.pointers(volume, old)
        with self._store.index.read() as txn:
            return self._changes.blocks(txn, before, after) * BLOCK_BYTES
