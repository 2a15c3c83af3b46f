"""Since when and until when a path was a volume's, with and without a history that is thinned out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedup import layout
from dedup.types import PointKind, Seq
from dedup.volume_history import path_history
from tests.dedup import model as models
from tests.dedup.thinned_world import STEP_NS, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(models, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store")
    group, model = world.group, world.model
    world.write(15)
    second = model.create("b.img", 100)
    group.ingest([second])
    world.write(15)
    group.ingest([model.rename(second.volume, "c.img"), model.flush(second.volume)])
    world.write(12)
    third = model.create("b.img", 7)
    group.ingest([third])
    world.write(3)
    group.ingest([model.flush(third.volume), model.retire(second.volume)])
    world.write(14)
    group.ingest([model.rename(third.volume, "c.img")])
    world.write(15)
    group.ingest([model.retire(third.volume)])
    world.write(11)
    group.complete_segment()
    world.write(20)
    return world


def test_the_spans_of_a_path_are_the_moments_that_have_it(world: World) -> None:
    directory = world.path / layout.GROUPS_NAME / "g" / layout.JOURNAL_NAME
    for thinned in (False, True):
        if thinned:
            assert world.thin().pieces == 1
        kept = world.kept()
        for path in ("a.img", "b.img", "c.img", "never"):
            history = path_history(world.store.storage, directory, path, Seq(world.model.seq))
            told = {
                seq
                for seq in kept
                if any(first <= seq and (last is None or seq <= last) for first, last in history.spans)
            }
            had = {seq for seq in kept if path in world.model.history[seq][1].values()}
            assert told == had, (path, thinned)
            assert all(first in kept for first, _ in history.spans if first >= kept[0])
            if thinned:
                flushed = [seq for seq in had if world.reader.view(Seq(seq)).state.point is not PointKind.CRASH]
                assert history.flushes == len(flushed)
    world.close()
