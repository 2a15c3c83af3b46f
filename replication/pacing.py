"""Has a reconcile yield to the applications beside it, and still end.

While they write, its steps are taken one at a time and each is followed by a rest in proportion; what it has on the way
to the second appliance is kept short, for a write that is to be acknowledged travels behind it. While they do not, it
goes as fast as it can.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from dedup.types import WRITE_BYTES_MAX

SHARE: Final = 0.1
"""Of the time in which applications write, so much is a reconcile's own work, and the second appliance's, maybe on the
same machine, is as much again. Measured there with two busy cores: a lone writer of 4 KiB blocks keeps three quarters
of its rate or more; with a fifth it kept little over half."""
REST_SECONDS_MAX: Final = 1.0
"""However long a step took, the next one comes: a reconcile ends on the busiest mount, too."""
BUSY_SECONDS: Final = 0.25
"""So long after a record of theirs the applications count as writing."""
BUSY_SEND_BYTES: Final = 128 << 10
"""Data of one record while they write: no write waits behind more for the link or for the range."""
BYTES_AHEAD: Final = 8 << 20
"""Data that may await its acknowledgement: a quarter of the queue, so that writers find room."""
BUSY_BYTES_AHEAD: Final = 512 << 10
"""The same while they write."""


class Pace:
    """The pace of one reconcile. `records` is how many records there are by now, `own` counts the reconcile's."""

    def __init__(self, records: Callable[[], int]) -> None:
        self._records = records
        self.own = 0
        self._seen = records()
        self._seen_at = float("-inf")
        self._one = trio.Lock()

    @property
    def busy(self) -> bool:
        """Whether applications write."""
        theirs = self._records() - self.own
        if theirs > self._seen:
            self._seen, self._seen_at = theirs, trio.current_time()
        return trio.current_time() - self._seen_at < BUSY_SECONDS

    @property
    def send_bytes(self) -> int:
        """Most data of the next record."""
        return BUSY_SEND_BYTES if self.busy else WRITE_BYTES_MAX

    @property
    def bytes_ahead(self) -> int:
        """Most data on the way."""
        return BUSY_BYTES_AHEAD if self.busy else BYTES_AHEAD

    @asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """A step of work, some megabytes at most; in it, no answer of the second appliance is awaited."""
        if not self.busy:
            yield
            return
        async with self._one:
            began = trio.current_time()
            yield
            worked = trio.current_time() - began
            await trio.sleep(min(worked * (1 - SHARE) / SHARE, REST_SECONDS_MAX))
