"""The model that stores are held against: a volume is bytes, a history is a list of such states."""

from __future__ import annotations

from dataclasses import dataclass, field

from dedup.types import (
    Aggregate,
    ClockRun,
    Correct,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    Reconcile,
    ReconcileEnd,
    Record,
    Rename,
    Resize,
    Retire,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)

RUN = ClockRun(0)
START_NS = 1_700_000_000_000_000_000
STEP_NS = 1_000_000


@dataclass
class Model:
    """Builds records in order and keeps what each volume holds after each of them."""

    seq: int = 0
    elapsed_ns: int = 0
    """Time that passed besides a step per record."""
    next_volume: int = 1
    content: dict[VolumeId, bytes] = field(default_factory=dict)
    paths: dict[VolumeId, str] = field(default_factory=dict)
    history: dict[int, tuple[dict[VolumeId, bytes], dict[VolumeId, str]]] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)

    def _next(self, count: int = 1) -> tuple[Seq, TimeNs, ClockRun]:
        self.seq += count
        return Seq(self.seq), TimeNs(START_NS + self.elapsed_ns + self.seq * STEP_NS), RUN

    def _keep(self) -> None:
        self.history[self.seq] = (dict(self.content), dict(self.paths))
        self.times[self.seq] = START_NS + self.elapsed_ns + self.seq * STEP_NS

    def begin(self) -> list[Record]:
        """The first records of a group: an agent's start, and an (empty) base snapshot."""
        start = EpochStart(*self._next(), Epoch(1), clean=False)
        self._keep()
        end = ReconcileEnd(*self._next())
        self._keep()
        return [start, end]

    def create(self, path: str, size: int = 0) -> Create:
        volume = VolumeId(self.next_volume)
        self.next_volume += 1
        record = Create(*self._next(), volume, path, size, 0o644, 0, 0)
        self.content[volume] = bytes(size)
        self.paths[volume] = path
        self._keep()
        return record

    def _put(self, volume: VolumeId, offset: int, data: bytes) -> None:
        old = self.content[volume].ljust(offset, b"\0")
        self.content[volume] = old[:offset] + data + old[offset + len(data) :]

    def write(self, volume: VolumeId, offset: int, data: bytes) -> Write:
        record = Write(*self._next(), Extent(volume, offset, data))
        self._put(volume, offset, data)
        self._keep()
        return record

    def reconcile(self, volume: VolumeId, offset: int, data: bytes) -> Reconcile:
        record = Reconcile(*self._next(), Extent(volume, offset, data))
        self._put(volume, offset, data)
        self._keep()
        return record

    def aggregate(self, volume: VolumeId, writes: list[tuple[int, bytes]]) -> Aggregate:
        """The writes must not overlap."""
        first = Seq(self.seq + 1)
        seq, time, run = self._next(len(writes))
        for offset, data in writes:
            self._put(volume, offset, data)
        self._keep()
        return Aggregate(first, seq, time, run, tuple(Extent(volume, offset, data) for offset, data in writes))

    def resize(self, volume: VolumeId, size: int) -> Resize:
        record = Resize(*self._next(), volume, size)
        self.content[volume] = self.content[volume][:size].ljust(size, b"\0")
        self._keep()
        return record

    def correct(self, volume: VolumeId, refused: int, size: int, offset: int, data: bytes) -> Correct:
        seq, time, run = self._next()
        self.content[volume] = self.content[volume][:size].ljust(size, b"\0")
        if data:
            self._put(volume, offset, data)
        self._keep()
        return Correct(seq, time, run, Seq(refused), size, Extent(volume, offset, data))

    def flush(self, volume: VolumeId) -> Flush:
        record = Flush(*self._next(), volume)
        self._keep()
        return record

    def heartbeat(self) -> Heartbeat:
        record = Heartbeat(*self._next())
        self._keep()
        return record

    def rename(self, volume: VolumeId, path: str) -> Rename:
        retired = tuple(other for other, taken in self.paths.items() if taken == path and other != volume)
        record = Rename(*self._next(), ((volume, path),), retired)
        for other in retired:
            del self.paths[other], self.content[other]
        self.paths[volume] = path
        self._keep()
        return record

    def retire(self, volume: VolumeId) -> Retire:
        record = Retire(*self._next(), volume)
        del self.paths[volume], self.content[volume]
        self._keep()
        return record
