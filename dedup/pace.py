"""Keeps background work to a share of the time, so that whoever it runs beside hardly notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_WORK_SECONDS: Final = 0.02
"""Worked at a stretch before the next rest."""
_REST_SECONDS_MAX: Final = 5.0
"""At most so long a rest: after the machine itself was away, or a disk, nothing is made up for."""


class Pace:
    """Works at most `share` of the time: between two rests, time that passed counts as worked.

    `share` may be set by another thread; 1.0 never rests.
    """

    def __init__(
        self,
        share: float = 1.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self.share = share
        self._clock = clock
        self._rest = rest
        self._since = clock()

    def breathe(self) -> None:
        """Called every few milliseconds of work: rests when it is time to."""
        worked = self._clock() - self._since
        if worked < _WORK_SECONDS:
            return
        if self.share < 1.0:
            self._rest(min(worked * (1.0 - self.share) / self.share, _REST_SECONDS_MAX))
        self._since = self._clock()

    def begin(self) -> None:
        """Work begins after a wait that does not count."""
        self._since = self._clock()
