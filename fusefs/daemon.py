"""The life of a mount: mounted, serving, unmounted, drained.

`replication.background.run` is the outermost call of such a process; `serve` is what it awaits once its `Operations`
exist.

Invariants:
- Every orderly way out (signal, `stop`, unmounted by somebody else) ends in the same `drain`, after the last request
  has been answered. Only a bug, a cancellation or a kill leaves without it.
- A mountpoint is never unmounted by a process whose own mount has already gone from there.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from dedup.errors import RewindError
from fusefs.mountpoint import MountBusy, unmount
from fusefs.request_wait import lingering_for_requests

log = logging.getLogger("rewindfs.daemon")

TASKS_MAX: Final = 64
"""Requests served at a time, unless the caller knows better."""
IDLE_TASKS: Final = 16
"""Tasks that are kept though idle, each with a buffer of 1 MiB; to make another costs as much as a request."""


class MountFailed(RewindError):
    """The kernel or libfuse refused the mount; libfuse's own reason is on stderr."""


async def nothing_to_drain() -> None:
    """For who owes nobody anything."""


async def serve(
    operations: pyfuse3.Operations,
    mountpoint: Path,
    options: set[str],
    *,
    drain: Callable[[], Awaitable[None]] = nothing_to_drain,
    signals: Collection[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    before_requests: Callable[[], Awaitable[None]] | None = None,
    stop: trio.Event | None = None,
    max_tasks: int = TASKS_MAX,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mounts `operations` at `mountpoint` and serves it until one of `signals`, `stop`, or an unmount by others.

    `before_requests` is awaited once the kernel has accepted the mount, before anything can be asked of it.
    `task_status.started()` is called when the mount is in place; requests wait for the next moment and are answered.
    On a signal or `stop` it unmounts; files that are still open there get errors from then on. However it ended: when
    the last request has been answered it awaits `drain()` and returns. A second signal cancels requests that are stuck
    and the drain. An exception of a handler unmounts and is raised, without drain; so does cancelling this.
    Raises MountFailed.
    """
    stop = trio.Event() if stop is None else stop
    ended = trio.Event()
    patience = trio.CancelScope()
    try:
        pyfuse3.init(operations, str(mountpoint), options)
    except RuntimeError as error:
        raise MountFailed(f"{mountpoint}: could not be mounted: {error}") from error
    unmounted = False
    try:
        if before_requests is not None:
            await before_requests()
        async with trio.open_nursery() as nursery:

            async def main_loop() -> None:
                with lingering_for_requests():
                    await pyfuse3.main(min_tasks=min(IDLE_TASKS, max_tasks), max_tasks=max_tasks)
                ended.set()
                stop.set()

            if signals:
                await nursery.start(_watch_signals, signals, stop, patience)
            nursery.start_soon(main_loop)
            log.info("%s: mounted", mountpoint)
            task_status.started()
            await stop.wait()
            if not ended.is_set():
                await trio.to_thread.run_sync(_leave, mountpoint)
                unmounted = True
                pyfuse3.terminate()
            with patience:
                await ended.wait()
                log.info("%s: unmounted, draining", mountpoint)
                await drain()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=not unmounted)
    log.info("%s: left", mountpoint)


def _leave(mountpoint: Path) -> None:
    """Unmounts this process's own mount. Blocks while the kernel writes back."""
    try:
        unmount(mountpoint)
    except MountBusy:
        log.warning("%s: files are still open there; they get errors from now on", mountpoint)
        unmount(mountpoint, lazy=True)


async def _watch_signals(
    signals: Collection[signal.Signals],
    stop: trio.Event,
    patience: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sets `stop` at the first signal that asks to leave, and cancels `patience` at the second."""
    with trio.open_signal_receiver(*signals) as received:
        task_status.started()
        async for number in received:
            if stop.is_set():
                log.warning("%s while draining: leaving at once", signal.Signals(number).name)
                patience.cancel()
            else:
                log.info("%s: leaving", signal.Signals(number).name)
                stop.set()
