"""How much an overlay may hold: its quota, counted in blocks."""

from __future__ import annotations

import errno
import logging
import os
import threading

from dedup.terminal import size_text
from dedup.types import BLOCK_BYTES

log = logging.getLogger("rewindfs.overlay")


class OverlayRoom:
    """Counts blocks that were written and entries that were made, one block each. Any thread may use it."""

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` 0: the disk is the only limit."""
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._used = 0
        self._said = False

    @property
    def used_bytes(self) -> int:
        return self._used * BLOCK_BYTES

    def take(self, blocks: int) -> None:
        """ENOSPC where that is more than there is left; then nothing was taken."""
        with self._lock:
            if not self.limit_bytes or (self._used + blocks) * BLOCK_BYTES <= self.limit_bytes:
                self._used += blocks
                return
            if not self._said:
                self._said = True
                log.warning(
                    "the overlay has reached its limit of %s: what needs more gets ENOSPC; clone with a larger "
                    "--overlay-limit",
                    size_text(self.limit_bytes),
                )
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def give_back(self, blocks: int) -> None:
        """They are free again."""
        with self._lock:
            self._used -= blocks
            self._said = self._said and not blocks
