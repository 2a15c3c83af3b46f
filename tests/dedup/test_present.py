"""The volumes that a checkpoint says exist are those that the index has, and the only ones that a reader looks at."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dedup import group_state
from dedup.catalog import Catalog
from dedup.reader import StoreReader
from dedup.store import Store
from dedup.types import Seq
from tests.dedup.model import Model


def made(path: Path) -> list[int]:
    """A store in which volumes come and go; the seqs of its checkpoints."""
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    model = Model()
    dice = random.Random(2)
    group.ingest(model.begin())
    seqs = []
    for number in range(120):
        group.ingest([model.create(f"v{number}")])
        while model.paths and dice.random() < 0.48:
            group.ingest([model.retire(dice.choice(sorted(model.paths)))])
        if dice.random() < 0.2:
            store.checkpoint()
            seqs.append(int(group.held))
    store.close()
    return seqs


@pytest.mark.parametrize("runs_max", [1024, 2])
def test_what_is_listed_is_what_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_max: int) -> None:
    monkeypatch.setattr(group_state, "PRESENT_RUNS_MAX", runs_max)
    path = tmp_path / "store"
    seqs = made(path)
    reader = StoreReader.open(path)
    with reader.index.read() as txn:
        catalog = Catalog(reader.index, reader.index.group_ids(txn)["g"])
        listed = 0
        for seq in seqs:
            anchor = catalog.anchor(txn, Seq(seq))
            assert anchor is not None and anchor.held == seq
            existing = catalog.volumes(txn, anchor.held)
            assert catalog.state(txn, anchor).volumes == existing
            if anchor.present is not None:
                listed += 1
                numbers = [number for first, last in anchor.present for number in range(first, last + 1)]
                assert numbers == sorted(existing) and len(anchor.present) <= runs_max
        assert (listed == len(seqs)) == (runs_max == 1024) and listed
    reader.close()


def test_who_reads_a_state_looks_at_no_volume_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    made(path)
    reader = StoreReader.open(path)
    looked: list[str] = []
    original = Catalog._last_at_or_before

    def spy(self: Catalog, txn: object, db: str, prefix: bytes, target: bytes) -> object:
        looked.append(db)
        return original(self, txn, db, prefix, target)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "_last_at_or_before", spy)
    group = reader.group("g")
    assert looked.count("volumes") == len(group.state.volumes)
    reader.close()
