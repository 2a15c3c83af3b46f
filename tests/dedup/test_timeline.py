"""The buckets of a timeline against a list of all that was written, for groups and paths, thinned out and not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.errors import BadTime
from dedup.moment import rfc3339
from dedup.reader import GroupReader, StoreReader
from dedup.store import Store
from dedup.timeline import BUCKETS_MAX, Bucket, grid_over, span_of, timeline_of
from dedup.types import Aggregate, Bookmark, ClockRun, Flush, PointKind, Reconcile, Record, Seq, TimeNs, Write
from tests.dedup import model as models
from tests.dedup.model import STEP_NS, Model
from tests.dedup.thinned_world import STEP_NS as THINNED_STEP_NS
from tests.dedup.thinned_world import World

PATHS = ("a.img", "b.img", "d/c.img")


@dataclass(frozen=True)
class Deed:
    """One record's part of a bucket, and the paths of the volumes that it was done to."""

    time: int
    paths: frozenset[str]
    part: Bucket


class Played:
    """A group with a few hundred random records in several checkpoints, and the list of what they did."""

    def __init__(self, path: Path, seed: int, *, step_back: bool = False) -> None:
        Store.create(path)
        self.store = Store.open(path)
        self.model = Model()
        self.random = random.Random(seed)
        self.deeds: list[Deed] = []
        group = self.store.group("g")
        group.ingest(self.model.begin())
        self.volumes = {name: self.model.create(name, 1 << 16) for name in PATHS[:2]}
        group.ingest(list(self.volumes.values()))
        run, back = ClockRun(0), 0
        for number in range(400):
            if step_back and number == 200:
                run, back = ClockRun(1), 100 * STEP_NS
            record = self._record()
            changed = msgspec.structs.replace if isinstance(record, msgspec.Struct) else replace
            record = changed(record, run=run, time=TimeNs(record.time - back))
            self._note(record)
            group.ingest([record])
            if self.random.random() < 0.03:
                self.store.checkpoint()
        self.store.close()
        self.path = path

    def _record(self) -> Record:
        model, chance = self.model, self.random.random()
        model.elapsed_ns += self.random.choice([0, 0, STEP_NS, 50 * STEP_NS])
        volume = self.random.choice(sorted(model.content))
        data = self.random.randbytes(self.random.choice([1, 4096, 9000]))
        if chance < 0.5:
            return model.write(volume, self.random.randrange(50_000), data)
        if chance < 0.6:
            return model.aggregate(volume, [(0, data), (20_000, data[:100]), (40_000, data)])
        if chance < 0.65:
            return model.reconcile(volume, 8192, data)
        if chance < 0.8:
            return model.flush(volume)
        if chance < 0.85:
            return Bookmark(*model._next(), f"mark{model.seq}")
        if chance < 0.9:
            return model.rename(volume, self.random.choice(PATHS))
        if chance < 0.92 and len(model.content) > 1:
            return model.retire(volume)
        if chance < 0.95 and (free := set(PATHS) - set(model.paths.values())):
            return model.create(sorted(free)[0], 10)
        return model.heartbeat()

    def _note(self, record: Record) -> None:
        paths = self.model.paths
        match record:
            case Write(extent=extent):
                of, part = {paths[extent.volume]}, Bucket(written_bytes=len(extent.data), records=1)
            case Reconcile(extent=extent):
                of, part = {paths[extent.volume]}, Bucket(resent_bytes=len(extent.data))
            case Aggregate(extents=extents):
                nbytes = sum(len(extent.data) for extent in extents)
                of, part = {paths[extents[0].volume]}, Bucket(nbytes, len(extents))
            case Flush(volume=volume):
                of, part = {paths[volume]}, Bucket(flushes=1)
            case Bookmark():
                of, part = set(paths.values()), Bucket(flushes=1)
            case _:
                return
        self.deeds.append(Deed(record.time, frozenset(of), part))

    def wanted(self, since: int, until: int, start: int, width: int, count: int, path: str | None) -> list[Bucket]:
        buckets = [Bucket() for _ in range(count)]
        for deed in self.deeds:
            if since <= deed.time <= until and (path is None or path in deed.paths):
                bucket = buckets[(deed.time - start) // width]
                bucket.written_bytes += deed.part.written_bytes
                bucket.records += deed.part.records if path is None else min(1, deed.part.records)
                bucket.flushes += deed.part.flushes
                bucket.resent_bytes += deed.part.resent_bytes
        return buckets


@contextmanager
def reading(path: Path) -> Iterator[GroupReader]:
    store = StoreReader.open(path)
    try:
        yield store.group()
    finally:
        store.close()


@pytest.mark.parametrize("step_back", [False, True])
def test_the_buckets_are_what_was_written(tmp_path: Path, step_back: bool) -> None:
    played = Played(tmp_path / "store", 7, step_back=step_back)
    times = [deed.time for deed in played.deeds]
    chance = random.Random(1)
    with reading(played.path) as group:
        for _ in range(40):
            since, until = sorted(chance.choice([*times, min(times) - 5, max(times) + 5]) for _ in range(2))
            path = chance.choice([None, None, *PATHS])
            found = timeline_of(group, TimeNs(since), TimeNs(until), chance.choice([2, 10, 100]), path)
            grid = found.grid
            wanted = played.wanted(since, until, grid.start, grid.width_ns, grid.count, path)
            assert list(found.buckets) == wanted, (since, until, path)
        whole = timeline_of(group, TimeNs(min(times)), TimeNs(max(times)), 50)
        assert sum(bucket.flushes for bucket in whole.buckets) == group.state.flushes
        assert all(sum(getattr(one, name) for one in whole.buckets) for name in ("records", "resent_bytes"))


def test_of_thinned_history_what_is_left_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "STEP_NS", THINNED_STEP_NS)
    world = World(tmp_path / "store")
    world.history(4)

    def total(path: str | None) -> Bucket:
        world.reader.refresh()
        span = span_of(world.reader, None, None)
        assert span is not None
        found = timeline_of(world.reader, *span, 20, path)
        assert found.since == world.reader.view(world.reader.state.base).state.time
        names = ("written_bytes", "records", "flushes", "resent_bytes", "thinned")
        return Bucket(*(sum(getattr(one, name) for one in found.buckets) for name in names))

    before = total(None)
    assert before.thinned == 0
    assert total("a.img") == before
    assert world.thin().pieces > 0
    after, of_volume = total(None), total("a.img")
    assert 0 < after.thinned < before.records
    assert after.records < before.records
    kept = [world.reader.view(Seq(seq)).state.point for seq in world.kept()]
    assert after.flushes == sum(point is not PointKind.CRASH for point in kept)
    assert after.written_bytes > 0
    assert of_volume.written_bytes == after.written_bytes
    assert of_volume.flushes == after.flushes
    world.close()


@given(
    since=st.integers(0, 1 << 62),
    length=st.integers(0, 1 << 61),
    buckets=st.integers(-1, 2 * BUCKETS_MAX),
)
def test_a_grid_has_room_for_both_ends(since: int, length: int, buckets: int) -> None:
    grid = grid_over(TimeNs(since), TimeNs(since + length), buckets)
    assert 1 <= grid.count <= min(max(buckets, 2), BUCKETS_MAX)
    assert grid.start % grid.width_ns == 0
    assert grid.start <= since < grid.start + grid.width_ns
    assert grid.start <= since + length < grid.start + grid.width_ns * grid.count


def test_the_span(tmp_path: Path) -> None:
    played = Played(tmp_path / "store", 3)
    with reading(played.path) as group:
        oldest, newest = group.view(group.state.base).state.time, group.covered_until
        mark = group.bookmarks()[0]
        assert span_of(group, None, None) == (oldest, newest)
        assert span_of(group, "2001-01-01T00:00:00Z", "latest") == (oldest, newest)
        assert span_of(group, mark.name, rfc3339(newest)) == (mark.time, newest)
        assert span_of(group, f"seq={mark.seq}", None) == (mark.time, newest)
        for since, until in (("latest", mark.name), ("2001-01-01T00:00:00Z", "2002-01-01T00:00:00Z"), ("0s", None)):
            with pytest.raises(BadTime, match=r"exchange the two|nothing is known"):
                span_of(group, since, until)


def test_nothing_to_restore_is_no_span(tmp_path: Path) -> None:
    path = tmp_path / "store"
    Store.create(path)
    store = Store.open(path)
    store.group("g").ingest(Model().begin()[:1])
    store.close()
    with reading(path) as group:
        assert span_of(group, None, None) is None
