"""When the agent lets marks of its intent log go: never while a reconcile is owed, and only once that is on record."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dedup.types import Correct, Record, Seq, TimeNs, VolumeId
from fusefs import agent as agent_module
from fusefs.agent import Agent
from fusefs.volume_table import Volume, VolumeTable
from replication.agent_link import AgentLink
from replication.intent_log import IntentLog
from replication.record_clock import RecordClock
from replication.region_tracker import IDLE_SECONDS, Region, RegionTracker
from replication.status import LinkState
from tests.replication.test_agent_link import ScriptedFirst


class First(ScriptedFirst):
    durable = Seq(0)
    link = LinkState.CONNECTED

    async def acknowledged(self, seq: Seq) -> bool:
        return True

    def flush_soon(self, seq: Seq) -> None:
        pass

    async def flushed(self, seq: Seq) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The agent's clock; `now.time` may be set."""
    clock = SimpleNamespace(time=100.0)
    monkeypatch.setattr(agent_module, "monotonic", lambda: clock.time)
    return clock


class Bench:
    """An agent over a real file and a scripted first appliance."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "a.img"
        self.file.write_bytes(bytes(8192))
        self.first = First()
        self.link = AgentLink(self.first, Seq(0), RecordClock(TimeNs(0), 1))  # type: ignore[arg-type]
        self.link.equal = True
        self.agent = Agent(
            directory, self.link, VolumeTable(VolumeId(1)), IntentLog.open(directory / "intent"), RegionTracker()
        )
        self.volume: Volume = self.agent.volumes.add("a.img", self.file.stat())
        self.kept: list[Seq] = []

    async def write(self, offset: int, data: bytes) -> int:
        fd = os.open(self.file, os.O_RDWR)
        try:
            return await self.agent.write(self.volume.id, fd, offset, data, False)
        finally:
            os.close(fd)

    async def let_marks_go(self) -> list[int]:
        await self.agent._let_marks_go(self.kept.append)
        return [int(region) for region in self.agent.intent.marked().get(self.volume.id, [])]

    def records(self, kind: type) -> list[Record]:
        return [record for record in self.first.records if isinstance(record, kind)]  # type: ignore[misc]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_mark_goes_after_its_seq_is_kept(bench: Bench, now: SimpleNamespace) -> None:
    await bench.write(0, b"recorded")
    assert await bench.let_marks_go() == [0]
    now.time += IDLE_SECONDS
    assert await bench.let_marks_go() == [0], "not durable at the second appliance yet"
    bench.first.durable = Seq(1)
    assert await bench.let_marks_go() == []
    assert bench.kept[-1] == 1


async def test_mark_of_an_unrecorded_write_stays(bench: Bench, now: SimpleNamespace) -> None:
    bench.first.answer = False
    assert await bench.write(0, b"unrecorded") == 10
    assert bench.file.read_bytes()[:10] == b"unrecorded"
    bench.first.durable = Seq(100)
    now.time += 10 * IDLE_SECONDS
    assert await bench.let_marks_go() == [0]
    bench.first.answer = True
    await bench.write(0, b"recorded")
    bench.first.durable = Seq(200)
    now.time += 10 * IDLE_SECONDS
    assert await bench.let_marks_go() == [0], "the reconcile is still owed"
    spells = bench.link.spells
    assert await bench.agent.end_gap(spells) is not None
    bench.agent.equal_again(spells)
    assert await bench.let_marks_go() == []


async def test_gap_is_not_ended_by_a_reconcile_of_an_earlier_spell(bench: Bench, now: SimpleNamespace) -> None:
    bench.first.answer = False
    await bench.write(0, b"first")
    spells = bench.link.spells
    bench.first.answer = True
    await bench.write(0, b"reconciling")
    bench.first.answer = False
    await bench.write(4096, b"second")
    bench.first.answer = True
    assert await bench.agent.end_gap(spells) is None
    bench.agent.equal_again(spells)
    assert not bench.link.equal


async def test_correction_spares_what_is_still_on_its_way(bench: Bench, now: SimpleNamespace) -> None:
    """A write past the end is recorded and not made yet when another one is refused: its bytes must not be cut off."""
    bench.volume.growing[Seq(50)] = 20_000
    takes_no_write = os.open(bench.file, os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            await bench.agent.write(bench.volume.id, takes_no_write, 8192, b"refused", False)
    finally:
        os.close(takes_no_write)
    (correct,) = bench.records(Correct)
    assert isinstance(correct, Correct)
    assert (correct.refused, correct.size) == (1, 20_000)
    assert (correct.extent.offset, bytes(correct.extent.data)) == (8192, bytes(7))


async def test_mark_goes_once_a_reconcile_under_way_found_its_region_equal(bench: Bench, now: SimpleNamespace) -> None:
    bench.link.equal = False
    await bench.agent.intent.mark(bench.volume.id, 0, 1)
    bench.agent.tracker.equal(bench.volume.id, Region(0), Seq(3), bench.link.spells)
    assert await bench.let_marks_go() == [0, 1]
    bench.first.durable = Seq(3)
    assert await bench.let_marks_go() == [1]
    assert bench.kept[-1] == 3


async def test_mark_stays_where_a_change_went_unrecorded_after_the_comparison(
    bench: Bench, now: SimpleNamespace
) -> None:
    bench.link.equal = False
    await bench.agent.intent.mark(bench.volume.id, 0, 0)
    bench.agent.tracker.equal(bench.volume.id, Region(0), Seq(0), bench.link.spells)
    bench.first.answer = False
    await bench.write(0, b"unrecorded")
    bench.first.durable = Seq(9)
    now.time += 10 * IDLE_SECONDS
    assert await bench.let_marks_go() == [0]
