"""Auto: sync while the round trip is short, async beyond, and back; nothing is lost or changes its place."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from dedup.types import Seq
from replication.messages import Level, Mode
from replication.modes import AUTO_BACK, AUTO_LIMIT_SECONDS, AUTO_REST_SECONDS, AutoMode, Outage
from tests.replication.test_first_appliance import Rig, Waiting, rig, seqs_of

LIMIT = AUTO_LIMIT_SECONDS
FAR, NEAR = 3 * LIMIT, LIMIT / 10


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_changes_beyond_the_limit_and_goes_back_well_below_it_after_a_rest() -> None:
    clock = Clock()
    policy = AutoMode(clock)
    assert (policy.write_waits_for, policy.flush_waits_for) == (Level.RECEIVED, Level.DURABLE)
    assert policy.patience_seconds == LIMIT
    assert not any(policy.observe(LIMIT) for _ in range(1000))
    assert any(policy.observe(2 * LIMIT) for _ in range(20))
    assert (policy.write_waits_for, policy.flush_waits_for) == (Level.QUEUED, Level.QUEUED)
    assert policy.patience_seconds is None
    # Neither a round trip that is a little shorter again, nor a short one too soon.
    clock.now += 2 * AUTO_REST_SECONDS
    assert not any(policy.observe(LIMIT * AUTO_BACK * 1.1) for _ in range(1000))
    assert any(policy.observe(NEAR) for _ in range(100))
    assert any(policy.observe(FAR) for _ in range(100))
    clock.now += AUTO_REST_SECONDS / 2
    assert not any(policy.observe(NEAR) for _ in range(1000))
    clock.now += AUTO_REST_SECONDS / 2
    assert policy.observe(NEAR)
    assert policy.write_waits_for is Level.RECEIVED


def test_one_slow_answer_is_no_reason() -> None:
    policy = AutoMode(Clock())
    for _ in range(100):
        policy.observe(NEAR)
    assert not policy.observe(5 * LIMIT)
    assert not any(policy.observe(NEAR) for _ in range(100))
    assert policy.write_waits_for is Level.RECEIVED


async def write(made: Rig, seq: int) -> float:
    """Records it as an agent does; how long it had to wait."""
    assert await made.first.room(8)
    began = trio.current_time()
    made.append(seq)
    assert await made.first.acknowledged(Seq(seq))
    return trio.current_time() - began


async def test_writes_wait_while_the_link_is_fast_and_no_longer_than_the_limit(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.AUTO) as made:
        made.second.delay = NEAR
        for seq in range(1, 50):
            assert await write(made, seq) > 0.99 * NEAR
            assert made.first.received == seq
        assert made.first.status().waits_for is Level.RECEIVED
        made.second.delay = FAR
        waits = [await write(made, seq) for seq in range(50, 100)]
        assert max(waits) <= LIMIT * 1.01 and waits[-1] == 0
        assert made.first.status().waits_for is Level.QUEUED
        assert made.first.mode is Mode.AUTO
        await made.first.drain()
        made.second.delay = NEAR
        seq = 99
        while made.first.status().waits_for is Level.QUEUED:
            seq += 1
            assert seq < 2000
            await write(made, seq)
            await trio.sleep(0.1)
        assert await write(made, seq + 1) > 0.99 * NEAR
        assert seqs_of(made.second.log) == list(range(1, seq + 2))


async def test_an_fsync_waits_until_it_becomes_async(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.AUTO) as made, trio.open_nursery() as nursery:
        made.second.syncs = False
        made.append(1)
        flush = Waiting(nursery, made.first.flushed, Seq(1))
        await trio.sleep(1)
        assert not flush.done
        made.second.delay = FAR
        for seq in range(2, 40):
            await write(made, seq)
        await trio.testing.wait_all_tasks_blocked()
        assert flush.done and flush.result is True
        nursery.cancel_scope.cancel()


async def test_without_a_link_a_write_waits_for_the_limit_at_most(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.AUTO, outage_after=10.0) as made:
        assert made.first.outage_policy is Outage.CONTINUE
        made.second.reachable = False
        await made.second.drop()
        waits = [await write(made, seq) for seq in range(1, 30)]
        assert max(waits) <= LIMIT * 1.01 and waits[-1] == 0
        made.second.reachable = True
        await made.first.drain()
        assert seqs_of(made.second.log) == list(range(1, 30))


async def test_auto_among_the_other_modes_under_load(autojump_clock: MockClock) -> None:
    async with rig(mode=Mode.SYNC) as made:
        last = 0

        async def writer() -> None:
            nonlocal last
            for _ in range(80):
                assert await made.first.room(8)
                last += 1
                seq = last
                made.append(seq)
                assert await made.first.acknowledged(Seq(seq))
                await trio.sleep(0.001)

        async with trio.open_nursery() as load:
            for _ in range(4):
                load.start_soon(writer)
            for delay, mode in (
                (NEAR, Mode.AUTO),
                (FAR, Mode.AUTO),
                (0, Mode.BATCH),
                (NEAR, Mode.AUTO),
                (0, Mode.ASYNC),
            ):
                made.second.delay = delay
                made.first.switch_mode(mode)
                await trio.sleep(0.05)
        made.second.delay = 0
        await made.first.drain()
        assert seqs_of(made.second.log) == list(range(1, 321))
