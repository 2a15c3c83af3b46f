"""The index of history that was thinned: it says what the journal says, as it is and not only made anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.pins import ReaderPins
from dedup.pointer_map import SEQ_MAX
from dedup.retention import DAY_NS, HOUR_NS, MINUTE_NS
from dedup.storage import Storage
from dedup.types import Seq
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


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "store")
    yield made
    made.store.abandon()


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
