"""The clock that stamps records: wall time that never decreases within a clock run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from dedup.types import ClockRun, TimeNs

STEP_BACK_NS: Final = 1_000_000_000
"""A clock that steps back by more begins a new clock run; by less, time stands still until it has caught up."""


class RecordClock:
    """Stamps in order of calls. `now` is injected by tests."""

    __slots__ = ("_now", "run", "time")

    def __init__(self, last: TimeNs, run: ClockRun, now: Callable[[], int] = time.time_ns) -> None:
        self.time = last
        self.run = run
        self._now = now

    def stamp(self) -> tuple[TimeNs, ClockRun]:
        """The time of the next record, and its clock run."""
        now = self._now()
        if now >= self.time:
            self.time = TimeNs(now)
        elif self.time - now > STEP_BACK_NS:
            self.time = TimeNs(now)
            self.run = ClockRun(self.run + 1)
        return self.time, self.run
