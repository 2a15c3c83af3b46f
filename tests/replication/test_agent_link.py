"""What the agent's link says of changes that went unrecorded: a gap, before anything that follows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from dedup.errors import RewindError
from dedup.types import ClockRun, Correct, Extent, Heartbeat, ReconcileBegin, Record, Seq, TimeNs, VolumeId, Write
from replication.agent_link import AgentLink
from replication.errors import HistoryLost, LocalProtocolError, OutageError
from replication.messages import Compare
from replication.modes import Outage
from replication.record_clock import RecordClock


class ScriptedFirst:
    """A first appliance whose room is what the test says."""

    def __init__(self, policy: Outage = Outage.CONTINUE) -> None:
        self.outage_policy = policy
        self.answer: bool | Exception = True
        self.records: list[Record | Compare] = []
        self.refuses: type | None = None
        """Records of this type cannot be encoded."""

    @property
    def last_seq(self) -> Seq:
        return self.records[-1].seq if self.records else Seq(0)

    async def room(self, nbytes: int) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def has_room(self, nbytes: int) -> bool:
        return self.answer is True

    def is_acknowledged(self, seq: Seq) -> bool:
        return False

    def append(self, record: Record | Compare) -> None:
        if self.refuses is not None and isinstance(record, self.refuses):
            raise LocalProtocolError("too long")
        self.records.append(record)


def a_link(first: ScriptedFirst) -> AgentLink:
    link = AgentLink(first, Seq(0), RecordClock(TimeNs(0), ClockRun(1)))  # type: ignore[arg-type]
    link.equal = True
    return link


def a_write(seq: Seq, time: TimeNs, run: ClockRun) -> Write:
    return Write(seq, time, run, Extent(VolumeId(1), 0, b"x"))


def a_correction(seq: Seq, time: TimeNs, run: ClockRun) -> Correct:
    return Correct(seq, time, run, Seq(1), 0, Extent(VolumeId(1), 0, b""))


async def test_gap_is_recorded_before_what_follows_it() -> None:
    first = ScriptedFirst()
    link = a_link(first)
    first.answer = False
    assert not await link.room(1)
    assert not await link.room(1)
    assert (link.degraded, link.equal, link.spells) == (True, False, 1)
    first.answer = True
    assert await link.room(1)
    link.put(a_write)
    assert [type(record) for record in first.records] == [ReconcileBegin, Write]
    assert [record.seq for record in first.records] == [1, 2]
    assert link.gap_opened.is_set() and not link.degraded
    assert not link.equal, "a reconcile is owed until somebody says that it was done"


async def test_refused_record_leaves_no_hole() -> None:
    first = ScriptedFirst()
    link = a_link(first)
    link.put(a_write)
    first.refuses = Write
    with pytest.raises(LocalProtocolError):
        link.put(a_write)
    with pytest.raises(LocalProtocolError):
        link.take(a_write(*link.stamp()))
    assert link.put(Heartbeat) == 2


async def test_each_spell_counts() -> None:
    first = ScriptedFirst()
    link = a_link(first)
    for spell in (1, 2):
        first.answer = False
        await link.room(1)
        first.answer = True
        await link.room(1)
        assert link.spells == spell


async def test_owed_correction_comes_first_of_all() -> None:
    first = ScriptedFirst(Outage.FAIL)
    link = a_link(first)
    link.put(a_write)
    first.answer = OutageError("no progress")
    assert not await link.room_by_and_by(1)
    link.owe(a_correction)
    with pytest.raises(OutageError):
        await link.room(1)
    first.answer = True
    assert await link.room(1)
    assert [type(record) for record in first.records] == [Write, ReconcileBegin, Correct]
    with pytest.raises(RewindError, match="reconcile"):
        link.require_equal()


@asynccontextmanager
async def heartbeats(link: AgentLink) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.heartbeats)
        yield
        nursery.cancel_scope.cancel()


async def test_heartbeat_begins_the_reconcile_where_nobody_writes(autojump_clock: trio.testing.MockClock) -> None:
    first = ScriptedFirst()
    link = a_link(first)
    first.answer = False
    await link.room(1)
    async with heartbeats(link):
        await trio.sleep(3)
        assert first.records == []
        first.answer = True
        with trio.fail_after(5):
            await link.gap_opened.wait()
    assert [type(record) for record in first.records][:2] == [ReconcileBegin, Heartbeat]


@pytest.mark.parametrize("policy", Outage)
async def test_lost_history_goes_by_the_policy(policy: Outage) -> None:
    first = ScriptedFirst(policy)
    link = a_link(first)
    first.answer = HistoryLost(Seq(0), Seq(1), "lost")
    if policy is Outage.CONTINUE:
        assert not await link.room(1)
        assert link.degraded
    else:
        with pytest.raises(HistoryLost):
            await link.room(1)
