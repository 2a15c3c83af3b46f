"""The agent's end of replication: gives each record its seq and its time, and hands it to the first appliance.

Invariants:
- seq, time and place in the queue are given in one synchronous step, so their orders are the same (`order`);
- once a change has gone unrecorded (an outage whose policy is to continue), the next records are a ReconcileBegin and
  the corrections that are owed: the gap is in the history before anything that follows it (`gap-is-said`), and a
  correction that does not say what a range holds is in it, too;
- `spells` grows with each such time: a reconcile whose work was chosen in an earlier spell must not end the gap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from dedup.errors import RewindError
from dedup.types import (
    ClockRun,
    Heartbeat,
    ReconcileBegin,
    Record,
    Seq,
    TimeNs,
)
from replication.errors import HistoryLost, OutageError
from replication.first_appliance import FirstAppliance
from replication.messages import Compare
from replication.modes import Outage
from replication.record_clock import RecordClock

log = logging.getLogger(__name__)

RECORD_BYTES = 512
"""What a record without data is counted as when it asks for room."""
OUTAGE_REASON = "an outage longer than the queue could hold"

Stamp = tuple[Seq, TimeNs, ClockRun]
Build = Callable[[Seq, TimeNs, ClockRun], Record]


class AgentLink:
    """Stamps and queues records. `last` is the last seq of the group, `clock` continues its time."""

    def __init__(self, first: FirstAppliance, last: Seq, clock: RecordClock) -> None:
        self.first = first
        self.last = last
        self._clock = clock
        self._unrecorded = False
        self._reason = ""
        self._owed: list[Build] = []
        self.spells = 0
        """How often changes began to go unrecorded."""
        self.equal = False
        """Whether the history equals the source, so that no reconcile is owed. Set by whoever ends the gap."""
        self.gap_opened = trio.Event()
        """Set when a ReconcileBegin was recorded because changes had gone unrecorded: a reconcile is due."""

    @property
    def degraded(self) -> bool:
        """Whether changes are going unrecorded."""
        return self._unrecorded

    def has_room(self, nbytes: int) -> bool:
        """Whether `room` would say True at once, and nothing is owed before the record."""
        return not self._unrecorded and self.first.has_room(nbytes)

    async def room(self, nbytes: int) -> bool:
        """Waits until a record of `nbytes` may be queued: True. False in an outage whose policy is to continue: the
        change must not be recorded, and its region stays marked. OutageError where the policy is to fail."""
        try:
            has_room = await self.first.room(nbytes)
        except HistoryLost:
            if self.first.outage_policy is not Outage.CONTINUE:
                raise
            has_room = False
        if not has_room:
            self._go_unrecorded(OUTAGE_REASON)
            return False
        if self._unrecorded:
            self._unrecorded = False
            owed, self._owed = self._owed, []
            self.put(lambda seq, time, run: ReconcileBegin(seq, time, run, self._reason))
            for build in owed:
                self.put(build)
            self.gap_opened.set()
        return True

    async def room_by_and_by(self, nbytes: int) -> bool:
        """As `room`, for what no application waits for: False, too, where the policy is to fail. Try again later.
        Raises HistoryLost, whatever the policy: there will be no room any more."""
        try:
            has_room = await self.room(nbytes)
        except OutageError:
            return False
        if not has_room:
            self.first.check_lost()
        return has_room

    async def room_to_correct(self, nbytes: int) -> bool:
        """As `room_by_and_by`; False, too, where there will be no room any more."""
        try:
            return await self.room_by_and_by(nbytes)
        except HistoryLost:
            return False

    def owe(self, correction: Build) -> None:
        """A record says what the source did not take, and the truth cannot be recorded now. `correction` is recorded
        once it can, behind the beginning of the gap, and a reconcile follows. It is small: nobody asks for its room."""
        self._owed.append(correction)
        self._go_unrecorded("a change that the source refused, and that could not be corrected at once")

    def _go_unrecorded(self, reason: str) -> None:
        if not self._unrecorded:
            log.error("recording is interrupted: %s; what changes is marked, and reconciled afterwards", reason)
            self.spells += 1
            self._reason = reason
        self._unrecorded = True
        self.equal = False

    def require_equal(self) -> None:
        """RewindError while the history does not equal the source: no recovery point can be named."""
        if not self.equal:
            raise RewindError(
                "the store does not equal the source yet: a reconcile is under way or due; try again once "
                "`rewindfs status` says protected"
            )

    @property
    def time(self) -> TimeNs:
        """Of the last record, or of what the store held."""
        return self._clock.time

    def stamp(self) -> Stamp:
        """The next seq, and its time. To be used at once: nothing may be awaited before `take`."""
        self.last = Seq(self.last + 1)
        time, run = self._clock.stamp()
        return self.last, time, run

    def put(self, build: Callable[[Seq, TimeNs, ClockRun], Record | Compare]) -> Seq:
        """Stamps and queues the record that `build` makes; after `room`, with no await between."""
        seq, time, run = self.stamp()
        try:
            self.first.append(build(seq, time, run))
        except BaseException:
            self.last = self.first.last_seq
            raise
        return seq

    def take(self, record: Record | Compare) -> None:
        """Queues the record that was just stamped. Where it is refused, its seq is the next one's: no hole is left."""
        try:
            self.first.append(record)
        except BaseException:
            self.last = self.first.last_seq
            raise

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
            if not (self._unrecorded or self.last == seen) or not self.first.has_room(RECORD_BYTES):
                continue
            # After an outage this begins the reconcile, also where no application writes any more.
            if await self.room(RECORD_BYTES):
                self.put(Heartbeat)
