"""A group as its records make it: what the store must hold after each, by the plainest means.

Invariants: `apply` takes records in seq order; gaps are those that the records say (FORMAT.md), told by `is_point`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

from dedup.types import (
    Aggregate,
    Attributes,
    ClockRun,
    Correct,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Reconcile,
    ReconcileBegin,
    ReconcileEnd,
    Record,
    Rename,
    Resize,
    Retire,
    Seq,
    TimeNs,
    VolumeId,
    VolumeState,
    Write,
)


def put(content: bytearray, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Writes as pwrite does."""
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def cut(content: bytearray, size: int) -> None:
    """Resizes as ftruncate does."""
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


@dataclass(slots=True)
class ImageVolume:
    id: VolumeId
    path: str
    content: bytearray
    mode: int
    uid: int
    gid: int

    def state(self) -> VolumeState:
        return VolumeState(self.id, self.path, len(self.content), self.mode, self.uid, self.gid)


@dataclass(slots=True)
class Image:
    """Mutable; `dirty` are the volumes that changed since the caller cleared it."""

    held: Seq = Seq(0)
    time: TimeNs = TimeNs(0)
    run: ClockRun = ClockRun(0)
    epoch: Epoch = Epoch(0)
    base: Seq = Seq(0)
    reconciling: bool = False
    next_volume: VolumeId = VolumeId(1)
    volumes: dict[VolumeId, ImageVolume] = field(default_factory=dict)
    dirty: set[VolumeId] = field(default_factory=set)

    @property
    def is_point(self) -> bool:
        """Whether `held` is a recovery point, corrections of refused writes apart: those come later."""
        return bool(self.base) and not self.reconciling

    def copy(self) -> Image:
        return deepcopy(self)

    def knows(self, records: list[Record]) -> bool:
        """Whether every volume that they name exists by then."""
        known = set(self.volumes)
        for record in records:
            if isinstance(record, Create):
                known.add(record.volume)
            if not set(_named(record)) <= known:
                return False
            if isinstance(record, Retire):
                known.discard(record.volume)
            if isinstance(record, Rename):
                known -= set(record.retired)
        return True

    def apply(self, record: Record) -> None:
        self.held, self.time, self.run = record.seq, record.time, record.run
        match record:
            case Write(extent=extent) | Reconcile(extent=extent):
                self._put(extent)
            case Aggregate(extents=extents):
                for extent in extents:
                    self._put(extent)
            case Correct(extent=extent, size=size):
                self._cut(extent.volume, size)
                self._put(extent)
            case Resize(volume=volume, size=size):
                self._cut(volume, size)
            case Create(volume=volume):
                self.volumes[volume] = ImageVolume(
                    volume, record.path, bytearray(record.size), record.mode, record.uid, record.gid
                )
                self.next_volume = VolumeId(max(self.next_volume, volume + 1))
                self.dirty.add(volume)
            case Rename(moves=moves, retired=retired):
                for gone in retired:
                    del self.volumes[gone]
                for volume, path in moves:
                    self.volumes[volume].path = path
                    self.dirty.add(volume)
            case Retire(volume=volume):
                del self.volumes[volume]
            case Attributes(volume=volume):
                found = self.volumes[volume]
                found.mode, found.uid, found.gid = record.mode, record.uid, record.gid
            case EpochStart(epoch=epoch, clean=clean):
                self.epoch = epoch
                self.reconciling = self.reconciling or not clean
            case ReconcileBegin():
                self.reconciling = True
            case ReconcileEnd():
                self.reconciling = False
                self.base = self.base or record.seq
            case _:
                pass

    def _put(self, extent: Extent) -> None:
        if not extent.length:
            return
        data = bytes(extent.zeros) if extent.zeros else extent.data
        put(self.volumes[extent.volume].content, extent.offset, data)
        self.dirty.add(extent.volume)

    def _cut(self, volume: VolumeId, size: int) -> None:
        cut(self.volumes[volume].content, size)
        self.dirty.add(volume)


def _named(record: Record) -> list[VolumeId]:
    match record:
        case Write(extent=extent) | Reconcile(extent=extent) | Correct(extent=extent):
            return [extent.volume]
        case Aggregate(extents=extents):
            return [extent.volume for extent in extents]
        case Resize(volume=volume) | Retire(volume=volume) | Attributes(volume=volume):
            return [volume]
        case Rename(moves=moves, retired=retired):
            return [*retired, *(volume for volume, _ in moves)]
    return []
