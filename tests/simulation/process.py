"""Processes of the simulation: they can be killed at any instant, and their threads run inline, late by chance.

Invariants:
- what runs in a simulated process finds that one in its context, and with it how slow it is;
- once a process is dead, nothing of it acts any more: what waits behind a shield is ended by Killed;
- `kill` returns when nothing of the process is left, so that the next one meets no ghost.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Protocol, TypeVar

import trio

from tests.simulation.chance import Chance

T = TypeVar("T")


class Killed(BaseException):
    """Ends what a dead process still does."""


class Endpoint(Protocol):
    """A connection's or listener's end, as the system sees it when its process dies."""

    def owner_died(self, *, power: bool) -> None: ...


class Process:
    """One life of a simulated process."""

    def __init__(self, name: str, chance: Chance) -> None:
        self.name = name
        self.dead = False
        self.exited = trio.Event()
        self.slow_until = 0.0
        """Until then its threads get nowhere, as if it were stopped."""
        self._chance = chance
        self._scope = trio.CancelScope()
        self._endpoints: dict[Endpoint, None] = {}

    def owns(self, endpoint: Endpoint) -> None:
        self._endpoints[endpoint] = None

    def disowns(self, endpoint: Endpoint) -> None:
        self._endpoints.pop(endpoint, None)

    async def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """The process's life: until `main` returns, or it is killed. Raises what `main` raises."""
        _current.set(self)
        try:
            with self._scope:
                await main()
        except BaseException as error:
            if not self.dead or _not_killed(error) is not None:
                raise
        finally:
            self.exited.set()

    async def kill(self, *, power: bool = False) -> None:
        """Nothing of it is left when this returns. With `power` its host goes too: nobody is told."""
        self.dead = True
        endpoints, self._endpoints = self._endpoints, {}
        for endpoint in endpoints:
            endpoint.owner_died(power=power)
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self.exited.wait()

    async def pause(self) -> None:
        """As long as a thread takes to begin, or to be heard of again. Raises Killed in a dead process."""
        if self._chance.happens(0.7):
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self._chance.scaled(1e-5, 2e-2))
        if trio.current_time() < self.slow_until:
            await trio.sleep_until(self.slow_until)
        if self.dead:
            raise Killed


_current: ContextVar[Process] = ContextVar("process")
redirected: dict[Callable[..., object], Callable[..., object]] = {}
"""What is called in the place of what."""


def current_process() -> Process:
    return _current.get()


async def run_inline(
    function: Callable[..., T],
    *args: object,
    thread_name: str | None = None,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """In the place of trio.to_thread.run_sync: no thread, and the call is made somewhere within the time it takes."""
    await trio.lowlevel.checkpoint_if_cancelled()
    process = current_process()
    with trio.CancelScope(shield=not abandon_on_cancel):
        await process.pause()
        try:
            result = redirected.get(function, function)(*args)
        except Exception:
            await process.pause()
            raise
        try:
            await process.pause()
        except Killed:
            if function is os.open:
                os.close(result)  # type: ignore[arg-type]  # as the system does for a process that died
            raise
        return result  # type: ignore[return-value]


def _not_killed(error: BaseException) -> BaseException | None:
    """What of the error is not Killed."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(Killed)[1]
    return None if isinstance(error, Killed) else error
