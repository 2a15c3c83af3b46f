"""The fingerprint index: layers, checkpoints that fail, and a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.errors import Damaged
from dedup.fingerprint_index import FingerprintIndex
from dedup.types import Address


def fp(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Fixture:
    def __init__(self, directory: Path) -> None:
        self.env = lmdb.open(str(directory), map_size=1 << 26, max_dbs=2)
        self.db = self.env.open_db(b"fingerprints")
        self.index = FingerprintIndex(self.env, self.db)

    def checkpoint(self, *, fails: bool = False) -> None:
        self.index.freeze()
        txn = self.env.begin(write=True)
        self.index.commit(txn)
        if fails:
            txn.abort()
        else:
            txn.commit()
            self.index.committed()

    def reopen(self) -> None:
        self.index.close()
        self.index = FingerprintIndex(self.env, self.db)

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
    index.note(fp(1), Address(997))
    fixture.checkpoint()
    fixture.reopen()
    assert fixture.index.lookup([fp(1)]) == [101]


def test_what_is_stored_outlives_the_index_and_what_is_pending_does_not(fixture: Fixture) -> None:
    for number in range(1000):
        fixture.index.note(fp(number), Address(number + 5))
    fixture.checkpoint()
    fixture.index.note(fp(5000), Address(1))
    fixture.reopen()
    found = fixture.index.lookup([fp(number) for number in range(1000)] + [fp(5000)])
    assert found == [*range(5, 1005), None]
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
    with fixture.env.begin(write=True) as txn:
        index.remove(txn, [(fp(1), Address(101)), (fp(2), Address(555)), (fp(3), Address(103)), (fp(4), Address(1))])
    index.committed()
    assert index.lookup([fp(1), fp(2), fp(3)]) == [None, 102, None]


def test_a_value_that_is_no_address_is_damage(fixture: Fixture) -> None:
    with fixture.env.begin(write=True) as txn:
        txn.put(fp(1), b"short", db=fixture.db)
    with pytest.raises(Damaged, match="not an address"):
        fixture.index.lookup([fp(1)])


@settings(max_examples=40)
@given(st.integers(0, 1 << 30))
def test_equals_a_dict(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    source = random.Random(seed)
    fixture = Fixture(tmp_path_factory.mktemp("index"))
    model: dict[bytes, int] = {}
    for step in range(60):
        choice = source.random()
        if choice < 0.6:
            key = fp(source.randrange(30))
            if fixture.index.lookup([key]) == [None]:
                fixture.index.note(key, Address(step + 1))
                model[key] = step + 1
        elif choice < 0.8:
            fixture.checkpoint(fails=source.random() < 0.3)
        else:
            wanted = [fp(source.randrange(40)) for _ in range(source.randrange(8))]
            assert fixture.index.lookup(wanted) == [model.get(key) for key in wanted]
    fixture.checkpoint()
    fixture.reopen()
    assert fixture.index.lookup([fp(n) for n in range(40)]) == [model.get(fp(n)) for n in range(40)]
    fixture.close()
