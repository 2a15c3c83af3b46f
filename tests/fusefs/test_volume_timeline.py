"""The recovery points that a bisect may try, of a history with gaps, before and after it is thinned out."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.errors import MomentRefused, UnknownName
from dedup.types import Moment, Seq
from fusefs.bisection import Bisection, Verdict
from fusefs.volume_timeline import SeqRange, VolumeTimeline
from tests.dedup import model as models
from tests.dedup.thinned_world import STEP_NS, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(models, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store")
    world.history(8)
    yield world
    world.close()


def points(world: World, suffix: str = "") -> list[int]:
    """Every recovery point, by asking for each seq."""
    found = set()
    for seq in range(1, world.model.seq + 1):
        try:
            found.add(int(world.reader.resolve(f"seq={seq}{suffix}").seq))
        except MomentRefused:
            continue
    return sorted(found)


def timeline(world: World, *, flushed: bool = False) -> VolumeTimeline:
    gaps: list[SeqRange] = [(Seq(first), Seq(last)) for first, last in world.gaps]
    whole = Seq(1), Seq(world.model.seq)
    return VolumeTimeline(world.reader, threading.Lock(), "a.img", whole, gaps, flushed=flushed)


def moment(world: World, seq: int) -> Moment:
    return world.reader.resolve(f"seq={seq}")


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("thinned", [False, True])
def test_it_tells_of_every_recovery_point_and_no_other(world: World, flushed: bool, thinned: bool) -> None:
    if thinned:
        world.thin()
    found = points(world, "~flush" if flushed else "")
    assert 2 < len(found) < world.model.seq - 10
    one = timeline(world, flushed=flushed)
    chance = random.Random(2)
    for _ in range(60):
        after, before = sorted(chance.sample(range(world.model.seq + 2), 2))
        point = one.point_in(Seq(after), Seq(before))
        inside = [seq for seq in found if after < seq < before]
        assert (point is None) == (not inside), (after, before, inside)
        assert point is None or point.seq in inside


@pytest.mark.parametrize("thinned", [False, True])
def test_a_bisection_of_it_finds_the_first_bad_one(world: World, thinned: bool) -> None:
    if thinned:
        world.thin()
    found = [seq for seq in points(world) if world.has_volume(seq)]
    for first_bad in random.Random(3).sample(found[1:], 6):
        bad = next(seq for seq in found if world.content(seq) == world.content(first_bad))
        bisection = Bisection(timeline(world), moment(world, found[0]), moment(world, found[-1]))
        tried = set()
        while (point := bisection.next()) is not None:
            assert world.content(point.seq) not in tried
            tried.add(world.content(point.seq))
            bisection.tell(point, Verdict.BAD if point.seq >= bad else Verdict.GOOD)
        assert bisection.first_bad.seq == bad and not bisection.skipped
        assert bisection.last_good.seq == max(seq for seq in found if seq < bad)


def test_of_a_path_that_was_nothing(world: World) -> None:
    with pytest.raises(UnknownName, match="it had: a.img"):
        timeline(world).require(moment(world, world.model.seq))
        VolumeTimeline(world.reader, threading.Lock(), "b", (Seq(1), Seq(2)), (), flushed=False).require(
            moment(world, world.model.seq)
        )
