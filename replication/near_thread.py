"""A thread of its own for calls that take about as long as the way to one of trio's threads and back: an fsync.

trio hands a call over through a limiter and a cache of threads, and hears of its end through the loop's entry queue and
a socket. Here it goes through one queue, and who asked lingers (`linger`) on the descriptor that tells the end: 26 µs
instead of 56 there and back with two cores at rest, where the disk takes 100 for the sync of a file.

Invariants:
- One call at a time is in the thread. Who asks meanwhile, or while no thread or descriptor is left to begin with, gets
  one of trio's threads.
- A call that was begun is waited for, by who is cancelled meanwhile, too: what it did is known then.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

import outcome
import trio

from replication.linger import Linger

log = logging.getLogger("rewindfs.thread")

T = TypeVar("T")
Args = TypeVarTuple("Args")


class _Calls:
    """What the thread knows: not who asks, so that it ends with them."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self.results: SimpleQueue[outcome.Maybe[Any]] = SimpleQueue()
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def serve(self) -> None:
        while (call := self.asked.get()) is not None:
            self.results.put(outcome.capture(call))
            os.eventfd_write(self.done, 1)
        os.close(self.done)


class NearThread:
    """Used by tasks of one loop. The thread begins with the first call and ends when nobody refers to this any more."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: _Calls | None = None
        self._linger: Linger | None = None
        self._busy = False

    async def run(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """What the call returns, or raises. Cancelled before it begins, or not at all; not always a checkpoint."""
        await trio.lowlevel.checkpoint_if_cancelled()
        begun = None if self._busy else self._begun()
        if begun is None:
            return await trio.to_thread.run_sync(function, *args)
        calls, linger = begun
        self._busy = True  # and it stays so if this task is torn away: the answer is not the next one's
        calls.asked.put(lambda: function(*args))
        with trio.CancelScope(shield=True):
            await linger.readable(calls.done)
        os.eventfd_read(calls.done)
        result: outcome.Maybe[T] = calls.results.get_nowait()
        self._busy = False
        return result.unwrap()

    def _begun(self) -> tuple[_Calls, Linger] | None:
        if self._calls is None or self._linger is None:
            try:
                calls = _Calls()
            except OSError as error:
                log.warning("no thread near by for %s: %s", self._name, error)
                return None
            try:
                threading.Thread(target=calls.serve, name=self._name, daemon=True).start()
            except RuntimeError as error:
                os.close(calls.done)
                log.warning("no thread near by for %s: %s", self._name, error)
                return None
            weakref.finalize(self, calls.asked.put, None)
            self._calls, self._linger = calls, Linger()
        return self._calls, self._linger
