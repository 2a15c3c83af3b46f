"""A reader that holds moments all the time leaves the writer most of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.hold_pace import BURST_SECONDS, SHARE, HoldPace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 3)), max_size=60))
def test_over_any_time_it_is_inside_for_its_share_and_a_burst(holds: list[tuple[float, float]]) -> None:
    clock = Clock()
    pace = HoldPace(lambda: clock.now, clock.sleep)
    stays: list[tuple[float, float]] = []
    for idle, stay in holds:
        clock.now += idle
        began: list[float] = []
        with pace.inside(lambda began=began: began.append(clock.now), lambda: None):  # type: ignore[misc]
            clock.now += stay
        stays.append((began[0], clock.now))
    for first in range(len(stays)):
        for last in range(first, len(stays)):
            # The last one may be longer than what was left: nobody knows before how long it takes.
            inside = sum(end - begin for begin, end in stays[first:last])
            assert inside <= (stays[last][0] - stays[first][0]) * SHARE + BURST_SECONDS + 1e-6


def test_who_holds_little_never_waits() -> None:
    clock = Clock()
    pace = HoldPace(lambda: clock.now, clock.sleep)
    for _ in range(4096):  # what a session held that ended: at once
        with pace.inside(lambda: None, lambda: None):
            clock.now += 0.001
    assert not clock.slept


def test_what_fails_inside_has_left() -> None:
    clock = Clock()
    pace = HoldPace(lambda: clock.now, clock.sleep)
    left: list[bool] = []
    with pytest.raises(ValueError), pace.inside(lambda: None, lambda: left.append(True)):
        raise ValueError
    assert left == [True]
