"""A bookmark of an application at rest: a command that freezes it, the bookmark, a command that thaws it.

Invariants:
- `always-thawed`: once the freeze was begun the thaw is run, whatever happened: the freeze failed or took too long, the
  bookmark was refused, the link is down, a signal came. A signal waits until it is done;
- `bounded-freeze`: freeze and bookmark together take at most the limit, and so does the thaw;
- a bookmark is made only after the freeze has succeeded, and never later than the limit: the mount records it sooner or
  not at all.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from dedup.errors import RewindError
from dedup.terminal import shown
from replication.explanation import explain

STOP_SECONDS: Final = 2.0
"""How long a hook that took too long may take to end after SIGTERM, and again after SIGKILL."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STDERR: Final = 2

Take = Callable[[float], Awaitable[dict[str, Any]]]
"""Makes the bookmark, recorded within so many seconds or not at all."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Command lines for /bin/sh; `limit`: the seconds that freeze and bookmark may take, and the thaw."""

    freeze: str
    thaw: str
    limit: float


@dataclass(frozen=True, slots=True)
class HookRun:
    """How a hook went. `status` is its exit status, negative for a signal that ended it, None when it was stopped."""

    command: str
    status: int | None
    seconds: float

    @property
    def fault(self) -> str:
        """What went wrong; empty when nothing did."""
        if self.status is None:
            return f"had not ended after {self.seconds:.1f} s and was stopped"
        if self.status < 0:
            return f"was ended by {signal.Signals(-self.status).name}"
        return f"failed with exit status {self.status}" if self.status else ""

    def document(self) -> dict[str, object]:
        return {"command": self.command, "exit": self.status, "seconds": round(self.seconds, 3)}


@dataclass(slots=True)
class Frozen:
    """What became of a bookmark with hooks."""

    answer: dict[str, Any] | None = None
    """The mount's; None when there is no bookmark, or none is known of."""
    freeze: HookRun | None = None
    thaw: HookRun | None = None
    seconds: float = 0.0
    """From the begin of the freeze to the end of the thaw."""
    signal: signal.Signals | None = None
    """The last one that came."""
    errors: list[str] = field(default_factory=list)
    """One line each; empty when all went well."""

    def document(self) -> dict[str, object]:
        return {
            "freeze": None if self.freeze is None else self.freeze.document(),
            "thaw": None if self.thaw is None else self.thaw.document(),
            "frozen_seconds": round(self.seconds, 3),
        }


async def bookmark_frozen(hooks: Hooks, environment: Mapping[str, str], take: Take) -> Frozen:
    """Freeze, bookmark, thaw, in the main thread. What goes wrong is told in `errors`, a signal too."""
    frozen = Frozen()
    begun = trio.current_time()
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(_end_at_signal, signals, scope, frozen)
            try:
                with scope:
                    await _freeze_and_take(hooks, environment, take, frozen)
                if scope.cancelled_caught:
                    frozen.errors.append(_interrupted(frozen))
            finally:
                with trio.CancelScope(shield=True):
                    await _thaw(hooks, environment, frozen)
            frozen.seconds = trio.current_time() - begun
            nursery.cancel_scope.cancel()
    return frozen


async def _end_at_signal(signals: AsyncIterator[int], scope: trio.CancelScope, frozen: Frozen) -> None:
    async for number in signals:
        frozen.signal = signal.Signals(number)
        scope.cancel()


def _interrupted(frozen: Frozen) -> str:
    known = "no bookmark was made" if frozen.freeze is None else "`rewindfs snapshot list` tells whether it was made"
    name = "a signal" if frozen.signal is None else frozen.signal.name
    return f"interrupted by {name} before there was an answer: {known}"


async def _freeze_and_take(hooks: Hooks, environment: Mapping[str, str], take: Take, frozen: Frozen) -> None:
    until = trio.current_time() + hooks.limit
    try:
        frozen.freeze = await run_hook(hooks.freeze, environment, hooks.limit)
    except OSError as error:
        frozen.errors.append(f"the freeze command could not be run, no bookmark was made: {explain(error)}")
        return
    if fault := frozen.freeze.fault:
        frozen.errors.append(f"the freeze command {fault}, no bookmark was made: {shown(hooks.freeze)}")
        return
    try:
        frozen.answer = await take(until - trio.current_time())
    except (RewindError, OSError) as error:
        frozen.errors.append(explain(error))


async def _thaw(hooks: Hooks, environment: Mapping[str, str], frozen: Frozen) -> None:
    try:
        frozen.thaw = await run_hook(hooks.thaw, environment, hooks.limit)
        fault = frozen.thaw.fault
    except OSError as error:
        fault = f"could not be run ({explain(error)})"
    if fault:
        frozen.errors.append(
            f"the thaw command {fault}: THE APPLICATION MAY STILL BE FROZEN, run it by hand: {shown(hooks.thaw)}"
        )


async def run_hook(command: str, environment: Mapping[str, str], limit: float) -> HookRun:
    """Runs a command line with /bin/sh; what it prints goes to standard error. Stopped after `limit` seconds.

    It has a session of its own, so that a Ctrl-C meant for the command does not end a thaw halfway, and no input.
    """
    begun = trio.current_time()
    process = await trio.lowlevel.open_process(
        ["/bin/sh", "-c", command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=_STDERR,
        start_new_session=True,
    )
    try:
        with trio.move_on_after(limit):
            await process.wait()
        status = process.returncode
    finally:
        if process.returncode is None:
            with trio.CancelScope(shield=True):
                await _stop(process)
    return HookRun(command, status, trio.current_time() - begun)


async def _stop(process: trio.Process) -> None:
    """Ends a hook and all that it started. One that cannot even be killed, in the kernel, is not waited for."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with trio.move_on_after(STOP_SECONDS):
            await process.wait()
            return
