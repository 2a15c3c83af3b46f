"""Notices an outage: no progress at the second appliance for too long, though somebody needs it.

Invariant: it only watches; what writers meet in an outage is the policy's part, in whose `on_change` that is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

OUTAGE_AFTER_SECONDS: Final = 10.0
OUTAGE_CHECKS: Final = 8
"""Times within `after` that progress is looked at: an outage is noticed that much late at most."""

log = logging.getLogger("rewindfs.first_appliance")


class OutageWatch:
    """Looks now and then, which costs the way of a write nothing."""

    def __init__(
        self,
        after: float,
        *,
        levels: Callable[[], object],
        needed: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        """`levels`: anything that changes with progress. `needed`: whether time without progress counts. `on_change` is
        called after `lasts` has changed."""
        self.after = after
        self.lasts = False
        """Whether an outage lasts."""
        self._levels = levels
        self._needed = needed
        self._on_change = on_change

    async def run(self) -> None:
        """Watches until cancelled."""
        seen = self._levels()
        stuck_since = trio.current_time()
        while True:
            await trio.sleep(self.after / OUTAGE_CHECKS)
            now = trio.current_time()
            levels = self._levels()
            if levels != seen or not self._needed():
                seen, stuck_since = levels, now
            self.set(now - stuck_since >= self.after)

    def set(self, lasts: bool) -> None:
        """It begins, or is over."""
        if lasts == self.lasts:
            return
        self.lasts = lasts
        log.warning("outage: %s", f"no progress for {self.after:g} s" if lasts else "over")
        self._on_change()
