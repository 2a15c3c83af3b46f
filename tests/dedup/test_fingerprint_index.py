"""The fingerprint index: layers, checkpoints that fail, and a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup import fingerprint_index
from dedup.catalog import Index
from dedup.errors import Damaged
from dedup.fingerprint_index import FingerprintIndex
from dedup.fingerprint_table import SLICES, FingerprintTable
from dedup.layout import address, fingerprint
from dedup.storage import Storage
from dedup.types import Address, ContainerId
from dedup.watermark import Watermark


def fp(number: int) -> bytes:
    return number.to_bytes(16, "little")


CONTAINER = ContainerId(7)


class Fixture:
    """The index of a store, and what a container's table has: a slot for each block stored, in their order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = Index(directory, writer=True)
        self.db = self.env.db["fingerprints"]
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
        self.db = self.env.db["fingerprints"]
        self.index = FingerprintIndex(self.env, Storage())
        self.index.load([(b"".join(self.slots.values()), np.fromiter(self.slots, np.uint64, len(self.slots)))])

    def stored(self) -> dict[bytes, int]:
        """What LMDB has."""
        with self.env.read() as txn, txn.cursor(self.db) as cursor:
            return {key: int.from_bytes(value, "little") for key, value in cursor}

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


def test_forget_recent_drops_only_what_was_noted_since_freeze(fixture: Fixture) -> None:
    index = fixture.index
    index.note(fp(1), Address(101))
    index.freeze()
    index.note(fp(2), Address(102))
    index.forget_recent()
    assert index.lookup([fp(1), fp(2)]) == [101, None]


def test_remove_takes_out_only_the_address_that_goes(fixture: Fixture) -> None:
    index = fixture.index
    for number in (1, 2):
        index.note(fp(number), Address(100 + number))
    fixture.checkpoint()
    index.note(fp(3), Address(103))
    with fixture.env.write() as txn:
        index.remove(txn, [(fp(1), Address(101)), (fp(2), Address(555)), (fp(3), Address(103)), (fp(4), Address(1))])
    index.reread()
    assert index.lookup([fp(1), fp(2), fp(3)]) == [None, 102, None]


def test_a_value_that_is_no_address_is_damage(fixture: Fixture) -> None:
    with fixture.env.write() as txn:
        txn.put(fp(1), b"short", db=fixture.db)
    with pytest.raises(Damaged, match="not an address"):
        fixture.index.lookup([fp(1)])


@pytest.mark.parametrize("few", [False, True])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30))
def test_equals_a_dict(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, few: bool, seed: int
) -> None:
    """Noted, committed or not, removed, merged by slices where only few stay in memory, opened anew."""
    if few:
        monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 6)
        monkeypatch.setattr(fingerprint_index, "_SLICES_PER_COMMIT", 40)
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
        elif choice < 0.85 and model:
            gone = source.sample(sorted(model.items()), min(3, len(model)))
            with fixture.env.write() as txn:
                fixture.index.remove(txn, gone)
            fixture.index.reread()
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


def test_what_gathers_in_memory_goes_into_lmdb_by_slices(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 256)
    fixture.checkpoint()
    placed = {}
    for number in range(2048):
        mark = fingerprint(number.to_bytes(4, "big"))
        placed[mark] = fixture.store(mark)
        if number % 32 == 31:
            fixture.checkpoint()
            assert fixture.index.unmerged_count <= 400
    assert fixture.index.lookup(list(placed)) == list(placed.values())
    stored = fixture.stored()
    assert len(stored) > 1000 and stored.items() <= placed.items()
    fixture.reopen()
    assert 2048 - len(stored) <= fixture.index.unmerged_count <= 600
    assert fixture.index.lookup(list(placed)) == list(placed.values())


def test_removed_slots_that_stay_in_their_container_are_named_for_a_while_only(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the last two rounds removed, of 16 checkpoints each, however few fingerprints are in memory."""
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 64)
    monkeypatch.setattr(fingerprint_index, "_FORGOTTEN_PER_ROUND", 200)
    fixture.checkpoint()
    removed: list[bytes] = []
    most = 0
    for number in range(120):
        marks = [fingerprint(bytes([number, other])) for other in range(8)]
        entries = [(mark, fixture.store(mark)) for mark in marks]
        fixture.checkpoint()
        with fixture.env.write() as txn:
            fixture.index.remove(txn, entries)
        fixture.index.reread()
        removed += marks
        most = max(most, len(fixture.env.gone()))
        if number % 29 == 28:
            fixture.reopen()
        assert not any(fixture.index.lookup(removed))
    assert 64 < most <= 64 + 2 * 16 * 8
    assert not fixture.stored().keys() & set(removed)


def test_a_container_that_was_swept_has_no_removed_slots_to_name(fixture: Fixture) -> None:
    fixture.checkpoint()
    entries = [(fp(number), fixture.store(fp(number))) for number in range(20)]
    others = [(fp(number), address(ContainerId(CONTAINER + other), 5)) for number, other in ((90, 1), (91, 256))]
    fixture.checkpoint()
    with fixture.env.write() as txn:
        fixture.index.remove(txn, [*entries[:15], *others])
    fixture.index.reread()
    fixture.reopen()
    assert fixture.env.gone().tolist() == sorted(where for _, where in [*entries[:15], *others])
    assert fixture.index.lookup([mark for mark, _ in entries]) == [None] * 15 + [where for _, where in entries[15:]]
    for _, where in entries[:15]:
        del fixture.slots[where]
    fixture.index.forget_gone(CONTAINER)
    assert fixture.env.gone().tolist() == [where for _, where in others]
    fixture.reopen()
    assert fixture.index.lookup([mark for mark, _ in entries]) == [None] * 15 + [where for _, where in entries[15:]]


def test_an_index_of_before_goes_on_with_what_it_has(fixture: Fixture) -> None:
    """One that no `Merged` was written into has everything in LMDB."""
    with fixture.env.write() as txn:
        txn.put(fp(1), (101).to_bytes(8, "little"), db=fixture.db)
        fixture.env.put_watermark(txn, Watermark(CONTAINER, {}))
    fixture.reopen()
    fixture.store(fp(1))
    assert fixture.index.lookup([fp(1)]) == [address(CONTAINER, 0)]  # whoever notes it has looked before
    fixture.checkpoint()
    fixture.store(fp(2))
    fixture.checkpoint()
    assert fixture.stored() == {fp(1): 101}
    fixture.reopen()
    assert fixture.index.lookup([fp(1), fp(2)]) == [101, address(CONTAINER, 1)]
    assert fixture.index.unmerged_count == 1


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), max_size=6))
def test_a_table_equals_a_dict(added: list[list[tuple[int, int]]]) -> None:
    """Also of fingerprints whose halves are the same."""
    table, model = FingerprintTable(), dict[bytes, int]()
    number = 0
    for some in added:
        marks = [high.to_bytes(8, "little") + low.to_bytes(8, "big") for high, low in some]
        places = list(range(number + 1, number + 1 + len(marks)))
        number += len(marks)
        table.add(b"".join(marks), np.array(places, np.uint64))
        for mark, place in zip(marks, places, strict=True):
            model.setdefault(mark, place)
    every = [high.to_bytes(8, "little") + low.to_bytes(8, "big") for high in range(4) for low in range(4)]
    assert table.find(every) == model
    assert [table.find([mark]).get(mark) for mark in every] == [model.get(mark) for mark in every]
    entries = [entry for number in range(SLICES) for entry in table.slice(number)]
    assert dict(entries) == model and len(entries) == len(model)
