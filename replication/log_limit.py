"""Log lines that a peer can provoke: few, whatever it does."""

from __future__ import annotations

import logging
import time


class LogLimit:
    """At most one line in so many seconds; the next one says how many were left out."""

    def __init__(self, log: logging.Logger, seconds: float) -> None:
        self._log = log
        self._seconds = seconds
        self._next = 0.0
        self._left_out = 0

    def warning(self, text: str) -> None:
        """Logs the line, or only counts it."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        more = f" ({self._left_out} more such lines were left out)" if self._left_out else ""
        self._next, self._left_out = now + self._seconds, 0
        self._log.warning("%s%s", text, more)
