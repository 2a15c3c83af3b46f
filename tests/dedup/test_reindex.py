"""The index of history that was thinned: it says what the journal says, as it is and not only made anew."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from dedup.manifest import Manifest, write_manifest
from dedup.pins import ReaderPins
from dedup.pointer_map import SEQ_MAX
from dedup.retention import DAY_NS, HOUR_NS, MINUTE_NS
from dedup.storage import Storage
from dedup.types import Bookmark, Epoch, EpochStart, ReconcileEnd, Seq, VolumeId
from dedup.verify import verify
from tests.dedup.test_consolidation import SECOND, World


def check_index(world: World, place: Path) -> None:
    """The index and the journal, as they lie there beside the writer, say the same."""
    shutil.copytree(world.path, place)
    try:
        damage = [one for check in verify(place).checks for one in check.damage]
    finally:
        shutil.rmtree(place)
    assert not damage


def last_held(world: World) -> Seq:
    """The seq of the last checkpoint."""
    with world.store.index.read() as txn:
        anchor = world.group.catalog.anchor(txn, SEQ_MAX)
    assert anchor is not None
    return anchor.held


@pytest.mark.parametrize("what", ["an owner", "a journal", "another journal"])
def test_a_checkpoint_behind_entries_without_a_seq_at_a_segments_beginning(
    world: World, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment is thinned and the one before it is not: the checkpoint is then of the segment's beginning."""
    monkeypatch.setattr("dedup.consolidation.PIECE_BYTES_MAX", 1)
    world.group.create_journal("coarse", MINUTE_NS)
    first = world.write(10, 7 * SECOND)
    world.store.checkpoint()
    first += world.write(10, 7 * SECOND)
    world.group.complete_segment()
    if what == "an owner":
        world.group.set_owner("a" * 32)
    elif what == "a journal":
        world.group.create_journal("finest", 0)
    else:
        world.group.use_journal("coarse")
    world.store.checkpoint()
    assert last_held(world) == first[-1]
    world.write(20, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    pins = ReaderPins.open(world.path, Storage())
    with pins.inside():
        pins.pin("g", Seq(first[3]))
    outcome = world.consolidate()
    assert (outcome.pieces, outcome.postponed) == (1, 1)
    check_index(world, tmp_path / "copy")
    assert set(first) <= set(world.kept())
    pins.close()
    assert world.consolidate().pieces == 1
    check_index(world, tmp_path / "copy")
    world.check()


def test_a_checkpoint_behind_a_base_that_advanced(world: World, tmp_path: Path) -> None:
    """What has expired is too little to join the base, so that what follows is thinned without it."""
    world.write(12)
    world.passes(40 * DAY_NS)
    assert world.consolidate().pieces == 1
    world.store.checkpoint()
    world.passes(40 * DAY_NS)
    assert world.consolidate().pieces == 0
    world.passes(3 * HOUR_NS)
    assert world.consolidate().pieces == 1
    check_index(world, tmp_path / "copy")
    world.check()


def test_names_that_went_since_the_last_checkpoint(world: World, tmp_path: Path) -> None:
    """What they stood for may be thinned at once: they are names no more."""
    world.write(5)
    world.group.create_snapshot("gone")
    world.write(5)
    world.passes(3 * HOUR_NS)
    world.store.checkpoint()
    world.group.delete_snapshot("gone")
    assert world.consolidate().pieces == 1
    assert last_held(world) < world.model.seq or world.group.state.new_snapshots
    check_index(world, tmp_path / "copy")
    world.passes(40 * DAY_NS)
    world.store.checkpoint()
    assert world.consolidate().pieces == 1
    assert world.group.state.new_snapshots, "the base advanced, and there was no checkpoint since"
    check_index(world, tmp_path / "copy")
    world.check()


def test_a_volume_that_came_and_went_before_a_checkpoint(world: World, tmp_path: Path) -> None:
    """That checkpoint knew its blocks, which are no part of history any more."""
    made = world.model.create("short-lived.img", 3 << 12)
    world.group.ingest([made])
    world.write(4, SECOND, made.volume)
    world.group.ingest([world.model.retire(made.volume)])
    world.passes(3 * HOUR_NS)
    world.store.checkpoint()
    assert world.consolidate().pieces == 1
    check_index(world, tmp_path / "copy")
    world.check()


class Killed(Exception):
    """The writer is gone."""


def killed_behind(storage: Storage, directory: Path, manifest: Manifest) -> None:
    """The manifest counts, and the index was not committed."""
    write_manifest(storage, directory, manifest)
    raise Killed


class IndexMachine(RuleBasedStateMachine):
    """Whatever a journal can have, checkpoints anywhere in it, and history thinned: the index equals the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="rewindfs-test-"))
        self.world = World(self.directory / "store")
        self.pins = ReaderPins.open(self.world.path, Storage())
        self.made = 0

    def new_name(self) -> str:
        self.made += 1
        return f"name-{self.made}"

    def volume(self, data: st.DataObject) -> VolumeId:
        return data.draw(st.sampled_from(sorted(self.world.model.content)))

    def ingest(self, *records: object) -> None:
        self.world.group.ingest(list(records))  # type: ignore[arg-type]

    @rule(count=st.integers(1, 12), every=st.sampled_from([SECOND, 10 * SECOND, 20 * MINUTE_NS]))
    def write(self, count: int, every: int) -> None:
        self.world.write(count, every)

    @rule(data=st.data())
    def write_elsewhere(self, data: st.DataObject) -> None:
        self.world.write(2, SECOND, self.volume(data))

    @rule(data=st.data(), what=st.sampled_from(["resize", "create", "retire", "rename"]))
    def change_volumes(self, data: st.DataObject, what: str) -> None:
        model = self.world.model
        if what == "resize":
            self.ingest(model.resize(self.volume(data), data.draw(st.integers(0, 200)) << 10))
        elif what == "create":
            self.ingest(model.create(self.new_name(), 3 << 12))
        elif what == "rename":
            self.ingest(model.rename(self.volume(data), self.new_name()))
        elif len(model.content) > 1:
            self.ingest(model.retire(max(model.content)))

    @rule()
    def flush(self) -> None:
        self.ingest(self.world.model.flush(self.world.volume))

    @rule()
    def bookmark(self) -> None:
        self.ingest(Bookmark(*self.world.model._next(), self.new_name()))
        self.world.model._keep()

    @rule(writes=st.integers(0, 3))
    def outage(self, writes: int) -> None:
        model = self.world.model
        start = EpochStart(*model._next(), Epoch(self.world.group.epoch + 1), clean=False)
        model._keep()
        self.ingest(start)
        for number in range(writes):
            self.ingest(model.reconcile(self.world.volume, 4096 * number, self.world.random.randbytes(4096)))
        end = ReconcileEnd(*model._next())
        model._keep()
        self.ingest(end)

    @rule(
        data=st.data(),
        what=st.sampled_from(["snapshot", "forget", "new journal", "use journal", "owner"]),
        at_beginning=st.booleans(),
        checkpoint=st.booleans(),
    )
    def say(self, data: st.DataObject, what: str, at_beginning: bool, checkpoint: bool) -> None:
        """An entry that consumes no seq, where a segment begins or elsewhere, before a checkpoint or not."""
        group = self.world.group
        if at_beginning:
            group.complete_segment()
        if what == "snapshot":
            group.create_snapshot(self.new_name())
        elif what == "forget":
            names = [name for name in map("name-{}".format, range(self.made + 1)) if group.name_exists(name)]
            if names:
                group.delete_snapshot(data.draw(st.sampled_from(names)))
        elif what == "new journal" and len(group.state.journals) < 5:
            group.create_journal(self.new_name(), data.draw(st.integers(0, 2)) * MINUTE_NS)
        elif what == "use journal":
            group.use_journal(data.draw(st.sampled_from(group.state.journals)).name)
        else:
            group.set_owner(data.draw(st.sampled_from("abc")) * 32)
        if checkpoint:
            self.world.store.checkpoint()

    @rule()
    def next_segment(self) -> None:
        self.world.group.complete_segment()

    @rule()
    def checkpoint(self) -> None:
        self.world.store.checkpoint()

    @rule(clean=st.booleans(), lose_index=st.booleans())
    def reopen(self, clean: bool, lose_index: bool) -> None:
        if clean:
            self.world.store.checkpoint()  # all that closing does more than a kill
        self.world.reopen(lose_index=lose_index)

    @rule(data=st.data(), back=st.integers(0, 40))
    def pin(self, data: st.DataObject, back: int) -> None:
        """A reader needs that moment, and none that was pinned before."""
        self.pins.close()
        self.pins = ReaderPins.open(self.world.path, Storage())
        with self.pins.inside():
            self.pins.pin("g", Seq(max(1, self.world.model.seq - back)))

    @rule(
        hours=st.sampled_from([0, 1, 3, 30, 40 * 24]),
        whole=st.booleans(),
        joined=st.booleans(),
        few=st.booleans(),
        killed=st.booleans(),
    )
    def thin(self, hours: int, whole: bool, joined: bool, few: bool, killed: bool) -> None:
        if whole:
            self.world.passes(hours * HOUR_NS)
        else:
            self.world.model.elapsed_ns += hours * HOUR_NS
            self.ingest(self.world.model.heartbeat())
        with pytest.MonkeyPatch.context() as patch:
            if not joined:
                patch.setattr("dedup.consolidation.PIECE_BYTES_MAX", 1)
            if few:
                patch.setattr("dedup.reindex.ANCHOR_RECORDS", 2)
            if killed:
                patch.setattr("dedup.consolidator.write_manifest", killed_behind)
            try:
                self.world.consolidate()
            except Killed:
                check_index(self.world, self.directory / "copy")
                self.world.reopen()
        check_index(self.world, self.directory / "copy")

    def teardown(self) -> None:
        try:
            kept = self.world.kept()
            self.world.reopen()
            check_index(self.world, self.directory / "copy")
            assert self.world.kept() == kept
            self.world.reopen(lose_index=True)
            check_index(self.world, self.directory / "copy")
            assert self.world.kept() == kept
        finally:
            self.pins.close()
            self.world.store.abandon()
            shutil.rmtree(self.directory)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


def test_index_machine() -> None:
    run_state_machine_as_test(IndexMachine, settings=settings(max_examples=8, stateful_step_count=25, **_SETTINGS))


@pytest.mark.slow
def test_index_machine_at_length() -> None:
    run_state_machine_as_test(IndexMachine, settings=settings(max_examples=300, stateful_step_count=40, **_SETTINGS))
