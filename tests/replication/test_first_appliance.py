"""The first appliance against a second one that does what the test says, on a clock that jumps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from dedup.types import Aggregate, ClockRun, Epoch, Extent, Flush, Heartbeat, Record, Seq, TimeNs, VolumeId, Write
from replication.errors import (
    HandshakeRefused,
    HistoryLost,
    LinkDown,
    LinkReset,
    LocalProtocolError,
    OutageError,
    RequestRefused,
)
from replication.first_appliance import FirstAppliance
from replication.messages import Compare, ErrorCode, Level
from replication.modes import ASYNC_GATHER_SECONDS, BATCH_SECONDS, Mode, Outage
from replication.status import FirstApplianceStatus, LinkState
from tests.replication.scripted_second import VOLUME, ScriptedSecond

RUN, DISK = ClockRun(0), VolumeId(1)


def write(seq: int, length: int = 8) -> Write:
    return Write(Seq(seq), TimeNs(seq), RUN, Extent(DISK, seq * 4096, bytes([seq % 255 + 1]) * length))


def seqs_of(log: list[Record | Compare]) -> list[int]:
    """Every seq that the records cover, in the order of their arrival."""
    return [seq for record in log for seq in range(getattr(record, "first_seq", record.seq), record.seq + 1)]


class Rig:
    def __init__(self, nursery: trio.Nursery, **options: object) -> None:
        self.second = ScriptedSecond(nursery)
        self.changes: list[FirstApplianceStatus] = []
        self.lost: list[HistoryLost] = []
        self.first = FirstAppliance(
            self.second.connect,
            group="g",
            epoch=Epoch(3),
            agent="a",
            on_change=self.changes.append,
            on_lost=self.lost.append,
            **options,  # type: ignore[arg-type]
        )

    def append(self, first: int, last: int | None = None, length: int = 8) -> None:
        for seq in range(first, (last or first) + 1):
            self.first.append(write(seq, length))


@asynccontextmanager
async def rig(**options: object) -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        made = Rig(nursery, **options)
        await made.first.start()
        nursery.start_soon(made.first.run)
        await settled()
        yield made
        nursery.cancel_scope.cancel()


async def settled() -> None:
    """What was appended has left, and everything that follows from it has happened."""
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(ASYNC_GATHER_SECONDS)
    await trio.testing.wait_all_tasks_blocked()


class Waiting:
    """A call that is being waited for, and what became of it."""

    def __init__(self, nursery: trio.Nursery, call: Callable[..., Awaitable[object]], *args: object) -> None:
        self.done = False
        self.result: object = None
        self.error: Exception | None = None
        nursery.start_soon(self._run, call, args)

    async def _run(self, call: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            self.result = await call(*args)
        except (HistoryLost, LinkDown, OutageError) as error:
            self.error = error
        self.done = True


async def test_start_says_what_the_store_holds(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        made = Rig(nursery)
        made.second.held = made.second.durable = 41
        welcome, volumes = await made.first.start()
        assert (welcome.held, volumes) == (41, [VOLUME])
        assert (made.first.last_seq, made.first.received, made.first.durable) == (41, 41, 41)
        assert made.second.hellos[0].epoch == 3
        assert made.first.digest_key == b"key 1"
        assert made.first.link is LinkState.CONNECTED
        made.append(42)
        with pytest.raises(LocalProtocolError):
            made.append(44)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", [ErrorCode.REFUSED, ErrorCode.STORE_FULL, ErrorCode.VERSION])
async def test_start_is_refused(code: ErrorCode, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        made = Rig(nursery)
        made.second.refuses = code
        with pytest.raises(HandshakeRefused) as caught:
            await made.first.start()
        assert caught.value.code is code
        made.second.refuses, made.second.reachable = None, False
        with pytest.raises(LinkDown):
            await made.first.start()
        made.second.reachable = True
        await made.first.start()
        nursery.cancel_scope.cancel()


async def test_a_peer_that_does_not_answer_hello(autojump_clock: MockClock) -> None:
    async def connect() -> object:
        near, _far = trio.testing.memory_stream_pair()
        from replication.transport import MemoryConnection

        return MemoryConnection(near)

    first = FirstAppliance(connect, group="g", epoch=Epoch(1), agent="a")  # type: ignore[arg-type]
    with pytest.raises(LinkDown, match="no answer"):
        await first.start()


async def test_sync_returns_when_received(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC) as made, trio.open_nursery() as nursery:
        made.second.acks = False
        assert await made.first.room(8)
        made.append(1, 2)
        one = Waiting(nursery, made.first.acknowledged, Seq(1))
        two = Waiting(nursery, made.first.acknowledged, Seq(2))
        await settled()
        assert seqs_of(made.second.log) == [1, 2]
        assert not one.done
        await made.second.ack(1)
        assert (one.done, one.result, two.done) == (True, True, False)
        await made.second.ack(2)
        assert two.result is True
        assert (made.first.received, made.first.durable) == (2, 0)


async def test_a_sync_flush_returns_when_durable_and_asks_for_it(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC) as made, trio.open_nursery() as nursery:
        made.second.syncs = False
        made.append(1)
        made.first.append(Flush(Seq(2), TimeNs(2), RUN, DISK))
        flushed = Waiting(nursery, made.first.flushed, Seq(2))
        await settled()
        assert made.first.received == 2
        assert not flushed.done
        assert made.second.sync_requests == 1
        await made.second.ack(2, 2)
        assert flushed.result is True


@pytest.mark.parametrize("mode", [Mode.ASYNC, Mode.BATCH])
async def test_async_and_batch_return_at_once(mode: Mode, autojump_clock: MockClock) -> None:
    async with rig(mode=mode) as made:
        made.second.stop_reading()
        with trio.testing.assert_no_checkpoints():
            assert await made.first.room(8)
            made.append(1)
            assert await made.first.acknowledged(Seq(1))
            assert await made.first.flushed(Seq(1))
        assert made.second.log == []


async def test_batch_sends_aggregates_after_a_time(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.BATCH) as made:
        made.append(1, 3)
        await settled()
        assert made.second.log == []
        assert made.first.status().queued_records == 3
        assert made.first.queued_bytes > 0
        await trio.sleep(BATCH_SECONDS * 1.5)
        (aggregate,) = made.second.log
        assert isinstance(aggregate, Aggregate)
        assert (aggregate.first_seq, aggregate.seq) == (1, 3)
        made.append(4)
        await trio.sleep(BATCH_SECONDS * 1.5)
        assert made.second.log[1] == write(4)


async def test_whoever_waits_for_a_level_closes_the_aggregate(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.BATCH) as made:
        made.append(1, 2)
        began = trio.current_time()
        await made.first.reached(Seq(2), Level.DURABLE)
        assert trio.current_time() < began + BATCH_SECONDS
        assert made.second.sync_requests == 1
        await made.first.drain()
        assert made.first.queued_bytes == 0


async def test_one_sync_answers_all_who_asked_before(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC) as made, trio.open_nursery() as nursery:
        made.append(1, 5)
        waits = [Waiting(nursery, made.first.reached, Seq(seq), Level.DURABLE) for seq in (5, 3, 1, 4)]
        await settled()
        assert all(wait.done for wait in waits)
        assert made.second.sync_requests <= 2


async def test_frames_are_kept_until_durable(autojump_clock: MockClock) -> None:
    async with rig() as made:
        made.second.syncs = False
        made.append(1, 10)
        await settled()
        status = made.first.status()
        assert (status.received, status.durable, status.queued_records, status.oldest_queued) == (10, 0, 10, 1)
        await made.second.ack(10, 7)
        assert made.first.status().queued_records == 3
        assert made.first.status().oldest_queued == 8
        await made.second.ack(10, 10)
        assert (made.first.queued_bytes, made.first.status().oldest_queued) == (0, None)


@pytest.mark.parametrize("mode", Mode)
async def test_reconnect_sends_exactly_the_missing(mode: Mode, autojump_clock: MockClock) -> None:
    async with rig(mode=mode) as made, trio.open_nursery() as nursery:
        made.second.syncs = False
        made.append(1, 6)
        await trio.sleep(BATCH_SECONDS * 2)
        assert made.first.received == 6
        await made.second.drop()
        assert made.first.link is LinkState.DOWN
        made.append(7, 9)
        waiting = Waiting(nursery, made.first.reached, Seq(9), Level.RECEIVED)
        await trio.sleep(3)
        assert waiting.done
        assert made.first.link is LinkState.CONNECTED
        assert seqs_of(made.second.log) == list(range(1, 10))
        assert made.first.digest_key == b"key 2"


async def test_what_the_store_lost_is_sent_again(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC) as made:
        made.second.syncs = False
        made.append(1, 6)
        await settled()
        await made.second.ack(6, 2)
        # A power cut: what was received and not synced is gone.
        await made.second.drop()
        made.second.held, made.second.log = 3, made.second.log[:3]
        await trio.sleep(3)
        assert seqs_of(made.second.log) == [1, 2, 3, 4, 5, 6]
        assert made.first.received == 6


async def test_what_became_durable_meanwhile_is_kept_when_it_is_told_of(autojump_clock: MockClock) -> None:
    levels: list[tuple[int, int]] = []
    async with trio.open_nursery() as nursery:
        made = Rig(nursery, on_progress=lambda: levels.append((made.first.kept, made.first.durable)))
        await made.first.start()
        nursery.start_soon(made.first.run)
        made.second.syncs = False
        made.append(1, 6)
        await settled()
        await made.second.drop()
        made.second.durable = 6
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    assert levels[-1] == (6, 6)
    assert all(durable <= kept for kept, durable in levels)


async def test_reconnecting_waits_longer_each_time(autojump_clock: MockClock) -> None:
    async with rig() as made:
        made.second.reachable = False
        await made.second.drop()
        tries: list[float] = []
        connect = made.second.connect

        async def counted() -> object:
            tries.append(trio.current_time())
            return await connect()

        made.first._forwarder.connect = counted  # type: ignore[assignment]
        await trio.sleep(20)
        pauses = [later - earlier for earlier, later in pairwise(tries)]
        assert pauses[0] < 0.3
        assert pauses == pytest.approx(sorted(pauses))
        assert pauses[-1] == pytest.approx(2.0)
        made.second.reachable = True
        await trio.sleep(3)
        assert made.first.link is LinkState.CONNECTED


async def test_a_full_store_keeps_everything_queued(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC) as made:
        made.second.fails_records = ErrorCode.STORE_FULL
        made.append(1, 4)
        await settled()
        assert made.first.link is LinkState.FULL
        await trio.sleep(5)
        assert made.first.link is LinkState.FULL
        assert "full" in made.first.status().error
        assert made.first.status().queued_records == 4
        made.second.fails_records = None
        await trio.sleep(3)
        assert made.first.link is LinkState.CONNECTED
        assert seqs_of(made.second.log) == [1, 2, 3, 4]


@pytest.mark.parametrize("how", ["backward", "forward", "other store"])
async def test_history_lost(how: str, autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC) as made, trio.open_nursery() as nursery:
        made.append(1, 6)
        await made.first.drain()
        made.second.acks = made.second.syncs = False
        made.append(7)
        waits = [
            Waiting(nursery, made.first.acknowledged, Seq(7)),
            Waiting(nursery, made.first.reached, Seq(7), Level.DURABLE),
        ]
        await settled()
        if how == "backward":
            made.second.held = made.second.durable = 3
        elif how == "forward":
            made.second.held = 99
        else:
            made.second.store = "another"
        await made.second.drop()
        await trio.sleep(3)
        assert made.first.link is LinkState.LOST
        assert len(made.lost) == 1
        assert all(isinstance(wait.error, HistoryLost) for wait in waits)
        for call in (made.first.room(1), made.first.acknowledged(Seq(7)), made.first.request("echo", {})):
            with pytest.raises(HistoryLost):
                await call
        with pytest.raises(HistoryLost):
            made.append(8)
        assert len(made.second.hellos) == 2


QUEUE = 64 << 10


async def fill(made: Rig, length: int = 4096) -> int:
    seq = made.first.last_seq
    while made.first.has_room(length):
        seq += 1
        made.append(seq, length=length)
    return seq


async def test_a_full_queue_waits_in_turn(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC, queue_bytes_max=QUEUE) as made, trio.open_nursery() as nursery:
        made.second.syncs = False
        last = await fill(made)
        await settled()
        assert made.first.queued_bytes <= QUEUE
        assert made.second.sync_requests == 1  # more than half of it is received and not durable
        order: list[int] = []

        async def enter(number: int) -> None:
            assert await made.first.room(4096)
            made.append(made.first.last_seq + 1, length=4096)
            order.append(number)
            assert made.first.queued_bytes <= QUEUE

        for number in range(4):
            nursery.start_soon(enter, number)
            await settled()
        assert order == []
        await made.second.ack(last, 1)
        assert order == [0]
        await made.second.ack(made.second.held, 3)
        assert order == [0, 1, 2]
        await made.second.ack(made.second.held, made.second.held)
        assert order == [0, 1, 2, 3]


async def test_leaving_the_line_lets_the_next_one_pass(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC, queue_bytes_max=QUEUE) as made, trio.open_nursery() as nursery:
        made.second.syncs = False
        last = await fill(made)
        scope = trio.CancelScope()

        async def give_up() -> None:
            with scope:
                await made.first.room(QUEUE)

        nursery.start_soon(give_up)
        await settled()
        small = Waiting(nursery, made.first.room, 4096)
        await made.second.ack(last, 2)
        assert not small.done
        scope.cancel()
        await settled()
        assert small.result is True


async def test_a_record_larger_than_the_queue_enters_an_empty_one(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC, queue_bytes_max=1000) as made:
        assert await made.first.room(4096)
        made.append(1, length=4096)
        assert not made.first.has_room(1)


async def test_a_stopped_second_appliance_stops_async_writers_only_at_the_bound(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC, queue_bytes_max=QUEUE, outage_after=10.0) as made, trio.open_nursery() as nursery:
        made.second.stop_reading()
        await fill(made)
        waiting = Waiting(nursery, made.first.room, 4096)
        await trio.sleep(5)
        assert not waiting.done
        made.second.go_on_reading()
        await trio.sleep(1)
        assert waiting.result is True


async def test_an_outage_with_continue(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC, queue_bytes_max=QUEUE, outage_after=2.0) as made, trio.open_nursery() as nursery:
        made.second.reachable = False
        await made.second.drop()
        await fill(made)
        waits = [Waiting(nursery, made.first.room, 4096) for _ in range(3)]
        await trio.sleep(1.5)
        assert not made.first.outage
        assert not any(wait.done for wait in waits)
        await trio.sleep(1.0)
        assert made.first.outage
        assert [wait.result for wait in waits] == [False] * 3
        assert await made.first.room(4096) is False
        assert not made.first.has_room(1)
        last = made.first.last_seq
        made.second.reachable = True
        await trio.sleep(3)
        assert not made.first.outage
        assert seqs_of(made.second.log) == list(range(1, last + 1))
        assert await made.first.room(4096) is True
        assert [status.outage for status in made.changes if status.link is LinkState.CONNECTED][-1] is False


async def test_sync_writers_in_an_outage_with_continue_are_released_unacknowledged(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC, outage=Outage.CONTINUE, outage_after=2.0) as made, trio.open_nursery() as nursery:
        made.second.reachable = False
        await made.second.drop()
        made.append(1)
        waiting = Waiting(nursery, made.first.acknowledged, Seq(1))
        durable = Waiting(nursery, made.first.reached, Seq(1), Level.DURABLE)
        await trio.sleep(1)
        assert not waiting.done
        await trio.sleep(2)
        assert waiting.done
        assert waiting.result is False
        assert not durable.done
        made.append(2)
        assert await made.first.acknowledged(Seq(2)) is False
        made.second.reachable = True
        await trio.sleep(3)
        assert seqs_of(made.second.log) == [1, 2]
        assert durable.done


async def test_sync_blocks_in_an_outage_by_default(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC, outage_after=2.0) as made, trio.open_nursery() as nursery:
        made.second.acks = False
        made.append(1)
        waiting = Waiting(nursery, made.first.acknowledged, Seq(1))
        await trio.sleep(60)
        assert made.first.outage  # connected, and no progress
        assert made.first.link is LinkState.CONNECTED
        assert not waiting.done
        await made.second.ack(1)
        assert waiting.result is True
        assert not made.first.outage


async def test_an_outage_with_fail(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC, outage=Outage.FAIL, outage_after=2.0) as made, trio.open_nursery() as nursery:
        made.second.reachable = False
        await made.second.drop()
        made.append(1)
        waiting = Waiting(nursery, made.first.acknowledged, Seq(1))
        await trio.sleep(3)
        assert isinstance(waiting.error, OutageError)
        with pytest.raises(OutageError):
            await made.first.room(1)
        with pytest.raises(OutageError):
            await made.first.acknowledged(Seq(1))
        made.second.reachable = True
        await trio.sleep(3)
        assert seqs_of(made.second.log) == [1]
        assert await made.first.room(1)


async def test_an_idle_link_is_no_outage(autojump_clock: MockClock) -> None:
    async with rig(outage_after=1.0) as made:
        made.append(1)
        await made.first.drain()
        await trio.sleep(100)
        assert not made.first.outage


async def test_switching_modes_under_load_keeps_order(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.ASYNC) as made, trio.open_nursery() as nursery:
        last = 0

        async def writer() -> None:
            nonlocal last
            for _ in range(60):
                assert await made.first.room(8)
                last += 1
                seq = last
                made.append(seq)
                assert await made.first.acknowledged(Seq(seq))
                await trio.sleep(0.001)

        async with trio.open_nursery() as load:
            for _ in range(4):
                load.start_soon(writer)
            for mode in (Mode.BATCH, Mode.SYNC, Mode.BATCH, Mode.ASYNC, Mode.SYNC):
                await trio.sleep(0.01)
                made.first.switch_mode(mode)
                assert made.first.mode is mode
                if mode is Mode.BATCH:
                    await made.second.drop()
        await made.first.drain()
        assert seqs_of(made.second.log) == list(range(1, 241))
        assert any(isinstance(record, Aggregate) for record in made.second.log)
        nursery.cancel_scope.cancel()


async def test_compares(autojump_clock: MockClock) -> None:
    async with rig() as made:
        made.first.append(Compare(Seq(1), TimeNs(1), RUN, DISK, 0, bytes(48)))
        assert await made.first.compared(Seq(1)) == b"\0\0\1"
        with pytest.raises(LocalProtocolError):
            await made.first.compared(Seq(1))


async def test_compares_do_not_outlive_their_session(autojump_clock: MockClock) -> None:
    async with rig() as made, trio.open_nursery() as nursery:
        made.second.stop_reading()
        made.append(1)
        await settled()
        made.first.append(Compare(Seq(2), TimeNs(2), RUN, DISK, 0, bytes(16)))
        result = Waiting(nursery, made.first.compared, Seq(2))
        await settled()
        await made.second.drop()
        made.second.held, made.second.log = 0, []
        assert isinstance(result.error, LinkReset)
        made.first.append(Compare(Seq(3), TimeNs(3), RUN, DISK, 0, bytes(16)))
        with pytest.raises(LinkReset):
            await made.first.compared(Seq(3))
        made.second.go_on_reading()
        await trio.sleep(3)
        assert made.second.log == [write(1), Heartbeat(Seq(2), TimeNs(2), RUN), Heartbeat(Seq(3), TimeNs(3), RUN)]


async def test_requests(autojump_clock: MockClock) -> None:
    async with rig() as made, trio.open_nursery() as nursery:
        assert await made.first.request("echo", {"a": [1, None]}) == {"a": [1, None]}
        with pytest.raises(RequestRefused, match="says the test"):
            await made.first.request("refuse", {})
        silent = Waiting(nursery, made.first.request, "silent", {})
        await settled()
        made.second.reachable = False
        await made.second.drop()
        assert isinstance(silent.error, LinkReset)
        with pytest.raises(LinkDown):
            await made.first.request("echo", {})


async def test_many_requests_wait_for_their_turn(autojump_clock: MockClock) -> None:
    async with rig() as made, trio.open_nursery() as nursery:
        waits = [Waiting(nursery, made.first.request, "echo", {"n": number}) for number in range(200)]
        await settled()
        assert [wait.result for wait in waits] == [{"n": number} for number in range(200)]


async def test_a_bad_record_is_refused_and_not_taken(autojump_clock: MockClock) -> None:
    async with rig() as made:
        with pytest.raises(LocalProtocolError):
            made.first.append(Write(Seq(1), TimeNs(1), RUN, Extent(DISK, 0, b"")))
        made.append(1)
        await made.first.drain()
        assert seqs_of(made.second.log) == [1]
