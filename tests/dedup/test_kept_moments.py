"""What must not disappear: moments named or held while a piece is thinned, history behind an index made anew."""

from __future__ import annotations

import shutil
from typing import NoReturn

import pytest

from dedup import group_recovery
from dedup.consolidation import Folded, fold_next
from dedup.consolidator import commit_piece, discard_pieces, history_of
from dedup.errors import Damaged, StoreFailed
from dedup.journal_reader import first_position
from dedup.layout import RAW_SLOTS_OFFSET, container_of, container_path, slot_of
from dedup.metadata_journal import read
from dedup.pins import ReaderPins
from dedup.reader import StoreReader
from dedup.retention import HOUR_NS, Policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Address, Seq
from tests.dedup.test_consolidation import SECOND, World


def fold_first(world: World) -> Folded:
    """What a child folds, and the writer has yet to commit."""
    with world.store.index.read() as txn:
        folded = fold_next(history_of(world.group, txn), Policy(), world.group.time, {})
    assert folded is not None
    return folded


def test_a_moment_that_is_named_after_the_fold_stays(world: World) -> None:
    seqs = world.write(70, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    folded = fold_first(world)
    for seq in seqs[5:14]:
        world.group.create_snapshot(f"of-{seq}", f"seq={seq}")
    assert not commit_piece(world.group, folded)
    for seq in seqs[5:14]:
        assert world.group.reader().resolve(f"of-{seq}").seq == seq
    folded = fold_first(world)
    assert commit_piece(world.group, folded)
    assert {*seqs[5:14]} <= {*world.kept()}
    world.check()


def test_a_piece_that_a_reader_keeps_out_can_be_tried_again(world: World) -> None:
    world.write(70, 7 * SECOND)
    world.passes(3 * HOUR_NS)
    pins = ReaderPins.open(world.path, Storage())
    for takes_place in (False, True):
        folded = fold_first(world)
        before = sorted(world.group.directory.iterdir())
        with pins.inside():
            assert commit_piece(world.group, folded) is None
        assert sorted(world.group.directory.iterdir()) == before
        if takes_place:
            assert commit_piece(world.group, folded)
        else:
            discard_pieces(world.group)
            assert len(list(world.group.directory.iterdir())) < len(before)
    with pins.inside():
        assert not world.consolidate().pieces
    pins.close()
    world.check()


def test_a_moment_held_before_its_own_checkpoint_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write(30)
    world.store.checkpoint()
    world.write(10)
    world.group.complete_segment()
    world.write(3)
    storage = Storage()
    pins = ReaderPins.open(world.path, storage)
    reader = StoreReader(world.path, storage, world.store.index, world.store.pool, pins).group()
    seq = Seq(world.model.seq)
    reader.hold(seq)
    image = reader.image(world.volume, seq)
    world.store.checkpoint()  # its view goes on from the one before
    world.passes(3 * HOUR_NS)
    monkeypatch.setattr("dedup.consolidation.PIECE_BYTES_MAX", 1)
    world.consolidate()
    assert image.read(0, image.size) == world.model.history[seq][0][world.volume]
    reader.release(seq)
    assert world.consolidate().pieces
    pins.close()
    world.check()


def test_a_leaf_that_was_cut_away_and_written_again_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write(5)
    world.store.checkpoint()
    world.group.ingest([world.model.resize(world.volume, 0)])
    world.store.checkpoint()
    world.passes(10 * SECOND)
    world.group.ingest([world.model.resize(world.volume, 32 * 4096), world.model.write(world.volume, 0, b"x" * 4096)])
    world.store.checkpoint()
    world.passes(3 * HOUR_NS)
    monkeypatch.setattr("dedup.consolidation.PIECE_BYTES_MAX", 1)
    assert world.consolidate().pieces
    world.kept()
    world.check()


def test_what_is_cut_away_behind_the_border_stays_away(world: World) -> None:
    world.write(5)
    world.store.checkpoint()
    data = b"x" * 4096
    world.group.ingest([world.model.write(world.volume, 600 * 4096, data), world.model.heartbeat()])
    world.passes(3 * HOUR_NS)
    world.group.ingest([world.model.resize(world.volume, 4096), world.model.write(world.volume, 1300 * 4096, data)])
    world.store.checkpoint()  # of what lies on both sides of the border
    assert world.consolidate().pieces
    world.kept()
    assert world.group.head_block(world.volume, 1300) == data
    assert world.group.head_address(world.volume, 600) == 0
    world.check()


def test_a_sync_that_fails_after_the_last_durable_segment_was_thinned(world: World) -> None:
    world.write(20, 7 * SECOND)
    world.store.checkpoint()
    world.passes(3 * HOUR_NS)
    assert world.consolidate().pieces
    held = world.group.held
    world.write(3)

    def fails(fd: int) -> NoReturn:
        raise StoreFailed("sync failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.store.storage, "datasync", fails)
        with pytest.raises(StoreFailed):
            world.store.sync()
    world.reopen()
    assert world.group.durable <= world.group.held <= held, "what nobody was told of as durable is gone"


def test_a_rebuild_that_is_killed_cuts_nothing_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    world.write(30)
    world.group.complete_segment()
    seqs = world.write(60)
    held = world.group.held
    world.store.close()
    progress = 0

    def stored(*args: object) -> None:
        nonlocal progress
        real(*args)  # type: ignore[arg-type]
        progress += 1
        if progress == 2:
            raise Killed

    real = group_recovery._store_progress
    monkeypatch.setattr(group_recovery, "_REBUILD_POINTERS", 10)
    shutil.rmtree(world.path / "index")
    (world.path / "index").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(group_recovery, "_store_progress", stored)
        with pytest.raises(Killed):
            Store.open(world.path)
    storage, directory = Storage(), world.path / "groups" / "g" / "journal"
    history = [logged for logged, _ in read(storage, directory, first_position(storage, directory))]
    (extent,) = next(logged for logged in history if logged.seq == seqs[30]).extents
    where = Address(int(extent.addresses[0]))
    path = container_path(world.path / "containers", container_of(where))
    content = bytearray(path.read_bytes())
    content[RAW_SLOTS_OFFSET + slot_of(where) * 4096] ^= 1
    path.write_bytes(content)
    world.store = Store.open(world.path)
    assert world.group.held == held
    with pytest.raises(Damaged):
        world.store.pool.read_block(where)


def test_a_name_made_at_the_end_of_a_piece_stays(world: World) -> None:
    world.write(20, 7 * SECOND)
    world.group.create_snapshot("last")
    seq = world.model.seq
    world.passes(3 * HOUR_NS)
    world.store.sync()
    assert world.consolidate().pieces
    assert world.group.reader().resolve("last").seq == seq
    world.reopen()
    assert world.group.reader().resolve("last").seq == seq
    world.check()


def test_an_older_index_gets_the_names_that_it_lacks(world: World) -> None:
    world.write(20, 7 * SECOND)
    world.store.checkpoint()
    world.store.abandon()
    shutil.copytree(world.path / "index", world.path.parent / "older")
    world.store = Store.open(world.path)
    world.group.create_snapshot("first")
    first = world.model.seq
    world.write(20, 7 * SECOND)
    world.group.create_snapshot("gone")
    world.group.create_snapshot("second", f"seq={first + 5}")
    world.group.delete_snapshot("gone")
    world.passes(3 * HOUR_NS)
    assert world.consolidate().pieces
    world.store.abandon()
    shutil.rmtree(world.path / "index")
    shutil.move(world.path.parent / "older", world.path / "index")
    world.store = Store.open(world.path)
    reader = world.group.reader()
    assert {name: reader.resolve(name).seq for name in ("first", "second")} == {"first": first, "second": first + 5}
    assert not world.group.name_exists("gone")
    world.check()
