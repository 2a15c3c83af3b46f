"""Reading a store beside its writer: groups, recovery points, snapshots and images. Any number of processes.

Invariants:
- nothing here writes: not the index, not the journal, not a container;
- a transaction lasts one request; the journal's tail past the checkpoint is read too, so a reader sees all that was
  journalled before `refresh`;
- an incomplete last entry of the journal is the end, not damage;
- a moment in a gap is refused, with the nearest recovery points on both sides (`gap-is-said`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup import layout
from dedup.catalog import Catalog, Index, Txn
from dedup.container import ContainerPool
from dedup.errors import MomentRefused, UnknownName
from dedup.group_state import Checkpoint, GroupState
from dedup.image import Image
from dedup.marker import read_marker
from dedup.metadata_journal import JournalPosition, Logged, read
from dedup.moment import AtSeq, AtTime, Latest, Named, parse_time, rfc3339
from dedup.pointer_map import SEQ_MAX
from dedup.storage import Storage
from dedup.synthesis import View, VolumePointers, changed_blocks, start_of, view_at
from dedup.types import BLOCK_BYTES, Gap, Moment, RunStart, Seq, Snapshot, TimeNs, VolumeId, VolumeState
from dedup.usage import StoreUsage, measure

VIEWS_MAX: Final = 8
"""Synthesized moments kept by a group's reader; each at most one checkpoint's overlay (a few MB)."""


@dataclass(frozen=True, slots=True)
class PointRange:
    """Recovery points first..last, all of which can be restored, at one granularity."""

    first: Seq
    first_time: TimeNs
    last: Seq
    last_time: TimeNs
    granularity: str
    journal: str


@dataclass(frozen=True, slots=True)
class Points:
    """What can be restored of a group."""

    group: str
    oldest: Moment | None
    newest: Moment | None
    covered_until: TimeNs
    ranges: tuple[PointRange, ...]
    gaps: tuple[Gap, ...]
    flushes: int
    bookmarks: tuple[Snapshot, ...]


class StoreReader:
    """A store opened for reading."""

    def __init__(self, path: Path, storage: Storage, index: Index, pool: ContainerPool) -> None:
        self.path = path
        self.storage = storage
        self.index = index
        self.pool = pool
        self.lock = threading.Lock()
        self._groups: dict[str, GroupReader] = {}

    @classmethod
    def open(cls, path: Path, storage: Storage | None = None) -> StoreReader:
        """Opens the store at `path`. NotAStore, UnknownFormat, Damaged."""
        storage = storage or Storage()
        read_marker(storage, path)
        index = Index(path / layout.INDEX_NAME, writer=False)
        return cls(path, storage, index, ContainerPool(storage, path / layout.CONTAINERS_NAME))

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
        return measure(self.path, logical, sum(len(group.snapshots()) for group in groups))

    def close(self) -> None:
        self.pool.close()
        self.index.close()


class GroupReader:
    """One group of a store that may be written meanwhile. Not for two threads at once (its images are)."""

    def __init__(self, store: StoreReader, name: str, group_id: int) -> None:
        self.name = name
        self._store = store
        self._catalog = Catalog(store.index, group_id)
        self._directory = store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        self._anchor: Checkpoint | None = None
        self._position: JournalPosition | None = None
        self._state = GroupState()
        self._views: OrderedDict[Seq, View] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Sees everything that was journalled before this call."""
        with self._store.index.read() as txn:
            anchor = self._catalog.anchor(txn, SEQ_MAX)
            if self._position is None or anchor != self._anchor:
                self._state, self._position = start_of(self._store.storage, self._directory, self._catalog, txn, anchor)
                self._anchor = anchor
        for logged, position in read(self._store.storage, self._directory, self._position):
            self._state.apply(logged)
            self._position = position

    @property
    def held(self) -> Seq:
        """The last record, as of the last refresh."""
        return self._state.held

    @property
    def covered_until(self) -> TimeNs:
        """Nothing happened after the last record until this time."""
        return self._state.time

    @property
    def state(self) -> GroupState:
        """The state at `held`; not to be changed."""
        return self._state

    def gaps(self) -> list[Gap]:
        """All gaps by seq; the last may be open."""
        with self._store.index.read() as txn:
            gaps = {gap.first: gap for gap in self._catalog.gaps(txn)}
        gaps.update((gap.first, gap) for gap in self._state.new_gaps)
        if self._state.base and self._state.gap is not None:
            gaps[self._state.gap.first] = self._state.gap
        return [gaps[first] for first in sorted(gaps)]

    def snapshots(self) -> list[Snapshot]:
        """All catalogued recovery points by seq: the base, bookmarks, snapshots."""
        with self._store.index.read() as txn:
            named = dict(self._catalog.snapshots(txn))
        for name, snapshot in self._state.new_snapshots.items():
            if snapshot is None:
                named.pop(name, None)
            else:
                named[name] = snapshot
        return sorted(named.values(), key=lambda snapshot: (snapshot.seq, snapshot.name))

    def snapshot(self, name: str) -> Snapshot | None:
        """The catalogued recovery point of that name."""
        if name in self._state.new_snapshots:
            return self._state.new_snapshots[name]
        with self._store.index.read() as txn:
            return self._catalog.snapshot(txn, name)

    def _runs(self, txn: Txn) -> list[RunStart]:
        runs = {run.run: run for run in self._catalog.runs(txn)}
        runs.update((run.run, run) for run in self._state.new_runs)
        return [runs[run] for run in sorted(runs)]

    def view(self, seq: Seq) -> View:
        """The group at the last record at or before `seq`; whether it is a recovery point is not asked."""
        seq = min(seq, self._state.held)
        view = self._views.get(seq)
        if view is None:
            with self._store.index.read() as txn:
                view = view_at(self._store.storage, self._directory, self._catalog, txn, lambda e: e.seq > seq, seq)
            self._remember(seq, view)
        self._views.move_to_end(seq)
        return view

    def _remember(self, seq: Seq, view: View) -> None:
        self._views[seq] = view
        if len(self._views) > VIEWS_MAX:
            self._views.popitem(last=False)

    def _view_at_time(self, text: str, time: TimeNs) -> View:
        with self._store.index.read() as txn:
            runs = self._runs(txn)
            ends = [run.previous_time for run in runs[1:]] + [self._state.time]
            holding = [run for run, end in zip(runs, ends, strict=True) if run.time <= time <= end]
            if len(holding) > 1:
                starts = ", ".join(f"seq={run.first}" for run in holding)
                raise MomentRefused(
                    f"{text}: the agent's clock stepped back, so this time was met {len(holding)} times; "
                    f"use seq=N, from one of the clock runs that start at {starts}"
                )
            if not holding:
                raise self._outside(text, before=bool(runs) and time < min(run.time for run in runs))
            run = holding[0]
            anchor = self._catalog.anchor_by_time(txn, run, time) or self._catalog.anchor(txn, run.first)

            def stop(logged: Logged) -> bool:
                return logged.run > run.run or (logged.run == run.run and logged.time > time)

            return view_at(
                self._store.storage,
                self._directory,
                self._catalog,
                txn,
                stop,
                Seq(0) if anchor is None else anchor.held,
            )

    def resolve(self, text: str, *, now: TimeNs | None = None) -> Moment:
        """The recovery point that TIME names, everything journalled before the call included.

        BadTime, UnknownName; MomentRefused names the nearest recovery points.
        """
        spec = parse_time(text, now=now)
        self.refresh()
        asked: TimeNs | None = None
        match spec.where:
            case Latest():
                view = self.view(self._state.held)
            case AtSeq(seq):
                if seq > self._state.held:
                    raise self._outside(text, before=False)
                view = self.view(seq)
            case Named(name, bookmark):
                view = self.view(self._named(name, bookmark=bookmark))
            case AtTime(time):
                named = self.snapshot(spec.text)
                if named is not None:
                    view = self.view(named.seq)
                else:
                    asked = time
                    view = self._view_at_time(text, time)
        if spec.flush:
            if not view.state.last_flush:
                raise self._outside(text, before=True)
            asked = None
            view = self.view(view.state.last_flush)
        self._refuse_unless_point(text, view, asked)
        return self._moment(view)

    def _moment(self, view: View) -> Moment:
        return Moment(self.name, view.state.held, view.state.time, view.state.point)

    def _named(self, name: str, *, bookmark: bool) -> Seq:
        snapshot = self.snapshot(name)
        if snapshot is None or (bookmark and snapshot.kind != "bookmark"):
            kind = "bookmark" if bookmark else "bookmark or snapshot"
            raise UnknownName(f"group {self.name} has no {kind} {name!r}; `rewindfs snapshot list` shows what it has")
        return snapshot.seq

    def _refuse_unless_point(self, text: str, view: View, asked: TimeNs | None) -> None:
        seq = view.state.held
        if not self._state.base or seq < self._state.base:
            raise self._outside(text, before=True)
        for gap in self.gaps():
            inside = gap.first <= seq and (gap.last is None or seq <= gap.last)
            between = asked is not None and gap.from_time < asked and (gap.to_time is None or asked < gap.to_time)
            if inside or between:
                sides = [self._point_text(Seq(gap.first - 1))] if gap.first > self._state.base else []
                if gap.last is not None:
                    sides.append(self._point_text(Seq(gap.last + 1)))
                raise MomentRefused(
                    f"{text}: in a gap ({gap.reason}), no consistent recovery point; nearest: {' and '.join(sides)}"
                )

    def _outside(self, text: str, *, before: bool) -> MomentRefused:
        if not self._state.base:
            return MomentRefused(
                f"{text}: group {self.name} has no recovery point yet, its base snapshot is being made"
            )
        if before:
            return MomentRefused(f"{text}: before the first recovery point, {self._point_text(self._state.base)}")
        return MomentRefused(f"{text}: after the last recovery point, {self._point_text(self._state.held)}")

    def _point_text(self, seq: Seq) -> str:
        state = self.view(seq).state
        return f"seq={state.held} at {rfc3339(state.time)}"

    def volumes_at(self, seq: Seq) -> dict[str, VolumeState]:
        """Path → volume, of those that existed at `seq`."""
        return {volume.path: volume for volume in self.view(seq).state.volumes.values()}

    def paths(self) -> set[str]:
        """Every path that a volume has had."""
        with self._store.index.read() as txn:
            paths = self._catalog.paths(txn)
        return paths | self._state.new_paths

    def image(self, volume: VolumeId, seq: Seq) -> Image:
        """The volume at `seq`. UnknownName if it did not exist then."""
        view = self.view(seq)
        state = view.volume(volume)
        if state is None:
            raise UnknownName(f"group {self.name} had no volume {volume} at seq={seq}")
        pointers = VolumePointers(view, self._catalog, volume)
        label = f"{state.path} at seq={view.state.held}"
        return Image(self._store.index, self._store.pool, self._store.lock, pointers, state.size, label)

    def changed_bytes(self, volume: VolumeId, old: Seq | None, new: Seq) -> int:
        """Bytes of blocks whose pointers differ between two moments (None: compared with nothing)."""
        after = VolumePointers(self.view(new), self._catalog, volume)
        before = None if old is None else VolumePointers(self.view(old), self._catalog, volume)
        with self._store.index.read() as txn:
            return changed_blocks(txn, before, after) * BLOCK_BYTES

    def points(self) -> Points:
        """What can be restored now."""
        self.refresh()
        state, gaps = self._state, self.gaps()
        bookmarks = tuple(found for found in self.snapshots() if found.kind == "bookmark")
        ranges: list[PointRange] = []
        if state.base:
            starts = [state.base, *(Seq(gap.last + 1) for gap in gaps if gap.last is not None)]
            ends = [*(Seq(gap.first - 1) for gap in gaps), *([] if state.gap else [state.held])]
            ranges = [self._range(first, last) for first, last in zip(starts, ends, strict=True) if first <= last]
        return Points(
            self.name,
            self._moment(self.view(ranges[0].first)) if ranges else None,
            self._moment(self.view(ranges[-1].last)) if ranges else None,
            state.time,
            tuple(ranges),
            tuple(gaps),
            state.flushes,
            bookmarks,
        )

    def _range(self, first: Seq, last: Seq) -> PointRange:
        start, end = self.view(first).state, self.view(last).state
        return PointRange(start.held, start.time, end.held, end.time, "every-write", "fine")
