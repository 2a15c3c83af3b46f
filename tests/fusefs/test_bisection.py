"""The search for the first bad recovery point, against a model: which seqs are points, and what is there."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.types import Moment, PointKind, Seq, TimeNs
from fusefs.bisection import Bisection, Verdict


def moment(seq: int) -> Moment:
    return Moment("group", Seq(seq), TimeNs(seq), PointKind.CRASH)


@dataclass
class ModelTimeline:
    """`contents[seq]` is what is there at each recovery point; other seqs are thinned out, or in gaps."""

    contents: dict[int, int]

    def point_in(self, after: Seq, before: Seq) -> Moment | None:
        inside = [seq for seq in self.contents if after < seq < before]
        return moment(inside[len(inside) // 2]) if inside else None

    def alike(self, one: Moment, other: Moment) -> bool:
        return self.contents[one.seq] == self.contents[other.seq]


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[int, int], int, set[int]]:
    """What is at each point (a count that rises), from which one on it is bad, and which ones cannot be tested."""
    seqs = sorted(draw(st.sets(st.integers(1, 400), min_size=2, max_size=60)))
    steps = draw(st.lists(st.booleans(), min_size=len(seqs) - 1, max_size=len(seqs) - 1))
    contents, content = {seqs[0]: 0}, 0
    for seq, changed in zip(seqs[1:], steps, strict=True):
        content += changed
        contents[seq] = content
    if not content:
        contents[seqs[-1]] = content = 1
    first_bad = draw(st.integers(1, content))
    skipped = draw(st.sets(st.integers(1, max(1, content - 1)), max_size=4))
    return contents, first_bad, skipped


@given(histories())
def test_it_finds_the_first_bad_one(history: tuple[dict[int, int], int, set[int]]) -> None:
    contents, first_bad, untestable = history
    points = sorted(contents)
    untestable -= {contents[points[0]], contents[points[-1]]}
    bisection = Bisection(ModelTimeline(contents), moment(points[0]), moment(points[-1]))
    tried: list[int] = []
    while (found := bisection.next()) is not None:
        content = contents[found.seq]
        assert content not in tried, "a moment like this one was tried already"
        tried.append(content)
        bad = Verdict.BAD if content >= first_bad else Verdict.GOOD
        bisection.tell(found, Verdict.SKIPPED if content in untestable else bad)
    assert bisection.left == 0
    assert len(tried) <= len(points).bit_length() + len(untestable) + 1
    truth = next(seq for seq in points if contents[seq] >= first_bad)
    suspects = [*(stretch.first.seq for stretch in bisection.skipped), bisection.first_bad.seq]
    assert truth in suspects
    assert all(contents[seq] in untestable for seq in suspects[:-1])
    assert contents[bisection.last_good.seq] < first_bad <= contents[bisection.first_bad.seq]
    # The last good one is the one just before: nothing untried is between.
    between = {contents[seq] for seq in points if bisection.last_good.seq < seq < suspects[0]}
    assert not between


def test_a_long_history_takes_few_steps() -> None:
    contents = dict(enumerate(range(100_000), start=1))
    bisection = Bisection(ModelTimeline(contents), moment(1), moment(100_000))
    steps = 0
    while (found := bisection.next()) is not None:
        steps += 1
        bisection.tell(found, Verdict.BAD if found.seq >= 77_777 else Verdict.GOOD)
    assert (bisection.first_bad.seq, bisection.last_good.seq) == (77_777, 77_776)
    assert steps <= 17


def test_good_comes_first() -> None:
    with pytest.raises(AssertionError):
        Bisection(ModelTimeline({1: 1}), moment(2), moment(1))
