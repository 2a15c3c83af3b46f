"""The words of the store as types: ids, records, states.

Every value here is immutable. Units are in the names: `*_bytes`, `*_ns`; `offset` and `size` are bytes of a volume,
`block` counts 4096-byte blocks of a volume, `slot` counts blocks of a container.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

import msgspec

from dedup.ids import (
    AGGREGATE_BYTES_MAX,
    BASE_JOURNAL,
    BLOCK_BYTES,
    FINE_JOURNAL,
    HOLE,
    LOST,
    LOST_CONTAINER,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    VOLUME_BYTES_MAX,
    WRITE_BYTES_MAX,
    Address,
    ClockRun,
    ContainerId,
    Epoch,
    JournalId,
    Seq,
    TimeNs,
    VolumeId,
)

__all__ = [
    "AGGREGATE_BYTES_MAX",
    "BASE_JOURNAL",
    "BLOCK_BYTES",
    "FINE_JOURNAL",
    "HOLE",
    "LOST",
    "LOST_CONTAINER",
    "NAME_BYTES_MAX",
    "PATH_BYTES_MAX",
    "VOLUME_BYTES_MAX",
    "WRITE_BYTES_MAX",
    "Address",
    "Aggregate",
    "Attributes",
    "BaseAdvance",
    "Bookmark",
    "ClockRun",
    "Consolidated",
    "ConsolidatedMore",
    "ContainerForm",
    "ContainerId",
    "Correct",
    "Create",
    "Entry",
    "Epoch",
    "EpochStart",
    "Extent",
    "Flush",
    "Gap",
    "Heartbeat",
    "JournalCreate",
    "JournalId",
    "JournalSpec",
    "JournalUse",
    "Moment",
    "Owner",
    "PointKind",
    "Reconcile",
    "ReconcileBegin",
    "ReconcileEnd",
    "Record",
    "Rename",
    "Resize",
    "Retire",
    "Route",
    "RunStart",
    "Seq",
    "Snapshot",
    "SnapshotCreate",
    "SnapshotDelete",
    "TimeNs",
    "VolumeId",
    "VolumeState",
    "Write",
]


class Extent(msgspec.Struct, frozen=True, gc=False):
    """Exact bytes at an exact place of one volume. `data` of length 0 with `zeros` set stands for that many zeros.

    This and `Write` are as frozen as the others, but made in a tenth of the time: there are thousands of them a second
    (measured: as dataclasses they were 1.5 µs of a write's 7).
    """

    volume: VolumeId
    offset: int
    data: bytes | bytearray | memoryview
    zeros: int = 0

    @property
    def length(self) -> int:
        return self.zeros or len(self.data)


class Write(msgspec.Struct, frozen=True, gc=False):
    """One intercepted write; extends the volume when it ends past its size."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    extent: Extent


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Writes first_seq..seq as one: coalesced, applied entirely or not at all. No recovery point lies inside."""

    first_seq: Seq
    seq: Seq
    time: TimeNs
    run: ClockRun
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Reconcile:
    """What the source holds in a range, read under the range lock at this seq. Goes to `base` containers."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    extent: Extent


@dataclass(frozen=True, slots=True)
class Correct:
    """The truth after the source refused or shortened record `refused`: the volume's size and the range's content.

    Moments `refused`..`seq - 1` are a gap.
    """

    seq: Seq
    time: TimeNs
    run: ClockRun
    refused: Seq
    size: int
    extent: Extent


@dataclass(frozen=True, slots=True)
class Resize:
    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId
    size: int


@dataclass(frozen=True, slots=True)
class Create:
    """A volume begins to exist at `path` (relative to the source directory) with `size` bytes, all zeros so far."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId
    path: str
    size: int
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Rename:
    """One namespace change: every volume whose path changes, and every volume that it replaces, at once."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    moves: tuple[tuple[VolumeId, str], ...]
    retired: tuple[VolumeId, ...] = ()


@dataclass(frozen=True, slots=True)
class Retire:
    """The volume was unlinked. Its past stays."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId


@dataclass(frozen=True, slots=True)
class Attributes:
    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Flush:
    """An fsync of `volume` returned: everything written to it before is on the source's disk."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId


@dataclass(frozen=True, slots=True)
class Bookmark:
    """A recovery point that a person named, after a flush of the whole group."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    name: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing changed between the record before and `time`."""

    seq: Seq
    time: TimeNs
    run: ClockRun


@dataclass(frozen=True, slots=True)
class EpochStart:
    """An agent started. Unless `clean`, what the store holds may differ from the source until `ReconcileEnd`: a gap."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    epoch: Epoch
    clean: bool


@dataclass(frozen=True, slots=True)
class ReconcileBegin:
    """From here until `ReconcileEnd` the store may differ from the source: a gap, for `reason`."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    reason: str


@dataclass(frozen=True, slots=True)
class ReconcileEnd:
    """The store equals the source again. The first one of a group is the base snapshot."""

    seq: Seq
    time: TimeNs
    run: ClockRun


Record = (
    Write
    | Aggregate
    | Reconcile
    | Correct
    | Resize
    | Create
    | Rename
    | Retire
    | Attributes
    | Flush
    | Bookmark
    | Heartbeat
    | EpochStart
    | ReconcileBegin
    | ReconcileEnd
)
"""What an agent sends, in order; each consumes one seq (an Aggregate as many as it combines)."""


@dataclass(frozen=True, slots=True)
class SnapshotCreate:
    """Store-made entry: recovery point `at` is kept under `name`. Carries the seq it follows; consumes none."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    name: str
    at: Seq
    at_time: TimeNs
    volume: VolumeId | None = None
    keep_until: TimeNs | None = None


@dataclass(frozen=True, slots=True)
class SnapshotDelete:
    """Store-made entry: the name is forgotten. Carries the seq it follows; consumes none."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    name: str


@dataclass(frozen=True, slots=True)
class JournalSpec:
    """A data journal of a group: how fine its recovery points are. `granularity_ns` 0 is every write."""

    journal: JournalId
    name: str
    granularity_ns: int


@dataclass(frozen=True, slots=True)
class JournalCreate:
    """Store-made entry: the group has a further data journal. Carries the seq it follows; consumes none."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    spec: JournalSpec


@dataclass(frozen=True, slots=True)
class JournalUse:
    """Store-made entry: what follows `seq` is routed to that data journal. Consumes no seq."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    journal: JournalId


@dataclass(frozen=True, slots=True)
class BaseAdvance:
    """Store-made entry: recovery point `base` is the base snapshot now; what was before it cannot be restored."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    base: Seq
    base_time: TimeNs


@dataclass(frozen=True, slots=True)
class Owner:
    """Store-made entry: what follows `seq` comes from that agent, and from no other one. Consumes no seq."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    agent: str


class PointKind(Enum):
    """What a recovery point is worth to a person."""

    CRASH = "crash"
    FLUSH = "flush"
    BOOKMARK = "bookmark"


class ContainerForm(IntEnum):
    RAW = 1
    SEALED = 2


@dataclass(frozen=True, slots=True)
class VolumeState:
    """A volume at one moment. `path` is relative to the source directory; `retired` volumes keep their last path."""

    volume: VolumeId
    path: str
    size: int
    mode: int
    uid: int
    gid: int
    retired: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """A recovery point of one group."""

    group: str
    seq: Seq
    time: TimeNs
    kind: PointKind


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A catalogued recovery point. `volume` limits it to one volume; None is the whole group."""

    name: str
    seq: Seq
    time: TimeNs
    kind: str
    """`base`, `bookmark` or `snapshot`."""
    volume: VolumeId | None = None
    keep_until: TimeNs | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """From the record after `after` on, IOs went to data journal `journal`."""

    after: Seq
    journal: JournalId


@dataclass(frozen=True, slots=True)
class RunStart:
    """A clock run: its first record's seq and time, and the time of the record before it."""

    run: ClockRun
    first: Seq
    time: TimeNs
    previous_time: TimeNs


@dataclass(frozen=True, slots=True)
class Gap:
    """Moments first..last are refused, and times between from_time and to_time. Open while `last` is None."""

    first: Seq
    last: Seq | None
    from_time: TimeNs
    to_time: TimeNs | None
    reason: str


@dataclass(frozen=True, slots=True)
class Consolidated:
    """Store-made entry in the place of records first_seq..seq: what they changed of the group, blocks aside.

    Blocks are the entry's extents, and those of the CONSOLIDATED_MORE entries behind it. `cuts` hide, from that block
    of the volume on, whatever is older than this entry. The other fields are those of `group_state.GroupState`.
    """

    seq: Seq
    time: TimeNs
    run: ClockRun
    epoch: Epoch
    base: Seq
    next_volume: VolumeId
    point: PointKind
    last_flush: Seq
    flushes: int
    gap: Gap | None
    logical_bytes: int
    journal: JournalId
    cuts: tuple[tuple[VolumeId, int], ...] = ()
    volumes: tuple[VolumeState, ...] = ()
    paths: tuple[str, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    forgotten: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    runs: tuple[RunStart, ...] = ()
    journals: tuple[JournalSpec, ...] = ()
    routes: tuple[Route, ...] = ()
    owners: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConsolidatedMore:
    """Store-made entry: further blocks of the Consolidated before it, whose seq it repeats."""

    seq: Seq
    time: TimeNs
    run: ClockRun


Entry = (
    Record
    | SnapshotCreate
    | SnapshotDelete
    | Consolidated
    | ConsolidatedMore
    | JournalCreate
    | JournalUse
    | BaseAdvance
    | Owner
)
"""What the metadata journal holds."""
