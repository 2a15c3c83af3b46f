"""What is held of a range at one seq, read after the volume has gone on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.errors import UnknownName
from dedup.layout import LEAF_BLOCKS, container_path
from dedup.store import Store
from dedup.types import ContainerId, VolumeId
from tests.dedup.model import Model
from tests.dedup.test_repair import flip, slot_at

BLOCK = 4096
A = VolumeId(1)
BLOCKS = 2 * LEAF_BLOCKS + 40
writes = st.tuples(st.integers(0, BLOCKS - 3), st.integers(1, 3), st.integers(0, 5))
"""First block, how many, and what they hold: few contents, so that some are shared."""
Step = tuple[int, int, int] | int | str
steps = st.one_of(writes, st.integers(0, BLOCKS), st.just("checkpoint"))


@settings(max_examples=10, deadline=None)
@given(before=st.lists(steps, max_size=12), after=st.lists(steps, max_size=6), data=st.data())
def test_it_is_what_was_held_then(
    tmp_path_factory: pytest.TempPathFactory, before: list[Step], after: list[Step], data: st.DataObject
) -> None:
    path, model = tmp_path_factory.mktemp("held") / "store", Model()
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    group.ingest([*model.begin(), model.create("a.img", BLOCKS * BLOCK)])

    def take(step: Step) -> None:
        match step:
            case (first, count, number):
                content = b"".join(random.Random(number * 9 + at).randbytes(BLOCK) for at in range(count))
                group.ingest([model.write(A, first * BLOCK, content)])
            case int():
                group.ingest([model.resize(A, step * BLOCK), model.resize(A, BLOCKS * BLOCK)])
            case str():
                store.checkpoint()

    try:
        for step in before:
            take(step)
        first = data.draw(st.integers(0, BLOCKS - 1))
        count = data.draw(st.integers(1, BLOCKS - first))
        expected = b"".join(group.head_block(A, block) for block in range(first, first + count))
        held = group.held_range(A, first * BLOCK, count)
        for step in after:
            take(step)
        content, bad = held.read()
        assert bytes(content) == expected and not bad
        assert held.is_hole <= (expected == bytes(len(expected)))
    finally:
        store.close()


def test_damaged_blocks_are_named(tmp_path: Path) -> None:
    path, model = tmp_path / "store", Model()
    Store.create(path)
    store = Store.open(path)
    content = random.Random(1).randbytes(8 * BLOCK)
    store.group("g").ingest([*model.begin(), model.create("a.img"), model.write(A, 0, content)])
    store.close()
    flip(container_path(path / "containers", ContainerId(1)), slot_at(5) + 9)
    store = Store.open(path)
    try:
        read, bad = store.group("g").held_range(A, 0, 10).read()
        assert bad == {5}
        assert read == content[: 5 * BLOCK] + bytes(BLOCK) + content[6 * BLOCK :] + bytes(2 * BLOCK)
        with pytest.raises(UnknownName):
            store.group("g").held_range(VolumeId(9), 0, 1)
    finally:
        store.close()
