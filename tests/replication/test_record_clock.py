"""Clocks that jump: within a run time never goes back, and a step back of more than a second begins another run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dedup.types import ClockRun, TimeNs
from replication.record_clock import STEP_BACK_NS, RecordClock

SECOND = 10**9
YEAR = 365 * 24 * 3600 * SECOND
START = 50 * YEAR


class Host:
    """A clock that does what a test tells it to."""

    def __init__(self, last: int = START, run: int = 0) -> None:
        self.now = START
        self.clock = RecordClock(TimeNs(last), ClockRun(run), lambda: self.now)

    def stamps(self, *times: int) -> list[tuple[int, int]]:
        found = []
        for self.now in times:
            found.append(self.clock.stamp())
        return [(int(time), int(run)) for time, run in found]


def test_a_year_forward_and_back_are_two_runs() -> None:
    times = (START + SECOND, START + YEAR, START + 2 * SECOND, START + 3 * SECOND)
    assert Host().stamps(*times) == [(times[0], 0), (times[1], 0), (times[2], 1), (times[3], 1)]


def test_a_small_step_back_holds_time_until_it_has_caught_up() -> None:
    back = START + SECOND
    assert Host().stamps(START + 2 * SECOND, back, back + SECOND // 2, START + 3 * SECOND) == [
        (START + 2 * SECOND, 0),
        (START + 2 * SECOND, 0),
        (START + 2 * SECOND, 0),
        (START + 3 * SECOND, 0),
    ]


def test_a_start_behind_the_group_s_last_record_begins_a_run() -> None:
    """Another host, or a clock that was put right while nothing was mounted."""
    assert Host(last=START + YEAR, run=4).stamps(START) == [(START, 5)]


@given(st.lists(st.integers(0, 4 * YEAR)))
def test_time_never_goes_back_within_a_run(times: list[int]) -> None:
    before = (START, 0)
    for now, (time, run) in zip(times, Host().stamps(*times), strict=True):
        assert run == before[1] or (run == before[1] + 1 and time == now)
        assert run > before[1] or time >= before[0]
        assert time == now or (time == before[0] and 0 < time - now <= STEP_BACK_NS)
        before = (time, run)
