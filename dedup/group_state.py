"""What is known of a group after a journal entry: its volumes, names, gaps, clock runs and the overlay of its blocks.

The writer's head, recovery, a reader's tail and the synthesis of a past moment all apply the same entries through
`GroupState.apply`, so that they cannot disagree.

Invariants:
- `apply` is called with each entry of the journal once, in order (`order`);
- an entry that consumes no seq may be applied twice, and changes nothing the second time;
- what changed since the last checkpoint is in `overlay` and in the `new_*` fields, and nowhere else: a checkpoint that
  writes these has written everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dedup.errors import Damaged
from dedup.metadata_journal import EntryKind, JournalPosition, Logged, Scanned
from dedup.overlay import Overlay
from dedup.types import (
    BASE_JOURNAL,
    BLOCK_BYTES,
    FINE_JOURNAL,
    Attributes,
    BaseAdvance,
    Bookmark,
    ClockRun,
    Consolidated,
    Correct,
    Create,
    Entry,
    Epoch,
    EpochStart,
    Flush,
    Gap,
    JournalCreate,
    JournalId,
    JournalSpec,
    JournalUse,
    Owner,
    PointKind,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
    Route,
    RunStart,
    Seq,
    Snapshot,
    SnapshotCreate,
    SnapshotDelete,
    TimeNs,
    VolumeId,
    VolumeState,
)
from dedup.write_run import WriteRun

FINE = JournalSpec(FINE_JOURNAL, "fine", 0)
"""The every-write data journal that each group begins with."""
PRESENT_RUNS_MAX = 1024
"""Runs of numbers of existing volumes that a checkpoint lists: some 10 KB at most."""
OWNERS_MAX = 64
"""Agents that are remembered to have fed a group: the newest."""
BASE_NAME = "base"
"""Name of the base snapshot: the state at the end of the first full reconcile."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The part of a group's state that a checkpoint stores as one value; the anchor of the moments that follow it."""

    held: Seq
    time: TimeNs
    run: ClockRun
    epoch: Epoch
    base: Seq
    next_volume: VolumeId
    point: PointKind
    last_flush: Seq
    flushes: int
    gap: Gap | None
    position: JournalPosition
    logical_bytes: int
    journal: JournalId = FINE_JOURNAL
    journals: tuple[JournalSpec, ...] = (FINE,)
    owners: tuple[str, ...] = ()
    present: tuple[tuple[VolumeId, VolumeId], ...] | None = field(default=None, compare=False)
    """(first, last) of each run of numbers of the volumes that exist, None when there are too many runs: so that they
    are found among all that came and went. Says nothing that `volumes` does not."""


@dataclass(slots=True)
class GroupState:
    """Mutable; owned by one writer or one reader. Fields of a group without records are zero."""

    held: Seq = Seq(0)
    time: TimeNs = TimeNs(0)
    run: ClockRun = ClockRun(0)
    epoch: Epoch = Epoch(0)
    base: Seq = Seq(0)
    next_volume: VolumeId = VolumeId(1)
    point: PointKind = PointKind.CRASH
    last_flush: Seq = Seq(0)
    flushes: int = 0
    gap: Gap | None = None
    logical_bytes: int = 0
    journal: JournalId = FINE_JOURNAL
    """The data journal that the next IO goes to."""
    journals: tuple[JournalSpec, ...] = (FINE,)
    owners: tuple[str, ...] = ()
    """Agents that fed the group, the one that feeds it now last; at most OWNERS_MAX."""
    volumes: dict[VolumeId, VolumeState] = field(default_factory=dict)
    overlay: Overlay = field(default_factory=Overlay)
    records: int = 0
    """Entries applied since the last checkpoint."""
    new_volumes: dict[VolumeId, VolumeState] = field(default_factory=dict)
    new_paths: set[str] = field(default_factory=set)
    """Every path a volume has had since, also those that came and went."""
    new_snapshots: dict[str, Snapshot | None] = field(default_factory=dict)
    """Names made (or forgotten: None) since the last checkpoint."""
    new_gaps: list[Gap] = field(default_factory=list)
    new_runs: list[RunStart] = field(default_factory=list)
    new_routes: list[Route] = field(default_factory=list)
    new_journals: list[JournalSpec] = field(default_factory=list)
    new_owners: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, checkpoint: Checkpoint, volumes: dict[VolumeId, VolumeState]) -> GroupState:
        """The state that a checkpoint stored."""
        return cls(
            held=checkpoint.held,
            time=checkpoint.time,
            run=checkpoint.run,
            epoch=checkpoint.epoch,
            base=checkpoint.base,
            next_volume=checkpoint.next_volume,
            point=checkpoint.point,
            last_flush=checkpoint.last_flush,
            flushes=checkpoint.flushes,
            gap=checkpoint.gap,
            logical_bytes=checkpoint.logical_bytes,
            journal=checkpoint.journal,
            journals=checkpoint.journals,
            owners=checkpoint.owners,
            volumes=volumes,
        )

    def checkpoint(self, position: JournalPosition) -> Checkpoint:
        """The value to store; `position` is where the journal goes on after the last entry applied."""
        return Checkpoint(
            held=self.held,
            time=self.time,
            run=self.run,
            epoch=self.epoch,
            base=self.base,
            next_volume=self.next_volume,
            point=self.point,
            last_flush=self.last_flush,
            flushes=self.flushes,
            gap=self.gap,
            position=position,
            logical_bytes=self.logical_bytes,
            journal=self.journal,
            journals=self.journals,
            owners=self.owners,
            present=_runs_of(self.volumes),
        )

    def checkpointed(self) -> None:
        """Forgets what a checkpoint has written."""
        self.overlay = Overlay()
        self.records = 0
        self.new_volumes = {}
        self.new_paths = set()
        self.new_snapshots = {}
        self.new_gaps = []
        self.new_runs = []
        self.new_routes = []
        self.new_journals = []
        self.new_owners = []

    @property
    def reconciling(self) -> bool:
        """Whether the store may differ from the source at `held`."""
        return self.gap is not None

    def apply(self, logged: Logged) -> None:
        """Takes one journal entry into the state. Damaged when it contradicts what came before."""
        if logged.kind is _WRITE and logged.run == self.run and self.held:
            self._apply_write(logged)
            return
        previous_time = self.time
        kind = logged.kind
        self.records += 1
        if kind in _CONSOLIDATED:
            self._apply_consolidated(logged)
            return
        if logged.run != self.run or not self.held:
            self.new_runs.append(RunStart(logged.run, logged.first_seq, logged.time, self.time))
            self.run = logged.run
        self.held, self.time = logged.seq, logged.time
        if kind is EntryKind.HEARTBEAT:
            return
        if logged.body is not None:
            self._apply_body(logged.body, previous_time)
        for extent in logged.extents:
            self.overlay.put(extent.volume, extent.offset // BLOCK_BYTES, extent.addresses)
            self.logical_bytes += extent.length
            self._reach(extent.volume, extent.offset + extent.length)
        if kind not in _KEEPS_POINT:
            self.point = PointKind.CRASH

    def _apply_write(self, logged: Logged) -> None:
        """What `apply` does for nearly all entries there are."""
        self.records += 1
        self.held, self.time, self.point = logged.seq, logged.time, PointKind.CRASH
        for extent in logged.extents:
            self.overlay.put(extent.volume, extent.offset // BLOCK_BYTES, extent.addresses)
            self.logical_bytes += extent.length
            self._reach(extent.volume, extent.offset + extent.length)

    def apply_run(self, run: WriteRun) -> None:
        """As `apply` of each of its entries; their clock run is the state's. Damaged."""
        self.records += len(run)
        self.held, self.time, self.point = run.seq, run.writes.times[-1], PointKind.CRASH
        self.logical_bytes += len(run) * BLOCK_BYTES
        for volume, blocks, addresses in run.pointers():
            self.overlay.put_each(volume, blocks, addresses)
            self._reach(volume, (max(blocks) + 1) * BLOCK_BYTES)

    def pass_over(self, entry: Scanned) -> None:
        """As `apply`, of an entry of `ONLY_BLOCKS`, without its blocks: there is no overlay then. Damaged."""
        self.records += 1
        if entry.run != self.run or not self.held:
            self.new_runs.append(RunStart(entry.run, entry.first_seq, entry.time, self.time))
            self.run = entry.run
        self.held, self.time, self.point = entry.seq, entry.time, PointKind.CRASH
        for number, offset, length in entry.extents():
            self.logical_bytes += length
            self._reach(number, offset + length)

    def _reach(self, number: VolumeId, end: int) -> None:
        volume = self.volume(number)
        if end > volume.size:
            self._change(replace(volume, size=end))

    def _apply_consolidated(self, logged: Logged) -> None:
        """What a stretch of history changed, all at once; its blocks may come in several entries."""
        body = logged.body
        if isinstance(body, Consolidated):
            self.held, self.time, self.run, self.epoch = body.seq, body.time, body.run, body.epoch
            self.base, self.next_volume, self.gap = body.base, body.next_volume, body.gap
            self.point, self.last_flush, self.flushes = body.point, body.last_flush, body.flushes
            self.logical_bytes, self.journal = body.logical_bytes, body.journal
            for volume, block in body.cuts:
                self.overlay.cut(volume, block)
            for state in body.volumes:
                self._change(state)
            self.new_paths.update(body.paths)
            self.new_snapshots.update((snapshot.name, snapshot) for snapshot in body.snapshots)
            self.new_snapshots.update(dict.fromkeys(body.forgotten))
            self.new_gaps += body.gaps
            self.new_runs += body.runs
            self.new_routes += body.routes
            for spec in body.journals:
                self._add_journal(spec)
            for agent in body.owners:
                self._own(agent)
        for extent in logged.extents:
            self.overlay.put(extent.volume, extent.offset // BLOCK_BYTES, extent.addresses)

    def consolidated(self) -> Consolidated:
        """All that was applied since the last checkpoint, blocks aside."""
        known = self.new_snapshots.items()
        return Consolidated(
            seq=self.held,
            time=self.time,
            run=self.run,
            epoch=self.epoch,
            base=self.base,
            next_volume=self.next_volume,
            point=self.point,
            last_flush=self.last_flush,
            flushes=self.flushes,
            gap=self.gap,
            logical_bytes=self.logical_bytes,
            journal=self.journal,
            cuts=tuple(sorted(self.overlay.cuts.items())),
            volumes=tuple(self.new_volumes[volume] for volume in sorted(self.new_volumes)),
            paths=tuple(sorted(self.new_paths)),
            snapshots=tuple(snapshot for _, snapshot in known if snapshot is not None),
            forgotten=tuple(name for name, snapshot in known if snapshot is None),
            gaps=tuple(self.new_gaps),
            runs=tuple(self.new_runs),
            journals=tuple(self.new_journals),
            routes=tuple(self.new_routes),
            owners=tuple(self.new_owners[-OWNERS_MAX:]),
        )

    def _own(self, agent: str) -> None:
        self.new_owners.append(agent)
        self.owners = (*(one for one in self.owners if one != agent), agent)[-OWNERS_MAX:]

    def _add_journal(self, spec: JournalSpec) -> None:
        self.new_journals.append(spec)
        if spec not in self.journals:
            self.journals = (*self.journals, spec)

    def journal_spec(self, journal: JournalId) -> JournalSpec | None:
        """The data journal of that number, None when the group has none such."""
        return next((spec for spec in self.journals if spec.journal == journal), None)

    def volume(self, volume: VolumeId) -> VolumeState:
        """The volume's state now; Damaged if it does not exist (a record must not name it)."""
        try:
            return self.volumes[volume]
        except KeyError:
            raise Damaged(
                f"journal: the entry of seq {self.held} names volume {volume}, which does not exist"
            ) from None

    def _change(self, volume: VolumeState) -> None:
        self.new_volumes[volume.volume] = volume
        self.new_paths.add(volume.path)
        if volume.retired:
            self.volumes.pop(volume.volume, None)  # in a consolidated stretch it may have come and gone
        else:
            self.volumes[volume.volume] = volume

    def _apply_body(self, body: Entry, previous_time: TimeNs) -> None:
        match body:
            case Resize(volume=volume, size=size):
                self._resize(volume, size)
            case Correct(refused=refused, size=size, extent=extent):
                self._resize(extent.volume, size)
                # Its moments are refused by seq; no stretch of time without records belongs to it.
                self._record_gap(
                    Gap(refused, Seq(body.seq - 1), body.time, body.time, "a write that the source refused")
                )
            case Create():
                self._change(VolumeState(body.volume, body.path, body.size, body.mode, body.uid, body.gid))
                self.next_volume = VolumeId(max(self.next_volume, body.volume + 1))
            case Rename(moves=moves, retired=retired):
                for gone in retired:
                    self._change(replace(self.volume(gone), retired=True))
                for moved, path in moves:
                    self._change(replace(self.volume(moved), path=path))
            case Retire(volume=volume):
                self._change(replace(self.volume(volume), retired=True))
            case Attributes(volume=volume):
                self._change(replace(self.volume(volume), mode=body.mode, uid=body.uid, gid=body.gid))
            case Bookmark(name=name):
                self._flushed(body.seq, PointKind.BOOKMARK)
                self.new_snapshots[name] = Snapshot(name, body.seq, body.time, "bookmark")
            case SnapshotCreate():
                self.new_snapshots[body.name] = Snapshot(
                    body.name, body.at, body.at_time, "snapshot", body.volume, body.keep_until
                )
            case SnapshotDelete(name=name):
                self.new_snapshots[name] = None
            case JournalCreate(spec=spec):
                self._add_journal(spec)
            case JournalUse(journal=journal):
                self.journal = journal
                self.new_routes.append(Route(body.seq, journal))
            case BaseAdvance(base=base, base_time=base_time):
                self.base = base
                self.new_snapshots[BASE_NAME] = Snapshot(BASE_NAME, base, base_time, "base")
            case Owner(agent=agent):
                self._own(agent)
            case EpochStart():
                self.epoch = body.epoch
                if not body.clean:
                    self._open_gap(body.seq, previous_time, "an agent ended without a clean shutdown")
            case ReconcileBegin():
                self._open_gap(body.seq, previous_time, body.reason)
            case Flush():
                self._flushed(body.seq, PointKind.FLUSH)
            case ReconcileEnd():
                self._reconciled(body.seq, body.time)
            case _:
                raise Damaged(f"journal: the entry of seq {self.held} has a body of the wrong kind")

    def _flushed(self, seq: Seq, kind: PointKind) -> None:
        self.point = kind
        self.last_flush = seq
        self.flushes += 1

    def _resize(self, number: VolumeId, size: int) -> None:
        volume = self.volume(number)
        if size < volume.size:
            self.overlay.cut(number, -(-size // BLOCK_BYTES))
        if size != volume.size:
            self._change(replace(volume, size=size))

    def _open_gap(self, first: Seq, since: TimeNs, reason: str) -> None:
        if self.gap is None:
            self.gap = Gap(first, None, since, None, reason)

    def _record_gap(self, gap: Gap) -> None:
        if not self.base:
            return
        if self.gap is None:
            self.new_gaps.append(gap)
        elif gap.first < self.gap.first:
            # What follows lies in the gap that is open; what was refused before it opened does not.
            self.new_gaps.append(replace(gap, last=Seq(self.gap.first - 1)))

    def _reconciled(self, seq: Seq, time: TimeNs) -> None:
        gap, self.gap = self.gap, None
        if not self.base:
            # Before the base there is no recovery point at all, so what lies there is no gap between two.
            self.base = seq
            self.new_snapshots[BASE_NAME] = Snapshot(BASE_NAME, seq, time, "base")
        elif gap is not None:
            self.new_gaps.append(replace(gap, last=Seq(seq - 1), to_time=time))


def owner_entry(last: Logged, agent: str) -> Logged:
    """The entry behind `last` that says who feeds the group from there on."""
    body = Owner(last.seq, last.time, last.run, agent)
    return Logged(EntryKind.OWNER, last.seq, last.seq, last.time, last.run, BASE_JOURNAL, (), body)


ONLY_BLOCKS = frozenset({EntryKind.WRITE, EntryKind.AGGREGATE, EntryKind.RECONCILE})
"""Entries that change the bytes of volumes, and their sizes, and nothing else."""
_WRITE = EntryKind.WRITE
_CONSOLIDATED = frozenset({EntryKind.CONSOLIDATED, EntryKind.CONSOLIDATED_MORE})
_KEEPS_POINT = frozenset({EntryKind.FLUSH, EntryKind.BOOKMARK}) | {kind for kind in EntryKind if not kind.consumes_seq}


def _runs_of(volumes: Iterable[VolumeId]) -> tuple[tuple[VolumeId, VolumeId], ...] | None:
    """(first, last) of each run of consecutive numbers; None for more than PRESENT_RUNS_MAX."""
    runs: list[tuple[VolumeId, VolumeId]] = []
    for volume in sorted(volumes):
        if runs and runs[-1][1] == volume - 1:
            runs[-1] = runs[-1][0], volume
        else:
            runs.append((volume, volume))
    return tuple(runs) if len(runs) <= PRESENT_RUNS_MAX else None
