"""A store in memory with the interface of dedup.store. Its syncs and ingests can be held; it can fill up, or fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dedup.errors import NameRefused, OutOfOrder, StoreError, StoreFailed, StoreFull, UnknownName
from dedup.storage import Storage
from dedup.types import (
    BLOCK_BYTES,
    Aggregate,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Reconcile,
    Record,
    Seq,
    Snapshot,
    TimeNs,
    VolumeId,
    VolumeState,
    Write,
)


@dataclass(frozen=True)
class FakeUsage:
    bytes: int
    snapshots: int


@dataclass(frozen=True)
class FakeRange:
    content: bytearray
    is_hole: bool = False

    def read(self) -> tuple[bytearray, frozenset[int]]:
        return self.content, frozenset()


@dataclass
class FakeGroup:
    store: FakeStore
    name: str
    held: Seq = Seq(0)
    durable: Seq = Seq(0)
    epoch: Epoch = Epoch(0)
    time: TimeNs = TimeNs(0)
    run: ClockRun = ClockRun(0)
    has_base: bool = False
    reconciling: bool = False
    next_volume: VolumeId = VolumeId(1)
    records: list[Record] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    content: dict[VolumeId, bytearray] = field(default_factory=dict)
    listed: list[VolumeState] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    owners: tuple[str, ...] = ()

    def set_owner(self, agent: str) -> None:
        self.owners = (*(one for one in self.owners if one != agent), agent)

    def volumes(self) -> list[VolumeState]:
        return list(self.listed)

    def ingest(self, records: Sequence[Record]) -> None:
        self.store.ingest_begun.set()
        self.store.ingest_gate.wait()
        if self.store.full:
            raise StoreFull("the disk under the store is full")
        if self.store.broken:
            raise StoreFailed("a write of the store failed")
        first = records[0].first_seq if isinstance(records[0], Aggregate) else records[0].seq
        if first != self.held + 1:
            raise OutOfOrder(f"record {first} does not follow {self.held}")
        known = {record.volume for record in records if isinstance(record, Create)} | self.content.keys()
        for record in records:
            extents = record.extents if isinstance(record, Aggregate) else ()
            if isinstance(record, (Write, Reconcile)):
                extents = (record.extent,)
            if any(extent.volume not in known for extent in extents):
                raise UnknownName("no such volume")
        for record in records:
            self._apply(record)
        self.batches.append(len(records))

    def _apply(self, record: Record) -> None:
        if isinstance(record, EpochStart):
            self.epoch = record.epoch
        elif isinstance(record, Create):
            self.content[record.volume] = bytearray(record.size)
            self.listed.append(VolumeState(record.volume, record.path, record.size, 0o644, 0, 0))
            self.next_volume = VolumeId(record.volume + 1)
        elif isinstance(record, (Write, Reconcile)):
            extent = record.extent
            self.content[extent.volume][extent.offset : extent.offset + extent.length] = extent.data
        self.records.append(record)
        self.held, self.time, self.run = record.seq, record.time, record.run

    def held_range(self, volume: VolumeId, offset: int, blocks: int) -> FakeRange:
        if volume not in self.content:
            raise UnknownName(f"no volume {volume}")
        return FakeRange(
            self.content[volume][offset : offset + blocks * BLOCK_BYTES].ljust(blocks * BLOCK_BYTES, b"\0")
        )

    def create_snapshot(
        self, name: str | None, at: str = "latest", volume: str | None = None, keep_ns: int = 0
    ) -> Snapshot:
        name = name or "default"
        if name in self.names:
            raise NameRefused(f"the name {name!r}\nexists")
        self.names.add(name)
        return Snapshot(name, self.held, self.time, "snapshot")

    def delete_snapshot(self, name: str) -> None:
        if name not in self.names:
            raise UnknownName(f"no snapshot {name!r}")
        self.names.remove(name)

    def name_exists(self, name: str) -> bool:
        return name in self.names


class FakeOwnBlocks:
    """No block is held."""

    def candidates(self, group: FakeGroup, fingerprints: Sequence[bytes]) -> NDArray[np.uint64]:
        return np.zeros(len(fingerprints), dtype=np.uint64)


class FakeStore:
    own_blocks = FakeOwnBlocks()
    pool = None
    uuid = "5eed"
    path = Path("a store that is in memory only")
    storage = Storage()

    def __init__(self) -> None:
        self.full = self.broken = self.sync_fails = self.merge_fails = False
        self.syncs = self.checkpoints = self.merges = 0
        self.to_merge = 0
        self.merge_error: Exception | None = None
        self.due = False
        self.sync_begun = threading.Semaphore(0)
        self.sync_gate = _open_gate()
        self.ingest_begun = threading.Event()
        self.ingest_gate = _open_gate()
        self._groups: dict[str, FakeGroup] = {}

    @property
    def groups(self) -> Sequence[FakeGroup]:
        return list(self._groups.values())

    def group(self, name: str) -> FakeGroup:
        if name.startswith("-"):
            raise StoreError(f"{name!r} cannot name a group")
        return self._groups.setdefault(name, FakeGroup(self, name))

    def sync(self) -> None:
        held = [(group, group.held) for group in self.groups]
        self.sync_begun.release()
        self.sync_gate.wait()
        if self.sync_fails:
            raise StoreFailed("fdatasync of the journal failed: Input/output error")
        self.syncs += 1
        for group, seq in held:
            group.durable = seq

    def sync_files(self) -> None:
        """It has no files."""
        self.sync()

    def let_pass(self) -> None:
        """Nothing lies in memory."""

    def checkpoint_due(self) -> bool:
        return self.due

    def checkpoint(self) -> None:
        if self.full:
            raise StoreFull("the disk under the store is full")
        self.due = False
        self.checkpoints += 1
        for group in self.groups:
            group.durable = group.held

    def merge(self) -> bool:
        if self.merge_fails:
            raise StoreFailed("fdatasync of a run of fingerprints failed: Input/output error")
        if self.merge_error is not None:
            raise self.merge_error
        if not self.to_merge:
            return False
        self.to_merge -= 1
        self.merges += 1
        return True

    def usage(self) -> FakeUsage:
        return FakeUsage(bytes=1, snapshots=sum(len(group.names) for group in self.groups))


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
