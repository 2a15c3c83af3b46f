"""A reconcile against a second appliance in memory: what it finds and sends, what that costs, and links that fail."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.types import BLOCK_BYTES, Extent, Reconcile, Record, Seq, VolumeId, Write
from replication.digests import Digester
from replication.errors import HistoryLost, LinkReset
from replication.messages import Compare, Level
from replication.reconcile import Reconciler, Work, all_regions
from replication.region_tracker import REGION_BYTES, Region
from replication.wire import encode
from tests.replication.test_agent_link import ScriptedFirst, a_link

VOLUME = VolumeId(1)
REGION_BLOCKS = REGION_BYTES // BLOCK_BYTES


class File:
    """Implements `reconcile.SourceFiles` for one file, which nobody else uses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def opened(self, volume: VolumeId) -> AsyncIterator[int | None]:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    @asynccontextmanager
    async def claimed(self, volume: VolumeId, offset: int, length: int) -> AsyncIterator[bool]:
        yield True


class Holding(ScriptedFirst):
    """Holds one volume: takes records and answers Compares as a second appliance does, and counts their bytes."""

    def __init__(self, content: bytes | bytearray = b"") -> None:
        super().__init__()
        self.content = bytearray(content)
        self.digest_key = b"a key"
        self.bytes = 0
        self.resets = 0
        """So many answers are still lost."""
        self._answers: dict[Seq, bytes] = {}

    def append(self, record: Record | Compare) -> None:
        super().append(record)
        self.bytes += sum(map(len, encode(record)))
        if isinstance(record, Compare):
            digester = Digester(self.digest_key)
            size = len(record.digests) // len(digester.zeros(record.unit)) * record.unit
            ours = digester.units(self.content[record.offset : record.offset + size].ljust(size, b"\0"), record.unit)
            self._answers[record.seq] = digester.differing(ours, record.digests, record.unit)
        elif isinstance(record, (Reconcile, Write)):
            extent = record.extent
            self.content[extent.offset : extent.offset + extent.length] = extent.data or bytes(extent.zeros)

    async def compared(self, seq: Seq) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.resets:
            self.resets -= 1
            raise LinkReset("the link is down")
        return self._answers.pop(seq)

    async def reached(self, seq: Seq, level: Level) -> None:
        """At once."""

    def kinds(self, kind: type) -> int:
        return sum(isinstance(record, kind) for record in self.records)


def blocks_of(numbers: dict[int, int], size: int) -> bytes:
    """`size` bytes of zeros but for these blocks, each of its own content."""
    content = bytearray(size)
    for block, number in numbers.items():
        end = min(size, (block + 1) * BLOCK_BYTES)
        content[block * BLOCK_BYTES : end] = random.Random(number).randbytes(BLOCK_BYTES)[: end - block * BLOCK_BYTES]
    return bytes(content)


sizes = st.one_of(
    st.integers(1, 3 * BLOCK_BYTES), st.integers(60_000, 140_000), st.integers(REGION_BYTES, REGION_BYTES + 70_000)
)


@settings(max_examples=30, deadline=None)
@given(size=sizes, common=st.integers(0, 3), data=st.data(), verify_only=st.booleans())
def test_finds_what_differs_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, size: int, common: int, data: st.DataObject, verify_only: bool
) -> None:
    count = -(-size // BLOCK_BYTES)
    places = st.dictionaries(st.integers(0, count - 1), st.integers(0, 3), max_size=8)
    base = dict.fromkeys(range(0, count, 7), common)
    source = blocks_of({**base, **data.draw(places)}, size)
    first = Holding(blocks_of({**base, **data.draw(places)}, size))
    pairs = (
        (source[at : at + BLOCK_BYTES], first.content[at : at + BLOCK_BYTES]) for at in range(0, size, BLOCK_BYTES)
    )
    wrong = {number for number, (one, other) in enumerate(pairs) if one != other}
    path = tmp_path_factory.mktemp("reconcile") / "a.img"
    path.write_bytes(source)
    run = Reconciler(a_link(first), File(path), verify_only=verify_only)
    trio.run(run.run, [Work(VOLUME, all_regions(size))])
    found = {at // BLOCK_BYTES for _, offset, length in run.found.ranges for at in range(offset, offset + length, 4096)}
    assert found == wrong
    assert run.progress.differing_blocks * BLOCK_BYTES == run.found.bytes == len(wrong) * BLOCK_BYTES
    assert (run.progress.compared, run.progress.said) == (size, first.bytes)
    assert first.kinds(Reconcile) == 0 if verify_only else first.content == source


REGIONS = 4
PATTERNS = {
    "one block": [5],
    "one block in each region": [region * REGION_BLOCKS + 17 * region for region in range(REGIONS)],
    "1 % at random": random.Random(1).sample(range(REGIONS * REGION_BLOCKS), REGIONS * REGION_BLOCKS // 100),
    "10 % at random": random.Random(1).sample(range(REGIONS * REGION_BLOCKS), REGIONS * REGION_BLOCKS // 10),
    "1 % in runs of 8": [start + at for start in range(100, 4000, 800) for at in range(8)],
    "all of it": list(range(REGIONS * REGION_BLOCKS)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_bytes_sent_are_few_more_than_those_that_differ(pattern: str, tmp_path: Path) -> None:
    base = random.Random(0).randbytes(REGIONS * REGION_BYTES)
    held = bytearray(base)
    for block in PATTERNS[pattern]:
        held[block * BLOCK_BYTES + 9] ^= 1
    path = tmp_path / "a.img"
    path.write_bytes(base)
    first = Holding(held)
    await Reconciler(a_link(first), File(path)).run([Work(VOLUME, all_regions(len(base)))])
    assert first.content == base
    differing = len(PATTERNS[pattern]) * BLOCK_BYTES
    print(f"{pattern}: {differing} bytes differ, {first.bytes} sent, {first.bytes / differing:.3f}")
    # Equal regions cost one digest each, so that is what a comparison without any difference sends.
    assert first.bytes <= 1.1 * differing + 60 * (REGIONS - 1)


async def test_equal_volume_costs_a_digest_a_region(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(content := random.Random(0).randbytes(2 * REGION_BYTES))
    first = Holding(content)
    run = Reconciler(a_link(first), File(path))
    await run.run([Work(VOLUME, all_regions(len(content)))])
    assert (first.bytes, len(first.records)) == (2 * 60, 2)


async def test_fresh_volume_is_sent_without_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"")
    os.truncate(path, 3 * REGION_BYTES)
    with path.open("r+b") as file:
        file.seek(REGION_BYTES + 8192)
        file.write(b"data")
    first = Holding(bytes(3 * REGION_BYTES))
    run = Reconciler(a_link(first), File(path))
    await run.run([Work(VOLUME, all_regions(3 * REGION_BYTES), fresh=True)])
    assert first.content == path.read_bytes()
    assert run.progress.sent <= 1 << 20 and not first.kinds(Compare)


async def test_hole_is_sent_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(REGION_BYTES))
    first = Holding(b"x" * REGION_BYTES)
    await Reconciler(a_link(first), File(path)).run([Work(VOLUME, [Region(0)])])
    assert first.content == bytes(REGION_BYTES)
    assert all(not record.extent.data for record in first.records if isinstance(record, Reconcile))


@pytest.fixture
def file(tmp_path: Path) -> File:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(BLOCK_BYTES) + b"x" * BLOCK_BYTES)
    return File(path)


async def test_digests_are_of_the_session_that_they_are_sent_in(
    file: File, autojump_clock: trio.testing.MockClock
) -> None:
    first = Holding(file.path.read_bytes())

    async def room(nbytes: int) -> bool:
        if not first.records:
            first.digest_key = b"second session"
        return True

    first.room = room  # type: ignore[method-assign]
    run = Reconciler(a_link(first), file)
    await run.run([Work(VOLUME, all_regions(2 * BLOCK_BYTES))])
    assert (run.progress.differing_blocks, run.progress.sent) == (0, 0)


async def test_comparison_is_made_again_after_a_lost_link(file: File, autojump_clock: trio.testing.MockClock) -> None:
    first = Holding(bytes(2 * BLOCK_BYTES))
    first.resets = 3
    run = Reconciler(a_link(first), file)
    await run.run([Work(VOLUME, all_regions(2 * BLOCK_BYTES))])
    assert first.content == file.path.read_bytes() and run.progress.differing_blocks == 1


@pytest.mark.parametrize("fresh", [True, False])
async def test_unreadable_source_is_tried_again(
    file: File, fresh: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    failures = [OSError(errno.EIO, "bad sector")] * 3
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if failures:
            raise failures.pop()
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    first = Holding(file.path.read_bytes())
    run = Reconciler(a_link(first), file)
    await run.run([Work(VOLUME, all_regions(2 * BLOCK_BYTES), fresh=fresh)])
    assert not failures
    assert bool(first.kinds(Reconcile)) is fresh


async def test_lost_history_ends_it(file: File) -> None:
    first = Holding(b"")
    lost = HistoryLost(Seq(0), Seq(1), "lost")
    first.answer = lost
    link = a_link(first)

    async def room(nbytes: int) -> bool:
        raise lost

    link.room_by_and_by = room  # type: ignore[method-assign]
    with pytest.raises(HistoryLost):
        await Reconciler(link, file).run([Work(VOLUME, all_regions(2 * BLOCK_BYTES))])


async def test_region_is_equal_as_of_its_last_record(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"x" * 2 * REGION_BYTES)
    first = Holding(b"x" * REGION_BYTES + b"y" * BLOCK_BYTES + b"x" * (REGION_BYTES - BLOCK_BYTES))
    equal: dict[Region, Seq] = {}
    asked: list[Region] = []

    async def differing(volume: VolumeId, region: Region) -> None:
        asked.append(region)
        assert not first.kinds(Reconcile)

    run = Reconciler(
        a_link(first),
        File(path),
        on_differing=differing,
        on_equal=lambda volume, region, seq, spells: equal.update({region: seq}),
    )
    await run.run([Work(VOLUME, all_regions(2 * REGION_BYTES))])
    (sent,) = (record.seq for record in first.records if isinstance(record, Reconcile))
    assert asked == [1] and equal[Region(1)] == sent and equal.keys() == {0, 1}


async def test_it_goes_in_small_steps_while_applications_write(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(content := b"x" * REGION_BYTES)
    first = Holding(bytes(REGION_BYTES))
    link = a_link(first)

    async def application() -> None:
        while True:
            link.put(lambda seq, time, run: Write(seq, time, run, Extent(VOLUME, 0, b"x")))
            await trio.sleep(0.01)

    def sizes(since: int = 0) -> set[int]:
        return {len(record.extent.data) for record in first.records[since:] if isinstance(record, Reconcile)}

    run = Reconciler(link, File(path))
    await run.run([Work(VOLUME, all_regions(REGION_BYTES), fresh=True)])
    assert sizes() == {1 << 20}
    first.content[:] = bytes(REGION_BYTES)
    alone = len(first.records)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(application)
        await trio.testing.wait_all_tasks_blocked()
        await run.run([Work(VOLUME, all_regions(REGION_BYTES), fresh=True)])
        nursery.cancel_scope.cancel()
    assert sizes(alone) == {128 << 10}
    assert first.content == content
