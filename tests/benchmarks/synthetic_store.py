"""Stores of any size, made in minutes: what the scale benchmark measures.

Everything goes through the store's own writer, so a store is what years of use would leave. Of each ten records: one
write of a block that the store does not have, anywhere in the volume; two of blocks that it has, within the volume's
first GiB; one flush; six heartbeats. Times are a second apart. Snapshots lie evenly over the records. The volumes
that came and went are empty. Nothing is sealed or consolidated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup.group_writer import GroupWriter
from dedup.metadata_journal import EntryKind, Logged
from dedup.store import Store
from dedup.types import (
    BASE_JOURNAL,
    BLOCK_BYTES,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    Reconcile,
    ReconcileBegin,
    ReconcileEnd,
    Record,
    Retire,
    Seq,
    SnapshotCreate,
    TimeNs,
    VolumeId,
    Write,
)

GROUP: Final = "group"
PATH: Final = "data"
VOLUME: Final = VolumeId(1)
FIRST_TIME: Final = TimeNs(1_700_000_000 * 10**9)
SECOND: Final = 10**9
RUN: Final = ClockRun(0)
_HOT_BYTES: Final = 1 << 30
_KNOWN_BLOCKS: Final = 256
_PATTERN: Final = "nhkhhfhkhh"
"""New block, known block, heartbeat, flush."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What there is a lot of, or little. Records are those after the base; each volume gone is two more."""

    volume_bytes: int
    records: int
    snapshots: int
    volumes_gone: int
    gaps: int


class RecordMaker:
    """What makes the records of a store: each a second after the one before it, ingested with checkpoints as due."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._group: GroupWriter = store.group(GROUP)
        self._random = random.Random(1)

    def _take(self, records: list[Record]) -> None:
        self._group.ingest(records)
        if self._store.checkpoint_due():
            self._store.checkpoint()

    def _stamp(self, ahead: int) -> tuple[Seq, TimeNs, ClockRun]:
        seq = self._group.held + ahead
        return Seq(seq), TimeNs(FIRST_TIME + seq * SECOND), RUN


class _Maker(RecordMaker):
    def __init__(self, store: Store, shape: Shape) -> None:
        super().__init__(store)
        self._shape = shape
        self._known = [self._random.randbytes(BLOCK_BYTES) for _ in range(_KNOWN_BLOCKS)]
        self._blocks = shape.volume_bytes // BLOCK_BYTES
        self._hot = min(self._blocks, _HOT_BYTES // BLOCK_BYTES)

    def make(self) -> None:
        self._take(list(self._beginning()))
        self._volumes_gone()
        shape = self._shape
        done = 0
        for number in range(1, shape.snapshots + 1):
            upto = shape.records * number // shape.snapshots
            while done < upto:
                count = min(1000, upto - done)
                self._take(self._records(done, count))
                for _ in range(done * shape.gaps // shape.records, (done + count) * shape.gaps // shape.records):
                    self._take(self._gap())
                done += count
            self._store.checkpoint()
            self._snapshot(number)

    def _beginning(self) -> Iterator[Record]:
        yield EpochStart(*self._stamp(1), Epoch(1), clean=False)
        yield Create(*self._stamp(2), VOLUME, PATH, self._shape.volume_bytes, 0o644, 0, 0)
        for index, block in enumerate(self._known):
            yield Reconcile(*self._stamp(3 + index), Extent(VOLUME, index * BLOCK_BYTES, block))
        yield ReconcileEnd(*self._stamp(3 + len(self._known)))

    def _volumes_gone(self) -> None:
        for volume in range(2, 2 + self._shape.volumes_gone):
            number = VolumeId(volume)
            self._take(
                [
                    Create(*self._stamp(1), number, f"gone/{volume}", 0, 0o644, 0, 0),
                    Retire(*self._stamp(2), number),
                ]
            )

    def _records(self, done: int, count: int) -> list[Record]:
        fresh = memoryview(self._random.randbytes(BLOCK_BYTES * (count // len(_PATTERN) + 1)))
        records: list[Record] = []
        at = 0
        for ahead in range(1, count + 1):
            stamp = self._stamp(ahead)
            match _PATTERN[(done + ahead) % len(_PATTERN)]:
                case "n":
                    place = self._random.randrange(self._blocks) * BLOCK_BYTES
                    records.append(Write(*stamp, Extent(VOLUME, place, fresh[at : at + BLOCK_BYTES])))
                    at += BLOCK_BYTES
                case "k":
                    place = self._random.randrange(self._hot) * BLOCK_BYTES
                    records.append(Write(*stamp, Extent(VOLUME, place, self._random.choice(self._known))))
                case "f":
                    records.append(Flush(*stamp, VOLUME))
                case _:
                    records.append(Heartbeat(*stamp))
        return records

    def _gap(self) -> list[Record]:
        return [ReconcileBegin(*self._stamp(1), "the link was down"), ReconcileEnd(*self._stamp(2))]

    def _snapshot(self, number: int) -> None:
        group = self._group
        seq, time, run = group.held, group.time, group.run
        body = SnapshotCreate(seq, time, run, f"snapshot-{number}", seq, time)
        group.append([Logged(EntryKind.SNAPSHOT_CREATE, seq, seq, time, run, BASE_JOURNAL, (), body)])


def make_store(path: Path, shape: Shape) -> None:
    """Makes the store at `path`, which must not exist, and closes it as a writer does that is told to end."""
    Store.create(path)
    store = Store.open(path)
    _Maker(store, shape).make()
    store.close()


def leave_tail(path: Path, records: int) -> None:
    """Appends to a made store as a writer does that is killed before its next checkpoint; the caller then exits."""
    store = Store.open(path)
    group: GroupWriter = store.group(GROUP)
    entries: list[Record] = []
    for ahead in range(1, records + 1):
        seq = Seq(group.held + ahead)
        stamp = seq, TimeNs(FIRST_TIME + seq * SECOND), RUN
        place = (seq * 7919 % 65536) * BLOCK_BYTES
        entries.append(Write(*stamp, Extent(VOLUME, place, seq.to_bytes(8, "big") * (BLOCK_BYTES // 8))))
    group.ingest(entries)
