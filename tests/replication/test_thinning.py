"""History thinned beside ingest, with real child processes: by itself, by command, beside readers."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio

from dedup.consolidator import commit_piece
from dedup.manifest import read_manifest
from dedup.pins import ReaderPins
from dedup.retention import HOUR_NS, Policy, save_policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Seq, VolumeId
from dedup.verify import verify
from replication import maintenance as module
from replication import thinning
from replication.commands import Caller
from replication.maintenance import Maintenance
from replication.messages import Role
from replication.second_appliance import SecondAppliance
from replication.store_writer import StoreWriter
from tests.dedup import model as clock
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment

A = VolumeId(1)


class Aged:
    """An open store whose history begins six hours ago."""

    def __init__(self, path: Path) -> None:
        self.path = path
        Store.create(path)
        self.store = Store.open(path)
        self.group = self.store.group("g")
        self.model = Model()
        self.dice = random.Random(1)
        self.group.ingest([*self.model.begin(), self.model.create("a.img", 1 << 20)])
        self.base = self.model.seq - 1
        self.old = self.write(60, 20 * 10**9)
        self.group.complete_segment()
        self.model.elapsed_ns += 4 * HOUR_NS

    def write(self, count: int, every_ns: int) -> list[int]:
        seqs = []
        for _ in range(count):
            self.model.elapsed_ns += every_ns
            self.group.ingest([self.model.write(A, self.dice.randrange(30) * 4096, self.dice.randbytes(4096))])
            seqs.append(self.model.seq)
        return seqs

    def kept(self) -> list[int]:
        reader = self.group.reader()
        found = [seq for seq in self.model.history if reader.view(Seq(seq)).state.held == seq]
        for seq in found:
            check_moment(reader, self.model, seq)
        return found


@pytest.fixture
def aged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aged]:
    monkeypatch.setattr(clock, "START_NS", time.time_ns() - 6 * HOUR_NS)
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.02)
    aged = Aged(tmp_path / "store")
    yield aged
    aged.store.close()
    assert verify(aged.path, read_data=True).ok


@asynccontextmanager
async def background(aged: Aged) -> AsyncIterator[tuple[StoreWriter, Maintenance]]:
    writer = StoreWriter(aged.store)
    maintenance = Maintenance(writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.serve)
        nursery.start_soon(maintenance.serve)
        with trio.fail_after(60):
            yield writer, maintenance
        nursery.cancel_scope.cancel()


async def test_old_history_is_thinned_while_new_history_is_made(aged: Aged) -> None:
    new = []
    async with background(aged) as (writer, _):
        while not read_manifest(aged.store.storage, aged.group.directory).rows:
            aged.model.elapsed_ns += 10**7
            record = aged.model.write(A, aged.dice.randrange(30) * 4096, aged.dice.randbytes(4096))
            await writer.ingest(aged.group, [record], 4096)
            new.append(record.seq)
            await trio.sleep(0.005)
    kept = aged.kept()
    assert set(new) <= set(kept)
    assert len([seq for seq in kept if seq in aged.old]) <= 22, "60 writes in 20 minutes: one a minute, and the ends"
    assert new


async def test_a_command_foresees_and_then_does_it(aged: Aged) -> None:
    appliance = SecondAppliance(aged.store)
    caller = Caller(Role.ADMIN, "")
    aged.write(3, 1000)
    before = aged.kept()
    foreseen = await appliance.commands.run(caller, "consolidate", {"dry_run": True})
    assert aged.kept() == before, "nothing was thinned"
    planned = foreseen["planned"]
    assert isinstance(planned, dict) and isinstance(foreseen["freed_bytes"], int)
    assert planned["pieces"] == 1 and 60 <= planned["points"] <= 65
    done = await appliance.commands.run(caller, "consolidate", {})
    kept = [seq for seq in aged.kept() if seq <= aged.old[-1]]
    assert len(kept) == planned["kept_points"]
    assert isinstance(done["freed_bytes"], int) and done["freed_bytes"] > 0 and done["postponed"] == 0
    again = await appliance.commands.run(caller, "consolidate", {"dry_run": True})
    assert isinstance(again["planned"], dict) and again["planned"]["pieces"] == 0


async def test_a_reader_postpones_and_is_not_waited_for(aged: Aged) -> None:
    appliance = SecondAppliance(aged.store)
    aged.write(3, 1000)
    pins = ReaderPins.open(aged.path, Storage(), everything=True)
    done = await appliance.commands.run(Caller(Role.ADMIN, ""), "consolidate", {})
    assert done["postponed"] == 1
    pins.close()
    done = await appliance.commands.run(Caller(Role.ADMIN, ""), "consolidate", {})
    assert done["postponed"] == 0
    assert len(aged.kept()) < 40


async def test_a_reader_that_is_just_pinning_postpones_for_that_moment_only(
    aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    appliance = SecondAppliance(aged.store)
    caller = Caller(Role.ADMIN, "")
    aged.write(3, 1000)
    pins = ReaderPins.open(aged.path, Storage())
    stays = [True] * 5

    def inside_for_some_time(*arguments: Any) -> bool | None:
        with pins.inside() if stays and stays.pop() else nullcontext():
            return commit_piece(*arguments)

    monkeypatch.setattr(thinning, "commit_piece", inside_for_some_time)
    monkeypatch.setattr(thinning, "COMMIT_TRIES", 3)
    for postponed, left in ((1, 2), (0, 0)):
        done = await appliance.commands.run(caller, "consolidate", {})
        assert (done["postponed"], len(stays)) == (postponed, left)
    pins.close()
    assert len(aged.kept()) < 40


async def test_segments_are_completed_as_they_are_written_to(aged: Aged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "SEGMENT_SECONDS", 0.05)
    aged.write(2, 1000)
    segment = aged.group.position.segment
    async with background(aged):
        while aged.group.position.segment == segment:  # noqa: ASYNC110 - nobody tells of it
            await trio.sleep(0.02)
        empty = aged.group.position.segment
        await trio.sleep(0.3)
        assert aged.group.position.segment == empty, "nothing was written: it is not completed"


async def test_the_policy_of_the_store_decides(aged: Aged) -> None:
    save_policy(aged.store.storage, aged.path, Policy(every_write_ns=12 * HOUR_NS))
    appliance = SecondAppliance(aged.store)
    done = await appliance.commands.run(Caller(Role.ADMIN, ""), "consolidate", {})
    assert isinstance(done["planned"], dict) and done["planned"]["pieces"] == 0
    assert set(aged.old) <= set(aged.kept())
