"""A reader beside a writer that thins history out: right bytes or a refusal, and what is held stays."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dedup import consolidator, group_views
from dedup.catalog import Catalog
from dedup.consolidator import Outcome
from dedup.errors import Damaged, MomentGone, MomentRefused
from dedup.granularity import EVERY_WRITE
from dedup.image import Image
from dedup.manifest import Manifest, write_manifest
from dedup.moment import rfc3339
from dedup.pins import Pinning
from dedup.reader import StoreReader
from dedup.retention import HOUR_NS, MINUTE_NS, Policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Heartbeat, Seq, TimeNs
from tests.dedup import model as models
from tests.dedup.thinned_world import SIZE, STEP_NS, World


@pytest.fixture(autouse=True)
def steps_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "STEP_NS", STEP_NS)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "store")


def test_what_is_held_stays_and_the_rest_is_thinned(world: World) -> None:
    world.history(8)
    asked = Seq(100)
    world.reader.hold(asked)
    read_before, read_after = (world.reader.image(world.volume, asked) for _ in range(2))
    assert read_before.read(0, SIZE) == world.content(100)
    first = world.thin()
    assert first.pieces == 0 and first.postponed == 1
    assert world.check(world.reader, 100) == 100
    world.reader.release(asked)
    assert world.thin().pieces == 1
    assert read_before.read(0, SIZE) == world.content(100)  # its pointers were looked up when they were there
    with pytest.raises(MomentGone, match="seq=100 has been thinned out"):
        read_after.read(0, SIZE)
    with pytest.raises(MomentGone):
        world.reader.hold(asked)
    kept = world.kept()
    assert 100 not in kept and len(kept) < world.model.seq / 3
    for seq in range(3, world.model.seq + 1):
        assert world.check(world.reader, seq) in kept
    world.close()


def test_a_moment_held_twice_stays_until_it_is_released_twice(world: World) -> None:
    world.history(4)
    world.reader.hold(Seq(40))
    assert world.reader.hold_again(Seq(40)) and not world.reader.hold_again(Seq(41))
    world.reader.release(Seq(40))
    assert world.thin().pieces == 0
    image = world.reader.image(world.volume, Seq(40))
    assert image.read(0, SIZE) == world.content(40)
    world.reader.release(Seq(40))
    assert world.thin().pieces == 1
    world.close()


def test_gaps_are_refused_and_their_neighbours_named_after_consolidation(world: World) -> None:
    world.history(5)
    times = {seq: models.START_NS + seq * STEP_NS for seq in range(1, world.model.seq + 1)}

    def expected(kept: list[int], gap: tuple[int, int]) -> tuple[int, int]:
        return max(seq for seq in kept if seq < gap[0]), min(seq for seq in kept if seq > gap[1])

    for thinned in (False, True):
        if thinned:
            assert world.thin().pieces
        kept = world.kept()
        points = [seq for seq in kept if not world.in_gap(seq)]
        for seq in range(2, world.model.seq + 1):
            for text in (f"seq={seq}", rfc3339(TimeNs(times[seq])), rfc3339(TimeNs(times[seq] + 1))):
                # A nanosecond after the last record before a gap, nobody knows any more what the source held.
                between = text == rfc3339(TimeNs(times[seq] + 1)) and world.in_gap(seq + 1)
                if between or world.in_gap(seq):
                    gap = next(gap for gap in world.gaps if gap[0] <= seq + between <= gap[1])
                    with pytest.raises(MomentRefused, match="in a gap") as refusal:
                        world.reader.resolve(text)
                    nearest = tuple(int(found) for found in re.findall(r"seq=(\d+) at", str(refusal.value)))
                    assert nearest == expected(points, gap), text
                elif seq < world.model.seq or "seq" in text:
                    moment = world.reader.resolve(text)
                    assert moment.seq == max(point for point in points if point <= seq), text
    world.close()


def test_what_is_refused_at_either_end(world: World) -> None:
    world.history(6)
    world.group.ingest([Heartbeat(*world.model._next())])
    world.model._keep()
    world.thin(Policy(every_write_ns=MINUTE_NS, minutes_ns=3 * MINUTE_NS, hours_ns=0, days_ns=0))
    world.reader.refresh()
    base = world.reader.state.base
    assert base > 20
    for text in ("seq=1", f"seq={base - 1}", rfc3339(TimeNs(models.START_NS + STEP_NS * (base - 1)))):
        with pytest.raises(MomentRefused, match=f"before the first recovery point, seq={base} at"):
            world.reader.resolve(text)
    assert world.reader.resolve(f"seq={base}").seq == base
    with pytest.raises(MomentRefused, match=f"after the last recovery point, seq={world.model.seq} at"):
        world.reader.resolve(f"seq={world.model.seq + 1}")
    assert all(world.check(world.reader, seq) >= base for seq in range(base, world.model.seq + 1))
    world.close()


def test_flushed_points_are_found_among_what_is_kept(world: World) -> None:
    world.history(5)
    world.reader.refresh()
    flushes = {seq for seq, _ in world.model.history.items() if world.reader.view(Seq(seq)).state.last_flush == seq}
    world.thin()
    kept = set(world.kept()) & flushes
    assert kept
    for seq in range(min(kept), world.model.seq + 1):
        if not world.in_gap(seq):
            assert world.reader.resolve(f"seq={seq}~flush").seq == max(found for found in kept if found <= seq)
    world.close()


def test_points_say_how_fine_each_range_is(world: World) -> None:
    world.history(7)
    world.thin()
    points = world.reader.points()
    kept = [seq for seq in world.kept() if not world.in_gap(seq)]
    assert [(gap.first, gap.last) for gap in points.gaps] == world.gaps
    assert {one.granularity for one in points.ranges} == {"1m", EVERY_WRITE}
    for one in points.ranges:
        inside = [seq for seq in kept if one.first <= seq <= one.last]
        assert inside[0] == one.first and inside[-1] == one.last
        if one.granularity == EVERY_WRITE:
            assert inside == list(range(one.first, one.last + 1))
    assert sum(len([seq for seq in kept if one.first <= seq <= one.last]) for one in points.ranges) == len(kept)
    world.close()


# -- rewritten while it is read --------------------------------------------------------------------------------------


class MeddlingStorage(Storage):
    """Does something once, right before it opens a segment of the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.meddle: Callable[[], object] | None = None

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        if path.suffix == ".rwj" and self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return super().open(path, flags, mode)


def test_a_segment_that_is_replaced_under_a_reader_is_no_damage(world: World) -> None:
    world.history(8)
    storage = MeddlingStorage()
    reader = world.open_reader(storage)
    assert reader.held == world.model.seq
    outcomes: list[Outcome] = []
    storage.meddle = lambda: outcomes.append(world.thin())
    held = reader.view(Seq(100)).state.held
    assert outcomes and outcomes[0].pieces == 1
    assert held < 100 and world.check(reader, 100) == held
    # The tail, too.
    world.history(8)
    storage.meddle = lambda: outcomes.append(world.thin())
    reader.refresh()
    assert outcomes[1].pieces == 1 and reader.held == world.model.seq
    world.close()


def test_a_segment_that_is_missing_is_damage(world: World) -> None:
    world.history(4)
    directory = world.path / "groups/g/journal"
    victim = sorted(directory.glob("*.rwj"))[1]
    victim.rename(directory / "hidden")
    with pytest.raises(Damaged, match="missing|ends at seq"):
        for seq in range(3, world.model.seq):
            world.reader.refresh()
            world.reader.view(Seq(seq))
    (directory / "hidden").rename(victim)
    world.close()


def test_a_last_segment_without_entries_may_go_again(world: World) -> None:
    """As a writer does that recovers, to go on in the one before."""
    world.history(1)
    directory = world.path / "groups/g/journal"
    segments = sorted(directory.glob("*.rwj"))
    assert segments[-1].name == f"{world.model.seq + 1:020d}.rwj"
    world.reader.refresh()
    segments[-1].rename(directory / "hidden")
    world.reader.refresh()
    assert world.reader.held == world.model.seq and world.check(world.reader, 20) == 20
    (directory / "hidden").rename(segments[-1])
    world.write(3)
    world.reader.refresh()
    assert world.reader.held == world.model.seq
    world.close()


def test_a_history_that_is_rewritten_endlessly_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.history(2)
    numbers = iter(range(1, 1000))
    monkeypatch.setattr(group_views, "read_number", lambda *_: next(numbers))

    def torn(number: int) -> None:
        raise Damaged("the segment is missing")

    with pytest.raises(Exception, match="thinned out faster than it is read"):
        world.reader._views._settled(torn)
    world.close()


def test_between_the_manifest_and_the_index_every_moment_is_right(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a writer leaves that is killed there, read before and after another one has finished it."""
    world.history(5)
    killed = tmp_path / "killed"

    def write_and_copy(storage: Storage, directory: Path, manifest: Manifest) -> None:
        write_manifest(storage, directory, manifest)
        shutil.copytree(world.path, killed)

    monkeypatch.setattr(consolidator, "write_manifest", write_and_copy)
    assert world.thin().pieces == 1
    kept = world.kept()
    store = StoreReader.open(killed, pinning=Pinning.MOMENTS)
    reader = store.group()
    assert reader.rewritten == (1, 0)
    assert [world.check(reader, seq) for seq in range(3, world.model.seq + 1, 2)] == [
        max(point for point in kept if point <= seq) for seq in range(3, world.model.seq + 1, 2)
    ]
    reader.hold(Seq(kept[5]))
    reader.release(Seq(kept[5]))
    assert reader.points().ranges == world.reader.points().ranges
    store.close()
    Store.open(killed).close()
    store = StoreReader.open(killed)
    assert store.group().rewritten == (1, 1)
    for seq in range(3, world.model.seq + 1, 2):
        world.check(store.group(), seq)
    store.close()
    world.close()


# -- what does not grow with history ---------------------------------------------------------------------------------


def test_a_moment_is_resolved_without_a_look_at_all_gaps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.history(7)
    world.store.checkpoint()

    def unwanted(*_: object) -> None:
        raise AssertionError("all gaps were read")

    monkeypatch.setattr(Catalog, "gaps", unwanted)
    for text in ("latest", "seq=30", "latest~flush", rfc3339(TimeNs(models.START_NS + 30 * STEP_NS))):
        world.reader.resolve(text)
    with pytest.raises(MomentRefused, match="in a gap"):
        world.reader.resolve(f"seq={world.gaps[0][0]}")
    world.close()


# -- a machine -------------------------------------------------------------------------------------------------------


class ReaderMachine(RuleBasedStateMachine):
    """Writes, thinning, holds and reads in any order, by a reader that refreshes only when it must."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="rewindfs-test-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(models, "STEP_NS", STEP_NS)
        self.world = World(self.directory / "store")
        self.held: list[Seq] = []
        self.images: list[tuple[int, Image]] = []

    @initialize()
    def begin(self) -> None:
        self.world.history(2)

    def any_seq(self, data: st.DataObject) -> Seq:
        return Seq(data.draw(st.integers(3, self.world.model.seq)))

    @rule(count=st.integers(1, 30))
    def write(self, count: int) -> None:
        self.world.write(count)

    @rule(writes=st.integers(0, 3))
    def outage(self, writes: int) -> None:
        self.world.outage(writes)

    @rule()
    def flush(self) -> None:
        self.world.group.ingest([self.world.model.flush(self.world.volume)])

    @rule()
    def next_segment(self) -> None:
        self.world.group.complete_segment()

    @rule()
    def checkpoint(self) -> None:
        self.world.store.checkpoint()

    @rule(minutes=st.sampled_from([(1, 60), (0, 5), (1, 2)]), hours=st.booleans())
    def thin(self, minutes: tuple[int, int], hours: bool) -> None:
        every, last = minutes
        self.world.thin(Policy(every * MINUTE_NS, last * MINUTE_NS, 2 * HOUR_NS if hours else 0, 0))

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        seq = self.any_seq(data)
        try:
            self.world.reader.hold(seq)
        except MomentGone:
            return
        self.held.append(seq)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.world.reader.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def read_held(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.held))
        image = self.world.reader.image(self.world.volume, seq)
        assert image.read(0, image.size) == self.world.content(seq)

    @rule(data=st.data())
    def make_image(self, data: st.DataObject) -> None:
        seq = min(self.any_seq(data), self.world.reader.held)
        if seq >= 3:
            held = self.world.reader.view(seq).state.held
            if self.world.has_volume(held):
                self.images.append((held, self.world.reader.image(self.world.volume, seq)))

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def read_image(self, data: st.DataObject) -> None:
        held, image = self.images[data.draw(st.integers(0, len(self.images) - 1))]
        try:
            assert image.read(0, image.size) == self.world.content(held)
        except MomentGone:
            assert held not in self.held

    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        seq = self.any_seq(data)
        try:
            moment = self.world.reader.resolve(f"seq={seq}")
        except MomentRefused as refusal:
            assert self.world.in_gap(seq) or seq < self.world.group.state.base, refusal
            return
        assert moment.seq <= seq and not self.world.in_gap(seq) and not self.world.in_gap(moment.seq)
        assert self.world.check(self.world.reader, seq) == moment.seq

    def teardown(self) -> None:
        for seq in self.held:
            image = self.world.reader.image(self.world.volume, seq)
            assert image.read(0, image.size) == self.world.content(seq)
        self.world.close()
        self.patch.undo()
        shutil.rmtree(self.directory)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_reader_machine() -> None:
    run_state_machine_as_test(ReaderMachine, settings=settings(max_examples=6, stateful_step_count=25, **_SETTINGS))


@pytest.mark.slow
def test_reader_machine_at_length() -> None:
    run_state_machine_as_test(ReaderMachine, settings=settings(max_examples=150, stateful_step_count=40, **_SETTINGS))
