"""Tasks that wait for room in a queue, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio


class RoomQueue:
    """The waiting line. A task that left it with room uses that room before its next await, so none is promised twice.

    Invariants: while anyone waits, no newcomer passes; only the first in line takes room.
    """

    def __init__(self) -> None:
        self._line: deque[_Turn] = deque()

    def __bool__(self) -> bool:
        return bool(self._line)

    async def wait(self, fits: Callable[[], bool], goes_on: Callable[[], bool]) -> bool:
        """True once this task is first in line and `fits` says so; False once `goes_on` does not. What they raise ends
        the wait. Both are asked after each `offer` and `ask_all`."""
        turn = _Turn()
        self._line.append(turn)
        try:
            while True:
                going_on = goes_on()
                if self._line[0] is turn and fits():
                    return True
                if not going_on:
                    return False
                await turn.event.wait()
                turn.event = trio.Event()
        finally:
            self._line.remove(turn)
            self.offer()

    def offer(self) -> None:
        """There may be room now."""
        if self._line:
            self._line[0].event.set()

    def ask_all(self) -> None:
        """What `goes_on` says may have changed."""
        for turn in self._line:
            turn.event.set()


class _Turn:
    def __init__(self) -> None:
        self.event = trio.Event()
