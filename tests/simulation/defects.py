"""Defects to put into the program, so as to see that the simulation finds them: each is a patch, and what it breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

import fusefs.agent_start
from dedup.types import Heartbeat, Record, Seq, VolumeId
from fusefs.agent import Agent
from fusefs.agent_source import AgentSource
from fusefs.range_lock import RangeLock
from replication import agent_link, modes, session_speech
from replication.aggregate import coalesce
from replication.intent_log import IntentLog
from replication.messages import Ack, Level
from replication.modes import BatchMode, SyncMode
from replication.outbox import Outbox, frame_of
from replication.region_tracker import RegionTracker
from replication.store_writer import StoreWriter

Defect = Callable[[], Any]
"""Gives a context in which the program has the defect."""


def _method(owner: type, name: str, make: Callable[[Any], Any]) -> Defect:
    return lambda: patch.object(owner, name, make(getattr(owner, name)))


def _rewind_leaves_one_out(rewind: Any) -> Any:
    def broken(self: Outbox, held: Seq) -> None:
        rewind(self, held)
        if len(self._waiting) > 1:
            self._waiting.popleft()

    return broken


def _rewind_sends_one_too_many(rewind: Any) -> Any:
    def broken(self: Outbox, held: Seq) -> None:
        rewind(self, Seq(held - 1) if self._held and held else held)

    return broken


def _says_durable_what_is_received() -> Any:
    return patch.object(session_speech, "_levels", lambda group: Ack(group.held, group.held, group.held, group.held))


def _ingest_loses_the_last(ingest: Any) -> Any:
    async def broken(self: StoreWriter, group: Any, records: Sequence[Record], nbytes: int) -> None:
        await ingest(self, group, records[:-1] if len(records) > 2 else records, nbytes)

    return broken


def _mark_is_forgotten(mark: Any) -> Any:
    async def broken(self: Agent, volume: VolumeId, first: int, last: int) -> None:
        if first == 0:
            await mark(self, volume, first, last)

    return broken


def _marks_go_before_durable(durable: Any) -> Any:
    def broken(self: RegionTracker, seq: Seq) -> None:
        durable(self, Seq(seq + 1_000_000))

    return broken


def _marks_are_not_read(marked: Any) -> Any:
    return lambda self: {}


def _barrier_overtakes(add: Any) -> Any:
    def broken(self: BatchMode, record: Any) -> Any:
        return add(self, record) if isinstance(record, modes.Write) else [frame_of(record), *self.close()]

    return broken


@contextmanager
def _first_write_wins() -> Iterator[None]:
    with patch.object(modes, "coalesce", lambda writes: coalesce(list(reversed(writes)))):
        yield


@contextmanager
def _gap_is_not_said() -> Iterator[None]:
    with patch.object(agent_link, "ReconcileBegin", lambda seq, time, run, reason: Heartbeat(seq, time, run)):
        yield


def _refused_write_is_not_corrected(correct: Any) -> Any:
    async def broken(self: Agent, volume: Any, fd: int, refused: Seq, offset: int, length: int) -> Seq:
        return refused

    return broken


@asynccontextmanager
async def _unlocked(self: AgentSource, volume: VolumeId, offset: int, length: int) -> AsyncIterator[bool]:
    yield self.agent.volumes.get(volume) is not None


@contextmanager
def _gap_ends_at_once() -> Iterator[None]:
    class Idle(fusefs.agent_start.Reconciler):
        async def run(self, work: Any) -> None:
            return

    with patch.object(fusefs.agent_start, "Reconciler", Idle):
        yield


DEFECTS: dict[str, Defect] = {
    "a resend leaves a record out": _method(Outbox, "rewind", _rewind_leaves_one_out),
    "a resend begins too early": _method(Outbox, "rewind", _rewind_sends_one_too_many),
    "durable is said of what is received": _says_durable_what_is_received,
    "the last record of a batch is lost": _method(StoreWriter, "ingest", _ingest_loses_the_last),
    "marks are forgotten": _method(Agent, "_mark", _mark_is_forgotten),
    "marks go before the record is durable": _method(RegionTracker, "durable", _marks_go_before_durable),
    "marks are not read at the start": _method(IntentLog, "marked", _marks_are_not_read),
    "a barrier overtakes the open aggregate": _method(BatchMode, "add", _barrier_overtakes),
    "the first write of a byte wins": _first_write_wins,
    "a gap is not said": _gap_is_not_said,
    "a refused write is not corrected": _method(Agent, "_correct", _refused_write_is_not_corrected),
    "sync does not wait": lambda: patch.object(SyncMode, "write_waits_for", Level.QUEUED),
    "the range lock locks nothing": _method(RangeLock, "_conflicting", lambda _: lambda self, claim: []),
    "a reconcile reads without the lock": lambda: patch.object(AgentSource, "claimed", _unlocked),
    "a reconcile sends nothing": _gap_ends_at_once,
}
