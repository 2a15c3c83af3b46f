"""Offers over a link: in batch mode, blocks that the second appliance has do not cross the wire."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from dedup.group_writer import GroupWriter
from dedup.layout import CONTAINERS_NAME, RAW_SLOTS_OFFSET
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    Aggregate,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from replication.first_appliance import FirstAppliance
from replication.messages import (
    Ack,
    ErrorCode,
    Failure,
    Level,
    Message,
    Mode,
    Offer,
    Remainder,
    Wanted,
)
from replication.offering import OFFER_BLOCKS_MIN, REST_EVERY, WINDOW, Habit
from replication.offers import named_by, offer_of, remainder, whole_blocks
from replication.session import OFFERS_OPEN_MAX, Session
from replication.status import LinkState
from replication.transport import memory_pair, socket_pair
from replication.wire import encode
from tests.replication.scripted_second import ScriptedSecond
from tests.replication.test_second_appliance import ONE, RUN, Peer, World, running

BLOCKS = 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield from _opened(tmp_path / "store")


def _opened(path: Path) -> Iterator[Store]:
    Store.create(path)
    opened = Store.open(path)
    yield opened
    opened.close()


def extents_of(*placed: tuple[int, bytes]) -> tuple[Extent, ...]:
    return tuple(Extent(ONE, offset, data) for offset, data in placed)


def aggregate(first: int, *placed: tuple[int, bytes]) -> Aggregate:
    return Aggregate(Seq(first), Seq(first + 1), TimeNs(first), RUN, extents_of(*placed))


class Feeder:
    """An agent in batch mode whose writes a model follows."""

    def __init__(self, first: FirstAppliance) -> None:
        self.first = first
        self.model = bytearray(BLOCKS * BLOCK_BYTES)

    @property
    def seq(self) -> Seq:
        return Seq(self.first.last_seq + 1)

    def begin(self) -> None:
        self.first.append(EpochStart(self.seq, TimeNs(1), RUN, Epoch(1), True))
        self.first.append(Create(self.seq, TimeNs(1), RUN, ONE, "disk", len(self.model), 0o600, 0, 0))

    def write(self, offset: int, data: bytes) -> None:
        self.first.append(Write(self.seq, TimeNs(self.seq), RUN, Extent(ONE, offset, data)))
        self.model[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.first.append(Flush(self.seq, TimeNs(self.seq), RUN, ONE))


@asynccontextmanager
async def feeding(world: World, offers: bool | None = True) -> AsyncIterator[Feeder]:
    async def connect() -> object:
        ours, theirs = memory_pair()
        await world.channel.send(theirs)
        return ours

    async with trio.open_nursery() as nursery:
        first = FirstAppliance(
            connect,  # type: ignore[arg-type]
            group="g",
            epoch=Epoch(1),
            agent="a",
            mode=Mode.BATCH,
            offers=offers,
        )
        await first.start()
        nursery.start_soon(first.run)
        feeder = Feeder(first)
        feeder.begin()
        yield feeder
        await first.drain()
        nursery.cancel_scope.cancel()


def content(group: GroupWriter) -> bytes:
    return b"".join(group.head_block(ONE, number) for number in range(BLOCKS))


# -- both ends -------------------------------------------------------------------------------------------------------


async def wire_bytes(path: Path, offers: bool) -> int:
    """Content that is written, and again elsewhere, as a journal and a checkpoint do."""
    pages = [Random(number).randbytes(BLOCK_BYTES) for number in range(24)]
    for store in _opened(path):
        async with running(store) as world:  # type: ignore[arg-type]
            async with feeding(world, offers) as feeder:
                for base in (0, 32):
                    for number, page in enumerate(pages):
                        feeder.write((base + number) * BLOCK_BYTES, page)
                    feeder.flush()
                    await feeder.first.drain()
                status = feeder.first.status()
            assert content(store.group("g")) == feeder.model
            assert (status.saved_bytes > 20 * BLOCK_BYTES) == offers
    return status.sent_bytes


async def test_what_is_there_does_not_cross_the_wire(tmp_path: Path) -> None:
    without = await wire_bytes(tmp_path / "without", False)
    with_offers = await wire_bytes(tmp_path / "with", True)
    assert without > 48 * BLOCK_BYTES
    assert with_offers < without * 0.6


async def test_no_offers_within_a_host() -> None:
    near, far = socket_pair()
    async with near, far:
        assert near.is_local
    ours, theirs = memory_pair()
    async with ours, theirs:
        assert not ours.is_local


pages = st.integers(0, 5)
steps = st.lists(
    st.one_of(
        st.tuples(st.integers(0, BLOCKS - 16), st.integers(0, 4095), st.lists(pages, min_size=1, max_size=14)),
        st.sampled_from(["flush", "drain"]),
    ),
    min_size=1,
    max_size=40,
)


@given(steps)
@settings(max_examples=25, deadline=None)
def test_the_store_equals_the_model(done: list[object]) -> None:
    """Few kinds of pages, at any offset, many of them aligned: of an aggregate's blocks some are held, some are not."""
    kinds = [Random(number).randbytes(BLOCK_BYTES) for number in range(5)] + [bytes(BLOCK_BYTES)]

    async def history(store: Store) -> None:
        async with running(store) as world:  # type: ignore[arg-type]
            async with feeding(world) as feeder:
                for step in done:
                    match step:
                        case "flush":
                            feeder.flush()
                        case "drain":
                            await feeder.first.drain()
                        case (block, skew, chosen):
                            skew = skew if skew % 3 == 0 else 0  # type: ignore[operator]
                            data = b"".join(kinds[kind] for kind in chosen)  # type: ignore[attr-defined]
                            feeder.write(block * BLOCK_BYTES + skew, data)  # type: ignore[operator]
            assert content(store.group("g")) == feeder.model

    with TemporaryDirectory() as directory:
        for store in _opened(Path(directory) / "store"):
            trio.run(history, store)


# -- the second appliance --------------------------------------------------------------------------------------------


class Agent:
    """A client that offers by hand."""

    def __init__(self, peer: Peer, held: int) -> None:
        assert peer.welcome is not None
        self.peer = peer
        self.key = peer.welcome.digest_key
        self.next = held + 1

    async def hear_wanted(self) -> Wanted:
        while not isinstance(message := await self.peer.hear(), Wanted):
            assert isinstance(message, Ack), message
        return message

    async def offers(self, made: Aggregate) -> bytes:
        await self.peer.say(offer_of(made, whole_blocks(made), self.key))
        return (await self.hear_wanted()).missing

    async def sends(self, made: Aggregate, missing: bytes | None = None) -> None:
        await self.peer.say(made if missing is None else remainder(made, missing))
        await self.peer.hear_ack(made.seq)


async def agent(world: World, group: str = "g") -> Agent:
    return Agent(await world.feeding(group, blocks=BLOCKS), 2)


def random_blocks(count: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(count * BLOCK_BYTES)


async def test_held_blocks_are_filled_in(store: Store) -> None:
    data = random_blocks(8)
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world)
        first = aggregate(3, (0, data))
        assert await one.offers(first) == b"\1" * 8
        await one.sends(first)
        mixed = data[: 3 * BLOCK_BYTES] + random_blocks(2, seed=1) + bytes(BLOCK_BYTES)
        second = aggregate(5, (32 * BLOCK_BYTES - 100, b"x" * 100 + mixed + b"y" * 100))
        assert await one.offers(second) == b"\0\0\0\1\1\0"
        await one.sends(second, b"\0\0\0\1\1\0")
        expected = bytearray(BLOCKS * BLOCK_BYTES)
        expected[: len(data)] = data
        at = 32 * BLOCK_BYTES - 100
        expected[at : at + len(mixed) + 200] = b"x" * 100 + mixed + b"y" * 100
        assert content(store.group("g")) == expected


async def test_neither_fingerprint_nor_digest_alone_is_enough(store: Store) -> None:
    data, other = random_blocks(2), random_blocks(2, seed=1)
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world)
        await one.sends(aggregate(3, (0, data)))
        made, lie = aggregate(5, (8 * BLOCK_BYTES, data)), aggregate(5, (8 * BLOCK_BYTES, other))
        marks, digests = named_by(offer_of(made, whole_blocks(made), one.key))
        false_marks, false_digests = named_by(offer_of(lie, whole_blocks(lie), one.key))
        await one.peer.say(Offer(Seq(6), marks[0] + false_digests[0] + false_marks[1] + digests[1]))
        assert (await one.hear_wanted()).missing == b"\1\1"
        # A digest with another session's key proves nothing.
        await one.peer.say(replace(offer_of(made, whole_blocks(made), b"another key"), seq=Seq(7)))
        assert (await one.hear_wanted()).missing == b"\1\1"


async def test_another_groups_blocks_are_not_told(store: Store) -> None:
    data = random_blocks(8)
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world, "one")
        await one.sends(aggregate(3, (0, data)))
        assert await one.offers(aggregate(5, (0, data))) == bytes(8)
        two = await agent(world, "two")
        made = aggregate(3, (0, data))
        assert await two.offers(made) == b"\1" * 8
        await two.sends(made)
        # It has sent them itself: they are its own now, wherever they lie.
        assert await two.offers(aggregate(5, (0, data))) == bytes(8)


async def test_what_a_group_held_before_is_known_after_a_restart(tmp_path: Path) -> None:
    mine, theirs = random_blocks(8), random_blocks(8, seed=1)
    for store in _opened(tmp_path / "store"):
        async with running(store) as world:  # type: ignore[arg-type]
            for name, data in (("one", mine), ("two", theirs)):
                await (await agent(world, name)).sends(aggregate(3, (0, data)))
    reopened = Store.open(tmp_path / "store")
    try:
        async with running(reopened) as world:  # type: ignore[arg-type]
            peer = await world.agent("one", epoch=2)
            one = Agent(peer, 4)
            assert await one.offers(aggregate(5, (0, mine), (16 * BLOCK_BYTES, theirs))) == bytes(8) + b"\1" * 8
    finally:
        reopened.close()


async def test_a_damaged_block_is_asked_for_and_healed(store: Store) -> None:
    data = random_blocks(4)
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world)
        await one.sends(aggregate(3, (0, data)))
        (container,) = sorted((store.path / CONTAINERS_NAME).iterdir())
        with container.open("r+b") as file:
            at = RAW_SLOTS_OFFSET + BLOCK_BYTES + 7
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
        again = aggregate(5, (8 * BLOCK_BYTES, data))
        assert await one.offers(again) == b"\0\1\0\0"
        await one.sends(again, b"\0\1\0\0")
        assert content(store.group("g"))[8 * BLOCK_BYTES : 12 * BLOCK_BYTES] == data


async def test_an_offer_may_come_to_nothing(store: Store) -> None:
    data = random_blocks(4)
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world)
        await one.sends(aggregate(3, (0, data)))
        for first in (5, 7, 9):
            made = aggregate(first, (0, data))
            assert await one.offers(made) == bytes(4)
            await one.sends(made)  # whole, all the same
        await one.peer.say(replace(offer_of(made, whole_blocks(made), one.key), seq=Seq(30)))
        assert (await one.hear_wanted()).seq == 30


@pytest.mark.parametrize("seed", range(12))
async def test_a_remainder_of_lies_ends_its_session_only(store: Store, seed: int) -> None:
    random = Random(seed)
    data = random_blocks(6, seed)
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world)
        await one.sends(aggregate(3, (0, data)))
        made = aggregate(5, (100, b"z" * (BLOCK_BYTES - 100) + data))
        missing = await one.offers(made)
        assert missing == bytes(6)
        rest = remainder(made, bytes(random.choice(b"\0\1") for _ in range(5)) + b"\1")
        piece = rest.pieces[0]
        lies = (
            rest,
            replace(rest, pieces=(replace(piece, data_bytes=piece.data_bytes + random.randint(1, 9000)),)),
            replace(rest, pieces=(replace(piece, offset=random.randint(1, 9000)), piece)),
            replace(remainder(made, missing), data=bytes(random.randint(4000, 9000))),
        )
        await one.peer.say_raw(b"".join(encode(lies[seed % len(lies)])))
        while isinstance(answer := await one.peer.hear(), Ack):
            pass
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL, answer
        assert store.group("g").held == 4
        again = await world.agent(epoch=2)
        assert again.welcome is not None and again.welcome.held == 4


async def test_a_remainder_without_an_offer_is_refused(store: Store) -> None:
    async with running(store) as world:  # type: ignore[arg-type]
        one = await agent(world)
        await one.peer.say_raw(b"".join(encode(remainder(aggregate(3, (0, b"x" * 4096)), b"\1"))))
        answer = await one.peer.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL


# -- the first appliance ---------------------------------------------------------------------------------------------


class Questioned(ScriptedSecond):
    """Collects offers; the test answers."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.offers: list[Offer] = []

    async def _handle(self, session: Session, message: Message) -> None:
        if isinstance(message, Offer):
            self.offers.append(message)
        else:
            await super()._handle(session, message)


@asynccontextmanager
async def questioned() -> AsyncIterator[tuple[Questioned, FirstAppliance]]:
    async with trio.open_nursery() as nursery:
        second = Questioned(nursery)
        first = FirstAppliance(second.connect, group="g", epoch=Epoch(1), agent="a", mode=Mode.BATCH)
        await first.start()
        nursery.start_soon(first.run)
        yield second, first
        nursery.cancel_scope.cancel()


def append(first: FirstAppliance, seed: int, blocks: int = OFFER_BLOCKS_MIN) -> None:
    """An aggregate of two writes and the flush that closes it: three records."""
    for at, count in ((0, 1), (1, blocks - 1)):
        seq = Seq(first.last_seq + 1)
        first.append(Write(seq, TimeNs(seq), RUN, Extent(ONE, at * BLOCK_BYTES, random_blocks(count, seed * 2 + at))))
    seq = Seq(first.last_seq + 1)
    first.append(Flush(seq, TimeNs(seq), ClockRun(0), VolumeId(1)))


def seqs(log: Sequence[Any]) -> list[int]:
    return [message.seq for message in log]


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_offers_go_ahead_and_nothing_overtakes_them(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):
        for seed in range(6):
            append(first, seed)
        await settled()
        assert [offer.seq for offer in second.offers] == [2, 5, 8, 11]
        assert len(second.offers) == OFFERS_OPEN_MAX
        assert second.log == []
        await second.say(Wanted(Seq(5), b"\0" * OFFER_BLOCKS_MIN))
        await settled()
        assert second.log == []
        await second.say(Wanted(Seq(2), b"\1\0" * (OFFER_BLOCKS_MIN // 2)))
        await settled()
        assert seqs(second.log) == [2, 3, 5, 6]
        whole, _, empty, _ = cast(list[object], second.log)
        assert isinstance(whole, Remainder) and len(whole.data) == OFFER_BLOCKS_MIN // 2 * BLOCK_BYTES
        assert isinstance(empty, Remainder) and not empty.data
        assert [offer.seq for offer in second.offers[4:]] == [14, 17]
        await second.say(Wanted(Seq(8), b"\1" * OFFER_BLOCKS_MIN))
        await settled()
        assert isinstance(second.log[4], Aggregate)
        assert seqs(second.log)[4:] == [8, 9]


async def test_a_request_and_a_sync_pass_an_open_offer(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):
        append(first, 0, blocks=2)
        await settled()
        append(first, 1)
        await settled()
        assert seqs(second.log) == [2, 3] and len(second.offers) == 1
        assert await first.request("echo", {"said": 1}) == {"said": 1}
        await first.reached(Seq(3), Level.DURABLE)
        assert second.sync_requests == 1


async def test_a_new_session_sends_them_whole_or_offers_anew(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):
        append(first, 0)
        await settled()
        (before,) = second.offers
        await second.drop()
        await trio.sleep(5)
        assert first.link is LinkState.CONNECTED
        assert len(second.offers) == 2
        again = second.offers[1]
        assert again.seq == before.seq
        assert named_by(again)[0] == named_by(before)[0]
        assert named_by(again)[1] != named_by(before)[1], "each session has its key"
        await second.say(Wanted(again.seq, b"\0" * OFFER_BLOCKS_MIN))
        await settled()
        assert seqs(second.log) == [2, 3]


async def test_a_peer_that_never_answers_is_an_outage(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):
        append(first, 0)
        await trio.sleep(60)
        assert len(second.offers) == 1 and second.log == []
        assert first.outage


async def test_an_answer_of_another_length_ends_the_session(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):
        append(first, 0)
        await settled()
        assert second._connection is not None
        await second._connection.send(encode(Wanted(second.offers[0].seq, b"\1")))
        await settled()
        assert first.link is LinkState.DOWN
        assert "Wanted" in first.status().error or "answer" in first.status().error


async def test_what_is_not_worth_an_offer_is_sent_at_once(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):
        append(first, 0, blocks=OFFER_BLOCKS_MIN - 1)
        for at in (0, 1):  # compresses to nothing
            seq = Seq(first.last_seq + 1)
            first.append(Write(seq, TimeNs(seq), RUN, Extent(ONE, at << 20, b"x" * (100 * BLOCK_BYTES))))
        await trio.sleep(1)
        assert second.offers == []
        assert seqs(second.log) == [2, 3, 5]


async def test_offers_rest_while_they_save_nothing(autojump_clock: MockClock) -> None:
    async with questioned() as (second, first):

        async def one(seed: int, answer: bytes, *, waits: bool = False) -> bool:
            asked = len(second.offers)
            append(first, seed)
            await settled()
            if len(second.offers) == asked:
                return False
            said = [second.offers[-1].seq in seqs(second.log)]
            assert said == [not waits], "it waits for the answer only where offers pay"
            await second.say(Wanted(second.offers[-1].seq, answer))
            await settled()
            return True

        nothing, everything = b"\1" * OFFER_BLOCKS_MIN, b"\0" * OFFER_BLOCKS_MIN
        assert [await one(seed, nothing, waits=True) for seed in range(WINDOW)] == [True] * WINDOW
        resting = [await one(100 + seed, nothing) for seed in range(REST_EVERY)]
        assert resting == [False] * (REST_EVERY - 1) + [True]
        status = first.status()
        assert status.saved_bytes < 0
        resting = [await one(200 + seed, everything) for seed in range(REST_EVERY)]
        assert resting == [False] * (REST_EVERY - 1) + [True]
        assert all([await one(300 + seed, everything, waits=True) for seed in range(3)])
        assert first.status().saved_bytes > 0
        assert len(second.log) == first.last_seq * 2 // 3


def test_habit() -> None:
    habit = Habit()
    for _ in range(WINDOW):
        assert habit.asks()
        habit.learn(1000, -10)
    rests = []
    for saved in (49, 50):
        habit.learn(1000, saved)
        rests.append(habit.resting)
    assert rests == [True, False]
    # One that saves much makes up for many that do not.
    for saved in (900, *[-5] * (WINDOW - 1)):
        habit.learn(1000, saved)
        assert not habit.resting
