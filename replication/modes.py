"""The modes, one policy object each: when may a write return, and how do records become frames?

Nothing outside this module asks which mode it is; it asks the policy. Where the frames go to a first appliance of its
own (`through`), that one combines them, and QUEUED is what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from dedup.types import AGGREGATE_BYTES_MAX, Aggregate, Record, Write
from replication.aggregate import coalesce
from replication.messages import Compare, Level
from replication.messages import Mode as Mode
from replication.outbox import FRAME_OVERHEAD_BYTES, Frame, frame_of
from replication.wire import encode_aggregate

ASYNC_GATHER_SECONDS: Final = 0.005
"""What async adds to the store's lag; at 5,000 writes a second 25 travel together."""
BATCH_SECONDS: Final = 0.05
"""Longest that a write waits in an open aggregate. It is the age of what a crash of the first appliance's process costs
on top of async; at 10,000 writes a second it is past BATCH_WRITES_MAX, so it bounds quiet times only."""
BATCH_WRITES_MAX: Final = 256
"""Most writes in one aggregate."""
BATCH_BYTES_MAX: Final = AGGREGATE_BYTES_MAX
"""Most bytes written in one aggregate, before coalescing."""
BATCH_ZSTD_LEVEL: Final = 1
AUTO_LIMIT_SECONDS: Final = 0.02
"""The longest round trip for which `auto` has writes wait, and the longest that it has one wait."""
AUTO_BACK: Final = 0.5
"""`auto` goes back to sync once the round trip is below this part of the limit: it does not swing around the limit."""
AUTO_REST_SECONDS: Final = 5.0
"""Between two changes back to sync."""
AUTO_WEIGHT: Final = 0.125
"""Weight of a new round trip in the mean, that of TCP's smoothed one (RFC 6298)."""


class Outage(Enum):
    """What writers meet when an outage lasts."""

    CONTINUE = "continue"
    """They go on; what the queue cannot take is not recorded, its regions are marked."""
    BLOCK = "block"
    """They wait."""
    FAIL = "fail"
    """They are refused."""


class ModePolicy(Protocol):
    """What a mode decides."""

    @property
    def mode(self) -> Mode: ...

    @property
    def write_waits_for(self) -> Level:
        """A write (and any other record but a flush) returns when its record has come this far."""

    @property
    def flush_waits_for(self) -> Level:
        """An fsync returns when its flush record has come this far."""

    @property
    def outage(self) -> Outage:
        """What an outage means unless the operator says otherwise."""

    @property
    def gather_seconds(self) -> float:
        """How long a frame may wait on its way out for others to travel with; 0 where somebody waits for the answer."""

    @property
    def patience_seconds(self) -> float | None:
        """Longest that a write waits for its level before it returns without; None for as long as it takes."""

    @property
    def observes(self) -> bool:
        """Whether `observe` is of any use."""

    def observe(self, seconds: float) -> bool:
        """A record took so long to be RECEIVED, or has not been for so long. Says whether that changed what writes wait
        for."""

    @property
    def open_bytes(self) -> int:
        """Memory of the writes that are taken and not yet part of a frame."""

    @property
    def open_records(self) -> int:
        """Number of those writes."""

    @property
    def closes_at(self) -> float | None:
        """When, on the clock given, `close` must be called; None while nothing is open."""

    def add(self, record: Record | Compare) -> list[Frame]:
        """Takes the record and returns the frames that are ready, in order. Raises LocalProtocolError for a bad
        record, which is then not taken."""

    def close(self) -> list[Frame]:
        """The frames of everything that is still open, in order."""


class _Steady:
    """What writes wait for does not depend on the round trip."""

    patience_seconds: Final[float | None] = None
    observes: Final = False

    def observe(self, seconds: float) -> bool:
        return False


class _AtOnce:
    """Each record is one frame, ready when it is added."""

    open_bytes: Final = 0
    open_records: Final = 0
    closes_at: Final[float | None] = None

    def add(self, record: Record | Compare) -> list[Frame]:
        return [frame_of(record)]

    def close(self) -> list[Frame]:
        return []


class SyncMode(_AtOnce, _Steady):
    """A write returns when the second appliance has journalled it; an fsync when it is on that one's disk too."""

    mode: Final = Mode.SYNC
    write_waits_for: Final = Level.RECEIVED
    flush_waits_for: Final = Level.DURABLE
    outage: Final = Outage.BLOCK
    gather_seconds: Final = 0.0


class AsyncMode(_AtOnce, _Steady):
    """A write returns when the first appliance holds it."""

    gather_seconds: float = ASYNC_GATHER_SECONDS
    mode: Mode = Mode.ASYNC
    write_waits_for: Final = Level.QUEUED
    flush_waits_for: Final = Level.QUEUED
    outage: Final = Outage.CONTINUE


class AutoMode(_AtOnce):
    """Sync while the mean round trip is at most `limit` seconds, async beyond; sync again once it is below AUTO_BACK of
    that, AUTO_REST_SECONDS later at the earliest. A write waits no longer than `limit`, an fsync only while in sync."""

    mode: Final = Mode.AUTO
    observes: Final = True
    outage: Final = Outage.CONTINUE
    gather_seconds: Final = 0.0

    def __init__(self, clock: Callable[[], float], limit: float = AUTO_LIMIT_SECONDS) -> None:
        self._clock = clock
        self._limit = limit
        self._mean = 0.0
        self._is_sync = True
        self._changed_at = clock()

    @property
    def write_waits_for(self) -> Level:
        return Level.RECEIVED if self._is_sync else Level.QUEUED

    @property
    def flush_waits_for(self) -> Level:
        return Level.DURABLE if self._is_sync else Level.QUEUED

    @property
    def patience_seconds(self) -> float | None:
        return self._limit if self._is_sync else None

    def observe(self, seconds: float) -> bool:
        self._mean += AUTO_WEIGHT * (seconds - self._mean)
        now = self._clock()
        if self._is_sync:
            is_sync = self._mean <= self._limit
        else:
            is_sync = self._mean < AUTO_BACK * self._limit and now - self._changed_at >= AUTO_REST_SECONDS
        if is_sync == self._is_sync:
            return False
        self._is_sync, self._changed_at = is_sync, now
        return True


class BatchMode(_Steady):
    """A write returns when the first appliance holds it; writes travel as aggregates.

    An aggregate closes before anything that is not a Write (a barrier, sent right behind it), at BATCH_WRITES_MAX
    writes, before BATCH_BYTES_MAX bytes are passed, and BATCH_SECONDS after its first write. One of a single write is
    sent as that write.
    """

    mode: Final = Mode.BATCH
    gather_seconds: Final = 0.0  # an aggregate has gathered
    write_waits_for: Final = Level.QUEUED
    flush_waits_for: Final = Level.QUEUED
    outage: Final = Outage.CONTINUE

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._writes: list[Write] = []
        self._bytes = 0
        self._closes_at: float | None = None

    @property
    def open_bytes(self) -> int:
        return self._bytes + len(self._writes) * FRAME_OVERHEAD_BYTES

    @property
    def open_records(self) -> int:
        return len(self._writes)

    @property
    def closes_at(self) -> float | None:
        return self._closes_at

    def add(self, record: Record | Compare) -> list[Frame]:
        # Encoded before it is taken: a record that cannot be sent is refused now, alone, and not with its aggregate.
        frame = frame_of(record)
        if not isinstance(record, Write) or (self._writes and self._writes[-1].run != record.run):
            return [*self.close(), frame]
        length = record.extent.length
        ready = self.close() if self._bytes + length > BATCH_BYTES_MAX else []
        if not self._writes:
            self._closes_at = self._clock() + BATCH_SECONDS
        self._writes.append(record)
        self._bytes += length
        if len(self._writes) >= BATCH_WRITES_MAX or self._bytes >= BATCH_BYTES_MAX:
            ready += self.close()
        return ready

    def close(self) -> list[Frame]:
        writes = self._writes
        if not writes:
            return []
        self._writes, self._bytes, self._closes_at = [], 0, None
        last = writes[-1]
        if len(writes) == 1:
            return [frame_of(last)]
        aggregate = Aggregate(writes[0].seq, last.seq, last.time, last.run, coalesce(writes))
        return [frame_of(aggregate, encode_aggregate(aggregate, level=BATCH_ZSTD_LEVEL))]


class AsyncThrough(AsyncMode):
    """Async, the frames going to a first appliance: a write waits for its word, so none waits to gather."""

    gather_seconds = 0.0


class BatchThrough(AsyncThrough):
    """Batch, the frames going to a first appliance, which combines them."""

    mode = Mode.BATCH


_POLICIES: Final[dict[Mode, Callable[[Callable[[], float]], ModePolicy]]] = {
    Mode.SYNC: lambda _clock: SyncMode(),
    Mode.ASYNC: lambda _clock: AsyncMode(),
    Mode.BATCH: BatchMode,
    Mode.AUTO: AutoMode,
}
_THROUGH: Final[dict[Mode, Callable[[Callable[[], float]], ModePolicy]]] = {
    **_POLICIES,
    Mode.ASYNC: lambda _clock: AsyncThrough(),
    Mode.BATCH: lambda _clock: BatchThrough(),
}


def mode_policy(mode: Mode, clock: Callable[[], float], *, through: bool = False) -> ModePolicy:
    """A new policy object; `clock` gives seconds and is what `closes_at` refers to. `through` a first appliance."""
    return (_THROUGH if through else _POLICIES)[mode](clock)
