"""Waiting on the spot: a task that has just answered looks for what comes next before it goes back to trio's loop.

A turn of the loop costs as much as all the rest of a small request: the descriptor is registered anew, deadlines and
tasks are looked through, and often another task is switched to. Where requests follow one another within microseconds,
asking the kernel directly halves what each of them takes.

Invariants:
- Nobody is kept waiting who could go on: a task lingers only while no other is ready to run, and it watches the loop's
  own epoll descriptor as well, which becomes ready with anything that the loop waits for. While others are ready, it
  takes what is there already, once in each step. One that is ready only to wait for a descriptor (`to_wait`) keeps
  nobody from lingering: its descriptor is watched for it.
- What a task waits for in the loop may be taken in by whoever lingers (`heard`): both work on the same bytes, in one
  thread and without an await between, so they come in order and once.
- The loop has its turn every TURN_SECONDS, so a deadline is late by no more than that and one linger; there a task is
  cancelled, too, and not while it lingers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from replication.own_descriptors import descriptors_of
from replication.patient_poll import PatientPoll

LINGER_MILLISECONDS: Final = 1
"""Longest sleep on the spot, and the least that poll(2) can wait. An answered writer is back after 10 to 30 µs."""
TURN_SECONDS: Final = 0.002
"""Longest that the loop goes without a turn."""
_NOTHING: Final = -1


class _Loop(trio.abc.Instrument):
    """What those who linger know of their loop."""

    def __init__(self) -> None:
        self.descriptor = _loop_descriptor()
        self.ready: set[trio.lowlevel.Task] = set()
        """Tasks that could run and have not yet."""
        self.steps = 0
        """How many have run."""
        self.turned = 0.0
        """When the loop had its last turn."""
        self.waits = _NOTHING
        """What one of the ready tasks will wait for, and do nothing else."""
        self.heard: dict[int, Callable[[], bool]] = {}

    @property
    def others(self) -> bool:
        """Whether a task is ready that would do more than wait."""
        return len(self.ready) > (self.waits != _NOTHING)

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.ready.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.ready.discard(task)
        self.steps += 1

    def after_io_wait(self, timeout: float) -> None:
        self.turned = time.monotonic()


_of_this_loop: trio.lowlevel.RunVar[_Loop] = trio.lowlevel.RunVar("rewindfs.linger")


def _loop() -> _Loop:
    try:
        return _of_this_loop.get()
    except LookupError:
        loop = _Loop()
        if loop.descriptor is not None:
            trio.lowlevel.add_instrument(loop)
        _of_this_loop.set(loop)
        return loop


@contextmanager
def heard(fd: int, hear: Callable[[], bool]) -> Iterator[None]:
    """Within it, whoever lingers in this loop has `hear` take what has come on the descriptor, as soon as it comes,
    though a task waits for it, too. `hear` waits for nothing, raises nothing, and says whether there was anything."""
    loop = _loop()
    loop.heard[fd] = hear
    try:
        yield
    finally:
        del loop.heard[fd]


class Linger:
    """Waits for one descriptor after the other, or for what is heard. Made and used by tasks of one loop."""

    def __init__(self) -> None:
        self._loop = _loop()
        self._fd = _NOTHING
        self._polls: dict[tuple[int, ...], PatientPoll] = {}
        self._step = -1
        """The one in which a descriptor was found readable though others were ready to run."""

    async def readable(self, fd: int) -> None:
        """Returns when the descriptor is readable, perhaps without a checkpoint. Raises as trio's `wait_readable`."""
        if fd != self._fd:
            self._fd, self._polls = fd, {}
        if not self._comes_soon(None):
            await trio.lowlevel.wait_readable(fd)

    def until(self, is_so: Callable[[], bool]) -> bool:
        """Whether it is so, after what is `heard` in the next moments; else the loop is to have its turn."""
        return is_so() or (bool(self._loop.heard) and self._comes_soon(is_so))

    def to_wait(self, task: trio.lowlevel.Task) -> None:
        """Wakes a task that will wait for the descriptor that was last waited for here, and do nothing before. It says
        so with `waits` when it runs."""
        self._loop.waits = self._fd
        trio.lowlevel.reschedule(task)

    def waits(self) -> None:
        """The task that `to_wait` woke runs."""
        self._loop.waits = _NOTHING

    def _comes_soon(self, is_so: Callable[[], bool] | None) -> bool:
        """Whether the descriptor is readable; of `is_so`, whether it is so."""
        loop = self._loop
        if loop.descriptor is None:
            return False
        while True:
            if loop.others:
                return is_so is None and self._is_there(loop)
            if time.monotonic() - loop.turned > TURN_SECONDS:
                return False
            found = [fd for fd, _ in self._poll(loop).poll(LINGER_MILLISECONDS)]
            if is_so is None and found == [self._fd]:
                return True
            if not any(loop.heard[fd]() for fd in found if fd in loop.heard):
                return False
            if is_so is not None and is_so():
                return True

    def is_alone(self) -> bool:
        """Whether nobody else could go on: no other task is ready to run, and neither the descriptor that was waited
        for last nor any that the loop waits for is readable. False where that cannot be told."""
        loop = self._loop
        if loop.descriptor is None or self._fd == _NOTHING or loop.others:
            return False
        return not self._poll(loop).poll(0)

    def _is_there(self, loop: _Loop) -> bool:
        """Whether the descriptor is readable now, though others are ready to run; once in each of their steps."""
        if self._step == loop.steps:
            return False
        self._step = loop.steps
        return any(fd == self._fd for fd, _ in self._poll(loop).poll(0))

    def _poll(self, loop: _Loop) -> PatientPoll:
        assert loop.descriptor is not None
        watched = (loop.descriptor, self._fd, loop.waits, *loop.heard)
        poll = self._polls.get(watched)
        if poll is None:
            # One set of descriptors at a time: those of links that have ended are not kept.
            self._polls = {key: value for key, value in self._polls.items() if key[3:] == watched[3:]}
            poll = self._polls[watched] = PatientPoll(*{fd for fd in watched if fd != _NOTHING})
        return poll


def _loop_descriptor() -> int | None:
    """By what the running loop waits. None where that cannot be told for certain: nobody lingers then."""
    try:
        found = descriptors_of("anon_inode:[eventpoll]")
    except OSError:
        return None  # no descriptor is left, or no /proc
    return found[0] if len(found) == 1 else None
