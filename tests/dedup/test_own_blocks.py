"""Which blocks a group may be told of: its own, with several groups in a store that shares their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import own_blocks
from dedup.group_writer import GroupWriter
from dedup.layout import LEAF_BLOCKS, SLOT_BITS, SLOTS_MAX, fingerprint
from dedup.slot_marks import SlotMarks
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    HOLE,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)

ONE, RUN = VolumeId(1), ClockRun(0)
LEAVES = 4


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    Store.create(tmp_path / "store")
    opened = Store.open(tmp_path / "store")
    yield opened
    opened.close()


def block(number: int) -> bytes:
    return Random(number).randbytes(BLOCK_BYTES)


def begin(store: Store, name: str) -> GroupWriter:
    group = store.group(name)
    size = LEAVES * LEAF_BLOCKS * BLOCK_BYTES
    start: list[Record] = [
        EpochStart(Seq(1), TimeNs(1), RUN, Epoch(1), True),
        Create(Seq(2), TimeNs(1), RUN, ONE, "disk", size, 0o600, 0, 0),
    ]
    group.ingest(start)
    return group


def write(group: GroupWriter, number: int, place: int) -> None:
    seq = Seq(group.held + 1)
    group.ingest([Write(seq, TimeNs(seq), RUN, Extent(ONE, place * BLOCK_BYTES, block(number)))])


def known(group: GroupWriter, *numbers: int) -> list[bool]:
    found = group.store.own_blocks.candidates(group, [fingerprint(block(number)) for number in numbers])
    return [where != HOLE for where in found.tolist()]


def test_alone_a_group_owns_all(store: Store) -> None:
    group = begin(store, "one")
    write(group, 7, 0)
    assert known(group, 7, 8) == [True, False]


def test_a_group_owns_what_its_records_name(store: Store) -> None:
    one, two = begin(store, "one"), begin(store, "two")
    write(one, 7, 0)
    write(two, 8, 0)
    assert (known(one, 7, 8), known(two, 7, 8)) == ([True, False], [False, True])
    write(two, 7, 1)  # shared with the first group's block
    assert (known(one, 7, 8), known(two, 7, 8)) == ([True, False], [True, True])


def test_the_pointer_maps_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    one, two = begin(store, "one"), begin(store, "two")
    for leaf in range(LEAVES):
        write(one, leaf, leaf * LEAF_BLOCKS)
        write(two, 100 + leaf, leaf * LEAF_BLOCKS)
    store.close()
    store = Store.open(tmp_path / "store")
    try:
        monkeypatch.setattr(own_blocks, "VERSIONS_PER_LOOK", 1)
        for name, first, others in (("one", 0, 100), ("two", 100, 0)):
            group = store.group(name)
            mine = [first + leaf for leaf in range(LEAVES)]
            counts = [sum(known(group, *mine)) for _ in range(LEAVES + 1)]
            assert counts == [*range(1, LEAVES + 1), LEAVES]
            assert not any(known(group, *(others + leaf for leaf in range(LEAVES))))
    finally:
        store.close()


def test_too_many_marks_are_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _two = begin(store, "one"), begin(store, "two")
    write(one, 1, 0)
    assert known(one, 1) == [True]
    monkeypatch.setattr(own_blocks, "CONTAINERS_MAX", 0)
    write(one, 2, 1)
    monkeypatch.undo()
    assert known(one, 1, 2) == [False, True]
    write(one, 1, 2)
    assert known(one, 1, 2) == [True, True]


addresses = st.builds(lambda container, slot: container << SLOT_BITS | slot, st.integers(0, 3), st.integers(0, 40))
beyond = st.builds(lambda container: container << SLOT_BITS | SLOTS_MAX, st.integers(0, 3))


@given(st.lists(addresses), st.lists(st.one_of(addresses, beyond)))
def test_marks_tell_what_was_added(added: list[int], asked: list[int]) -> None:
    marks = SlotMarks()
    marks.add(np.array(added, dtype=np.uint64))
    expected = [where in added and where != HOLE for where in asked]
    assert marks.has(np.array(asked, dtype=np.uint64)).tolist() == expected
