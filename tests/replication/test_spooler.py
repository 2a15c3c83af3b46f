"""A first appliance with a spool: an outage longer than memory, restarts within it, disks that fill up or break."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import replication.spool
from dedup.types import ClockRun, Epoch, Extent, Heartbeat, Record, Seq, TimeNs, VolumeId, Write
from replication.errors import HistoryLost, LinkReset, SpoolError
from replication.first_appliance import FirstAppliance
from replication.messages import Compare, ErrorCode, Level
from replication.modes import Mode, Outage
from replication.outbox import frame_of
from replication.spool import Spool
from replication.spool_file import Origin
from replication.spooler import SPOOL_AFTER_SECONDS
from replication.status import LinkState
from tests.dedup.crash_storage import unsynced
from tests.dedup.faults import FaultyStorage
from tests.replication.scripted_second import ScriptedSecond

RUN, DISK = ClockRun(0), VolumeId(1)
QUEUE = 64 << 10
AGENT = "0f" * 16


@pytest.fixture(autouse=True)
def disk_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What threads do is done on the spot: on a clock that jumps, waiting for a thread is an eternity."""

    async def run_sync(call: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*args)

    monkeypatch.setattr("replication.spooler.trio.to_thread.run_sync", run_sync)
    monkeypatch.setattr(replication.spool, "SPOOL_SEGMENT_BYTES", 20_000)
    with unsynced():
        yield


def write(seq: int, length: int = 4096) -> Write:
    return Write(Seq(seq), TimeNs(seq), RUN, Extent(DISK, seq * 4096, bytes([seq % 255 + 1]) * length))


def origin(epoch: int = 3, store: str = "store", group: str = "g") -> Origin:
    return Origin(group, AGENT, Epoch(epoch), store)


class Rig:
    def __init__(self, second: ScriptedSecond, spool: Spool, **options: Any) -> None:
        self.second = second
        self.spool = spool
        self.lost: list[HistoryLost] = []
        options = {"group": "g", "epoch": Epoch(3), "agent": AGENT, "queue_bytes_max": QUEUE, **options}
        self.first = FirstAppliance(second.connect, spool=spool, on_lost=self.lost.append, **options)

    async def put(self, first: int, last: int | None = None, length: int = 4096) -> None:
        for seq in range(first, (last or first) + 1):
            assert await self.first.room(length)
            self.first.append(write(seq, length))
            assert self.first.queued_bytes <= QUEUE * 5 // 4

    @property
    def log(self) -> list[Record | Compare]:
        return self.second.log


@asynccontextmanager
async def running(second: ScriptedSecond, spool: Spool, **options: Any) -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        rig = Rig(second, spool, **options)
        await rig.first.start()
        nursery.start_soon(rig.first.run)
        await trio.testing.wait_all_tasks_blocked()
        yield rig
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def rigged(directory: Path, *, limit: int = 1 << 30, held: int = 0, **options: Any) -> AsyncIterator[Rig]:
    spool = Spool.open(directory / "spool", limit, options.pop("storage", None))
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery, held=held)
        async with running(second, spool, **options) as rig:
            yield rig
        nursery.cancel_scope.cancel()
    spool.close()


async def cut(rig: Rig) -> None:
    """The link breaks, for long enough that the disk is used."""
    rig.second.reachable = False
    await rig.second.drop()
    await trio.sleep(SPOOL_AFTER_SECONDS + 0.5)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # the clock jumps
        await trio.sleep(0.01)


async def drained(rig: Rig) -> None:
    await rig.first.drain()
    await trio.testing.wait_all_tasks_blocked()


async def test_an_outage_longer_than_memory_leaves_no_gap(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        await rig.put(1, 3)
        await trio.sleep(0.1)
        await cut(rig)
        await rig.put(4, 100)
        assert rig.first.last_seq == 100
        await trio.sleep(60)
        assert rig.first.outage
        await rig.put(101, 200)
        await trio.sleep(1)
        assert (rig.first.kept, rig.first.durable, rig.first.queued_bytes) == (200, 0, 0)
        status = rig.first.status()
        assert status.spool_bytes == rig.spool.bytes > 190 * 4096
        assert (status.queued_records, status.oldest_queued, status.spool_error) == (200, 1, "")
        rig.second.reachable = True
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, 201)]
        assert rig.spool.empty
        await rig.put(201, 203)
        await drained(rig)
        assert rig.log[200:] == [write(seq) for seq in range(201, 204)]
        assert rig.spool.empty
        assert not rig.first.outage
        assert (rig.first.queued_bytes, rig.first.status().queued_records) == (0, 0)


async def test_a_short_break_costs_no_disk(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        await rig.second.drop()
        await rig.put(1, 5)
        await trio.sleep(SPOOL_AFTER_SECONDS * 3)
        assert [record.seq for record in rig.log] == [1, 2, 3, 4, 5]
        assert rig.spool.empty
        assert rig.first.kept == 0


async def test_a_slow_link_throttles_writers_and_uses_no_disk(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        rig.second.syncs = False
        with trio.move_on_after(5) as scope:
            await rig.put(1, 1000)
        assert scope.cancelled_caught
        assert rig.first.queued_bytes <= QUEUE
        assert rig.spool.empty


@pytest.mark.parametrize("breaks", [1, 4])
async def test_the_link_breaks_again_while_it_drains(tmp_path: Path, breaks: int, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        await cut(rig)
        await rig.put(1, 150)
        last = 150
        for _ in range(breaks):
            rig.second.reachable = True
            await until(lambda: len(rig.log) >= last // (breaks + 1))  # noqa: B023
            await rig.put(last + 1, last + 20)
            last += 20
            if breaks == 1:
                rig.second.durable = rig.second.held
            await cut(rig)
            await rig.put(last + 1, last + 20)
            last += 20
        rig.second.reachable = True
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, last + 1)]
        assert rig.spool.empty


async def test_a_store_that_lost_what_was_not_durable_gets_it_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        rig.second.syncs = False
        await cut(rig)
        await rig.put(1, 60)
        rig.second.reachable = True
        await until(lambda: rig.second.held == 60)
        await rig.second.ack(60, 20)
        await trio.sleep(1)
        assert 1 < rig.spool.first_seq <= 21
        rig.second.reachable = False
        await rig.second.drop()
        rig.second.held = 20  # a power cut there
        rig.second.syncs = rig.second.reachable = True
        await drained(rig)
        assert [record.seq for record in rig.log] == [*range(1, 61), *range(21, 61)]
        assert rig.spool.empty


async def test_writers_go_on_while_it_drains(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What does not fit in memory behind what is being sent goes to the disk, too."""
    async with rigged(tmp_path) as rig:
        await cut(rig)
        await rig.put(1, 100)
        await trio.sleep(1)
        rig.second.stop_reading()
        rig.second.reachable = True
        await trio.sleep(3)
        assert rig.first.link is LinkState.DOWN
        await rig.put(101, 200)
        rig.second.go_on_reading()
        await rig.put(201, 300)
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, 301)]


async def test_a_peer_that_hangs_is_an_outage_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        await rig.put(1, 2)
        await trio.sleep(0.1)
        rig.second.stop_reading()
        await rig.put(3, 10)
        await trio.sleep(30)
        assert rig.first.outage
        assert rig.first.link is LinkState.CONNECTED
        await rig.put(11, 300)
        await trio.sleep(1)
        assert rig.first.kept == 300
        rig.second.go_on_reading()
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, 301)]
        assert rig.spool.empty
        assert len(rig.second.hellos) == 1


async def test_comparisons_become_heartbeats(tmp_path: Path, autojump_clock: MockClock) -> None:
    def compare(seq: int) -> Compare:
        return Compare(Seq(seq), TimeNs(seq), RUN, DISK, 0, bytes(16))

    async with rigged(tmp_path) as rig:
        rig.second.stop_reading()
        await rig.put(1, 3)
        await trio.sleep(0.1)
        rig.first.append(compare(4))  # on its way, perhaps
        await rig.put(5)
        await trio.sleep(30)
        rig.first.append(compare(6))
        await trio.sleep(1)
        with pytest.raises(LinkReset):
            await rig.first.compared(Seq(6))
        await cut(rig)
        with pytest.raises(LinkReset):
            await rig.first.compared(Seq(4))
        rig.second.go_on_reading()
        rig.second.reachable = True
        await drained(rig)
        assert [record.seq for record in rig.log] == [1, 2, 3, 4, 5, 6]
        assert rig.log[5] == Heartbeat(Seq(6), TimeNs(6), RUN)


async def test_past_the_limit_the_outage_policy_is_met(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigged(tmp_path, limit=200_000) as rig:
        await cut(rig)
        taken = 0
        with trio.move_on_after(60):
            while await rig.first.room(4096):
                taken += 1
                rig.first.append(write(taken))
        assert rig.first.outage
        assert taken * 4096 > 200_000
        assert rig.spool.bytes <= 200_000
        assert caplog.text.count("is full") == 1
        rig.second.reachable = True
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, taken + 1)]
        await cut(rig)
        await rig.put(taken + 1, taken + 40)
        assert not rig.spool.empty


async def test_with_the_policy_to_block_writers_wait_for_the_disk_and_then_for_the_link(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with rigged(tmp_path, limit=200_000, outage=Outage.BLOCK) as rig:
        await cut(rig)
        with trio.move_on_after(1000) as scope:
            await rig.put(1, 1000)
        assert scope.cancelled_caught
        last = rig.first.last_seq
        assert last * 4096 > 200_000
        rig.second.reachable = True
        await rig.put(last + 1, 300)
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, 301)]


@pytest.mark.parametrize("what", ["full", "broken"])
async def test_a_disk_that_takes_nothing_is_as_no_spool_and_what_it_holds_is_sent(
    tmp_path: Path, what: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FaultyStorage()
    async with rigged(tmp_path, storage=storage) as rig:
        await cut(rig)
        await rig.put(1, 30)
        await trio.sleep(1)
        assert rig.first.kept == 30
        if what == "full":
            storage.refuse_write_after = 100
        else:
            storage.refuse_sync = True
        taken = 30
        with trio.move_on_after(60):
            while await rig.first.room(4096):
                taken += 1
                rig.first.append(write(taken))
        assert rig.first.outage
        assert 30 < taken < 50
        assert (rig.first.kept, rig.spool.last_seq) == (30, 30)
        assert bool(rig.first.status().spool_error) == (what == "broken")
        assert sum(("spool" in text and "full" in text) or "nothing more" in text for text in caplog.messages) == 1
        rig.second.reachable = True
        await drained(rig)
        assert rig.log == [write(seq) for seq in range(1, taken + 1)]
        storage.refuse_write_after, storage.refuse_sync = None, False
        await cut(rig)
        await rig.put(taken + 1)
        await trio.sleep(1)
        assert rig.spool.empty == (what == "broken")


async def test_damage_ends_ordered_replication_and_says_where(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        await cut(rig)
        await rig.put(1, 60)
        await trio.sleep(1)
        path = sorted(rig.spool.directory.glob("*.rwq"))[1]
        path.write_bytes(path.read_bytes()[:-50] + bytes(50))
        rig.second.reachable = True
        await until(lambda: bool(rig.lost))
        assert rig.first.link is LinkState.LOST
        assert path.name in str(rig.lost[0])
        assert rig.log == [write(seq) for seq in range(1, len(rig.log) + 1)]
        with pytest.raises(HistoryLost):
            await rig.first.reached(Seq(60), Level.DURABLE)


async def test_after_a_restart_the_same_epoch_goes_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path) as rig:
        await rig.put(1, 5)
        await trio.sleep(0.1)
        await cut(rig)
        await rig.put(6, 60)
        await trio.sleep(1)
        log = list(rig.log)
    async with rigged(tmp_path, held=5) as rig:
        assert rig.first.last_seq == rig.first.kept == 60
        await rig.put(61, 70)
        await drained(rig)
        assert log + rig.log == [write(seq) for seq in range(1, 71)]
        assert rig.spool.empty


def left(tmp_path: Path, first: int, last: int, of: Origin) -> Spool:
    spool = Spool.open(tmp_path / "spool")
    for seq in range(first, last + 1):
        assert spool.append([frame_of(write(seq))], of) == 1
    spool.sync()
    return spool


async def test_a_new_epoch_brings_the_older_ones_records_first(tmp_path: Path, autojump_clock: MockClock) -> None:
    spool = left(tmp_path, 6, 60, origin(epoch=2))
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery, held=5)
        async with running(second, spool) as rig:
            assert [hello.epoch for hello in second.hellos] == [2, 3]
            assert rig.log == [write(seq) for seq in range(6, 61)]
            assert (rig.first.last_seq, rig.first.durable, spool.empty) == (60, 60, True)
            await cut(rig)
            await rig.put(61)
            await trio.sleep(1)
            assert spool.origin == origin()
        nursery.cancel_scope.cancel()
    spool.close()


@pytest.mark.parametrize(
    ("of", "held", "why"),
    [
        (origin(store="another"), 5, "not for"),
        (origin(epoch=2, store="another"), 5, "not for"),
        (origin(epoch=2), 3, "up to 3 only"),
        (origin(), 3, "up to 3 only"),
        (origin(epoch=2), 100, "the store has them"),
        (origin(), 100, "the store has them"),
    ],
)
async def test_what_does_not_meet_the_store_is_discarded(
    tmp_path: Path, of: Origin, held: int, why: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rewindfs.spool")
    spool = left(tmp_path, 6, 60, of)
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery, held=held)
        async with running(second, spool) as rig:
            assert (rig.first.last_seq, rig.log, spool.empty) == (held, [], True)
            assert "records 6..60 are discarded" in caplog.text
            assert why in caplog.text
        nursery.cancel_scope.cancel()
    spool.close()


async def test_an_epoch_that_is_over_is_discarded(tmp_path: Path, autojump_clock: MockClock) -> None:
    spool = left(tmp_path, 6, 60, origin(epoch=2))
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery, held=5)
        second.refuses = ErrorCode.FENCED
        rig = Rig(second, spool)
        with pytest.raises(Exception, match="the test says no"):
            await rig.first.start()
        assert spool.empty
        nursery.cancel_scope.cancel()
    spool.close()


async def test_a_spool_of_another_group_is_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    spool = left(tmp_path, 6, 60, origin(group="h"))
    async with trio.open_nursery() as nursery:
        rig = Rig(ScriptedSecond(nursery, held=5), spool)
        with pytest.raises(SpoolError, match="group 'h', not of 'g'"):
            await rig.first.start()
        assert not spool.empty
        nursery.cancel_scope.cancel()
    spool.close()


async def test_aggregates_are_spooled_whole(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with rigged(tmp_path, mode=Mode.BATCH) as rig:
        await cut(rig)
        await rig.put(1, 200, 100)
        await trio.sleep(1)
        rig.second.reachable = True
        await drained(rig)
        seqs = [seq for record in rig.log for seq in range(getattr(record, "first_seq", record.seq), record.seq + 1)]
        assert seqs == list(range(1, 201))
        assert len(rig.log) < 20
