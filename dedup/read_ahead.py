"""Who reads one after the other, and what he will need next. Pure; any thread may use it.

A kernel reads ahead itself, with several requests side by side that may come in another order than the file's: what is
near the place that was reached counts as going on from there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

STREAMS_MAX: Final = 4
"""Places in one image that are read from at a time."""
NEAR_BLOCKS: Final = 1024
"""As far as a request may be from the place that was reached."""
BEGIN_BLOCKS: Final = 64
"""Blocks read in a row before anything is fetched ahead."""


@dataclass(slots=True)
class _Stream:
    end: int
    row: int
    reached: int = 0
    """The first chunk that was not asked for yet."""


class ReadAhead:
    """Of one image, which is fetched in chunks of `chunk_blocks`, at most `ahead_chunks` of them ahead."""

    def __init__(self, chunk_blocks: int, ahead_chunks: int) -> None:
        self._chunk_blocks = chunk_blocks
        self._ahead_chunks = ahead_chunks
        self._streams: list[_Stream] = []
        self._lock = threading.Lock()

    def chunks(self, first: int, count: int, end: int) -> list[int]:
        """The chunks to be fetched now that `count` blocks are read from `first` on, of an image of `end` blocks. Each
        is told once for a stream."""
        size = self._chunk_blocks
        with self._lock:
            stream = next((one for one in self._streams if abs(first - one.end) <= NEAR_BLOCKS), None)
            if stream is None:
                self._streams.insert(0, _Stream(first + count, count))
                del self._streams[STREAMS_MAX:]
                return []
            further = first + count - stream.end
            if further <= 0:
                return []  # asked for again, or in another order than the file's
            stream.end += further
            stream.row += min(further, count)
            if stream.row < BEGIN_BLOCKS:
                return []
            # Longer ahead the longer it goes on.
            ahead = min(self._ahead_chunks, max(1, stream.row // size))
            begin = max(stream.reached, -(-stream.end // size))
            stop = min(-(-stream.end // size) + ahead, -(-end // size))
            stream.reached = max(stream.reached, stop)
            return list(range(begin, stop))

    def put_off(self, chunk: int) -> None:
        """It and those behind it are not fetched now: they are told again."""
        with self._lock:
            for stream in self._streams:
                if stream.reached > chunk >= stream.end // self._chunk_blocks:
                    stream.reached = chunk
