"""The second appliance's own work, with real child processes: sealing and collecting beside ingest, and cut off."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from dedup import layout
from dedup.consolidator import Outcome
from dedup.container import ContainerReader
from dedup.errors import Damaged, StoreError, StoreFull
from dedup.pins import ReaderPins
from dedup.retention import Policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId, VolumeId
from dedup.verify import verify
from dedup.worker import FindDead, Freed, ReplyStream, Seal, frame
from replication import maintenance as module
from replication.commands import Caller
from replication.maintenance import Maintenance
from replication.messages import Role
from replication.second_appliance import SecondAppliance
from replication.store_writer import StoreWriter
from replication.thinning import Thinning
from replication.worker_process import WorkerLost, WorkerProcess, working
from tests.dedup.model import Model
from tests.dedup.test_gc import LeakyStorage
from tests.dedup.test_store import check_moment

A = VolumeId(1)
KEPT, LOST = 40, 30


class Built:
    """An open store with two closed containers: one has KEPT blocks that are live, both have LOST that are dead."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage = LeakyStorage()
        self.model = Model()
        self.dice = random.Random(1)
        Store.create(path)
        self._open()
        self.group.ingest([*self.model.begin(), self.model.create("a.img", 1 << 20)])
        self.write(0, KEPT)
        self.lost = self.waste(LOST)
        self.store.close()
        self._open()
        self.waste(LOST)
        self.store.close()
        self._open()

    def _open(self) -> None:
        self.store = Store.open(self.path, self.storage)
        self.group = self.store.group("g")

    def write(self, block: int, count: int) -> None:
        self.group.ingest([self.model.write(A, block * BLOCK_BYTES, self.dice.randbytes(count * BLOCK_BYTES))])

    def waste(self, count: int) -> bytes:
        """Blocks that are placed and indexed, and named by nothing."""
        data = self.dice.randbytes(count * BLOCK_BYTES)
        record = Model(seq=self.model.seq, content={A: b""}).write(A, 0, data)
        self.storage.refuse_journal = True
        with pytest.raises(StoreFull):
            self.group.ingest([record])
        self.storage.refuse_journal = False
        return data

    def forms(self) -> dict[ContainerId, ContainerForm]:
        containers = self.path / "containers"
        found = {}
        for name in sorted(os.listdir(containers)):
            number = layout.container_named(name)
            if number is not None:
                reader = ContainerReader.open(Storage(), containers, number)
                found[number] = reader.header.form
                reader.close()
        return found

    def check(self) -> None:
        for seq in self.model.history:
            check_moment(self.group.reader(), self.model, seq)


@pytest.fixture
async def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Built]:
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(module, "SEAL_AGE_SECONDS", 0.0)
    built = Built(tmp_path / "store")
    yield built
    built.store.close()
    assert verify(built.path, read_data=True).ok


@asynccontextmanager
async def running(built: Built, *, background: bool = False) -> AsyncIterator[Maintenance]:
    writer = StoreWriter(built.store)
    maintenance = Maintenance(writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.serve)
        if background:
            nursery.start_soon(maintenance.serve)
        with trio.fail_after(60):
            yield maintenance
        nursery.cancel_scope.cancel()


async def until(built: Built, forms: dict[ContainerId, ContainerForm]) -> None:
    while built.forms() != forms:  # noqa: ASYNC110 - nobody tells of it
        await trio.sleep(0.02)


async def test_the_background_seals_what_is_closed_and_collects_what_was_dropped(built: Built) -> None:
    one, two, three = ContainerId(1), ContainerId(2), ContainerId(3)
    built.write(100, 3)
    built.check()
    async with running(built, background=True) as maintenance:
        await until(built, {one: ContainerForm.SEALED, two: ContainerForm.SEALED, three: ContainerForm.RAW})
        built.check()
        maintenance.garbage()
        await until(built, {one: ContainerForm.SEALED, three: ContainerForm.RAW})
    built.check()


async def test_a_command_collects_and_says_what_it_did(built: Built) -> None:
    appliance = SecondAppliance(built.store)
    caller = Caller(Role.ADMIN, "")
    planned = {"containers": 2, "removed": 1, "rewritten": 1, "live_blocks": KEPT, "dead_blocks": 2 * LOST}
    built.write(100, 3)
    for dry_run in (True, False):
        said = await appliance.commands.run(caller, "gc", {"dry_run": dry_run})
        assert said["dry_run"] is dry_run and said["skipped"] == said["postponed"] == []
        found = said["planned"]
        assert isinstance(found, dict) and found.items() >= planned.items()
        assert isinstance(said["freed_bytes"], int) and said["freed_bytes"] >= 2 * LOST * BLOCK_BYTES
        assert len(built.forms()) == (3 if dry_run else 2)
    built.check()
    again = await appliance.commands.run(caller, "gc", {})
    assert again["freed_bytes"] == 0


async def test_ingest_goes_on_beside_it_and_shares_what_was_about_to_go(built: Built) -> None:
    async with running(built) as maintenance:
        done = trio.Event()

        async def feed() -> None:
            block = 0
            while not done.is_set():
                at = block % LOST
                data = built.lost[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]
                record = built.model.write(A, (300 + block % 100) * BLOCK_BYTES, data)
                await maintenance._writer.ingest(built.group, [record], len(data))
                block += 1
                await trio.sleep(0.005)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            for _ in range(3):
                await maintenance.collect()
            done.set()
    final = built.model.seq
    check_moment(built.group.reader(), built.model, final)
    check_moment(built.group.reader(), built.model, final // 2)


async def test_a_command_comes_before_the_background(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = trio.Event()

    async def seal_for_ever(self: Maintenance, worker: object, containers: object) -> None:
        begun.set()
        await trio.sleep_forever()

    monkeypatch.setattr(Maintenance, "_seal", seal_for_ever)
    async with running(built, background=True) as maintenance:
        await begun.wait()
        assert (await maintenance.collect()).freed_bytes > 0


async def test_a_new_policy_ends_what_is_done_by_the_old_one(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def thin_for_ever(self: Thinning, policy: Policy) -> Outcome:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    monkeypatch.setattr(Thinning, "round", thin_for_ever)
    async with running(built, background=True) as maintenance:
        await begun.wait()
        maintenance.reconsider()
        await ended.wait()


async def test_a_reader_that_pins_everything_postpones_the_sweep(built: Built) -> None:
    async with running(built) as maintenance:
        reader = ReaderPins.open(built.path, Storage(), everything=True)
        done = await maintenance.collect()
        assert len(done.postponed) == 1 and done.freed_bytes == 0 and done.plan.dead_blocks == 2 * LOST
        reader.close()
        done = await maintenance.collect()
        assert not done.postponed and done.freed_bytes > 0


@pytest.mark.parametrize(
    "at", ["Remove", pytest.param("Mark", marks=pytest.mark.slow), pytest.param("FindDead", marks=pytest.mark.slow)]
)
async def test_a_killed_child_costs_nothing(built: Built, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    ask = WorkerProcess.ask

    async def ask_and_kill(self: WorkerProcess, request: object) -> object:
        if type(request).__name__ == at:
            os.kill(self.pid, signal.SIGKILL)
        return await ask(self, request)  # type: ignore[arg-type]

    built.write(100, 1)
    async with running(built) as maintenance:
        with monkeypatch.context() as patch:
            patch.setattr(WorkerProcess, "ask", ask_and_kill)
            with pytest.raises(WorkerLost):
                await maintenance.collect()
        assert built.store.ingest.shared is None
        built.check()
        assert (await maintenance.collect()).freed_bytes > 0
    built.check()


async def test_the_child_ends_with_its_parent_and_two_never_work_at_once(built: Built) -> None:
    async with working(built.path) as first:
        reply = await first.ask(Seal(1))
        assert isinstance(reply, Freed)
        async with working(built.path) as second:
            with trio.move_on_after(0.7) as patience:
                await second.ask(Seal(2))
            assert patience.cancelled_caught, "the first one holds the lock"
            assert Path(f"/proc/{second.pid}").exists()
        assert not Path(f"/proc/{second.pid}/cmdline").exists()
        with pytest.raises(Damaged):
            await first.ask(Seal(77))
        with pytest.raises(StoreError, match="no meaning"):
            await first.ask(FindDead(1))
        await first.take_share(0.25)
    assert built.forms()[ContainerId(1)] is ContainerForm.SEALED
    built.store.pool.forget(ContainerId(1))


def test_replies_arrive_in_pieces() -> None:
    stream = ReplyStream()
    wire = frame(Freed(5)) + frame(Freed(6))
    found = []
    for at in range(len(wire)):
        stream.receive_data(wire[at : at + 1])
        while (reply := stream.next_reply()) is not None:
            found.append(reply)
    assert found == [Freed(5), Freed(6)]
