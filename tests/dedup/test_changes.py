"""What changed between two moments, against a model: blocks whose bytes differ have pointers that differ."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from dedup import changes
from dedup.layout import LEAF_BLOCKS, ZERO_BLOCK
from dedup.reader import GroupReader
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    Aggregate,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Heartbeat,
    ReconcileEnd,
    Record,
    Resize,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)

A = VolumeId(1)
SIZE = 6 * LEAF_BLOCKS * BLOCK_BYTES


class SparseModel:
    """One volume: block → its bytes, where those are not zeros; and the same after each record."""

    def __init__(self) -> None:
        self.seq = 0
        self.size = SIZE
        self.blocks: dict[int, bytes] = {}
        self.history: dict[int, dict[int, bytes]] = {}

    def stamp(self, count: int = 1) -> tuple[Seq, TimeNs, ClockRun]:
        self.seq += count
        return Seq(self.seq), TimeNs(self.seq * 10**9), ClockRun(0)

    def begin(self) -> list[Record]:
        return [
            EpochStart(*self.stamp(), Epoch(1), clean=False),
            ReconcileEnd(*self.stamp()),
            Create(*self.stamp(), A, "a", SIZE, 0o644, 0, 0),
        ]

    def write(self, block: int, data: bytes) -> Write:
        self.blocks[block] = data
        self.size = max(self.size, (block + 1) * BLOCK_BYTES)
        return Write(*self.stamp(), Extent(A, block * BLOCK_BYTES, data))

    def aggregate(self, blocks: list[int], data: bytes) -> Aggregate:
        extents = tuple(self.write(block, data).extent for block in blocks)
        seq, time, run = Seq(self.seq), TimeNs(self.seq * 10**9), ClockRun(0)
        return Aggregate(Seq(self.seq - len(blocks) + 1), seq, time, run, extents)

    def resize(self, size: int) -> Resize:
        last, kept = divmod(size, BLOCK_BYTES)
        self.blocks = {block: data for block, data in self.blocks.items() if block * BLOCK_BYTES < size}
        if last in self.blocks and size < self.size:
            self.blocks[last] = self.blocks[last][:kept].ljust(BLOCK_BYTES, b"\0")
        self.size = size
        return Resize(*self.stamp(), A, size)

    def step(self, dice: random.Random) -> Record:
        """Writes, mostly; of few different blocks, so that many come back; cuts, now and then."""
        what = dice.random()
        block = dice.randrange(SIZE // BLOCK_BYTES - 2) if dice.random() < 0.5 else 7
        data = bytes([dice.randrange(3)]) * BLOCK_BYTES
        if what < 0.1:
            return self.resize(dice.choice([SIZE, SIZE // 2 + dice.randrange(BLOCK_BYTES), self.size]))
        if what < 0.2:
            return Heartbeat(*self.stamp())
        return self.aggregate([block, block + 2], data) if what < 0.3 else self.write(block, data)

    def differing(self, old: int | None, new: int) -> int:
        """Bytes of the blocks that differ between two moments."""
        was = {} if old is None else self.history[old]
        now = self.history[new]
        blocks = was.keys() | now.keys()
        return BLOCK_BYTES * sum(was.get(block, ZERO_BLOCK) != now.get(block, ZERO_BLOCK) for block in blocks)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    Store.create(tmp_path / "store")
    return Store.open(tmp_path / "store")


def check_pairs(reader: GroupReader, model: SparseModel, moments: list[int]) -> None:
    for old, new in itertools.pairwise(moments):
        assert reader.changed_bytes(A, Seq(old), Seq(new)) == model.differing(old, new), (old, new)
    for index, new in enumerate(moments):
        assert reader.changed_bytes(A, None, Seq(new)) == model.differing(None, new)
        for old in moments[max(0, index - 3) : index]:
            assert reader.changed_bytes(A, Seq(old), Seq(new)) == model.differing(old, new), (old, new)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pointers_max", [-1, 1 << 16], ids=["by the pointer maps", "by the journal"])
def test_changed_bytes_are_those_of_the_model(
    store: Store, monkeypatch: pytest.MonkeyPatch, seed: int, pointers_max: int
) -> None:
    monkeypatch.setattr(changes, "POINTERS_MAX", pointers_max)
    monkeypatch.setattr(changes, "LEAVES_MAX", 2)
    dice = random.Random(seed)
    model = SparseModel()
    group = store.group("g")
    group.ingest(model.begin())
    moments = []
    for _ in range(20):
        group.ingest([model.step(dice) for _ in range(dice.randrange(1, 6))])
        if dice.random() < 0.4:
            store.checkpoint()
        moments.append(model.seq)
        model.history[model.seq] = dict(model.blocks)
    check_pairs(group.reader(), model, moments)
    store.close()


def test_a_pair_costs_what_lies_between_and_not_the_volume(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SparseModel()
    group = store.group("g")
    group.ingest(model.begin())
    group.ingest([model.write(leaf * LEAF_BLOCKS, b"x" * BLOCK_BYTES) for leaf in range(6)])
    store.checkpoint()
    before = group.held
    group.ingest([model.write(0, b"y" * BLOCK_BYTES)])
    store.checkpoint()
    looked_at: list[int] = []
    reader = group.reader()
    original = changes.VolumePointers.leaf

    def leaf(self: changes.VolumePointers, txn: object, number: int) -> object:
        looked_at.append(number)
        return original(self, txn, number)  # type: ignore[arg-type]

    monkeypatch.setattr(changes.VolumePointers, "leaf", leaf)
    assert reader.changed_bytes(A, before, group.held) == BLOCK_BYTES
    assert set(looked_at) == {0}
    store.close()
