"""The range lock against its rule: a claim is held exactly when no earlier conflicting claim is still there."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.types import BLOCK_BYTES, VolumeId
from fusefs.range_lock import Claim, ClaimState, RangeLock

ONE, TWO = VolumeId(1), VolumeId(2)


def held(claim: Claim | None) -> Claim:
    assert claim is not None and claim.state is ClaimState.HELD
    return claim


def test_writes_to_different_blocks_do_not_wait() -> None:
    lock = RangeLock()
    first = held(lock.try_claim(ONE, 0, BLOCK_BYTES))
    second = held(lock.try_claim(ONE, BLOCK_BYTES, 1))
    other = held(lock.try_claim(TWO, 0, BLOCK_BYTES))
    for claim in (first, second, other):
        lock.release(claim)
    assert lock.idle


def test_claims_are_rounded_to_blocks() -> None:
    lock = RangeLock()
    held(lock.try_claim(ONE, 10, 1))
    assert lock.try_claim(ONE, 4000, 1) is None
    assert lock.try_claim(ONE, 4095, 2) is None
    assert lock.try_claim(ONE, 0, 0) is None
    claim = held(lock.try_claim(ONE, 5000, 4000))
    assert (claim.start, claim.end) == (4096, 12288)


def test_a_claim_is_released_once() -> None:
    lock = RangeLock()
    claim = held(lock.try_claim(ONE, 0, 1))
    lock.release(claim)
    with pytest.raises(RuntimeError, match="released"):
        lock.release(claim)


async def test_no_checkpoint_without_conflict() -> None:
    lock = RangeLock()
    with trio.CancelScope() as scope:
        scope.cancel()  # any checkpoint would raise Cancelled
        lock.release(await lock.claim(ONE, 0, 1))
        lock.release(await lock.claim_volume(ONE))
        lock.release(await lock.claim_all())
    assert not scope.cancelled_caught and lock.idle


async def test_a_volume_is_claimed_to_any_size() -> None:
    lock = RangeLock()
    claim = await lock.claim_volume(ONE)
    assert lock.try_claim(ONE, (1 << 50) - 1, 2) is None
    lock.release(held(lock.try_claim(TWO, 0, 1)))
    lock.release(claim)


async def test_the_group_waits_for_all_and_all_wait_for_the_group(autojump_clock: trio.testing.MockClock) -> None:
    lock = RangeLock()
    order: list[str] = []

    async def take(name: str, claim: Claim) -> None:
        order.append(name)
        await trio.sleep(1)
        lock.release(claim)

    async def group() -> None:
        await take("group", await lock.claim_all())

    async def late() -> None:
        await take("late", await lock.claim(TWO, 0, 1))

    first = held(lock.try_claim(ONE, 0, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(late)
        await trio.testing.wait_all_tasks_blocked()
        assert order == []  # the late write conflicts with nothing held, but the group came first
        assert lock.try_claim(TWO, 0, 1) is None
        lock.release(first)
    assert order == ["group", "late"] and lock.idle


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    lock = RangeLock()
    first = await lock.claim(ONE, 0, 1)
    scope = trio.CancelScope()
    got: list[Claim] = []

    async def cancelled() -> None:
        with scope:
            await lock.claim_all()

    async def behind() -> None:
        got.append(await lock.claim(TWO, 0, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancelled)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(behind)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        scope.cancel()
    assert scope.cancelled_caught and len(got) == 1
    lock.release(got[0])
    lock.release(first)
    assert lock.idle


async def test_granted_and_cancelled_at_once_holds_nothing() -> None:
    lock = RangeLock()
    first = await lock.claim(ONE, 0, 1)
    scope = trio.CancelScope()

    async def waiter() -> None:
        with scope:
            lock.release(await lock.claim(ONE, 0, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        lock.release(first)  # grants the claim whose task has yet to see the cancellation
    assert lock.idle


@dataclass
class Slot:
    """One claim of the property test, with the task that waits for it."""

    volume: VolumeId | None
    first: int
    last: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    claim: Claim | None = None

    def conflicts(self, other: Slot) -> bool:
        if self.volume is None or other.volume is None:
            return True
        return self.volume == other.volume and self.first <= other.last and other.first <= self.last


_range = st.tuples(st.just("range"), st.sampled_from([ONE, TWO]), st.integers(0, 5), st.integers(0, 2))
_volume = st.tuples(st.just("volume"), st.sampled_from([ONE, TWO]), st.just(0), st.just(0))
_all = st.tuples(st.just("all"), st.none(), st.just(0), st.just(0))
_end = st.tuples(st.just("end"), st.none(), st.integers(0, 20), st.just(0))
Step = tuple[str, VolumeId | None, int, int]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(_range, _range, _volume, _all, _end, _end), max_size=30))
def test_exclusive_and_fair(steps: list[Step]) -> None:
    trio.run(_follow, steps)


async def _follow(steps: list[Step]) -> None:
    lock = RangeLock()
    model: list[Slot] = []  # every claim that is held or waiting, in the order they were made

    async def hold(slot: Slot, kind: str) -> None:
        with slot.scope:
            if kind == "all" or slot.volume is None:
                slot.claim = await lock.claim_all()
            elif kind == "volume":
                slot.claim = await lock.claim_volume(slot.volume)
            else:
                offset, length = slot.first * BLOCK_BYTES + 7, (slot.last - slot.first) * BLOCK_BYTES + 5
                slot.claim = await lock.claim(slot.volume, offset, length)

    async with trio.open_nursery() as nursery:
        for kind, volume, number, extra in [*steps, *[("end", None, 0, 0)] * len(steps)]:
            if kind == "end" and model:
                slot = model.pop(number % len(model))
                if slot.claim is not None:
                    lock.release(slot.claim)
                else:
                    slot.scope.cancel()
            elif kind != "end":
                last = 1 << 40 if kind == "volume" else number + extra
                slot = Slot(volume, number, last)
                model.append(slot)
                nursery.start_soon(hold, slot, kind)
            await trio.testing.wait_all_tasks_blocked()
            for index, slot in enumerate(model):
                free = not any(slot.conflicts(earlier) for earlier in model[:index])
                assert (slot.claim is not None) == free
    assert lock.idle
