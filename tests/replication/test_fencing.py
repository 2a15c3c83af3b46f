"""One agent feeds a group: others are refused, or take it over, and who was fenced is told so, for good."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from dedup.errors import StoreFull
from dedup.types import Epoch, Heartbeat, Seq, TimeNs
from replication.errors import Fenced, HistoryLost
from replication.first_appliance import FirstAppliance
from replication.messages import ErrorCode, Failure, Message, Welcome
from replication.modes import Mode
from replication.status import LinkState
from tests.replication.fake_store import FakeStore
from tests.replication.scripted_second import ScriptedSecond
from tests.replication.test_second_appliance import RUN, Peer, World, beat, quick_syncs, running

__all__ = ["quick_syncs"]


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def refused(answer: Message | None, code: ErrorCode, *words: str) -> None:
    assert isinstance(answer, Failure), answer
    assert answer.code is code, answer
    assert "\n" not in answer.text
    assert all(word in answer.text for word in words), answer.text


async def hello(world: World, agent: str, epoch: int, *, take_over: bool = False) -> tuple[Peer, Message | None]:
    peer = await world.connect()
    return peer, await peer.greet(epoch=epoch, agent=agent, take_over=take_over)


async def test_the_first_agent_that_comes_owns_the_group(store: FakeStore) -> None:
    async with running(store) as world:
        await hello(world, "first", 1)
        assert store.group("g").owners == ("first",)
        _, answer = await hello(world, "first", 2)
        assert isinstance(answer, Welcome)
        assert store.group("g").owners == ("first",)


async def test_another_agent_is_refused_and_told_what_to_do(store: FakeStore) -> None:
    store.group("g").owners = ("first",)
    async with running(store) as world:
        _, answer = await hello(world, "other", 9)
        refused(answer, ErrorCode.REFUSED, "first", "other", "'g'", "--take-over", "--name")
    assert store.group("g").owners == ("first",)


async def test_another_agent_takes_over_and_the_first_is_fenced_for_good(store: FakeStore) -> None:
    async with running(store) as world:
        first, _ = await hello(world, "first", 1)
        _, answer = await hello(world, "other", 2, take_over=True)
        assert isinstance(answer, Welcome)
        assert store.group("g").owners == ("first", "other")
        refused(await first.hear(), ErrorCode.FENCED, "other", "taken over", "'g'")
        for epoch in (1, 2, 3):  # connecting again, or as a new start
            _, answer = await hello(world, "first", epoch)
            refused(answer, ErrorCode.FENCED, "other", "--take-over")
        _, answer = await hello(world, "first", 3, take_over=True)
        assert isinstance(answer, Welcome)
    assert store.group("g").owners == ("other", "first")


async def test_a_link_that_comes_back_takes_nothing_over_a_second_time(store: FakeStore) -> None:
    """Every connection of an agent says take_over: the epoch tells that this one is over."""
    async with running(store) as world:
        await hello(world, "first", 1)
        await hello(world, "other", 2, take_over=True)
        await hello(world, "first", 3, take_over=True)
        _, answer = await hello(world, "other", 2, take_over=True)
        refused(answer, ErrorCode.FENCED, "epoch 3")


async def test_two_that_take_over_in_one_epoch_do_not_take_turns(store: FakeStore) -> None:
    """Both asked for the store's epoch before either had begun its own: the one that came first has it."""
    async with running(store) as world:
        await hello(world, "first", 1)
        one, _ = await hello(world, "one", 2, take_over=True)
        await one.connection.aclose()
        _, answer = await hello(world, "other", 2, take_over=True)
        refused(answer, ErrorCode.REFUSED, "epoch 2")
        _, answer = await hello(world, "one", 2, take_over=True)
        assert isinstance(answer, Welcome), "its own link broke"
    assert store.group("g").owners == ("first", "one")


async def test_nobody_is_put_out_by_one_who_is_refused(store: FakeStore) -> None:
    async with running(store) as world:
        first = await world.feeding()
        _, answer = await hello(world, "other", 9)
        refused(answer, ErrorCode.REFUSED)
        _, answer = await hello(world, "other", 1, take_over=True)
        refused(answer, ErrorCode.REFUSED)  # of the same epoch: the first one would have to end by itself
        await first.say(beat(3))
        await first.hear_ack(3)
    assert store.group("g").held == 3


async def test_two_starts_of_one_agent_the_newer_feeds(store: FakeStore) -> None:
    """A state directory that was copied."""
    async with running(store) as world:
        first, _ = await hello(world, "same", 1)
        _, answer = await hello(world, "same", 2)
        assert isinstance(answer, Welcome)
        refused(await first.hear(), ErrorCode.FENCED, "a newer start")
        _, answer = await hello(world, "same", 1)
        refused(answer, ErrorCode.FENCED, "epoch 2")


async def test_an_owner_that_cannot_be_written_is_none(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    group = store.group("g")

    def full(agent: str) -> None:
        raise StoreFull("the disk under the store is full")

    monkeypatch.setattr(group, "set_owner", full)
    async with running(store) as world:
        _, answer = await hello(world, "first", 1)
        refused(answer, ErrorCode.STORE_FULL)
        monkeypatch.undo()
        _, answer = await hello(world, "first", 1)
        assert isinstance(answer, Welcome)


# -- the fenced agent's side -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["in its session", "connecting again"])
async def test_a_fenced_agent_stops_for_good(when: str, autojump_clock: trio.testing.MockClock) -> None:
    lost: list[HistoryLost] = []
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery)
        first = FirstAppliance(
            second.connect, group="g", epoch=Epoch(1), agent="a", mode=Mode.SYNC, on_lost=lost.append
        )
        await first.start()
        nursery.start_soon(first.run)
        if when == "in its session":
            second.fails_records = ErrorCode.FENCED
        else:
            second.refuses = ErrorCode.FENCED
            await second.drop()
        first.append(Heartbeat(Seq(1), TimeNs(1), RUN))
        with pytest.raises(Fenced):
            await first.acknowledged(Seq(1))
        assert first.link is LinkState.LOST
        assert [type(error) for error in lost] == [Fenced]
        assert first.status().error
        hellos = len(second.hellos)
        await trio.sleep(60)
        assert len(second.hellos) == hellos, "it does not come again"
        with pytest.raises(Fenced):
            first.append(Heartbeat(Seq(2), TimeNs(1), RUN))
        with pytest.raises(Fenced):
            await first.room(1)
        nursery.cancel_scope.cancel()
