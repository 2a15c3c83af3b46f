"""The plan of a restore in place, against a model that is bytes: what it writes makes the one moment the other."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.errors import UnknownName
from dedup.types import BLOCK_BYTES, Moment, PointKind, Seq, TimeNs, VolumeId
from fusefs.restore_claim import is_below
from fusefs.restore_plan import RestorePlan, make_plan
from tests.dedup.thinned_world import World

PATHS = ("a.img", "db/app", "db/app-wal", "db/x/deep", "dbx")
PLACES = (".", "db", "db/x", *PATHS)
SIZES = (0, 1, 4096, 5000, 3 * 4096 + 7, 40_000)

paths = st.sampled_from(PATHS)
steps = st.one_of(
    st.tuples(st.just("make"), paths, st.sampled_from(SIZES)),
    st.tuples(st.just("write"), paths, st.tuples(st.integers(0, 30_000), st.binary(min_size=1, max_size=9000))),
    st.tuples(st.just("write"), paths, st.tuples(st.integers(0, 9), st.just(bytes(4096)))),
    st.tuples(st.just("resize"), paths, st.sampled_from(SIZES)),
    st.tuples(st.just("remove"), paths, st.none()),
    st.tuples(st.just("move"), paths, paths),
)


def take(world: World, step: tuple[str, str, object]) -> None:
    """One step; nothing where the path is not as it needs it."""
    what, path, how = step
    model = world.model
    volume = next((volume for volume, taken in model.paths.items() if taken == path), None)
    match what, how:
        case "make", int(size) if volume is None:
            world.group.ingest([model.create(path, size)])
        case "write", (int(offset), bytes(data)) if volume is not None:
            world.group.ingest([model.write(volume, offset, data)])
        case "resize", int(size) if volume is not None:
            world.group.ingest([model.resize(volume, size)])
        case "remove", None if volume is not None:
            world.group.ingest([model.retire(volume)])
        case "move", str(new) if volume is not None and new != path:
            world.group.ingest([model.rename(volume, new)])


def files(world: World, seq: int) -> dict[str, bytes]:
    content, names = world.model.history[seq]
    return {names[volume]: data for volume, data in content.items()}


def moment(seq: int) -> Moment:
    return Moment("g", Seq(seq), TimeNs(0), PointKind.CRASH)


def carried_out(world: World, plan: RestorePlan) -> tuple[dict[str, bytes], int]:
    """The files after the plan, and how many bytes it wrote: as `in_place` does it, on bytes."""
    held = files(world, plan.now.seq)
    then = files(world, plan.then.seq)
    written = 0
    for change in plan.removed:
        del held[change.path]
    for change in plan.kept:
        size = len(then[change.path])
        data = bytearray(held.get(change.path, b"")[:size].ljust(size, b"\0"))
        for found in plan.ranges(world.reader, change):
            data[found.offset : found.offset + found.length] = then[change.path][found.offset :][: found.length]
            written += found.length
        held[change.path] = bytes(data)
    return held, written


def differing_bytes(old: bytes, new: bytes) -> int:
    """Of the blocks of `new` that are not as in `old`, where what it lacks are zeros and what it has more is gone."""
    return sum(
        min(BLOCK_BYTES, len(new) - at)
        for at in range(0, len(new), BLOCK_BYTES)
        if old[at : at + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0") != new[at : at + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
    )


@settings(max_examples=40)
@given(st.lists(steps, min_size=2, max_size=25), st.sampled_from(PLACES), st.data())
def test_a_plan_makes_the_one_moment_the_other(
    history: list[tuple[str, str, object]], place: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory) / "store", size=9000)
        for step in history:
            take(world, step)
        world.reader.refresh()
        seqs = st.integers(3, world.model.seq)
        now, then = (data.draw(seqs, label=label) for label in ("now", "then"))
        before, after = files(world, now), files(world, then)
        wanted = {path: content for path, content in after.items() if is_below(path, place)}
        if not wanted and place != ".":
            with pytest.raises(UnknownName):
                make_plan(world.reader, place, moment(now), moment(then))
        else:
            plan = make_plan(world.reader, place, moment(now), moment(then))
            found, written = carried_out(world, plan)
            others = {path: content for path, content in before.items() if not is_below(path, place)}
            assert found == {**others, **wanted}
            assert written == sum(differing_bytes(before.get(path, b""), new) for path, new in wanted.items())
        world.close()


def test_what_a_plan_names(tmp_path: Path) -> None:
    world = World(tmp_path / "store", size=9000)
    world.group.ingest([world.model.create("db/app", 100)])
    then = world.model.seq
    world.group.ingest([world.model.create("db/app-wal", 5), world.model.resize(world.volume, 100)])
    world.group.ingest([world.model.retire(VolumeId(2))])
    world.reader.refresh()
    plan = make_plan(world.reader, ".", moment(world.model.seq), moment(then))
    assert [change.path for change in plan.removed] == ["db/app-wal"]
    assert [change.path for change in plan.made] == ["db/app"]
    assert [change.path for change in plan.resized] == ["a.img"]
    assert plan.total_bytes == 9100 and not plan.restyled
    world.close()
