"""A listing goes from moment to moment; what it says of each is what the moment says that is synthesized by itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dedup import group_walk
from dedup.reader import GroupReader
from dedup.types import Seq
from tests.dedup import model as models
from tests.dedup.thinned_world import STEP_NS, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(models, "STEP_NS", STEP_NS)
    return World(tmp_path / "store")


def more(world: World, rounds: int) -> None:
    """Writes that make a volume longer, and volumes that come, are cut, renamed and go."""
    model, group, chance = world.model, world.group, world.random
    for _ in range(rounds):
        made = model.create(f"{model.seq}.img", 100)
        group.ingest([made, model.write(made.volume, chance.randrange(9000), b"x" * chance.randrange(1, 9000))])
        group.ingest([model.aggregate(made.volume, [(0, b"a" * 5000), (30_000, b"b")]), model.flush(made.volume)])
        if chance.random() < 0.5:
            group.ingest([model.resize(made.volume, chance.randrange(40_000)), model.rename(made.volume, "moved.img")])
        if chance.random() < 0.3:
            world.store.checkpoint()


def check(walking: GroupReader, alone: GroupReader, seqs: list[int]) -> None:
    for reader in (walking, alone):
        reader.refresh()
    for seq in seqs:
        found, view = walking.group_at(Seq(seq)), alone.view(Seq(seq))
        assert found.moment == alone.moment(view), seq
        assert found.volumes == {volume.path: volume for volume in view.state.volumes.values()}, seq


@pytest.mark.parametrize(("far", "forget"), [(group_walk.ENTRIES_PER_VOLUME, group_walk.FORGET_RECORDS), (1000, 10)])
def test_each_moment_is_what_it_is_alone(world: World, monkeypatch: pytest.MonkeyPatch, far: int, forget: int) -> None:
    monkeypatch.setattr(group_walk, "ENTRIES_PER_VOLUME", far)
    monkeypatch.setattr(group_walk, "FORGET_RECORDS", forget)
    walking, alone = world.open_reader(world.store.storage), world.open_reader(world.store.storage)
    chance = random.Random(3)
    for number in range(4):
        more(world, 12)
        world.history(2)
        if number == 2:
            assert world.thin().pieces
        last = world.model.seq
        check(walking, alone, list(range(last + 3)))
        check(walking, alone, sorted(chance.sample(range(last), 20)))
        check(walking, alone, chance.sample(range(last), 20))
    world.close()


def test_no_entry_is_read_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.history(3)
    reader = world.open_reader(world.store.storage)
    reads: list[int] = []
    pread = type(world.store.storage).pread

    def counting(storage: object, fd: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return pread(storage, fd, length, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(type(world.store.storage), "pread", counting)
    for seq in range(2, world.model.seq):
        reader.group_at(Seq(seq))
    assert len(reads) < world.model.seq, "a manifest's number for each moment, and each segment a few times"
    world.close()
