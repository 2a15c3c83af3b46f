"""Consolidation: what stays of history as it grows older, and what a crash, a reader or a gap changes about it."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from dedup import consolidator, fold, manifest
from dedup.consolidation import GroupHistory, plan
from dedup.consolidator import Outcome, consolidate
from dedup.errors import Damaged, MomentRefused, StoreFull
from dedup.granularity import FOREVER
from dedup.group_writer import GroupWriter
from dedup.journal_reader import chain
from dedup.layout import MANIFEST_NAME, RAW_GENERATION
from dedup.manifest import read_manifest
from dedup.metadata_journal import read
from dedup.pins import ReaderPins
from dedup.retention import DAY_NS, HOUR_NS, MINUTE_NS, Policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Seq, TimeNs, VolumeId
from dedup.verify import verify
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment

SECOND = 10**9


class World:
    """A store with one group and its model, in which time passes as the test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        Store.create(path)
        self.store = Store.open(path)
        self.model = Model()
        self.group.ingest(self.model.begin())
        self.base = self.model.seq
        create = self.model.create("disk.img", 32 * 4096)
        self.group.ingest([create])
        self.volume = create.volume
        self.random = random.Random(1)

    @property
    def group(self) -> GroupWriter:
        return self.store.group("g")

    def write(self, count: int = 1, every_ns: int = SECOND, volume: VolumeId | None = None) -> list[int]:
        """Writes random blocks, so far apart in time; their seqs."""
        seqs = []
        for _ in range(count):
            self.model.elapsed_ns += every_ns
            offset = self.random.randrange(30) * 4096 + self.random.choice((0, 0, 0, 100))
            data = self.random.randbytes(self.random.choice((4096, 4096, 8192, 700)))
            self.group.ingest([self.model.write(volume or self.volume, offset, data)])
            seqs.append(self.model.seq)
        return seqs

    def passes(self, nanoseconds: int) -> None:
        """Time without a write, after the segment so far was completed: only whole segments grow old."""
        self.group.complete_segment()
        self.model.elapsed_ns += nanoseconds
        self.group.ingest([self.model.heartbeat()])

    def consolidate(self, policy: Policy | None = None) -> Outcome:
        return consolidate(self.group, policy or Policy(), self.group.time)

    def kept(self) -> list[int]:
        """The seqs of the recovery points that there are, each held against the model."""
        reader = self.group.reader()
        found = []
        for seq in sorted(self.model.history):
            if seq >= self.group.state.base and reader.view(Seq(seq)).state.held == seq:
                check_moment(reader, self.model, seq)
                found.append(seq)
        return found

    def reopen(self, *, lose_index: bool = False) -> None:
        self.store.abandon()
        if lose_index:
            shutil.rmtree(self.path / "index")
            (self.path / "index").mkdir()
        self.store = Store.open(self.path)

    def check(self) -> None:
        """The store is sound; the index, made anew, says the same."""
        kept = self.kept()
        self.reopen(lose_index=True)
        assert self.kept() == kept
        self.store.close()
        report = verify(self.path, read_data=True)
        assert report.ok, report
        self.store = Store.open(self.path)


def buckets(world: World, seqs: list[int], window: int) -> list[int]:
    return [world.model.times[seq] // window for seq in seqs]


def test_one_point_a_minute_is_left_of_what_is_older_than_two_hours(world: World) -> None:
    old = world.write(70, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    new = world.write(20)
    assert world.consolidate().pieces == 1
    kept = world.kept()
    assert set(new) <= set(kept), "every write of the last two hours is there"
    of_old = [seq for seq in kept if old[0] <= seq <= old[-1]]
    assert len(of_old) == len(set(buckets(world, old, MINUTE_NS)))
    last = {world.model.times[seq] // MINUTE_NS: seq for seq in old}
    assert of_old == sorted(last.values()), "the last one of each minute"
    assert world.base in kept
    world.check()


def test_the_last_flushed_point_of_a_minute_is_the_one_that_stays(world: World) -> None:
    world.passes(MINUTE_NS - world.model.times[world.model.seq] % MINUTE_NS)
    world.write(3)
    world.group.ingest([world.model.flush(world.volume)])
    flushed = world.model.seq
    world.write(3)
    world.write(1, MINUTE_NS)
    world.passes(3 * HOUR_NS)
    world.consolidate()
    kept = world.kept()
    assert [seq for seq in kept if flushed - 3 <= seq <= flushed + 3] == [flushed]
    assert world.group.reader().resolve(f"seq={flushed}").kind.value == "flush"
    world.check()


def test_history_grows_coarser_with_age_and_then_ends(world: World) -> None:
    seqs = world.write(100, 30 * MINUTE_NS)  # 50 hours
    policy = Policy()
    sizes = []
    for age in (HOUR_NS, 2 * DAY_NS, 9 * DAY_NS, 40 * DAY_NS):
        world.passes(age)
        world.consolidate(policy)
        kept = [seq for seq in world.kept() if seq in seqs]
        sizes.append(len(kept))
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[1] <= len(set(buckets(world, seqs, HOUR_NS))) + 1
    assert sizes[2] <= len(set(buckets(world, seqs, DAY_NS))) + 1
    state = world.group.state
    assert state.base > seqs[0], "the base has advanced"
    assert world.group.reader().resolve("base").seq == state.base
    with pytest.raises(MomentRefused, match="before the first recovery point"):
        world.group.reader().resolve(f"seq={state.base - 1}")
    world.check()


def test_named_points_outlive_every_tier(world: World) -> None:
    world.write(20)
    world.group.create_snapshot("kept")
    named = world.model.seq
    world.write(20)
    world.passes(100 * DAY_NS)
    world.consolidate()
    assert named in world.kept()
    assert world.group.reader().resolve("kept").seq == named
    world.group.delete_snapshot("kept")
    world.write(5)
    world.passes(100 * DAY_NS)
    world.consolidate()
    assert named not in world.kept()
    world.check()


def test_a_snapshot_whose_time_is_up_is_forgotten(world: World) -> None:
    world.write(5)
    seq = world.model.seq
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: world.group.time)
        world.group.create_snapshot("short", keep_ns=10 * DAY_NS)
    world.write(5)
    world.passes(DAY_NS)
    world.consolidate()
    assert seq in world.kept()
    world.passes(50 * DAY_NS)
    world.consolidate()
    assert not world.group.name_exists("short")
    assert seq not in world.kept()
    world.check()


def test_a_time_between_two_kept_points_is_the_earlier_one(world: World) -> None:
    seqs = world.write(70, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    world.consolidate()
    kept = [seq for seq in world.kept() if seq in seqs]
    between = kept[2] + 2
    assert between not in kept
    reader = world.group.reader()
    assert reader.resolve(f"seq={between}").seq == kept[2]
    check_moment(reader, world.model, reader.resolve(f"seq={between}").seq)


def test_a_gap_stays_one_when_history_is_thinned(world: World) -> None:
    world.write(10)
    refused = world.model.write(world.volume, 0, b"refused")
    world.group.ingest([refused, world.model.correct(world.volume, refused.seq, 32 * 4096, 0, b"truth")])
    after = world.model.seq
    world.write(10)
    world.passes(3 * HOUR_NS)
    world.consolidate()
    assert refused.seq not in world.kept()
    with pytest.raises(MomentRefused, match="in a gap") as error:
        world.group.reader().resolve(f"seq={refused.seq}")
    nearest = [int(part.split()[0]) for part in str(error.value).split("seq=")[2:]]
    assert nearest[0] < refused.seq < after <= nearest[1]
    assert set(nearest) <= set(world.kept())


def test_volumes_that_come_and_go_within_a_window_leave_nothing(world: World) -> None:
    world.passes(MINUTE_NS - world.model.times[world.model.seq] % MINUTE_NS)
    create = world.model.create("short-lived", 0)
    world.group.ingest([create, world.model.write(create.volume, 0, b"x" * 9000), world.model.retire(create.volume)])
    world.write(2)
    world.store.checkpoint()
    world.passes(3 * HOUR_NS)
    world.consolidate()
    history = [logged for logged, _ in read(world.store.storage, world.group.directory, start(world))]
    assert not any(extent.volume == create.volume for logged in history for extent in logged.extents)
    with world.store.index.read() as txn:
        assert not list(world.group.catalog.pointers.leaves(txn, create.volume))
    world.check()


def start(world: World):  # type: ignore[no-untyped-def]
    return chain(world.store.storage, world.group.directory)[0].start


def test_more_than_fits_one_entry_or_one_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "ENTRY_BLOCKS_MAX", 5)
    monkeypatch.setattr(fold, "LEAVES_MAX", 1)
    others = [world.model.create(f"v{number}", 0) for number in range(3)]
    world.group.ingest(others)
    for _ in range(30):
        for create in others:
            world.write(1, SECOND, create.volume)
    world.group.ingest([world.model.resize(others[0].volume, 5000)])
    world.write(5)
    world.passes(3 * HOUR_NS)
    assert world.consolidate().pieces == 1
    world.kept()
    world.check()


def test_files_and_pieces_of_a_bounded_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "FILE_BYTES_MAX", 2000)
    monkeypatch.setattr("dedup.consolidation.PIECE_BYTES_MAX", 6000)
    for _ in range(6):
        world.write(40, 20 * SECOND)
        world.group.complete_segment()
    world.passes(3 * HOUR_NS)
    assert world.consolidate().pieces > 1
    assert len(read_manifest(world.store.storage, world.group.directory).rows) > 3
    world.kept()
    world.passes(30 * HOUR_NS)
    world.consolidate()
    world.check()


def test_a_pinned_moment_postpones_its_piece_only(world: World) -> None:
    first = world.write(50, 7 * SECOND)
    world.group.complete_segment()
    world.store.checkpoint()
    second = world.write(50, 7 * SECOND)
    world.group.complete_segment()
    world.store.checkpoint()
    world.passes(3 * HOUR_NS)
    pins = ReaderPins.open(world.path, Storage())
    with pins.inside():
        pins.pin("g", Seq(first[10]))
    # Both lie in one piece when they are due together; smaller pieces keep them apart.
    world_policy = Policy()
    consolidation_bytes = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dedup.consolidation.PIECE_BYTES_MAX", consolidation_bytes)
        outcome = world.consolidate(world_policy)
        assert outcome.postponed == 1 and outcome.pieces >= 1
        assert set(first) <= set(world.kept())
        assert not set(second) <= set(world.kept())
        rows = read_manifest(world.store.storage, world.group.directory).rows
        assert rows[0].generation == RAW_GENERATION
        world.check()
        pins.close()
        assert world.consolidate(world_policy).postponed == 0
    assert not set(first) <= set(world.kept())
    world.check()


def test_everything_pinned_postpones_everything(world: World) -> None:
    world.write(50)
    world.passes(3 * HOUR_NS)
    pins = ReaderPins.open(world.path, Storage(), everything=True)
    before = sorted(world.group.directory.iterdir())
    outcome = world.consolidate()
    assert (outcome.pieces, outcome.postponed) == (0, 1)
    assert {path.name for path in before} <= {path.name for path in world.group.directory.iterdir()}
    pins.close()
    assert world.consolidate().pieces == 1


@pytest.mark.parametrize("when", ["before the index", "before the manifest"])
def test_a_writer_killed_in_a_commit(world: World, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def killed(*args: object) -> None:
        if when == "before the index":
            manifest.write_manifest(*args)  # type: ignore[arg-type]
        raise Killed

    world.write(70, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    with monkeypatch.context() as patch:
        patch.setattr(consolidator, "write_manifest", killed)
        with pytest.raises(Killed):
            world.consolidate()
    before = len(world.model.history)
    world.reopen()
    kept = world.kept()
    assert len(kept) < before / 3 if when == "before the index" else len(kept) >= before - 2
    files = {path.name for path in world.group.directory.iterdir()} - {MANIFEST_NAME}
    assert len(files) == len(chain(world.store.storage, world.group.directory)), "dead files are gone"
    world.write(5)
    world.consolidate()
    world.check()


def test_a_full_disk_leaves_history_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write(40, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    before = world.kept()

    def full(self: object, *args: object) -> None:
        raise StoreFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("dedup.segment_builder.SegmentBuilder._write", full)
        with pytest.raises(StoreFull):
            world.consolidate()
    assert world.kept() == before
    world.write(3)
    assert world.consolidate().pieces == 1
    world.check()


def test_an_older_manifest_is_named(world: World) -> None:
    world.write(40, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    world.consolidate()
    path = world.group.directory / MANIFEST_NAME
    older = path.read_bytes()
    world.passes(30 * HOUR_NS)
    world.consolidate()
    world.store.close()
    newest = path.read_bytes()
    path.write_bytes(older)
    with pytest.raises(Damaged, match="MANIFEST"):
        Store.open(world.path)
    path.write_bytes(newest)
    world.store = Store.open(world.path)
    world.check()


def test_the_plan_is_done_after_it_was_done(world: World) -> None:
    world.write(80, 25 * MINUTE_NS)
    world.passes(3 * DAY_NS)
    world.consolidate()
    with world.store.index.read() as txn:
        group = world.group
        history = GroupHistory(world.store.storage, group.directory, group.catalog, txn, group.state)
        assert plan(history, Policy(), group.time) == []
    kept = world.kept()
    assert world.consolidate().pieces == 0
    assert world.kept() == kept


def test_what_has_expired_joins_the_base_now_and_then(world: World) -> None:
    for _ in range(12):
        world.write(30, 2 * HOUR_NS)
        world.group.ingest([world.model.flush(world.volume), *[world.model.heartbeat() for _ in range(3)]])
        world.passes(DAY_NS)
        world.consolidate()
    for _ in range(8):
        world.write(10, 2 * HOUR_NS)
        world.passes(20 * DAY_NS)
        world.consolidate()
    rows = read_manifest(world.store.storage, world.group.directory).rows
    assert rows[0].window_ns == FOREVER
    expired = [row for row in rows if world.group.time - row.newest > 32 * DAY_NS]
    grown = sum(row.bytes for row in expired[1:])
    assert grown * 4 < rows[0].bytes, "never more than a fourth of the base waits"
    world.check()


def test_the_base_is_a_point_though_history_expires_in_a_gap(world: World) -> None:
    world.write(5)
    world.group.ingest([world.model.flush(world.volume)])
    world.write(5)
    world.group.complete_segment()
    before = world.model.seq
    refused = world.model.write(world.volume, 0, b"refused")
    world.group.ingest([refused])
    world.group.complete_segment()
    world.group.ingest([world.model.correct(world.volume, refused.seq, 32 * 4096, 0, b"truth")])
    world.write(3)
    world.passes(100 * DAY_NS)
    world.write(3)
    # Only what lies before the gap has expired, or ends in it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dedup.consolidation._due_window", lambda one, *_: FOREVER if one.last <= refused.seq else 0)
        assert world.consolidate().pieces == 1
        assert world.consolidate().pieces == 0
    assert world.group.state.base == before
    assert before in world.kept()
    world.check()
    world.consolidate()
    assert refused.seq not in world.kept()
    assert world.consolidate().pieces == 0, "what is done is not done again"
    world.check()


def test_age_counts_from_the_older_clock(world: World) -> None:
    world.write(50, 7 * SECOND)
    before = world.kept()
    leapt = TimeNs(world.group.time + 1000 * DAY_NS)
    assert consolidate(world.group, Policy(), leapt).pieces == 0
    assert world.kept() == before
