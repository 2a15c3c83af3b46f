"""The fingerprint index: layers, checkpoints that fail, and a model."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup import fingerprint_index, fingerprint_merge, index_file
from dedup.catalog import Index
from dedup.errors import StoreFailed, StoreFull
from dedup.fingerprint_index import FingerprintIndex
from dedup.fingerprint_run import FingerprintRun
from dedup.fingerprint_runs import run_name
from dedup.fingerprint_table import FingerprintTable, halves, halves_of_one
from dedup.layout import address, fingerprint
from dedup.storage import Storage
from dedup.types import HOLE, Address, ContainerId
from dedup.watermark import Merged, Watermark
from tests.dedup.crash_storage import unsynced
from tests.dedup.faults import open_descriptors


def fp(number: int) -> bytes:
    return number.to_bytes(16, "little")


CONTAINER = ContainerId(7)


class Fixture:
    """The index of a store, and what a container's table has: a slot for each block stored, in their order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = Index(directory, writer=True)
        self.index = FingerprintIndex(self.env, Storage())
        self.slots: dict[Address, bytes] = {}
        self.used = 0

    def store(self, mark: bytes) -> Address:
        """A new block."""
        where = address(CONTAINER, self.used)
        self.used += 1
        self.slots[where] = mark
        self.index.note(mark, where)
        return where

    def checkpoint(self, *, fails: bool = False) -> None:
        self.index.freeze()
        watermark = Watermark(ContainerId(CONTAINER + 1), {CONTAINER: self.used})
        txn = self.env.env.begin(write=True)
        self.index.commit(txn, watermark)
        self.env.put_watermark(txn, watermark)
        if fails:
            txn.abort()
        else:
            txn.commit()
            self.index.committed()

    def reopen(self) -> None:
        self.close()
        self.env = Index(self.directory, writer=True)
        self.index = FingerprintIndex(self.env, Storage())
        self.index.load([(b"".join(self.slots.values()), np.fromiter(self.slots, np.uint64, len(self.slots)))])

    def stored(self) -> dict[bytes, int]:
        """What the runs have that LMDB names."""
        stored: dict[bytes, int] = {}
        for number in self.env.fingerprint_runs():
            run = FingerprintRun.open(Storage(), self.directory / run_name(number))
            for high, low, where in zip(*(column.tolist() for column in run.rows(0, run.page_count)), strict=True):
                stored.setdefault(high.to_bytes(8, "big") + low.to_bytes(8, "big"), where)
            run.close()
        return stored

    def close(self) -> None:
        self.index.close()
        self.env.close()


@pytest.fixture
def fixture(tmp_path: Path) -> Iterator[Fixture]:
    fixture = Fixture(tmp_path)
    yield fixture
    fixture.close()


def test_found_in_every_layer_in_the_order_asked(fixture: Fixture) -> None:
    index = fixture.index
    index.note(fp(1), Address(101))
    fixture.checkpoint()
    index.note(fp(2), Address(102))
    index.freeze()
    index.note(fp(3), Address(103))
    assert index.pending_count == 2
    wanted = [fp(n) for n in (3, 9, 2, 1, 1, 8, 3)]
    assert index.lookup(wanted) == [103, None, 102, 101, 101, None, 103]
    assert index.lookup([]) == []


def test_the_first_address_stays_in_every_layer(fixture: Fixture) -> None:
    index = fixture.index
    index.note(fp(1), Address(101))
    index.note(fp(1), Address(999))
    assert index.lookup([fp(1)]) == [101]
    index.freeze()
    index.note(fp(1), Address(998))
    assert index.lookup([fp(1)]) == [101]
    fixture.checkpoint()
    index.note(fp(1), Address(997))  # as one does whose block is not the one at 101
    fixture.checkpoint()
    index.note(fp(1), Address(996))
    fixture.checkpoint()
    assert index.lookup([fp(1)]) == [997]
    assert fixture.stored() == {fp(1): 101}


@pytest.mark.parametrize("is_frozen", [False, True])
def test_of_many_noted_at_once_the_first_address_stays(fixture: Fixture, is_frozen: bool) -> None:
    index = fixture.index
    index.note(fp(1), Address(101))
    if is_frozen:
        index.freeze()
    index.note_each([fp(2), fp(1), fp(2), fp(3)], [102, 999, 998, 103])
    assert index.lookup([fp(1), fp(2), fp(3)]) == [101, 102, 103]


def test_what_is_stored_outlives_the_index_and_what_is_pending_does_not(fixture: Fixture) -> None:
    placed = [fixture.store(fp(number)) for number in range(1000)]
    fixture.checkpoint()
    fixture.index.note(fp(5000), Address(1))
    fixture.reopen()
    found = fixture.index.lookup([fp(number) for number in range(1000)] + [fp(5000)])
    assert found == [*placed, None]
    assert fixture.index.pending_count == 0


def test_a_failed_commit_loses_nothing(fixture: Fixture) -> None:
    index = fixture.index
    index.note(fp(1), Address(101))
    fixture.checkpoint(fails=True)
    index.note(fp(2), Address(102))
    assert index.lookup([fp(1), fp(2)]) == [101, 102]
    fixture.checkpoint()
    assert index.pending_count == 0
    assert index.lookup([fp(1), fp(2)]) == [101, 102]


def test_remove_takes_out_only_the_address_that_goes(fixture: Fixture) -> None:
    index = fixture.index
    for number in (1, 2):
        index.note(fp(number), Address(100 + number))
    fixture.checkpoint()
    index.note(fp(3), Address(103))
    with fixture.env.write() as txn:
        index.remove(txn, [(fp(1), Address(101)), (fp(2), Address(555)), (fp(3), Address(103)), (fp(4), Address(1))])
    assert index.lookup([fp(1), fp(2), fp(3)]) == [None, 102, None]


@pytest.mark.parametrize("few", [False, True])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30))
def test_equals_a_dict(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, few: bool, seed: int
) -> None:
    """Noted, committed or not, removed, in runs that are merged where only few stay in memory, opened anew."""
    if few:
        monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 6)
    source = random.Random(seed)
    fixture = Fixture(tmp_path_factory.mktemp("index"))
    marks = [fingerprint(bytes([number])) for number in range(60)]
    model: dict[bytes, Address] = {}
    for _ in range(100):
        choice = source.random()
        if choice < 0.6:
            key = source.choice(marks)
            if fixture.index.lookup([key]) == [None]:
                model[key] = fixture.store(key)
        elif choice < 0.8:
            fixture.checkpoint(fails=source.random() < 0.3)
            for _ in range(source.randrange(3)):
                fixture.index.merge()
        elif choice < 0.85 and model:
            gone = source.sample(sorted(model.items()), min(3, len(model)))
            with fixture.env.write() as txn:
                fixture.index.remove(txn, gone)
            for key, where in gone:
                del model[key]
                if source.random() < 0.5:
                    del fixture.slots[where]
        elif choice < 0.9:
            fixture.checkpoint()
            fixture.reopen()
        else:
            wanted = [source.choice(marks) for _ in range(source.randrange(20))]
            assert fixture.index.lookup(wanted) == [model.get(key) for key in wanted]
    fixture.checkpoint()
    fixture.reopen()
    assert fixture.index.lookup(marks) == [model.get(key) for key in marks]
    fixture.close()


def test_what_gathers_in_memory_goes_into_runs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are merged though nobody calls `merge`, and what is in memory stays little."""
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 64)
    fixture.checkpoint()
    placed = {}
    for number in range(4096):
        mark = fingerprint(number.to_bytes(4, "big"))
        placed[mark] = fixture.store(mark)
        if number % 32 == 31:
            fixture.checkpoint()
            assert fixture.index.unmerged_count <= 96
            assert len(fixture.env.fingerprint_runs()) <= 12
    assert fixture.index.lookup(list(placed)) == list(placed.values())
    stored = fixture.stored()
    assert len(stored) >= 4096 - 96 and stored.items() <= placed.items()
    fixture.reopen()
    assert fixture.index.unmerged_count == 4096 - len(stored)
    assert fixture.index.lookup(list(placed)) == list(placed.values())
    assert sorted(fixture.directory.glob("*.rwf")) == [
        fixture.directory / run_name(number) for number in sorted(fixture.env.fingerprint_runs())
    ]


def test_a_thread_merges_beside_everything_else(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 200)
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 4)
    ends, source, model = threading.Event(), random.Random(8), dict[bytes, Address]()
    pieces = [0]

    def merge() -> None:
        while not ends.is_set():
            pieces[0] += fixture.index.merge()

    with unsynced(), ThreadPoolExecutor(1) as pool:
        merging = pool.submit(merge)
        try:
            for turn in range(60):
                model |= {mark: fixture.store(mark) for mark in [source.randbytes(16) for _ in range(150)]}
                fixture.checkpoint(fails=turn % 7 == 6)
                asked = source.sample(sorted(model), 100)
                assert fixture.index.lookup(asked) == [model[mark] for mark in asked]
                gone = source.sample(sorted(model.items()), 5)
                with fixture.env.write() as txn:
                    fixture.index.remove(txn, gone)
                for mark, _ in gone:
                    del model[mark]
        finally:
            ends.set()
        merging.result()
    assert pieces[0] > 10
    fixture.checkpoint()
    assert fixture.index.lookup(list(model)) == list(model.values())
    fixture.reopen()
    assert fixture.index.lookup(list(model)) == list(model.values())


def test_removed_slots_that_stay_in_their_container_are_named_for_a_while_only(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as may be in memory, however few are."""
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 64)
    monkeypatch.setattr(fingerprint_index, "_FORGOTTEN_PER_RUN", 200)
    fixture.checkpoint()
    removed: list[bytes] = []
    most = 0
    for number in range(120):
        marks = [fingerprint(bytes([number, other])) for other in range(8)]
        entries = [(mark, fixture.store(mark)) for mark in marks]
        fixture.checkpoint()
        with fixture.env.write() as txn:
            fixture.index.remove(txn, entries)
        removed += marks
        most = max(most, len(fixture.env.gone()))
        if number % 29 == 28:
            fixture.reopen()
        assert not any(fixture.index.lookup(removed))
    assert 48 < most <= 64
    assert not fixture.stored().keys() & set(removed)


def test_a_container_that_was_swept_has_no_removed_slots_to_name(fixture: Fixture) -> None:
    fixture.checkpoint()
    entries = [(fp(number), fixture.store(fp(number))) for number in range(20)]
    others = [(fp(number), address(ContainerId(CONTAINER + other), 5)) for number, other in ((90, 1), (91, 256))]
    fixture.checkpoint()
    with fixture.env.write() as txn:
        fixture.index.remove(txn, [*entries[:15], *others])
    fixture.reopen()
    assert fixture.env.gone().tolist() == sorted(where for _, where in [*entries[:15], *others])
    assert fixture.index.lookup([mark for mark, _ in entries]) == [None] * 15 + [where for _, where in entries[15:]]
    for _, where in entries[:15]:
        del fixture.slots[where]
    fixture.index.forget_gone(CONTAINER)
    assert fixture.env.gone().tolist() == [where for _, where in others]
    fixture.reopen()
    assert fixture.index.lookup([mark for mark, _ in entries]) == [None] * 15 + [where for _, where in entries[15:]]


def old_store(fixture: Fixture, rows: dict[bytes, bytes], merged: Merged | None) -> None:
    """As versions left it that had the fingerprints in LMDB."""
    with fixture.env.write() as txn:
        for mark, value in rows.items():
            txn.put(mark, value, db=fixture.env.db["fingerprints"])
        txn.put(b"filter", bytes(8), db=fixture.env.db["store"])
        fixture.env.put_watermark(txn, Watermark(ContainerId(CONTAINER + 1), {CONTAINER: fixture.used}))
        if merged is not None:
            fixture.env.put_merged(txn, merged)
    (fixture.directory / "filter").write_bytes(bytes(4096))


def test_an_index_of_before_goes_on_with_what_it_has(fixture: Fixture) -> None:
    """One that no `Merged` was written into has everything in LMDB; what there is no address is left out."""
    old_store(fixture, {fp(1): (101).to_bytes(8, "little"), fp(3): b"short", fp(4): bytes(8)}, None)
    fixture.reopen()
    assert not (fixture.directory / "filter").exists()
    with fixture.env.read() as txn:
        assert txn.stat(fixture.env.db["fingerprints"])["entries"] == 0
        assert txn.get(b"filter", db=fixture.env.db["store"]) is None
    assert fixture.index.lookup([fp(1), fp(3), fp(4)]) == [101, None, None]
    fixture.checkpoint()
    fixture.store(fp(2))
    fixture.checkpoint()
    assert fixture.stored() == {fp(1): 101}
    fixture.reopen()
    assert fixture.index.lookup([fp(1), fp(2)]) == [101, address(CONTAINER, 0)]
    assert fixture.index.unmerged_count == 1


def test_an_index_of_before_that_was_between_two_slices(fixture: Fixture) -> None:
    """Of the newer fingerprints those of the first slices are in LMDB, but what was removed: that is named nowhere."""
    marks = [fingerprint(bytes([number])) for number in range(200)]
    placed = {mark: fixture.store(mark) for mark in marks}
    within = [mark for mark in marks if mark[0] < 32 * 4]
    removed = set(within[:10])
    rows = {mark: placed[mark].to_bytes(8, "little") for mark in within[10:]}
    now = Watermark(ContainerId(CONTAINER + 1), {CONTAINER: fixture.used})
    old_store(fixture, rows, Merged(Watermark(CONTAINER, {}), now, 32))
    wanted = [None if mark in removed else placed[mark] for mark in marks]
    for _ in range(2):
        fixture.reopen()
        assert fixture.index.lookup(marks) == wanted
        assert fixture.index.unmerged_count == len(marks) - len(within)


@pytest.mark.parametrize("at", ["run", "commit"])
def test_an_older_store_on_a_full_disk_opens_and_is_upgraded_later(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    fixture.reopen()
    known = open_descriptors()
    old_store(fixture, {fp(number): number.to_bytes(8, "little") for number in range(1, 20)}, None)
    full = StoreFull("no space left")
    with monkeypatch.context() as patch:
        if at == "run":
            patch.setattr(Storage, "pwritev", raising(full))
        else:
            patch.setattr(Index, "put_fingerprint_runs", raising(full))
        fixture.reopen()
    assert fixture.index.lookup([fp(1)]) == [None] and not list(fixture.directory.glob("*.rwf"))
    with fixture.env.write() as txn:
        fixture.index.remove(txn, [(fp(1), Address(1)), (fp(2), Address(99)), (fp(99), Address(99))])
    fixture.reopen()
    assert fixture.index.lookup([fp(number) for number in (1, 2, 3, 99)]) == [None, 2, 3, None]
    fixture.index.close()
    assert open_descriptors() == known


def raising(error: Exception) -> Callable[..., None]:
    def refused(*_: object) -> None:
        raise error

    return refused


def test_runs_beside_fingerprints_of_an_older_version_are_not_believed(fixture: Fixture) -> None:
    """It knows no runs, and so has removed nothing from them."""
    where = fixture.store(fp(1))
    fixture.checkpoint()
    assert fixture.env.fingerprint_runs()
    old_store(fixture, {fp(2): (102).to_bytes(8, "little")}, None)
    fixture.slots = {}
    fixture.reopen()
    assert fixture.index.lookup([fp(1), fp(2)]) == [None, 102] and where
    fixture.reopen()
    assert fixture.index.lookup([fp(1), fp(2)]) == [None, 102]
    assert len(list(fixture.directory.glob("*.rwf"))) == 1


def test_a_commit_that_the_file_is_too_short_for_is_not_tried_again(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done: only opening anew tells what it named."""
    monkeypatch.setattr(index_file, "_bytes_named", lambda env: 1 << 40)
    monkeypatch.setattr("os.truncate", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(StoreFailed, match="cannot be made"), fixture.env.write():
        pass


def test_no_row_of_before_is_an_address(fixture: Fixture) -> None:
    old_store(fixture, {fp(3): b"short"}, None)
    fixture.reopen()
    assert fixture.env.fingerprint_runs() == ()
    assert fixture.index.lookup([fp(3)]) == [None]
    assert not list(fixture.directory.glob("*.rwf"))


def test_a_rebuild_makes_runs_of_as_many_as_memory_has(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 100)
    marks = [fp(number) for number in range(1, 331)]
    for at in range(0, 330, 30):
        for mark in marks[at : at + 30]:
            fixture.store(mark)
        fixture.index.freeze()
        with fixture.env.write() as txn:
            fixture.index.commit(txn)
        fixture.index.committed()
        assert len(fixture.env.fingerprint_runs()) == (at + 30) // 120
        assert fixture.index.lookup(marks[: at + 30]) == [*fixture.slots]
    fixture.index.note(fp(1000), address(CONTAINER, fixture.used))
    fixture.checkpoint()
    fixture.reopen()
    assert len(fixture.env.fingerprint_runs()) == 3 and fixture.index.unmerged_count == 0
    assert fixture.index.lookup(marks) == [*fixture.slots]


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_bytes(b"torn"), lambda path: os.truncate(path, 5000)]
)
def test_a_run_that_is_lost_costs_what_it_has(fixture: Fixture, spoil: Callable[[Path], object]) -> None:
    fixture.store(fp(1))
    fixture.checkpoint()  # the first makes a run
    fixture.store(fp(2))
    fixture.checkpoint()
    spoil(fixture.directory / run_name(1))
    fixture.reopen()
    assert fixture.index.lookup([fp(1), fp(2)]) == [None, address(CONTAINER, 1)]
    fixture.store(fp(1))
    fixture.checkpoint()
    fixture.reopen()
    assert fixture.index.lookup([fp(1), fp(2)]) == [address(CONTAINER, 2), address(CONTAINER, 1)]


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), max_size=6))
def test_a_table_equals_a_dict(added: list[list[tuple[int, int]]]) -> None:
    """Also of fingerprints whose halves are the same."""
    table, model = FingerprintTable(), dict[bytes, int]()
    number = 0
    for some in added:
        marks = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in some]
        places = list(range(number + 1, number + 1 + len(marks)))
        number += len(marks)
        table.add(b"".join(marks), np.array(places, np.uint64))
        for mark, place in zip(marks, places, strict=True):
            model.setdefault(mark, place)
    every = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high in range(4) for low in range(4)]
    high, low = halves(b"".join(every))
    assert table.find(high, low).tolist() == [model.get(mark, HOLE) for mark in every]
    assert [table.find_one(*halves_of_one(mark)) for mark in every] == [model.get(mark, HOLE) for mark in every]
    pieces = list(table.pieces()) or [tuple(np.zeros((3, 0), np.uint64))]
    high, low, where = (np.concatenate(column) for column in zip(*pieces, strict=True))
    assert (high[1:] >= high[:-1]).all()
    entries = zip(high.tolist(), low.tolist(), where.tolist(), strict=True)
    assert {one.to_bytes(8, "big") + other.to_bytes(8, "big"): place for one, other, place in entries} == model
    assert len(where) == len(model)
