"""The search for the first bad recovery point: which one to try next, and what the answers leave. No I/O of its own.

As in any bisection, everything before the first bad one is taken for good, and everything behind it for bad.

Invariants:
- `stretches` are in order: a good one, those that were skipped, a bad one. All moments of a stretch that history tells
  apart, up to `until`, are alike, so that one answer holds for all of them;
- a moment is never tried twice, nor one that is like its neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Protocol

from dedup.types import Moment, Seq


class Verdict(Enum):
    """What is known of a moment."""

    GOOD = "good"
    BAD = "bad"
    SKIPPED = "skip"


@dataclass(slots=True)
class Stretch:
    """Moments first..last, which are alike; up to `until` there is no other recovery point."""

    first: Moment
    last: Moment
    until: Seq
    verdict: Verdict

    @classmethod
    def of(cls, moment: Moment, verdict: Verdict) -> Stretch:
        return cls(moment, moment, moment.seq, verdict)


class Timeline(Protocol):
    """The recovery points of what is searched."""

    def point_in(self, after: Seq, before: Seq) -> Moment | None:
        """A recovery point between the two, near their middle; None when there is none."""

    def alike(self, one: Moment, other: Moment) -> bool:
        """Whether what is searched is certainly the same at both."""


class Bisection:
    """Give `next` to the person's command, and its answer to `tell`, until there is no next one."""

    def __init__(self, timeline: Timeline, good: Moment, bad: Moment) -> None:
        """`good` is before `bad`."""
        assert good.seq < bad.seq, "the good end comes first"
        self._timeline = timeline
        self.stretches = [Stretch.of(good, Verdict.GOOD), Stretch.of(bad, Verdict.BAD)]

    @property
    def last_good(self) -> Moment:
        """The last one that is known to be good."""
        return self.stretches[0].last

    @property
    def first_bad(self) -> Moment:
        """The first one that is known to be bad; the first bad one at all when nothing is left and none is skipped."""
        return self.stretches[-1].first

    @property
    def skipped(self) -> list[Stretch]:
        """Those between the two that could not be tried: any of them may be the first bad one."""
        return self.stretches[1:-1]

    @property
    def left(self) -> int:
        """How many records are between those that were tried: no fewer than there are recovery points left."""
        return sum(_distance(left, right) for left, right in pairwise(self.stretches))

    def next(self) -> Moment | None:
        """The recovery point to try now: near the middle of the widest part of which nothing is known."""
        while True:
            left, right = max(pairwise(self.stretches), key=lambda pair: _distance(*pair))
            if not _distance(left, right):
                return None
            point = self._timeline.point_in(left.until, right.first.seq)
            if point is None:
                left.until = Seq(right.first.seq - 1)
            elif self._timeline.alike(left.last, point):
                left.last, left.until = point, point.seq
            elif self._timeline.alike(point, right.first):
                right.first = point
            else:
                return point

    def tell(self, moment: Moment, verdict: Verdict) -> None:
        """The answer to `next`."""
        new = Stretch.of(moment, verdict)
        before = [stretch for stretch in self.stretches if stretch.last.seq < moment.seq]
        behind = self.stretches[len(before) :]
        match verdict:
            case Verdict.GOOD:
                self.stretches = [new, *behind]
            case Verdict.BAD:
                self.stretches = [*before, new]
            case Verdict.SKIPPED:
                self.stretches = [*before, new, *behind]


def _distance(left: Stretch, right: Stretch) -> int:
    return right.first.seq - left.until - 1
