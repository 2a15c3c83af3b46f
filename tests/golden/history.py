"""The history of one group as a script writes it: the records, and what must be found of each moment afterwards.

It knows nothing of the store but the record types, so that a golden store's expectation does not come from its own
code.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import xxhash

from dedup.moment import rfc3339
from dedup.types import (
    Aggregate,
    Attributes,
    Bookmark,
    ClockRun,
    Correct,
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
    Rename,
    Resize,
    Retire,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from tests.golden.expected import Asked, ExpectedGap, ExpectedGroup, ExpectedMoment, Name, Volume

START_NS = 1_700_000_000_000_000_000
STEP_NS = 1_000_000


def block(number: int) -> bytes:
    """4096 bytes that only this number gives, and that compress well."""
    return random.Random(number).randbytes(16) * 256


def noise(number: int, blocks: int = 1) -> bytes:
    """Bytes that do not compress."""
    return random.Random(number).randbytes(4096 * blocks)


@dataclass(frozen=True)
class _Held:
    path: str
    content: bytes
    mode: int
    uid: int
    gid: int


@dataclass
class History:
    """Each method makes one record: `take` gives those made since it was last called."""

    seq: int = 0
    clock: int = START_NS
    time: int = START_NS
    """Of the last record."""
    run: int = 0
    epoch: int = 0
    kind: str = "crash"
    based: bool = False
    reason: str | None = None
    """Why a gap is open."""
    gap_first: int = 0
    gap_since: int = 0
    next_volume: int = 1
    held: dict[VolumeId, _Held] = field(default_factory=dict)
    moments: dict[int, tuple[int, str, dict[VolumeId, _Held]]] = field(default_factory=dict)
    gaps: list[ExpectedGap] = field(default_factory=list)
    names: dict[str, Name] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    pending: list[Record] = field(default_factory=list)

    def take(self) -> list[Record]:
        taken, self.pending = self.pending, []
        return taken

    # -- the clock ---------------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        self.clock += int(seconds * 1e9)

    def clock_steps_back(self, seconds: float) -> None:
        self.clock -= int(seconds * 1e9)
        self.run += 1

    def _next(self, count: int = 1) -> tuple[Seq, TimeNs, ClockRun]:
        self.seq += count
        self.clock += STEP_NS
        self.time = self.clock
        return Seq(self.seq), TimeNs(self.time), ClockRun(self.run)

    def _record(self, record: Record, kind: str = "crash") -> int:
        self.pending.append(record)
        self.kind = kind
        if self.based and self.reason is None:
            self.moments[self.seq] = (self.time, kind, dict(self.held))
        return self.seq

    # -- the agent ---------------------------------------------------------------------------------------------------

    def agent_starts(self, *, clean: bool = False) -> int:
        self.epoch += 1
        since = self.time
        record = EpochStart(*self._next(), Epoch(self.epoch), clean)
        if not clean:
            self._open_gap(since, "an agent ended without a clean shutdown")
        return self._record(record)

    def reconcile_begins(self, reason: str) -> int:
        since = self.time
        record = ReconcileBegin(*self._next(), reason)
        self._open_gap(since, reason)
        return self._record(record)

    def _open_gap(self, since: int, reason: str) -> None:
        if self.reason is None:
            self.gap_first, self.gap_since, self.reason = self.seq, since, reason

    def reconcile_ends(self) -> int:
        record = ReconcileEnd(*self._next())
        if not self.based:
            self.based = True
            self.names["base"] = Name("base", "base", self.seq)
        elif self.reason is not None:
            self.gaps.append(ExpectedGap(self.gap_first, self.seq - 1, self.gap_since, self.time, self.reason))
        self.reason = None
        return self._record(record)

    def heartbeat(self) -> int:
        return self._record(Heartbeat(*self._next()), self.kind)

    # -- volumes -----------------------------------------------------------------------------------------------------

    def volume(self, path: str) -> VolumeId:
        return next(number for number, held in self.held.items() if held.path == path)

    def create(self, path: str, size: int = 0, mode: int = 0o644, uid: int = 0, gid: int = 0) -> int:
        volume = VolumeId(self.next_volume)
        self.next_volume += 1
        self.held[volume] = _Held(path, bytes(size), mode, uid, gid)
        self.paths.add(path)
        return self._record(Create(*self._next(), volume, path, size, mode, uid, gid))

    def rename(self, *moves: tuple[str, str]) -> int:
        """All at once; a path that is taken and not given up loses its volume."""
        numbered = tuple((self.volume(old), new) for old, new in moves)
        moved = {number for number, _ in numbered}
        retired = tuple(
            number
            for number, held in self.held.items()
            if held.path in {new for _, new in numbered} and number not in moved
        )
        for number in retired:
            del self.held[number]
        for number, new in numbered:
            self.held[number] = replace(self.held[number], path=new)
            self.paths.add(new)
        return self._record(Rename(*self._next(), numbered, retired))

    def retire(self, path: str) -> int:
        volume = self.volume(path)
        del self.held[volume]
        return self._record(Retire(*self._next(), volume))

    def attributes(self, path: str, mode: int, uid: int, gid: int) -> int:
        volume = self.volume(path)
        self.held[volume] = replace(self.held[volume], mode=mode, uid=uid, gid=gid)
        return self._record(Attributes(*self._next(), volume, mode, uid, gid))

    # -- content -----------------------------------------------------------------------------------------------------

    def _put(self, path: str, offset: int, data: bytes, size: int | None = None) -> VolumeId:
        volume = self.volume(path)
        content = self.held[volume].content
        if size is not None:
            content = content[:size].ljust(size, b"\0")
        if data:
            content = content.ljust(offset, b"\0")
            content = content[:offset] + data + content[offset + len(data) :]
        self.held[volume] = replace(self.held[volume], content=content)
        return volume

    def write(self, path: str, offset: int, data: bytes) -> int:
        return self._record(Write(*self._next(), Extent(self._put(path, offset, data), offset, data)))

    def write_zeros(self, path: str, offset: int, length: int) -> int:
        volume = self._put(path, offset, bytes(length))
        return self._record(Write(*self._next(), Extent(volume, offset, b"", length)))

    def reconcile(self, path: str, offset: int, data: bytes) -> int:
        return self._record(Reconcile(*self._next(), Extent(self._put(path, offset, data), offset, data)))

    def aggregate(self, *writes: tuple[str, int, bytes], seqs: int) -> int:
        """`seqs` writes as one; those given must not overlap. A seq inside means the moment before."""
        before = max(self.moments, default=None)
        first = Seq(self.seq + 1)
        extents = tuple(Extent(self._put(path, offset, data), offset, data) for path, offset, data in writes)
        if before is not None and self.based and self.reason is None:
            for inner in range(first, first + seqs - 1):
                self.ask(f"seq={inner}", before)
        return self._record(Aggregate(first, *self._next(seqs), extents))

    def resize(self, path: str, size: int) -> int:
        return self._record(Resize(*self._next(), self._put(path, 0, b"", size), size))

    def correct(self, path: str, refused: int, size: int, offset: int, data: bytes) -> int:
        volume = self._put(path, offset, data, size)
        record = Correct(*self._next(), Seq(refused), size, Extent(volume, offset, data))
        if self.based:
            last = self.seq - 1 if self.reason is None else self.gap_first - 1
            if refused <= last:
                self.gaps.append(ExpectedGap(refused, last, self.time, self.time, "a write that the source refused"))
                for seq in range(refused, last + 1):
                    self.moments.pop(seq, None)
        return self._record(record)

    def flush(self, path: str) -> int:
        return self._record(Flush(*self._next(), self.volume(path)), "flush")

    def bookmark(self, name: str) -> int:
        record = Bookmark(*self._next(), name)
        self.names[name] = Name(name, "bookmark", self.seq)
        return self._record(record, "bookmark")

    # -- what is asked of it -----------------------------------------------------------------------------------------

    def snapshot(self, name: str, seq: int, path: str | None = None, keep_until: int | None = None) -> None:
        """Not a record: the store is to be told by the caller."""
        self.names[name] = Name(name, "snapshot", seq, path, keep_until)

    def forget(self, name: str) -> None:
        del self.names[name]

    def ask(self, text: str, seq: int) -> None:
        """The TIME must mean that seq."""
        self.asked.append(Asked(text, seq))

    def ask_time(self, seq: int, later_ns: int = 0) -> None:
        """The time of that moment, or so much later, must mean it."""
        self.ask(rfc3339(TimeNs(self.moments[seq][0] + later_ns)), seq)

    def refuse(self, text: str, why: str) -> None:
        """The TIME must be refused."""
        self.asked.append(Asked(text, None, why))

    def expected(self) -> ExpectedGroup:
        gaps = list(self.gaps)
        if self.based and self.reason is not None:
            gaps.append(ExpectedGap(self.gap_first, None, self.gap_since, None, self.reason))
        group = ExpectedGroup(self.seq, self.time)
        before: dict[str, Volume] = {}
        for seq, (time, kind, held) in sorted(self.moments.items()):
            now = {one.path: _described(one) for one in held.values()}
            changed: dict[str, Volume | None] = {path: one for path, one in now.items() if before.get(path) != one}
            changed.update({path: None for path in before if path not in now})
            group.moments.append(ExpectedMoment(seq, time, kind, changed))
            before = now
        group.gaps = sorted(gaps, key=lambda gap: gap.first)
        group.names = sorted(self.names.values(), key=lambda name: (name.seq, name.name))
        group.asked = self.asked
        group.paths = sorted(self.paths)
        return group


def _described(held: _Held) -> Volume:
    digest = xxhash.xxh3_128_hexdigest(held.content)
    return Volume(len(held.content), held.mode, held.uid, held.gid, digest)
