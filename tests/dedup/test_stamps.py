"""Where records end, read from the headers of the journal, against the views of the same seqs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dedup.group_writer import GroupWriter
from dedup.reader import GroupReader
from dedup.stamps import Stamps
from dedup.store import Store
from dedup.types import Seq, VolumeId
from tests.dedup.model import Model

A = VolumeId(1)


@pytest.fixture
def group(tmp_path: Path) -> GroupWriter:
    """Writes and aggregates with checkpoints at uneven distances, and entries without a seq of their own."""
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    dice = random.Random(5)
    model = Model()
    group = store.group("g")
    group.ingest([*model.begin(), model.create("a")])
    for number in range(60):
        if dice.random() < 0.4:
            group.ingest([model.aggregate(A, [(0, b"a"), (5, b"b"), (9, b"c")])])
        else:
            group.ingest([model.write(A, number, b"w")])
        if dice.random() < 0.15:
            store.checkpoint()
        if dice.random() < 0.1:
            group.create_snapshot(f"s{number}")
    return group


def check(reader: GroupReader, stamps: Stamps, seq: Seq) -> None:
    state = reader.view(seq).state
    assert stamps.last(seq) == (state.held, state.time)
    following = reader.first_from(seq)
    expected = None if following is None else (following.state.held, following.state.time)
    assert stamps.first(seq) == expected


def test_stamps_are_those_of_the_views(group: GroupWriter) -> None:
    reader = group.reader()
    seqs = [Seq(seq) for seq in range(int(group.held) + 3)]

    def step(stamps: Stamps) -> None:
        for seq in seqs:
            check(reader, stamps, seq)

    reader.stamped(step)
    random.Random(6).shuffle(seqs)
    reader.stamped(step)


def test_what_was_appended_since_is_not_told(group: GroupWriter) -> None:
    reader = group.reader()
    held = reader.held

    def step(stamps: Stamps) -> None:
        group.create_snapshot("later", at=f"seq={group.state.base}")
        assert stamps.last(Seq(held + 1)).seq == held
        assert stamps.first(Seq(held + 1)) is None

    reader.stamped(step)
