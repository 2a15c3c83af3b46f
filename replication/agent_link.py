"""The agent's end of replication: gives each record its seq and its time, and hands it to the first appliance.

Invariants:
- seq, time and place in the queue are given in one synchronous step, so their orders are the same (`order`);
- once a change has gone unrecorded (an outage whose policy is to continue), the next record is a ReconcileBegin: the
  gap is in the history before anything that follows it (`gap-is-said`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from dedup.types import (
    ClockRun,
    Heartbeat,
    ReconcileBegin,
    Record,
    Seq,
    TimeNs,
)
from replication.first_appliance import FirstAppliance
from replication.messages import Compare
from replication.record_clock import RecordClock

log = logging.getLogger(__name__)

RECORD_BYTES = 512
"""What a record without data is counted as when it asks for room."""
OUTAGE_REASON = "an outage longer than the queue could hold"

Stamp = tuple[Seq, TimeNs, ClockRun]


class AgentLink:
    """Stamps and queues records. `last` is the last seq of the group, `clock` continues its time."""

    def __init__(self, first: FirstAppliance, last: Seq, clock: RecordClock) -> None:
        self.first = first
        self.last = last
        self._clock = clock
        self._unrecorded = False
        self.gap_opened = trio.Event()
        """Set when a ReconcileBegin was recorded because changes had gone unrecorded: a reconcile is due."""

    @property
    def degraded(self) -> bool:
        """Whether changes are going unrecorded."""
        return self._unrecorded

    async def room(self, nbytes: int) -> bool:
        """Waits until a record of `nbytes` may be queued: True. False in an outage whose policy is to continue: the
        change must not be recorded, and its region stays marked. OutageError where the policy is to fail."""
        if not await self.first.room(nbytes):
            if not self._unrecorded:
                log.error("changes are no longer recorded: %s; their regions are marked", OUTAGE_REASON)
            self._unrecorded = True
            return False
        if self._unrecorded:
            self._unrecorded = False
            self.put(lambda seq, time, run: ReconcileBegin(seq, time, run, OUTAGE_REASON))
            self.gap_opened.set()
        return True

    def stamp(self) -> Stamp:
        """The next seq, and its time. To be used at once: nothing may be awaited before `first.append`."""
        self.last = Seq(self.last + 1)
        time, run = self._clock.stamp()
        return self.last, time, run

    def put(self, build: Callable[[Seq, TimeNs, ClockRun], Record | Compare]) -> Seq:
        """Stamps and queues the record that `build` makes; after `room`, with no await between."""
        seq, time, run = self.stamp()
        self.first.append(build(seq, time, run))
        return seq

    async def record(self, build: Callable[[Seq, TimeNs, ClockRun], Record]) -> Seq | None:
        """Room, then `put`, then what the mode has a change wait for. None where it must go unrecorded."""
        if not await self.room(RECORD_BYTES):
            return None
        seq = self.put(build)
        await self.first.acknowledged(seq)
        return seq

    async def heartbeats(self, interval: float = 1.0) -> None:
        """Says "nothing after seq N until now" while nothing else is recorded. Runs until cancelled."""
        while True:
            seen = self.last
            await trio.sleep(interval)
            if self.last == seen and not self._unrecorded and self.first.has_room(RECORD_BYTES):
                self.put(Heartbeat)
