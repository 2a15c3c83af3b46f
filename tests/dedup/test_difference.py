"""Where two images differ, from pointers alone, against a model that is bytes.

Every byte that differs is in a range, and every block of a range differs.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import difference
from dedup.errors import UnknownName
from dedup.history import ByteRange
from dedup.layout import LEAF_BLOCKS
from dedup.types import BLOCK_BYTES, Seq, VolumeId
from tests.dedup import model as models
from tests.dedup.thinned_world import STEP_NS, World

SIZE = 2 * LEAF_BLOCKS * BLOCK_BYTES + 5000
BLOCKS = (0, 1, 2, LEAF_BLOCKS - 1, LEAF_BLOCKS, LEAF_BLOCKS + 300, 2 * LEAF_BLOCKS)
SIZES = (0, 5000, BLOCK_BYTES, LEAF_BLOCKS * BLOCK_BYTES, LEAF_BLOCKS * BLOCK_BYTES + 7, SIZE, SIZE + 4 * BLOCK_BYTES)

Written = tuple[int, bytes]
Side = tuple[VolumeId, Seq] | None

contents = st.builds(lambda fill, length: bytes([fill]) * length, st.integers(0, 4), st.sampled_from([100, 4096, 9000]))
places = st.builds(
    lambda block, within: block * BLOCK_BYTES + within, st.sampled_from(BLOCKS), st.sampled_from([0, 0, 70])
)
writes: st.SearchStrategy[Written] = st.tuples(places, contents)
steps = st.one_of(
    st.tuples(st.just("write"), st.booleans(), writes),
    st.tuples(st.just("write"), st.booleans(), writes),
    st.tuples(st.just("aggregate"), st.booleans(), st.tuples(contents, contents)),
    st.tuples(st.just("resize"), st.booleans(), st.sampled_from(SIZES)),
    st.tuples(st.just("checkpoint"), st.none(), st.none()),
    st.tuples(st.just("thin"), st.none(), st.none()),
)


@pytest.fixture(autouse=True)
def steps_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "STEP_NS", STEP_NS)
    monkeypatch.setattr(difference, "_LEAVES_PER_REQUEST", 2)


def expected(old: bytes, new: bytes, start: int) -> Iterator[ByteRange]:
    """The ranges, block by block. Holes and zeros are the same."""
    end = max(len(old), len(new))
    blocks = -(-end // BLOCK_BYTES)
    was, now = (np.frombuffer(side.ljust(blocks * BLOCK_BYTES, b"\0"), dtype=np.uint8) for side in (old, new))
    differs = (was != now).reshape(blocks, BLOCK_BYTES).any(axis=1).tolist()
    at = 0
    for differing, run in itertools.groupby(differs):
        length = len(list(run)) * BLOCK_BYTES
        low, high = max(at, start), min(at + length, end)
        if differing and low < high:
            yield ByteRange(low, high - low)
        at += length


def take(world: World, other: VolumeId, step: tuple[str, bool | None, object]) -> None:
    """One step of a history, on the world's volume or the other one."""
    what, of_other, how = step
    volume = other if of_other else world.volume
    match what, how:
        case "write", (int(offset), bytes(data)):
            world.group.ingest([world.model.write(volume, offset, data)])
        case "aggregate", (bytes(first), bytes(second)):
            parts = [(BLOCK_BYTES, first), ((LEAF_BLOCKS - 1) * BLOCK_BYTES, second)]
            world.group.ingest([world.model.aggregate(volume, parts)])
        case "resize", int(size):
            world.group.ingest([world.model.resize(volume, size)])
        case "checkpoint", None:
            world.store.checkpoint()
        case "thin", None:
            world.group.complete_segment()
            world.thin()
        case _:
            raise AssertionError(step)


@settings(max_examples=25)
@given(st.lists(steps, min_size=4, max_size=30), st.integers(0, SIZE), st.randoms(use_true_random=False))
def test_ranges_are_those_of_the_model(
    history: list[tuple[str, bool | None, object]], start: int, dice: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory) / "store", size=SIZE)
        made = world.model.create("b.img", 5000)
        world.group.ingest([made])
        for step in history:
            take(world, made.volume, step)
        world.reader.refresh()
        sides: list[Side] = [None]
        for seq in world.kept():
            sides += [(volume, Seq(seq)) for volume in world.model.history[seq][0]]
        for old, new in dice.choices(list(itertools.product(sides, sides)), k=12):
            content = [b"" if side is None else world.model.history[side[1]][0][side[0]] for side in (old, new)]
            for begin in (0, start):
                found = list(world.reader.differing(old, new, begin))
                assert found == list(expected(content[0], content[1], begin)), (old, new, begin)
        world.close()


def test_a_volume_that_did_not_exist_is_unknown(tmp_path: Path) -> None:
    world = World(tmp_path / "store")
    made = world.model.create("b.img", 5000)
    world.group.ingest([made])
    world.reader.refresh()
    with pytest.raises(UnknownName, match="had no volume 2 at seq=3"):
        list(world.reader.differing((made.volume, Seq(3)), (made.volume, made.seq)))
    world.close()


def test_no_block_and_no_leaf_is_read_that_cannot_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "store", size=SIZE)
    for block in BLOCKS:
        world.group.ingest([world.model.write(world.volume, block * BLOCK_BYTES, world.random.randbytes(BLOCK_BYTES))])
    world.store.checkpoint()
    before = world.group.held
    world.group.ingest([world.model.write(world.volume, LEAF_BLOCKS * BLOCK_BYTES, b"new" * 1000)])
    world.store.checkpoint()
    world.reader.refresh()
    monkeypatch.setattr(world.store.pool, "read_addresses", None)
    looked_at: list[int] = []
    original = difference.VolumePointers.leaf

    def leaf(self: difference.VolumePointers, txn: object, number: int) -> object:
        looked_at.append(number)
        return original(self, txn, number)  # type: ignore[arg-type]

    monkeypatch.setattr(difference.VolumePointers, "leaf", leaf)
    found = list(world.reader.differing((world.volume, before), (world.volume, world.group.held)))
    assert found == [ByteRange(LEAF_BLOCKS * BLOCK_BYTES, BLOCK_BYTES)]
    assert set(looked_at) == {1}
    world.close()
