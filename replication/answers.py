"""Questions that went out and the tasks that wait for their answers.

Invariants: a question is answered once, by its answer or by an error; what nobody takes is bounded by the asker.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import trio

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class _Answer(Generic[T]):
    __slots__ = ("error", "event", "value")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.value: T | None = None
        self.error: Exception | None = None


class Answers(Generic[K, T]):
    """Open questions by their key."""

    def __init__(self) -> None:
        self._open: dict[K, _Answer[T]] = {}

    def __len__(self) -> int:
        """Questions whose answer nobody has taken yet."""
        return len(self._open)

    def __contains__(self, key: K) -> bool:
        return key in self._open

    def expect(self, key: K) -> None:
        """The question went out."""
        self._open[key] = _Answer()

    def settle(self, key: K, value: T) -> None:
        """Its answer came. Nothing happens if nobody expects it any more."""
        answer = self._open.get(key)
        if answer is not None and not answer.event.is_set():
            answer.value = value
            answer.event.set()

    def fail(self, key: K, error: Exception) -> None:
        """No answer will come."""
        answer = self._open[key]
        if not answer.event.is_set():
            answer.error = error
            answer.event.set()

    def fail_all(self, error: Exception) -> None:
        for key in self._open:
            self.fail(key, error)

    async def take(self, key: K) -> T:
        """Waits for the answer and forgets the question, also when cancelled. Raises what it failed with."""
        answer = self._open[key]
        try:
            await answer.event.wait()
        finally:
            self._open.pop(key, None)
        if answer.error is not None:
            raise answer.error
        return answer.value  # type: ignore[return-value]  # set with the event, when there is no error
