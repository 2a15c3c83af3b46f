"""Where damage lies is found at the price of what names it, not of all leaves of all snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dedup.damage import LATEST, locate
from dedup.layout import LEAF_BLOCKS
from dedup.store import Store
from dedup.synthesis import VolumePointers
from dedup.types import BLOCK_BYTES, VolumeId
from tests.dedup.model import Model

A = VolumeId(1)
LEAVES = 5


def block(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK_BYTES


def test_only_leaves_that_name_the_damage_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    group = store.group("g")
    model = Model()
    group.ingest([*model.begin(), model.create("a")])
    group.create_snapshot("before")
    store.checkpoint()
    group.ingest([model.write(A, leaf * LEAF_BLOCKS * BLOCK_BYTES, block(leaf)) for leaf in range(LEAVES)])
    group.create_snapshot("with it")
    store.checkpoint()
    bad = group.head_address(A, 2 * LEAF_BLOCKS)
    group.ingest([model.write(A, (2 * LEAF_BLOCKS + 1) * BLOCK_BYTES, block(2)), model.write(A, 0, block(9))])
    between = group.held
    group.ingest([model.write(A, offset * BLOCK_BYTES, block(20)) for offset in (2 * LEAF_BLOCKS, 2 * LEAF_BLOCKS + 1)])
    group.create_snapshot("between checkpoints", at=f"seq={between}")
    decoded: list[int] = []
    original = VolumePointers.leaf

    def leaf(self: VolumePointers, txn: object, number: int) -> object:
        decoded.append(number)
        return original(self, txn, number)  # type: ignore[arg-type]

    monkeypatch.setattr(VolumePointers, "leaf", leaf)
    found = list(locate(store.index, group.reader(), group.catalog.group_id, np.array([bad], dtype=np.uint64)))
    assert [(one.snapshot, one.first_block, len(one.addresses)) for one in found] == [
        ("with it", 2 * LEAF_BLOCKS, 1),
        ("between checkpoints", 2 * LEAF_BLOCKS, 2),
    ]
    snapshots, head = decoded[:-LEAVES], decoded[-LEAVES:]
    # The moment between checkpoints: what its overlay has, too, which is where block 0 was written.
    assert snapshots == [2, 2, 0, 2]
    assert head == list(range(LEAVES)) and LATEST not in {one.snapshot for one in found}
    store.close()
