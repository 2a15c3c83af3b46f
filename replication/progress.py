"""How far the records have come, and who waits for it.

Invariants:
- No level ever decreases, DURABLE never passes RECEIVED, nor RECEIVED QUEUED.
- A waiter is woken once: by its level, by a release, or by a failure. A cancelled one leaves nothing behind.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count

import trio

from dedup.types import Seq
from replication.messages import Level


class _Waiter:
    __slots__ = ("error", "reached", "releasable", "task")

    def __init__(self, releasable: bool) -> None:
        self.task = trio.lowlevel.current_task()
        self.releasable = releasable
        self.reached = True
        self.error: Exception | None = None


_Heap = list[tuple[Seq, int, _Waiter]]


class Progress:
    """The levels of a group's records, and the tasks that wait for one of them."""

    def __init__(self) -> None:
        self.queued = Seq(0)
        self.received = Seq(0)
        self.durable = Seq(0)
        self._queued: _Heap = []
        self._received: _Heap = []
        self._durable: _Heap = []
        self._order = count()

    @property
    def waiting(self) -> bool:
        """Whether any task waits."""
        return bool(self._received or self._durable or self._queued)

    def queue(self, queued: Seq) -> None:
        """The first appliance holds everything up to `queued`. Lower than before: ignored."""
        if queued > self.queued:
            self.queued = queued
            if self._queued:
                _wake(self._queued, queued)

    def advance(self, received: Seq, durable: Seq) -> bool:
        """Raises the levels, wakes whose seq they reach, and says whether they rose."""
        rose = False
        self.queue(received)
        if received > self.received:
            self.received = received
            rose = True
            if self._received:
                _wake(self._received, received)
        if durable > self.durable:
            self.durable = durable
            rose = True
            if self._durable:
                _wake(self._durable, durable)
        return rose

    def has_reached(self, seq: Seq, level: Level) -> bool:
        if level is Level.QUEUED:
            return seq <= self.queued
        return seq <= (self.durable if level is Level.DURABLE else self.received)

    async def wait(self, seq: Seq, level: Level, *, releasable: bool) -> bool:
        """Waits until `seq` has reached the level: True. A `releasable` wait may end earlier: False, or the error given
        to `release`. Any wait may raise what was given to `fail`. Returns without a checkpoint when it is there."""
        if self.has_reached(seq, level):
            return True
        heap = self._heap(level)
        waiter = _Waiter(releasable)
        heappush(heap, (seq, next(self._order), waiter))

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            heap[:] = [entry for entry in heap if entry[2] is not waiter]
            heapify(heap)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if waiter.error is not None:
            raise waiter.error
        return waiter.reached

    def release(self, error: Exception | None) -> None:
        """Ends every releasable wait: with the error, or with False when there is none."""
        for heap in (self._queued, self._received, self._durable):
            released = [entry[2] for entry in heap if entry[2].releasable]
            heap[:] = [entry for entry in heap if not entry[2].releasable]
            heapify(heap)
            _end(released, error)

    def fail(self, error: Exception) -> None:
        """Ends every wait with the error."""
        for heap in (self._queued, self._received, self._durable):
            failed = [entry[2] for entry in heap]
            heap.clear()
            _end(failed, error)

    def _heap(self, level: Level) -> _Heap:
        if level is Level.QUEUED:
            return self._queued
        return self._durable if level is Level.DURABLE else self._received


def _wake(heap: _Heap, reached: Seq) -> None:
    while heap and heap[0][0] <= reached:
        trio.lowlevel.reschedule(heappop(heap)[2].task)


def _end(waiters: list[_Waiter], error: Exception | None) -> None:
    for waiter in waiters:
        waiter.reached = False
        waiter.error = error
        trio.lowlevel.reschedule(waiter.task)
