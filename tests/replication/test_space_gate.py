"""The gate at the hard limit: what waits, what is refused, what thins, and that whoever waits can be ended."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from dedup import layout
from dedup.errors import StoreFailed, StoreFull
from dedup.retention import HOUR_NS, AtLimit, Policy, load_policy, save_policy
from dedup.storage import Storage
from dedup.types import Epoch
from replication import space_gate, store_writer
from replication.messages import ErrorCode, Failure, Role, Welcome
from replication.space_gate import SpaceGate
from tests.replication.fake_store import FakeStore
from tests.replication.test_second_appliance import Peer, World, beat, running, write

MIB = 1 << 20
HARD = 64 * MIB


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch as large as those that are held up here is ingested in a thread."""
    monkeypatch.setattr(store_writer, "THREAD_BYTES", 256 << 10)


class Disk:
    """A store's directory, of which a file takes as much as a test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.walks = 0

    def use(self, size: int) -> None:
        ballast = self.path / "ballast"
        ballast.unlink(missing_ok=True)
        if size:
            with open(ballast, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)


@pytest.fixture(autouse=True)
def quick_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_gate, "FULL_SECONDS", 0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@asynccontextmanager
async def capped(disk: Disk, at_limit: AtLimit, *, soft: int | None = None) -> AsyncIterator[World]:
    """An appliance over a fake store in that directory, with a hard limit of 64 MiB."""
    save_policy(Storage(), disk.path, Policy(soft_limit_bytes=soft, hard_limit_bytes=HARD, at_limit=at_limit))
    store = FakeStore()
    store.path = disk.path
    with trio.fail_after(20):
        async with running(store) as world:
            world.appliance.space.thinner = None  # a fake store has no history to thin
            yield world


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await trio.sleep(0.005)


def at_limit(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]


async def space_of(world: World) -> dict[str, object]:
    peer = await world.connect()
    assert isinstance(await peer.greet(role=Role.READER, group="", epoch=0), Welcome)
    reply = await peer.ask("status")
    await peer.connection.aclose()
    space = reply.body["space"]
    assert isinstance(space, dict)
    return space


async def blocked(world: World, disk: Disk) -> Peer:
    """An agent whose record 3 waits for room."""
    peer = await world.feeding()
    disk.use(60 * MIB)
    world.appliance.space.recheck()
    await until(lambda: (world.appliance.space._account.used or 0) >= 60 * MIB)
    await peer.say(write(3))
    await until(lambda: any(session.waits_for_room for session in world.appliance._sessions))
    return peer


async def test_without_caps_nothing_is_measured(disk: Disk) -> None:
    def measure(path: Path) -> int:
        raise AssertionError("measured")

    gate = SpaceGate(disk.path, Storage(), measure)
    assert gate.open
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.serve)
        gate.recheck()
        await trio.testing.wait_all_tasks_blocked()
        await gate.admit(1 << 60, bare=False)
        nursery.cancel_scope.cancel()


async def test_block(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """What waits is not acknowledged, and is taken as soon as there is room; commands are answered meanwhile."""
    async with capped(disk, AtLimit.BLOCK) as world:
        peer = await blocked(world, disk)
        space = await space_of(world)
        assert (space["state"], space["hard_limit"]) == ("hard", HARD)
        (said,) = at_limit(caplog)
        assert "hard limit" in said and "retention set" in said and "wait" in said
        assert world.store.group("g").held == 2
        await peer.say(*[write(seq) for seq in range(4, 9)])
        disk.use(0)
        ack = await peer.hear_ack(8)
        assert ack.received == 8
        assert [record.seq for record in world.store.group("g").records] == list(range(1, 9))
        assert (await space_of(world))["state"] == "ok"
        assert len(at_limit(caplog)) == 1
        assert any("room again" in record.message for record in caplog.records)


async def test_fail(disk: Disk) -> None:
    """The session ends as it does when the disk is full; the next one is taken once there is room."""
    async with capped(disk, AtLimit.FAIL) as world:
        peer = await world.feeding()
        disk.use(60 * MIB)
        world.appliance.space.recheck()
        await until(lambda: (world.appliance.space._account.used or 0) >= 60 * MIB)
        await peer.say(write(3))
        answer = await peer.hear()
        while not isinstance(answer, Failure):
            answer = await peer.hear()
        assert answer.code is ErrorCode.STORE_FULL and "no space left below the hard limit" in answer.text
        assert world.store.group("g").held == 2
        assert (await space_of(world))["state"] == "hard"
        disk.use(0)
        await until(lambda: world.appliance.space._refused is None)
        again = await world.agent()
        await again.say(write(3))
        await again.hear_ack(3)


async def test_records_without_blocks_pass(disk: Disk) -> None:
    """They take from the reserve: what is covered by heartbeats goes on."""
    async with capped(disk, AtLimit.BLOCK) as world:
        peer = await world.feeding()
        disk.use(60 * MIB)
        world.appliance.space.recheck()
        await until(lambda: (world.appliance.space._account.used or 0) >= 60 * MIB)
        await peer.say(beat(3))
        await peer.hear_ack(3)


async def test_stopping_does_not_wait_for_room(disk: Disk) -> None:
    async with capped(disk, AtLimit.BLOCK) as world:
        await blocked(world, disk)
        world.appliance.stop()
        with trio.fail_after(5):
            await until(lambda: not world.appliance._sessions)
    assert world.store.group("g").held == 2


async def test_a_batch_behind_the_drain_is_not_waited_for(disk: Disk) -> None:
    """The drain comes while a batch before it is being ingested."""
    async with capped(disk, AtLimit.BLOCK) as world:
        peer = await world.feeding(blocks=4096)
        disk.use(50 * MIB)
        world.appliance.space.recheck()
        await until(lambda: (world.appliance.space._account.used or 0) >= 50 * MIB)
        world.store.ingest_gate.clear()
        world.store.ingest_begun.clear()
        await peer.say(*[write(3 + number, b"y" * MIB, number * MIB) for number in range(12)])
        await trio.to_thread.run_sync(world.store.ingest_begun.wait, abandon_on_cancel=True)
        world.appliance.stop()
        world.store.ingest_gate.set()
        with trio.fail_after(5):
            await until(lambda: not world.appliance._sessions)
    held = world.store.group("g").held
    assert 3 <= held < 14


@pytest.mark.parametrize("epoch", [1, 2])
async def test_the_next_session_of_an_agent_ends_the_one_that_waits(disk: Disk, epoch: int) -> None:
    """Of a new epoch as ever; of the same one too: the older does not listen, and cannot hear that its link broke."""
    async with capped(disk, AtLimit.BLOCK) as world:
        await blocked(world, disk)
        with trio.fail_after(4):
            again = await world.agent(epoch=epoch)
        assert again.welcome is not None and again.welcome.held == 2
        disk.use(0)
        await again.say(write(3))
        await again.hear_ack(3)
        assert world.store.group("g").epoch == Epoch(1)


async def test_a_raised_limit_is_in_force_at_once(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_gate, "FULL_SECONDS", 1000)
    async with capped(disk, AtLimit.BLOCK) as world:
        peer = await blocked(world, disk)
        admin = await world.connect()
        assert isinstance(await admin.greet(role=Role.ADMIN, group="", epoch=0), Welcome)
        reply = await admin.ask("retention.set", hard_limit_bytes=HARD - 1)
        assert "no room to work" in reply.error
        reply = await admin.ask("retention.set", hard_limit_bytes=2 * HARD)
        assert reply.error == "" and reply.body["hard_limit_bytes"] == 2 * HARD
        await peer.hear_ack(3)
        assert load_policy(Storage(), disk.path).hard_limit_bytes == 2 * HARD
        assert (await admin.ask("retention.show")).body == reply.body
        reader = await world.connect()
        assert isinstance(await reader.greet(role=Role.READER, group="", epoch=0), Welcome)
        assert "not for the role" in (await reader.ask("retention.set", hard_limit_bytes=None)).error


async def test_thin_halves_the_tiers_until_there_is_room_to_spare(disk: Disk) -> None:
    async with capped(disk, AtLimit.THIN) as world:
        sizes = iter([60, 58, 50, 40])
        asked: list[Policy] = []

        async def thin(policy: Policy) -> None:
            asked.append(policy)
            disk.use(next(sizes) * MIB)

        peer = await blocked(world, disk)
        world.appliance.space.thinner = thin
        await peer.hear_ack(3)
        await until(lambda: world.appliance.space._refused is None and len(asked) == 4)
        reaches = [one.every_write_ns for one in asked]
        lost = [(2 * HOUR_NS >> halvings) - reach for halvings, reach in enumerate(reaches)]
        assert all(0 <= waited < 20 * 10**9 for waited in lost), "but for the time that it took"
        assert world.appliance.space.policy.at_limit is AtLimit.THIN


async def test_a_walk_that_began_before_a_thinning_does_not_count(disk: Disk) -> None:
    """What it saw is gone; to believe it would thin once more for nothing."""
    save_policy(Storage(), disk.path, Policy(hard_limit_bytes=HARD, at_limit=AtLimit.THIN))
    used, asked, walks = 60 * MIB, 0, 0
    held = threading.Event()
    held.set()

    def measure(_: Path) -> int:
        nonlocal walks
        found = used
        walks += 1
        held.wait()
        return found

    async def thin(_: Policy) -> None:
        nonlocal used, asked
        before = walks
        held.clear()
        await until(lambda: walks > before)  # it sees what there was, and is slow
        used = 10 * MIB
        asked += 1

    gate = SpaceGate(disk.path, Storage(), measure)
    gate.thinner = thin
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.serve)
            nursery.start_soon(functools.partial(gate.admit, MIB, bare=False))
            await until(lambda: asked == 1)
            await trio.sleep(0.05)
            held.set()
            await until(lambda: gate._refused is None)
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
    assert asked == 1


async def test_a_new_policy_ends_the_thinning_by_the_old_one(disk: Disk) -> None:
    async with capped(disk, AtLimit.THIN) as world:
        begun, ended = trio.Event(), trio.Event()

        async def thin(policy: Policy) -> None:
            begun.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        peer = await blocked(world, disk)
        world.appliance.space.thinner = thin
        await begun.wait()
        await world.appliance.space.set_policy(Policy())
        await ended.wait()
        await peer.hear_ack(3)


async def test_thin_says_so_when_it_is_no_use_and_waits(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    async with capped(disk, AtLimit.THIN) as world:
        asked: list[Policy] = []

        async def thin(policy: Policy) -> None:
            asked.append(policy)
            if len(asked) == 14:
                raise StoreFull("not even for the manifest")

        peer = await blocked(world, disk)
        world.appliance.space.thinner = thin
        await until(lambda: any("cannot be thinned further" in said for said in at_limit(caplog)))
        assert len(asked) == 13
        assert world.store.group("g").held == 2
        await trio.sleep(0.1)
        assert len(asked) == 13, "again and again, for nothing"
        await world.appliance.space.set_policy(world.appliance.space.policy)
        await until(lambda: any("not even for the manifest" in said for said in at_limit(caplog)))
        disk.use(0)
        await peer.hear_ack(3)


async def test_without_anybody_who_thins_it_blocks(disk: Disk) -> None:
    async with capped(disk, AtLimit.THIN) as world:
        peer = await blocked(world, disk)
        await trio.sleep(0.05)
        assert world.store.group("g").held == 2
        disk.use(0)
        await peer.hear_ack(3)


async def test_the_soft_limit_is_a_warning_said_once(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    async with capped(disk, AtLimit.BLOCK, soft=20 * MIB) as world:
        peer = await world.feeding()
        for size, said in ((10, 0), (30, 1), (40, 1), (5, 1), (30, 2)):
            disk.use(size * MIB)
            world.appliance.space.recheck()
            await until(lambda size=size: (world.appliance.space._account.used or 0) // MIB == size)  # type: ignore[misc]
            warnings = [record for record in caplog.records if "above its soft limit" in record.message]
            assert len(warnings) == said
        await peer.say(write(3))
        await peer.hear_ack(3)
        assert at_limit(caplog) == []


async def test_a_soft_limit_alone_never_waits(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    save_policy(Storage(), disk.path, Policy(soft_limit_bytes=MIB))
    gate = SpaceGate(disk.path, Storage())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.serve)
        disk.use(2 * MIB)
        for _ in range(10):
            await gate.admit(MIB, bare=False)
            gate.landed(MIB)
        with trio.fail_after(10):
            await until(lambda: any("above its soft limit" in record.message for record in caplog.records))
        nursery.cancel_scope.cancel()


async def test_a_damaged_policy_stops_no_ingest(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    (disk.path / layout.POLICY_NAME).write_bytes(b"rubbish")
    gate = SpaceGate(disk.path, Storage())
    assert gate.open
    (said,) = at_limit(caplog)
    assert "retention set" in said


async def test_waiting_leaves_no_trace_when_it_is_cancelled(disk: Disk) -> None:
    save_policy(Storage(), disk.path, Policy(hard_limit_bytes=HARD))
    gate = SpaceGate(disk.path, Storage())
    disk.use(60 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.serve)
        with trio.move_on_after(0.1) as patience:
            await gate.admit(MIB, bare=False)
        assert patience.cancelled_caught
        disk.use(10 * MIB)
        await gate.admit(46 * MIB, bare=False)  # all that there is
        assert gate._account.most <= 57 * MIB
        gate.landed(46 * MIB)
        nursery.cancel_scope.cancel()


async def test_a_policy_that_cannot_be_written_is_not_in_force(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreFailed("sync failed")

    gate = SpaceGate(disk.path, Storage())
    monkeypatch.setattr(space_gate, "save_policy", refuse)
    with pytest.raises(StoreFailed):
        await gate.set_policy(Policy(hard_limit_bytes=HARD))
    assert gate.policy == Policy()
