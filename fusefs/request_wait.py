"""How a mount waits for the kernel's next request: it lingers for it (`replication.linger`) instead of taking a turn of
the loop, or two, between any two requests.

pyfuse3 takes what it needs of trio from its attribute `trio`, so that its asyncio mode can put another module there.
Here trio itself is put there but for two names: how one waits for /dev/fuse, and the lock that lets one task do so at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pyfuse3
import trio

from replication.linger import Linger


class ReadLock:
    """Held by the one task that waits for requests.

    Invariants:
    - While it is free and tasks wait, one of them has been woken and has not run yet.
    - It goes to whoever asks first, and costs no checkpoint then. trio's lock is handed on from task to task, a turn of
      the loop each time; here the task that served a request without waiting takes the next one, too, and who was woken
      in vain waits on.
    """

    def __init__(self, linger: Linger) -> None:
        self._linger = linger
        self._held = False
        self._woken = False
        self._waiting: list[trio.lowlevel.Task] = []

    async def __aenter__(self) -> None:
        while self._held:
            task = trio.lowlevel.current_task()
            self._waiting.append(task)
            await trio.lowlevel.wait_task_rescheduled(lambda _, task=task: self._leave(task))  # type: ignore[misc]
            self._woken = False
            self._linger.waits()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            self._linger.to_wait(self._waiting.pop())

    def _leave(self, task: trio.lowlevel.Task) -> trio.lowlevel.Abort:
        self._waiting.remove(task)
        return trio.lowlevel.Abort.SUCCEEDED


_serving: trio.lowlevel.RunVar[Linger | None] = trio.lowlevel.RunVar("rewindfs.request_wait", None)


async def let_others() -> None:
    """A checkpoint when another task could run, or another request or anything else has come; nothing where not.

    For a handler that looks again and again for what comes within microseconds: a turn of the loop takes as long.
    """
    linger = _serving.get()
    if linger is None or not linger.is_alone():
        await trio.lowlevel.checkpoint()


@contextmanager
def lingering_for_requests() -> Iterator[None]:
    """Within it pyfuse3's main loop lingers. To be entered within trio, for one mount of the process at a time."""
    linger = Linger()
    lowlevel = SimpleNamespace(**(vars(trio.lowlevel) | {"wait_readable": linger.readable}))
    instead = vars(trio) | {"lowlevel": lowlevel, "Lock": lambda: ReadLock(linger)}
    pyfuse3.trio = SimpleNamespace(**instead)  # type: ignore[attr-defined]
    _serving.set(linger)
    try:
        yield
    finally:
        _serving.set(None)
        pyfuse3.trio = trio  # type: ignore[attr-defined]
