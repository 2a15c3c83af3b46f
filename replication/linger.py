"""Waiting on the spot: a task that has just answered looks for what comes next before it goes back to trio's loop.

A turn of the loop costs as much as all the rest of a small request: the descriptor is registered anew, deadlines and
tasks are looked through, and often another task is switched to. Where requests follow one another within microseconds,
asking the kernel directly halves what each of them takes.

Invariants:
- Nobody is kept waiting who could go on: a task lingers only while no other is ready to run, and it watches the loop's
  own epoll descriptor as well, which becomes ready with anything that the loop waits for. While others are ready, it
  takes what is there already, once in each step.
- The loop has its turn every TURN_SECONDS, so a deadline is late by no more than that and one linger; there a task is
  cancelled, too, and not while it lingers.
"""

from __future__ import annotations

import time
from typing import Final

import trio

from replication.own_descriptors import descriptors_of
from replication.patient_poll import PatientPoll

LINGER_MILLISECONDS: Final = 1
"""Longest sleep on the spot, and the least that poll(2) can wait. An answered writer is back after 10 to 30 µs."""
TURN_SECONDS: Final = 0.002
"""Longest that the loop goes without a turn."""


class _Ready(trio.abc.Instrument):
    """The tasks of this loop that could run and have not yet, and how many have run."""

    def __init__(self) -> None:
        self.tasks: set[trio.lowlevel.Task] = set()
        self.steps = 0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.tasks.discard(task)
        self.steps += 1


_of_this_loop: trio.lowlevel.RunVar[tuple[_Ready, int | None]] = trio.lowlevel.RunVar("rewindfs.linger")


class Linger:
    """Waits for descriptors, one at a time. Made and used by tasks of one loop."""

    def __init__(self) -> None:
        self.ignored = 0
        """Of the tasks that are ready, so many have nothing to do. Whoever makes them ready keeps it true."""
        try:
            found = _of_this_loop.get()
        except LookupError:
            found = _Ready(), _loop_descriptor()
            if found[1] is not None:
                trio.lowlevel.add_instrument(found[0])
            _of_this_loop.set(found)
        self._ready, self._loop_fd = found
        self._polled = -1
        self._poll = PatientPoll()
        self._turned = 0.0
        self._step = -1
        """The one in which a descriptor was found readable though others were ready to run."""

    async def readable(self, fd: int) -> None:
        """Returns when the descriptor is readable, perhaps without a checkpoint. Raises as trio's `wait_readable`."""
        if self._loop_fd is None or not self._is_readable_soon(fd):
            await trio.lowlevel.wait_readable(fd)
            self._turned = time.monotonic()

    def _is_readable_soon(self, fd: int) -> bool:
        if fd != self._polled:
            self._watch(fd)
        if len(self._ready.tasks) > self.ignored:
            if self._step == self._ready.steps:
                return False
            self._step = self._ready.steps
            return any(ready == fd for ready, _ in self._poll.poll(0))
        if time.monotonic() - self._turned > TURN_SECONDS:
            return False
        found = self._poll.poll(LINGER_MILLISECONDS)
        return len(found) == 1 and found[0][0] == fd

    def _watch(self, fd: int) -> None:
        assert self._loop_fd is not None
        self._poll = PatientPoll(self._loop_fd, fd)
        self._polled = fd


def _loop_descriptor() -> int | None:
    """By what the running loop waits. None where that cannot be told for certain: nobody lingers then."""
    try:
        found = descriptors_of("anon_inode:[eventpoll]")
    except OSError:
        return None  # no descriptor is left, or no /proc
    return found[0] if len(found) == 1 else None
