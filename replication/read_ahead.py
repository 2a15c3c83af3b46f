"""Who reads one after the other, and what he will need next. Pure; any thread may use it.

A kernel reads ahead itself, with several requests side by side that may come in another order than the file's: what is
near the place that was reached counts as going on from there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from replication.history_queries import FETCH_BLOCKS_MAX

STREAMS_MAX: Final = 4
"""Places in one image that are read from at a time."""
NEAR_BLOCKS: Final = 1024
"""As far as a request may be from the place that was reached."""
BEGIN_BLOCKS: Final = 64
"""Blocks read in a row before anything is fetched ahead."""
AHEAD_CHUNKS: Final = 12


@dataclass(slots=True)
class _Stream:
    end: int
    row: int
    reached: int = 0
    """The first chunk that was not asked for yet."""


class ReadAhead:
    """Of one image."""

    def __init__(self) -> None:
        self._streams: list[_Stream] = []
        self._lock = threading.Lock()

    def chunks(self, first: int, count: int, end: int) -> list[int]:
        """The chunks of FETCH_BLOCKS_MAX blocks to be fetched now that `count` blocks are read from `first` on, of an
        image of `end` blocks. Each is told once for a stream."""
        with self._lock:
            stream = next((one for one in self._streams if abs(first - one.end) <= NEAR_BLOCKS), None)
            if stream is None:
                self._streams.insert(0, _Stream(first + count, count))
                del self._streams[STREAMS_MAX:]
                return []
            stream.end = max(stream.end, first + count)
            stream.row += count
            if stream.row < BEGIN_BLOCKS:
                return []
            # Longer ahead the longer it goes on.
            ahead = min(AHEAD_CHUNKS, max(1, stream.row // FETCH_BLOCKS_MAX))
            begin = max(stream.reached, -(-stream.end // FETCH_BLOCKS_MAX))
            stop = min(-(-stream.end // FETCH_BLOCKS_MAX) + ahead, -(-end // FETCH_BLOCKS_MAX))
            stream.reached = max(stream.reached, stop)
            return list(range(begin, stop))

    def put_off(self, chunk: int) -> None:
        """It and those behind it are not fetched now: they are told again."""
        with self._lock:
            for stream in self._streams:
                if stream.reached > chunk >= stream.end // FETCH_BLOCKS_MAX:
                    stream.reached = chunk
