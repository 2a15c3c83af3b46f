"""How long one reader may keep the writer from thinning history: whoever holds a moment is inside the store's barrier
meanwhile (`dedup.pins`), and the writer, which waits for nobody, puts its change off.

Invariant: over any time the reader is inside for at most SHARE of it, and BURST_SECONDS.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SHARE: Final = 0.25
BURST_SECONDS: Final = 5.0
"""As much as a new session takes for all that the one before held, at the most."""


class HoldPace:
    """Of one reader. Any thread."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._turn = threading.Lock()
        self._paid = clock()
        """Until when what was spent inside counts."""

    @contextmanager
    def inside(self, enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
        """Inside while the block runs, one thread after the other; waits before it for so long as it must."""
        with self._turn:
            wait = self._paid - BURST_SECONDS / SHARE - self._clock()
            if wait > 0:
                self._sleep(wait)
            enter()
            began = self._clock()
            try:
                yield
            finally:
                leave()
                ended = self._clock()
                self._paid = max(self._paid, began) + (ended - began) / SHARE
