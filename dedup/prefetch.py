"""Chunks of images fetched in threads, ahead of who reads one after the other (`read_ahead` says what he will need).

Invariants:
- what was fetched never changes, and its memory is used for nothing else: who was given a part of it may keep that;
- a chunk that could not be fetched is not there: who needs it reads it himself, and meets the reason;
- bounded: CHUNKS_MAX chunks are being fetched or lie here to be read. One that nobody has read to its end within
  ABANDONED_SECONDS makes room when others want it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from dedup.errors import StoreError

log = logging.getLogger("rewindfs.prefetch")

THREADS: Final = 2
"""Whoever decodes leaves the interpreter to the others meanwhile."""
CHUNKS_MAX: Final = 20
"""Of a MiB each: what four sequential readers have ahead of them, and what each of them is at."""
ABANDONED_SECONDS: Final = 2.0

Fetching = Future[memoryview]


@dataclass(frozen=True, slots=True)
class _Begun:
    fetching: Fetching
    time: float


class Prefetch:
    """Safe between threads, `close` excepted."""

    def __init__(self) -> None:
        self._chunks: dict[Hashable, _Begun] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def begin(self, chunk: Hashable, fetch: Callable[[], memoryview]) -> bool:
        """Has `fetch` called in a thread, once for a chunk; what it returns must not be changed any more. False when
        there is no room for it, or no thread."""
        with self._lock:
            if chunk in self._chunks:
                return True
            if len(self._chunks) >= CHUNKS_MAX:
                self._drop_abandoned()
            if len(self._chunks) >= CHUNKS_MAX:
                return False
            try:
                if self._threads is None:
                    self._threads = _started()
                fetching = self._threads.submit(fetch)
            except RuntimeError as error:  # the machine gives no more threads
                log.debug("nothing is fetched ahead of its reader: %s", error)
                return False
            self._chunks[chunk] = _Begun(fetching, time.monotonic())
            return True

    def find(self, chunk: Hashable) -> Fetching | None:
        """What will be the chunk, or is it already; None when nobody fetches it. It may fail yet: look again then."""
        begun = self._chunks.get(chunk)
        if begun is None:
            return None
        if begun.fetching.done() and (error := begun.fetching.exception()) is not None:
            if not isinstance(error, StoreError):
                log.error("a chunk could not be fetched ahead of its reader", exc_info=error)
            self.drop(chunk)
            return None
        return begun.fetching

    def drop(self, chunk: Hashable) -> None:
        """It was read to its end, and makes room; not one that is being fetched, which takes its room until it is."""
        with self._lock:
            begun = self._chunks.get(chunk)
            if begun is not None and begun.fetching.done():
                del self._chunks[chunk]

    def drop_abandoned(self) -> None:
        """To be called now and then: gives memory back."""
        with self._lock:
            self._drop_abandoned()

    def _drop_abandoned(self) -> None:
        before = time.monotonic() - ABANDONED_SECONDS
        for chunk, begun in list(self._chunks.items()):
            if begun.time < before and begun.fetching.done():
                del self._chunks[chunk]

    def close(self) -> None:
        """Ends the threads, when what they are at is done; nothing may be begun meanwhile."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._chunks.clear()


def _started() -> ThreadPoolExecutor:
    """All its threads run. RuntimeError when the machine does not give them.

    One that starts them as they are needed leaves what it found no thread for in its queue, to be done at some time.
    """
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch")
    all_run = threading.Barrier(THREADS)
    try:
        for _ in range(THREADS):
            threads.submit(all_run.wait)
    except BaseException:
        all_run.abort()
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    return threads
