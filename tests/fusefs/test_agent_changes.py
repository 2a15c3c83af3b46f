"""What the agent makes of changes that fail, are too large, or are made and not yet safe."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from dedup.types import (
    PATH_BYTES_MAX,
    VOLUME_BYTES_MAX,
    Correct,
    Create,
    Flush,
    ReconcileBegin,
    Rename,
    Resize,
    Retire,
    Seq,
)
from fusefs import agent as agent_module
from fusefs import volume_records
from fusefs.agent import Agent
from fusefs.catch_up import catch_up
from fusefs.intercept import CreateFile, RemoveFile, RenamePath
from fusefs.volume_table import key_of
from replication.errors import LocalProtocolError, OutageError
from tests.fusefs.test_agent_marks import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def fd(bench: Bench) -> Iterator[int]:
    opened = os.open(bench.file, os.O_RDWR)
    yield opened
    os.close(opened)


def namespace_flag(bench: Bench) -> bool:
    return bench.agent.intent._namespace_changes > 0


def rename(bench: Bench, old: str, new: str) -> RenamePath:
    """Of a file, which must exist; or of a directory."""
    source = bench.agent.source
    path = source / old
    is_directory = path.is_dir()
    key = None if is_directory else key_of(path.stat())
    return RenamePath(old, new, key, None, False, is_directory, False, lambda: os.rename(path, source / new))


def create(bench: Bench, path: str) -> CreateFile:
    def perform() -> os.stat_result:
        (bench.agent.source / path).touch()
        return (bench.agent.source / path).stat()

    return CreateFile(path, perform)


def remove(bench: Bench, path: str) -> RemoveFile:
    full = bench.agent.source / path
    return RemoveFile(path, key_of(full.stat()), full.unlink)


async def settle(agent: Agent, durable: int) -> None:
    agent.first.durable = Seq(durable)  # type: ignore[misc]
    await agent.brackets.settle()


async def test_unreadable_source_is_owed_a_reconcile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(agent_module, "write_at", refuse)
    takes_no_read = os.open(bench.file, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="bad sector"):
            await bench.agent.write(bench.volume.id, takes_no_read, 0, b"refused", False)
    finally:
        os.close(takes_no_read)
    assert bench.link.degraded and not bench.link.equal
    assert bench.agent.intent.is_marked(bench.volume.id, 0)
    await bench.link.room(1)
    (correct,) = bench.records(Correct)
    assert isinstance(correct, Correct) and correct.refused == 1 and not correct.extent.data
    assert bench.records(ReconcileBegin)


async def test_bracket_waits_for_a_sync_that_began_after_the_change(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[str] = []

    def syncfs(path: str) -> None:
        """The first one takes so long that another change is made meanwhile."""
        syncs.append(path)
        if len(syncs) == 1:
            trio.from_thread.run(bench.agent.namespace, rename(bench, "b.img", "c.img"))

    monkeypatch.setattr(pyfuse3, "syncfs", syncfs)
    await bench.agent.namespace(rename(bench, "a.img", "b.img"))
    await settle(bench.agent, 0)
    assert namespace_flag(bench) and not syncs, "its record is not durable"
    await settle(bench.agent, 2)
    assert namespace_flag(bench), "the second change came after that sync had begun"
    await settle(bench.agent, 2)
    assert len(syncs) == 2
    assert not namespace_flag(bench)


async def test_failed_sync_keeps_the_bracket(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError(errno.EIO, "no sync")

    await bench.agent.namespace(rename(bench, "a.img", "b.img"))
    with monkeypatch.context() as patch:
        patch.setattr(pyfuse3, "syncfs", fail)
        with pytest.raises(OSError, match="no sync"):
            await settle(bench.agent, 1)
    assert namespace_flag(bench)
    await settle(bench.agent, 1)
    assert not namespace_flag(bench)


async def test_cut_regions_are_held_while_they_are_cut(bench: Bench, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    async def room(nbytes: int) -> bool:
        bench.agent.tracker.source_synced(bench.volume.id, bench.agent.tracker.token())
        held.append(not bench.agent.tracker.clearable(1e9))
        return True

    monkeypatch.setattr(bench.first, "room", room)
    await bench.agent.resize(bench.volume.id, fd, 100)
    assert held == [True]
    assert bench.agent.intent.is_marked(bench.volume.id, 0)
    bench.agent.tracker.source_synced(bench.volume.id, bench.agent.tracker.token())
    bench.agent.tracker.durable(Seq(1))
    assert bench.agent.tracker.clearable(1e9) == [(bench.volume.id, 0)]


async def test_sizes_that_no_record_carries_are_refused_at_once(bench: Bench, fd: int) -> None:
    for too_large in (
        bench.agent.resize(bench.volume.id, fd, VOLUME_BYTES_MAX + 1),
        bench.agent.write(bench.volume.id, fd, VOLUME_BYTES_MAX, b"x", False),
    ):
        with pytest.raises(OSError) as refused:
            await too_large
        assert refused.value.errno == errno.EFBIG
    assert not bench.first.records and not bench.agent.intent.marked() and not namespace_flag(bench)


async def test_growth_marks_nothing_however_far(bench: Bench, fd: int) -> None:
    await bench.agent.resize(bench.volume.id, fd, 1 << 40)
    assert os.fstat(fd).st_size == bench.volume.size == 1 << 40
    assert bench.records(Resize) and not bench.agent.intent.marked() and not len(bench.agent.tracker)


async def test_rename_of_too_much_is_refused_before_it_is_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.agent.source / "dir").mkdir()
    for name in ("dir/x", "dir/y"):
        await bench.agent.namespace(create(bench, name))
    monkeypatch.setattr(volume_records, "RENAME_MOVES_MAX", 1)
    with pytest.raises(OSError) as refused:
        await bench.agent.namespace(rename(bench, "dir", "new"))
    assert refused.value.errno == errno.E2BIG
    assert (bench.agent.source / "dir/x").exists() and bench.agent.volumes.by_path("dir/x")
    monkeypatch.undo()
    await bench.agent.namespace(rename(bench, "dir", "new"))
    assert len(bench.records(Rename)) == 1


async def test_path_that_no_record_carries_is_refused(bench: Bench) -> None:
    change = CreateFile("d/" * (PATH_BYTES_MAX // 2) + "x", lambda: pytest.fail("was made"))
    with pytest.raises(OSError) as refused:
        await bench.agent.namespace(change)
    assert refused.value.errno == errno.ENAMETOOLONG


async def test_change_whose_record_is_refused_keeps_its_bracket(bench: Bench) -> None:
    bench.first.refuses = Rename
    with pytest.raises(LocalProtocolError):
        await bench.agent.namespace(rename(bench, "a.img", "b.img"))
    await settle(bench.agent, 100)
    assert namespace_flag(bench)
    bench.first.refuses = None
    bench.file = bench.agent.source / "b.img"
    assert await bench.write(0, b"goes on") == 7


async def test_catching_up_frees_a_path_before_it_is_taken(bench: Bench) -> None:
    await bench.agent.namespace(create(bench, "gone.img"))
    bench.first.answer = False
    await bench.agent.namespace(remove(bench, "gone.img"))
    await bench.agent.namespace(rename(bench, "a.img", "gone.img"))
    await bench.agent.namespace(create(bench, "a.img"))
    bench.first.answer = True
    before = len(bench.first.records)
    fresh = await catch_up(bench.agent)
    told = [type(record) for record in bench.first.records[before:]]
    assert told[:4] == [ReconcileBegin, Retire, Rename, Create]
    made = bench.agent.volumes.by_path("a.img")
    assert made is not None and fresh == [made.id]


# -- fsync -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def syncs(bench: Bench, fd: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many flushes had been recorded when the source was synced."""
    found: list[int] = []
    real: Callable[[int], None] = os.fdatasync

    def sync(synced: int) -> None:
        if synced == fd:
            found.append(len(bench.records(Flush)))
        real(synced)

    monkeypatch.setattr(os, "fdatasync", sync)
    return found


async def test_both_sides_sync_at_the_same_time(bench: Bench, fd: int, syncs: list[int]) -> None:
    await bench.agent.fsync(bench.volume.id, fd, True)
    assert syncs == [1]
    assert len(bench.records(Flush)) == 1


async def test_the_source_is_synced_first_where_there_is_no_room(bench: Bench, fd: int, syncs: list[int]) -> None:
    bench.first.answer = OutageError("the link is down")
    with pytest.raises(OutageError):
        await bench.agent.fsync(bench.volume.id, fd, True)
    assert syncs == [0]
    assert bench.records(Flush) == []


async def test_the_source_is_synced_in_an_outage_that_goes_on(bench: Bench, fd: int, syncs: list[int]) -> None:
    bench.first.answer = False
    await bench.agent.fsync(bench.volume.id, fd, True)
    assert syncs == [0]
    assert bench.records(Flush) == []


async def test_a_gap_begins_before_the_flush_behind_it(bench: Bench, fd: int, syncs: list[int]) -> None:
    bench.first.answer = False
    await bench.write(0, b"unrecorded")
    bench.first.answer = True
    await bench.agent.fsync(bench.volume.id, fd, True)
    assert syncs == [0]
    assert [type(record) for record in bench.first.records] == [ReconcileBegin, Flush]


async def test_an_fsync_that_the_source_fails_is_told(bench: Bench, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fdatasync", fail)
    token = bench.agent.tracker.token()
    with pytest.raises(OSError, match="the disk is gone"):
        await bench.agent.fsync(bench.volume.id, fd, True)
    assert bench.agent.tracker.token() == token
    assert not bench.agent.tracker._synced, "no mark goes for it"


async def test_the_flush_of_a_volume_that_is_gone_is_not_recorded(bench: Bench, fd: int, syncs: list[int]) -> None:
    bench.agent.volumes.remove(bench.volume)
    await bench.agent.fsync(bench.volume.id, fd, True)
    assert syncs == [0]
    assert bench.first.records == []
