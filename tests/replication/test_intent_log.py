"""The intent log's file: what is durable when, what survives a torn end, what counts as damage."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.errors import Damaged, UnknownFormat
from dedup.types import VolumeId
from replication import intent_log
from replication.intent_log import MARK_AHEAD_REGIONS, IntentLog, IntentLogFailed
from replication.region_tracker import REGIONS_MAX, Region

ONE, TWO = VolumeId(1), VolumeId(2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "intent.log"


def on_disk(path: Path) -> IntentLog:
    """What a process that starts now would find, without taking the file from the log that is open."""
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    return IntentLog.open(copy)


class HeldSync:
    """An fdatasync that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = trio.Event()
        self._go = threading.Event()
        self._real = os.fdatasync
        self._token = trio.lowlevel.current_trio_token()
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self._token.run_sync_soon(self.begun.set)
        self._go.wait()
        self._real(fd)

    def release(self) -> None:
        self._go.set()


async def test_marks_survive_reopening(path: Path) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 3, 5)
    await log.mark(TWO, REGIONS_MAX - 1, REGIONS_MAX - 1)
    # Nothing is closed: this is what a killed process leaves.
    found = IntentLog.open(path)
    assert found.marked() == {ONE: [3, 4, 5], TWO: [REGIONS_MAX - 1]}
    assert found.is_marked(ONE, 4) and not found.is_marked(ONE, 6) and not found.is_marked(TWO, 4)


async def test_a_mark_counts_only_when_it_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = IntentLog.open(path)
    held = HeldSync(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.mark, ONE, 7, 7)
        await held.begun.wait()
        assert not log.is_marked(ONE, 7)
        held.release()
    assert log.is_marked(ONE, 7)


async def test_marks_that_wait_together_share_one_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = IntentLog.open(path)
    held = HeldSync(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.mark, ONE, 0, 0)
        await held.begun.wait()
        for region in range(100, 1000, 10):
            nursery.start_soon(log.mark, TWO, region, region)
        await trio.testing.wait_all_tasks_blocked()
        held.release()
    assert log.syncs == 2
    assert IntentLog.open(path).marked() == {ONE: [0], TWO: list(range(100, 1000, 10))}


async def test_a_mark_that_is_there_costs_no_sync(path: Path) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 0, 9)
    assert await log.mark(ONE, 2, 4) == range(2, 5)
    assert log.syncs == 1


async def test_a_sequential_writer_is_marked_ahead(path: Path) -> None:
    log = IntentLog.open(path)
    assert await log.mark(ONE, 10, 10) == range(10, 11)
    assert await log.mark(ONE, 11, 11) == range(11, 12 + MARK_AHEAD_REGIONS)
    for region in range(12, 12 + MARK_AHEAD_REGIONS):
        await log.mark(ONE, region, region)
    assert log.syncs == 2
    assert (await log.mark(ONE, 12 + MARK_AHEAD_REGIONS, 12 + MARK_AHEAD_REGIONS)).stop == 13 + 2 * MARK_AHEAD_REGIONS
    assert await log.mark(TWO, 500, 500) == range(500, 501), "another volume is another stream"
    assert await log.mark(ONE, REGIONS_MAX - 2, REGIONS_MAX - 2)
    assert await log.mark(ONE, REGIONS_MAX - 1, REGIONS_MAX - 1) == range(REGIONS_MAX - 1, REGIONS_MAX)


async def test_a_cancelled_mark_is_either_durable_or_not_claimed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = IntentLog.open(path)
    held = HeldSync(monkeypatch)
    returned: list[str] = []

    async def marker(name: str, region: int, scope: trio.CancelScope) -> None:
        with scope:
            await log.mark(ONE, region, region)
            returned.append(name)

    leader, follower, other = (trio.CancelScope() for _ in range(3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(marker, "leader", 1, leader)
        await held.begun.wait()
        nursery.start_soon(marker, "follower", 100, follower)
        nursery.start_soon(marker, "other", 200, other)
        await trio.testing.wait_all_tasks_blocked()
        leader.cancel()
        follower.cancel()
        await trio.testing.wait_all_tasks_blocked()
        held.release()
    assert "other" in returned and "follower" not in returned
    assert log.is_marked(ONE, 1) and log.is_marked(ONE, 200)
    assert set(log.marked()[ONE]) <= set(IntentLog.open(path).marked()[ONE])


async def test_clears_are_lazy_and_a_flush_writes_them(path: Path) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 0, 3)
    log.clear([(ONE, 1), (ONE, 99), (TWO, 0)])
    assert log.marked() == {ONE: [0, 2, 3]}
    assert IntentLog.open(path).marked() == {ONE: [0, 1, 2, 3]}, "a lost clear is a mark too many"


async def test_close_writes_clears(path: Path) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 0, 3)
    await log.mark(TWO, 5000, 5000)
    log.clear([(ONE, 1)])
    log.volumes_gone(TWO)
    await log.close()
    assert IntentLog.open(path).marked() == {ONE: [0, 2, 3]}
    with pytest.raises(IntentLogFailed, match="closed"):
        await log.mark(ONE, 50, 50)


async def test_a_clear_during_a_sync_of_its_page_is_not_undone_by_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 0, 0)
    held = HeldSync(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.mark, ONE, 77, 77)
        await held.begun.wait()
        log.clear([(ONE, 0)])
        held.release()
    assert log.marked() == {ONE: [77]}
    await log.flush()
    assert IntentLog.open(path).marked() == {ONE: [77]}


async def test_the_namespace_flag_is_durable_before_and_falls_after(path: Path) -> None:
    log = IntentLog.open(path)
    assert not log.found_namespace
    await log.namespace_begin()
    await log.namespace_begin()
    assert log.syncs == 1
    log.namespace_end()
    await log.flush()
    assert IntentLog.open(path).found_namespace
    log = IntentLog.open(path)
    await log.namespace_begin()
    log.namespace_end()
    await log.flush()
    found = IntentLog.open(path)
    assert found.found_namespace, "what was found at the start stays until the listings are compared"
    found.namespace_compared()
    await found.close()
    assert not IntentLog.open(path).found_namespace
    with pytest.raises(RuntimeError):
        IntentLog.open(path).namespace_end()


async def test_a_burst_of_namespace_changes_pays_one_sync(path: Path) -> None:
    log = IntentLog.open(path)
    for _ in range(50):
        await log.namespace_begin()
        log.namespace_end()
    assert log.syncs == 1


async def test_a_namespace_change_begun_while_the_flag_is_being_cleared_waits(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = IntentLog.open(path)
    await log.namespace_begin()
    log.namespace_end()
    held = HeldSync(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.flush)
        await held.begun.wait()
        nursery.start_soon(log.namespace_begin)
        held.release()
    assert IntentLog.open(path).found_namespace


async def test_a_failed_mark_is_told_and_the_next_one_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 1, 1)
    await log.namespace_begin()
    log.namespace_end()

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(IntentLogFailed, match="Input/output error"):
            await log.mark(ONE, 2, 2)
    assert not log.is_marked(ONE, 2)
    # The failed frame may have cleared the flag on disk: it is written again.
    await log.namespace_begin()
    assert on_disk(path).found_namespace
    await log.mark(ONE, 30, 30)
    assert log.is_marked(ONE, 30)
    assert on_disk(path).marked() == {ONE: [1, 30]}


async def test_a_full_disk_is_told_and_the_log_goes_on_when_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = IntentLog.open(path)
    await log.mark(ONE, 1, 1)
    real = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        real(fd, data[:100], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for _ in range(3):
            with pytest.raises(IntentLogFailed, match="No space"):
                await log.mark(ONE, 9, 9)
    assert IntentLog.open(path).marked() == {ONE: [1]}


async def test_the_file_stays_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intent_log, "_COMPACT_BYTES_MIN", 16384)
    log = IntentLog.open(path)
    for number in range(300):
        region = number * 10
        await log.mark(ONE, region, region)
        log.clear([(ONE, region)] if number < 299 else [])
        assert path.stat().st_size <= 16384
    assert log.syncs == 300
    assert IntentLog.open(path).marked() == {ONE: [2990]}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


async def _three_frames(path: Path) -> list[int]:
    """A log with frames [], {1}, {1, 5000}; the offsets at which each ends."""
    log = IntentLog.open(path)
    ends = [path.stat().st_size]
    for region in (1, 5000):
        await log.mark(ONE, region, region)
        ends.append(path.stat().st_size)
    return ends


async def test_a_torn_end_loses_only_what_was_never_acknowledged(path: Path) -> None:
    _, second, third = await _three_frames(path)
    whole = path.read_bytes()
    for cut in [second, second + 1, second + 30, third - 513, third - 1]:
        path.write_bytes(whole[:cut])
        assert IntentLog.open(path).marked() == {ONE: [1]}
        path.write_bytes(whole[:cut].ljust(third, b"\xff"))
        assert IntentLog.open(path).marked() == {ONE: [1]}


@pytest.mark.parametrize("place", ["magic", "version", "nonce", "header checksum", "first frame", "middle frame"])
async def test_damage_before_the_last_frame_is_said(path: Path, place: str) -> None:
    first, second, _ = await _three_frames(path)
    at = {"magic": 0, "version": 8, "nonce": 17, "header checksum": 25, "first frame": 34, "middle frame": first + 40}
    content = bytearray(path.read_bytes())
    content[at[place]] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"intent\.log.*every volume must be reconciled"):
        IntentLog.open(path)
    assert second > at[place]
    log = IntentLog.open_damaged(path)
    assert log.everything and log.found_namespace
    found = IntentLog.open(path)
    assert found.everything and found.found_namespace and not found.marked()
    found.clear_everything()
    found.namespace_compared()
    await found.close()
    assert not IntentLog.open(path).everything


async def test_an_empty_file_is_damage(path: Path) -> None:
    path.touch()
    with pytest.raises(Damaged):
        IntentLog.open(path)


async def test_a_newer_format_is_refused(path: Path) -> None:
    IntentLog.open(path)
    content = bytearray(path.read_bytes())
    content[8:12] = (2).to_bytes(4, "little")
    content[24:32] = intent_log.xxh3_64_intdigest(bytes(content[:24])).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(UnknownFormat, match="format 2"):
        IntentLog.open(path)


async def test_everything_survives_and_leaves_marks_exact(path: Path) -> None:
    log = IntentLog.open(path)
    await log.mark_everything()
    assert IntentLog.open(path).everything
    assert not log.is_marked(ONE, 0)


_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), st.integers(1, 2), st.integers(0, 9000), st.integers(0, 3)),
        st.tuples(st.just("clear"), st.integers(1, 2), st.integers(0, 9000), st.integers(0, 40)),
        st.tuples(st.just("gone"), st.integers(1, 2), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0), st.integers(0, 600)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(actions=_ACTIONS)
def test_property_no_acknowledged_mark_is_ever_lost(tmp_path_factory: pytest.TempPathFactory, actions: list) -> None:
    """Against a set of regions: after any crash, marks are a superset of the model and never beyond what was asked."""
    path = tmp_path_factory.mktemp("intent") / "log"

    async def run() -> None:
        log = IntentLog.open(path)
        marked: set[tuple[int, int]] = set()
        ever: set[tuple[int, int]] = set()
        for action, volume, first, count in actions:
            span = {(volume, region) for region in range(first, first + count + 1)}
            if action == "mark":
                told = await log.mark(VolumeId(volume), first, first + count)
                marked |= {(volume, region) for region in told}
                ever |= marked
                assert span <= marked
            elif action == "clear":
                log.clear((VolumeId(v), r) for v, r in span)
                marked -= span
            elif action == "gone":
                log.volumes_gone(VolumeId(volume))
                marked = {key for key in marked if key[0] != volume}
            else:
                content = path.read_bytes()
                path.write_bytes(content + b"\x01" * count)
                log = IntentLog.open(path)
                found = {(int(v), int(r)) for v, regions in log.marked().items() for r in regions}
                assert marked <= found <= ever
                marked = found
            assert log.marked() == {
                VolumeId(v): sorted(Region(r) for w, r in marked if w == v) for v in {v for v, _ in marked}
            }

    trio.run(run)
