"""Garbage collection: nothing that is named is ever lost, whatever happens beside it; what nothing names goes."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dedup import gc, layout
from dedup.consolidator import consolidate
from dedup.container import ContainerReader
from dedup.errors import Damaged, StoreBusy, StoreError, StoreFull
from dedup.gc import Collection, Collector, collect
from dedup.layout import ZERO_BLOCK, address, container_path, fingerprint
from dedup.reader import GroupReader
from dedup.retention import HOUR_NS, Policy
from dedup.sealed import seal
from dedup.slot_marks import SlotMarks, pack_slots, unpack_slots
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId, Record, Seq, VolumeId
from dedup.verify import verify
from dedup.worker_lock import WORKER_LOCK_NAME, worker_lock
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment, image_of

A = VolumeId(1)
SIZE = 64 * BLOCK_BYTES


class LeakyStorage(Storage):
    """Refuses journals on demand, so that blocks are placed and indexed, and then named by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse_journal = False

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        if self.refuse_journal and self.path_of(fd).suffix == layout.SEGMENT_SUFFIX:
            raise StoreFull(f"{self.path_of(fd)}: full")
        super().pwritev(fd, buffers, offset)


class Killed(BaseException):
    """The process is gone: no handler of the code under test may take this for an error of the disk."""


class MortalStorage(Storage):
    """Dies before its n-th call that changes a file; from then on every such call dies, as after kill -9."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def _change(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_CREAT:
            self._change()
        return super().open(path, flags, mode)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._change()
        super().pwritev(fd, buffers, offset)

    def datasync(self, fd: int) -> None:
        self._change()
        super().datasync(fd)

    def sync_directory(self, path: Path) -> None:
        self._change()
        super().sync_directory(path)

    def replace(self, src: Path, dst: Path) -> None:
        self._change()
        super().replace(src, dst)

    def unlink(self, path: Path) -> None:
        self._change()
        super().unlink(path)


class Shop:
    """A store with its model, and ways to leave garbage in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage = LeakyStorage()
        self.model = Model()
        Store.create(path)
        self.store = Store.open(path, self.storage)
        self.group.ingest([*self.model.begin(), self.model.create("a.img", SIZE)])

    @property
    def group(self) -> Any:
        return self.store.group("g")

    @property
    def containers(self) -> Path:
        return self.path / "containers"

    def names(self) -> list[ContainerId]:
        return [number for name in sorted(os.listdir(self.containers)) if (number := layout.container_named(name))]

    def write(self, block: int, *contents: bytes) -> None:
        self.group.ingest([self.model.write(A, block * BLOCK_BYTES, b"".join(contents))])

    def waste(self, *contents: bytes) -> None:
        """Leaves these blocks placed and indexed, and named by nothing."""
        records: list[Record] = [Model(seq=self.model.seq, content={A: b""}).write(A, 0, b"".join(contents))]
        self.storage.refuse_journal = True
        with pytest.raises(StoreFull):
            self.group.ingest(records)
        self.storage.refuse_journal = False

    def reopen(self, storage: Storage | None = None) -> None:
        """Whatever was written so far lies in containers that are closed."""
        self.store.close()
        self.start(storage)

    def start(self, storage: Storage | None = None) -> None:
        self.store = Store.open(self.path, storage or self.storage)

    def check(self) -> None:
        """Every moment that is kept is what it was; the last one is."""
        reader = self.group.reader()
        kept = [seq for seq in self.model.history if self.is_kept(reader, seq)]
        assert self.model.seq in kept
        for seq in kept:
            check_moment(reader, self.model, seq)

    def is_kept(self, reader: GroupReader, seq: int) -> bool:
        return seq >= self.group.state.base and reader.view(Seq(seq)).state.held == seq

    def thin(self, nanoseconds: int) -> None:
        """So much time passes, and history is thinned: what only lost moments named is garbage now."""
        self.group.complete_segment()
        self.model.elapsed_ns += nanoseconds
        self.group.ingest([self.model.heartbeat()])
        consolidate(self.group, Policy(), self.group.time)

    def verify(self) -> None:
        """Closes the store for it, and opens it again."""
        self.store.close()
        assert verify(self.path, read_data=True).ok
        self.start()

    def address_of(self, block: int) -> int:
        return int(self.group.head_address(A, block))

    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.containers.iterdir())


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "store")
    yield shop
    shop.store.close()


def blocks(count: int, seed: int = 0) -> list[bytes]:
    dice = random.Random(seed)
    return [dice.randbytes(BLOCK_BYTES) for _ in range(count)]


def begun(shop: Shop) -> tuple[Collection, Collector, gc.Plan]:
    collection = Collection.begin(shop.store)
    collector = Collector(shop.store.storage, shop.path, shop.store.index, collection.boundary)
    return collection, collector, collector.mark()


# -- what goes and what stays -----------------------------------------------------------------------------------------


def test_what_nothing_names_goes_and_all_else_stays(shop: Shop) -> None:
    kept, lost = blocks(4), blocks(20, 1)
    shop.write(0, *kept)
    shop.waste(*lost)
    shop.reopen()
    shop.waste(*blocks(8, 2))
    shop.reopen()
    shop.write(10, *blocks(2, 3))
    shop.reopen()
    before = shop.disk_bytes()
    planned = collect(shop.store, dry_run=True)
    assert planned.freed_bytes == 0 and shop.disk_bytes() == before
    assert (planned.plan.live_blocks, planned.plan.dead_blocks, planned.plan.removed) == (6, 28, 1)
    assert planned.plan.containers == len(shop.names())
    done = collect(shop.store)
    assert done.plan == planned.plan and not done.skipped
    assert done.freed_bytes >= 20 * BLOCK_BYTES
    assert shop.disk_bytes() <= before - 28 * BLOCK_BYTES
    assert len(shop.names()) == planned.plan.containers - 1
    shop.check()
    again = collect(shop.store)
    assert (again.plan.dead_blocks, again.freed_bytes, again.plan.rewrites) == (0, 0, ())
    shop.verify()


def test_what_thinned_history_named_goes(shop: Shop) -> None:
    for at in range(6):
        shop.write(0, *blocks(20, at))
    shop.reopen()
    shop.write(30, *blocks(2, 9))
    shop.thin(40 * 24 * HOUR_NS)
    shop.reopen()
    done = collect(shop.store)
    assert done.plan.dead_blocks >= 4 * 20, done.plan
    assert done.freed_bytes >= 4 * 20 * BLOCK_BYTES
    shop.check()
    shop.verify()
    shop.check()


def test_a_store_of_which_all_is_live_is_left_alone(shop: Shop) -> None:
    shop.write(0, *blocks(30))
    shop.reopen()
    before = {path: path.stat().st_mtime_ns for path in shop.containers.iterdir()}
    assert collect(shop.store).plan.rewrites == ()
    assert {path: path.stat().st_mtime_ns for path in shop.containers.iterdir()} == before


def test_little_garbage_is_left_where_it_is(shop: Shop) -> None:
    shop.write(0, *blocks(30))
    shop.waste(*blocks(9, 1))
    shop.reopen()
    done = collect(shop.store)
    assert (done.plan.dead_blocks, done.plan.rewrites, done.freed_bytes) == (9, (), 0)
    shop.waste(*blocks(1, 2))


def test_open_and_newer_containers_are_not_looked_at(shop: Shop) -> None:
    shop.waste(*blocks(8))
    collection, _, plan = begun(shop)
    assert collection.boundary.open and plan.rewrites == ()
    collection.end()


def test_an_index_entry_goes_with_its_block_and_no_other(shop: Shop) -> None:
    kept, lost = blocks(2), blocks(8, 1)
    shop.write(0, *kept)
    shop.waste(*lost)
    shop.reopen()
    collect(shop.store)
    marks = [layout.fingerprint(block) for block in [*kept, *lost]]
    assert [found is not None for found in shop.store.fingerprints.lookup(marks)] == [True] * 2 + [False] * 8


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_swept_is_not_remembered(shop: Shop, killed: bool) -> None:
    """Also by what a writer that was killed right behind step 4 leaves: it counts, and so it ends."""
    shop.write(0, *blocks(3, 99))
    shop.reopen()  # what is stored from here on is not in LMDB
    gone = []
    for number in range(4):
        lost = blocks(10, number)
        shop.waste(*lost)
        shop.reopen()
        if killed:
            collection, collector, plan = begun(shop)
            (planned,) = [one for one in plan.rewrites if one.dead == 10]
            condemned = collection.condemn(collector.dead(planned.container))
            assert len(shop.store.index.gone()) == len(condemned) + sum(gone[-1:])
            collector.rewrite(planned.container, condemned)
            shop.store.abandon()
            shop.start()
        else:
            assert collect(shop.store).plan.dead_blocks == 10
        gone.append(len(shop.store.index.gone()))
        assert not any(shop.store.fingerprints.lookup([fingerprint(block) for block in lost]))
        shop.reopen()
        assert not any(shop.store.fingerprints.lookup([fingerprint(block) for block in lost]))
        shop.check()
    assert gone == ([10, 20, 30, 40] if killed else [0, 0, 0, 0])
    shop.verify()


def test_a_number_is_never_given_again(shop: Shop) -> None:
    shop.write(0, *blocks(2))
    shop.reopen()
    shop.waste(*blocks(5, 1))
    highest = shop.names()[-1]
    shop.reopen()
    collect(shop.store)
    assert shop.names()[-1] == highest, "an empty container keeps the highest place"
    assert container_path(shop.containers, highest).stat().st_size < 2 * BLOCK_BYTES
    assert collect(shop.store).plan.rewrites == ()
    shop.store.close()
    shutil.rmtree(shop.path / "index")
    (shop.path / "index").mkdir()
    shop.start()
    shop.write(9, *blocks(1, 2))
    assert shop.address_of(9) >> layout.SLOT_BITS > highest
    shop.reopen()
    collect(shop.store)
    assert highest not in shop.names(), "and goes when it is the highest no longer"
    shop.check()


def test_damage_is_left_as_it_is(shop: Shop) -> None:
    shop.write(0, *blocks(3))
    shop.waste(*blocks(9, 1))
    damaged = container_path(shop.containers, ContainerId(shop.address_of(1) >> layout.SLOT_BITS))
    shop.reopen()
    shop.waste(*blocks(9, 2))
    shop.reopen()
    shop.write(20, *blocks(1, 3))
    with damaged.open("r+b") as file:
        file.seek(layout.RAW_SLOTS_OFFSET + BLOCK_BYTES)
        file.write(b"?")
    before = damaged.read_bytes()
    done = collect(shop.store)
    assert len(done.skipped) == 1 and str(damaged) in done.skipped[0]
    assert damaged.read_bytes() == before
    assert len(done.plan.rewrites) == 2 and done.freed_bytes > 0
    with damaged.open("r+b") as file:
        file.truncate(layout.RAW_SLOTS_OFFSET + BLOCK_BYTES)
    (skipped,) = collect(shop.store).skipped or ("",)
    assert damaged.stat().st_size == layout.RAW_SLOTS_OFFSET + BLOCK_BYTES, skipped
    shop.storage.close(shop.storage.open(damaged, os.O_RDONLY))


def test_a_journal_that_cannot_be_read_whole_condemns_nothing(shop: Shop) -> None:
    shop.write(0, *blocks(3))
    shop.waste(*blocks(9, 1))
    shop.reopen()
    segment = shop.path / "groups" / "g" / "journal" / layout.segment_name(Seq(1))
    whole, names = segment.read_bytes(), {path: path.read_bytes() for path in shop.containers.iterdir()}
    # The very last entry: nothing whole follows it, as after a torn write; but the store had settled behind it.
    segment.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(Damaged):
        collect(shop.store)
    assert {path: path.read_bytes() for path in shop.containers.iterdir()} == names
    assert shop.store.ingest.shared is None
    segment.write_bytes(whole)
    collect(shop.store)
    shop.check()


def test_one_collection_at_a_time(shop: Shop) -> None:
    collection, _, _ = begun(shop)
    with pytest.raises(StoreError, match="under way"):
        collect(shop.store)
    collection.end()
    with (
        worker_lock(shop.storage, shop.path),
        pytest.raises(StoreBusy),
        worker_lock(shop.storage, shop.path, wait_seconds=0),
    ):
        pass
    collect(shop.store)


def test_what_one_before_left_half_made_is_removed(shop: Shop) -> None:
    (shop.containers / (layout.container_name(ContainerId(1)) + ".tmp")).write_bytes(b"half")
    collect(shop.store)
    assert not list(shop.containers.glob("*.tmp"))
    assert (shop.path / WORKER_LOCK_NAME).exists()


# -- the race ---------------------------------------------------------------------------------------------------------


def _race(shop: Shop) -> tuple[Collection, Collector, gc.Dead, list[bytes]]:
    """Marked, and the mark found these blocks dead, which the index still knows."""
    shop.write(0, *blocks(2))
    doomed = blocks(10, 1)
    shop.waste(*doomed)
    shop.reopen()
    collection, collector, plan = begun(shop)
    (planned,) = [one for one in plan.rewrites if one.dead == 10]
    dead = collector.dead(planned.container)
    assert [layout.fingerprint(block) for block in doomed] == [
        dead.fingerprints[at : at + 16] for at in range(0, len(dead.fingerprints), 16)
    ]
    return collection, collector, dead, doomed


def test_a_hit_on_a_block_about_to_be_swept(shop: Shop) -> None:
    """Dead, then shared before it is condemned; and written again after it was condemned, before it is gone."""
    collection, collector, dead, doomed = _race(shop)
    old = [address(dead.container, slot) for slot in dead.slots]

    shop.write(10, doomed[3])
    assert shop.address_of(10) == old[3], "this is the hit that must be provoked"
    pieces = list(dead.pieces(5))
    condemned = list(collection.condemn(pieces[0]))
    assert condemned == [slot for slot in dead.slots[:5] if slot != dead.slots[3]]
    shop.write(11, doomed[7], doomed[0])
    assert shop.address_of(11) == old[7], "not condemned yet: shared"
    assert shop.address_of(12) not in old, "condemned: stored anew"
    condemned += collection.condemn(pieces[1])
    assert len(condemned) == 8
    shop.write(13, doomed[1], doomed[9])
    assert shop.address_of(13) not in old and shop.address_of(14) not in old

    collector.rewrite(dead.container, tuple(condemned))
    collection.swept(dead.container)
    collection.rewritten(dead.container)
    shop.write(15, doomed[1], doomed[3], doomed[5])
    collection.end()
    shop.check()
    shop.reopen()
    shop.check()
    shop.verify()


def test_without_noting_the_race_loses_the_block(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before this one can fail: with the noting switched off, the shared block is gone."""
    collection, collector, dead, doomed = _race(shop)
    monkeypatch.setattr(SlotMarks, "add_each", lambda self, addresses: None)
    shop.write(10, doomed[3])
    condemned = [slot for piece in dead.pieces(5) for slot in collection.condemn(piece)]
    assert len(condemned) == 10
    collector.rewrite(dead.container, tuple(condemned))
    collection.swept(dead.container)
    collection.rewritten(dead.container)
    collection.end()
    with pytest.raises(Damaged, match="is not in the container"):
        image_of(shop.group.reader(), A, shop.model.seq)


def test_an_index_that_does_not_forget_loses_no_block(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a damaged one may: what was taken out is found nevertheless."""
    collection, collector, dead, doomed = _race(shop)
    monkeypatch.setattr(shop.store.fingerprints, "remove", lambda txn, entries: None)
    condemned = [slot for piece in dead.pieces(5) for slot in collection.condemn(piece)]
    assert len(condemned) == 10
    shop.write(10, *doomed)
    old = {address(dead.container, slot) for slot in dead.slots}
    assert not old & {shop.address_of(block) for block in range(10, 20)}, "found, the same bytes, and not shared"
    collector.rewrite(dead.container, tuple(condemned))
    collection.swept(dead.container)
    collection.rewritten(dead.container)
    collection.end()
    shop.write(30, *doomed)
    shop.check()
    shop.reopen()
    shop.check()


def test_without_condemning_first_a_late_hit_loses_its_block(shop: Shop) -> None:
    """Nor may the index still know a block that has left its container."""
    collection, collector, dead, doomed = _race(shop)
    shop.store.pool.read_block(address(dead.container, dead.slots[4]))  # so that `_same` reads an open descriptor
    collector.rewrite(dead.container, dead.slots)
    shop.write(10, doomed[4])
    collection.rewritten(dead.container)
    collection.end()
    with pytest.raises(Damaged, match="is not in the container"):
        image_of(shop.group.reader(), A, shop.model.seq)


# -- kills ------------------------------------------------------------------------------------------------------------


def test_killed_before_any_change_of_a_file(tmp_path: Path) -> None:
    """At every call that changes a file: the store is sound, and a collection after it frees what one alone does."""
    built = Shop(tmp_path / "built")
    built.write(0, *blocks(3))
    built.waste(*blocks(9, 1))
    built.reopen()
    built.waste(*blocks(6, 2))
    built.reopen()
    built.write(30, *blocks(1, 3))
    built.store.close()

    shutil.copytree(built.path, tmp_path / "alone")
    built.path = tmp_path / "alone"
    built.start()
    assert collect(built.store).plan.removed == 1
    built.check()
    expected = built.disk_bytes()
    built.store.close()

    kills = 0
    while True:
        place = tmp_path / "killed"
        shutil.copytree(tmp_path / "built", place)
        built.path = place
        storage = MortalStorage()
        built.start(storage)
        storage.left = kills
        try:
            collect(built.store)
        except Killed:
            built.store.abandon()
        else:
            built.store.abandon()
            break
        finally:
            kills += 1
        built.start()
        built.check()
        collect(built.store)
        built.check()
        assert built.disk_bytes() == expected, kills
        built.store.close()
        assert verify(place, read_data=True).ok
        shutil.rmtree(place)
    assert kills > 10


@pytest.mark.parametrize("phase", ["begun", "condemned", "rewritten", "swept"])
@pytest.mark.parametrize("lose_index", [False, True])
def test_killed_between_two_steps(shop: Shop, phase: str, lose_index: bool) -> None:
    collection, collector, dead, doomed = _race(shop)
    shop.write(10, doomed[2])
    if phase != "begun":
        condemned = collection.condemn(dead)
        shop.write(20, doomed[5])
        if phase != "condemned":
            collector.rewrite(dead.container, condemned)
            if phase == "swept":
                collection.swept(dead.container)
            shop.write(25, doomed[6])
    shop.store.abandon()
    if lose_index:
        shutil.rmtree(shop.path / "index")
        (shop.path / "index").mkdir()
    shop.start()
    shop.check()
    shop.write(40, doomed[5], doomed[2], doomed[7])
    done = collect(shop.store)
    if phase == "condemned":
        assert done.plan.dead_blocks == 9, "all but the one that was shared, also those written again since"
    shop.check()
    shop.verify()


def test_a_full_disk_costs_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write(0, *blocks(3))
    shop.waste(*blocks(9, 1))
    shop.reopen()

    def full(*args: object, **more: object) -> int:
        raise StoreFull("no space left")

    with monkeypatch.context() as patch, pytest.raises(StoreFull):
        patch.setattr(gc, "seal", full)
        collect(shop.store)
    shop.check()
    assert collect(shop.store).freed_bytes > 0
    shop.check()


# -- anything beside anything -----------------------------------------------------------------------------------------


class GcMachine(RuleBasedStateMachine):
    """Writes, waste, thinned history, kills and the steps of a collection in any order; every moment that is kept stays
    what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="rewindfs-test-"))
        self.shop = Shop(self.path / "store")
        self.collection: Collection | None = None

        self.dice = random.Random(1)
        self.contents = [ZERO_BLOCK]
        """The latest are likely to lie wasted."""

    def fresh(self, count: int) -> list[bytes]:
        new = [self.dice.randbytes(BLOCK_BYTES) for _ in range(count)]
        self.contents += new
        return new

    @initialize()
    def begin_with_a_block(self) -> None:
        self.shop.write(0, *self.fresh(1))

    @rule(block=st.integers(0, 40), picks=st.lists(st.integers(1, 12), min_size=1, max_size=3))
    def write(self, block: int, picks: list[int]) -> None:
        self.shop.write(block, *[self.contents[-min(pick, len(self.contents))] for pick in picks])

    @rule(block=st.integers(0, 40), count=st.integers(1, 3))
    def write_new(self, block: int, count: int) -> None:
        self.shop.write(block, *self.fresh(count))

    @rule(count=st.integers(1, 8))
    def waste(self, count: int) -> None:
        self.shop.waste(*self.fresh(count))

    @precondition(lambda self: self.collection is None)
    @rule(count=st.integers(1, 8))
    def waste_and_close(self, count: int) -> None:
        self.shop.waste(*self.fresh(count))
        self.shop.reopen()

    @rule()
    def checkpoint(self) -> None:
        self.shop.store.checkpoint()

    @rule(clean=st.booleans(), lose_index=st.booleans())
    def reopen(self, clean: bool, lose_index: bool) -> None:
        self.collection = None
        self.shop.store.close() if clean else self.shop.store.abandon()
        if lose_index:
            shutil.rmtree(self.shop.path / "index")
            (self.shop.path / "index").mkdir()
        self.shop.start()

    @precondition(lambda self: self.collection is None)
    @rule(hours=st.sampled_from([1, 3, 30, 24 * 40]))
    def thin(self, hours: int) -> None:
        self.shop.thin(hours * HOUR_NS)

    @rule()
    def seal_one(self) -> None:
        taken = self.shop.store.settle()
        closed = [one for one in self.shop.names() if one < taken.next_container and one not in taken.open]
        if closed:
            chosen = random.Random(len(closed)).choice(closed)
            seal(Storage(), self.shop.containers, chosen, None)
            self.shop.store.pool.forget(chosen)

    @rule(picks=st.lists(st.integers(0, 8), min_size=1, max_size=5), size=st.integers(1, 5), forget=st.booleans())
    def go_on_collecting(self, picks: list[int], size: int, forget: bool) -> None:
        """The next steps of a collection: begin and mark, find what is dead, condemn a piece, rewrite, end; before each
        of them a block may be written that is likely to be dead."""
        for pick in picks:
            if pick:
                self.write(10 + pick, [pick])
            if self.collection is None:
                self.collection, self.collector, plan = begun(self.shop)
                self.todo = list(plan.rewrites)
                self.current: ContainerId | None = None
            elif self.current is not None and self.pieces:
                self.condemned += self.collection.condemn(self.pieces.pop(0))
            elif self.current is not None:
                self.collector.rewrite(self.current, tuple(self.condemned))
                if pick % 2:
                    self.collection.swept(self.current)
                if forget:
                    self.collection.rewritten(self.current)
                self.current = None
            elif self.todo:
                self.current = self.todo.pop().container
                self.pieces = list(self.collector.dead(self.current).pieces(size))
                self.condemned: list[int] = []
            else:
                self.collection.end()
                self.collection = None

    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.shop.model.history)))
        reader = self.shop.group.reader()
        if self.shop.is_kept(reader, seq):
            check_moment(reader, self.shop.model, seq)

    def teardown(self) -> None:
        if self.collection is not None:
            self.collection.end()
        shop = self.shop
        try:
            shop.check()
            shop.reopen()
            before = shop.disk_bytes()
            done = collect(shop.store)
            assert shop.disk_bytes() <= before and not done.skipped
            shop.check()
            shop.reopen()
            shop.check()
            self._nothing_dead_is_left()
            shop.verify()
        finally:
            shop.store.close()
            shutil.rmtree(self.path)

    def _nothing_dead_is_left(self) -> None:
        """No container is wholly dead, but an empty last one; none has much that is."""
        again = collect(self.shop.store, dry_run=True).plan
        assert all(one.dead < gc.DEAD_SHARE_MIN * one.slots for one in again.rewrites)


def run_machine(examples: int) -> None:
    run_state_machine_as_test(
        GcMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_gc_machine() -> None:
    run_machine(15)


@pytest.mark.slow
def test_gc_machine_long() -> None:
    run_machine(400)


# -- the parts --------------------------------------------------------------------------------------------------------


def test_slot_marks() -> None:
    marks = SlotMarks()
    dice = random.Random(5)
    wanted = {(dice.randrange(1, 5), dice.randrange(layout.SLOTS_MAX)) for _ in range(3000)}
    listed = [address(ContainerId(number), slot) for number, slot in wanted]
    marks.add(np.array([0, *listed[:2000], *listed[:50], address(ContainerId(1), 20_000)], dtype=np.uint64))
    marks.add_each([0, *listed[2000:], address(ContainerId(1), 20_000)])
    assert len(marks) == len(wanted)
    for number in range(1, 6):
        slots = marks.slots(ContainerId(number))
        assert slots.tolist() == sorted(slot for one, slot in wanted if one == number)
        assert unpack_slots(pack_slots(slots)).tolist() == slots.tolist()
    assert list(marks) == [1, 2, 3, 4]


def test_a_sealed_container_is_collected_too(shop: Shop) -> None:
    kept, lost = blocks(5), blocks(15, 1)
    shop.write(0, *kept)
    shop.waste(*lost)
    chosen = ContainerId(shop.address_of(0) >> layout.SLOT_BITS)
    shop.reopen()
    seal(Storage(), shop.containers, chosen, None)
    shop.store.pool.forget(chosen)
    collect(shop.store)
    reader = ContainerReader.open(Storage(), shop.containers, chosen)
    assert reader.header.form is ContainerForm.SEALED and len(reader.slots()) == 5
    reader.close()
    shop.check()


def test_the_compression_ratio_counts_blocks_against_what_they_take(shop: Shop) -> None:
    half = [block[:2048] + bytes(2048) for block in blocks(32)]
    shop.write(0, *half)
    shop.reopen()
    before = shop.store.usage()
    assert (before.compression_ratio, before.containers) == (1.0, 1)
    seal(Storage(), shop.containers, ContainerId(1), None)
    after = shop.store.usage()
    assert 1.8 < after.compression_ratio < 2.0
    assert after.dedup_ratio == before.dedup_ratio and after.bytes < before.bytes
