"""A history, and moments of it, for a process whose trio loop must not wait for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio

from dedup.container_pool import IDLE_SECONDS
from dedup.history import History
from dedup.pins import Pinning
from dedup.types import Moment
from replication.cache_options import CachePlace
from replication.history import held_moments, open_history
from replication.route import Route


@asynccontextmanager
async def opened_history(
    address: str, group: str | None, route: Route, cache: CachePlace, *texts: str, pinning: Pinning
) -> AsyncIterator[tuple[History, tuple[Moment, ...]]]:
    """As `open_history`, and as `held_moments` of the TIMEs; entered and left in threads."""
    stack = ExitStack()

    def enter() -> tuple[History, tuple[Moment, ...]]:
        history = stack.enter_context(open_history(address, group, route, pinning=pinning, cache=cache))
        return history, stack.enter_context(held_moments(history, *texts))

    try:
        yield await trio.to_thread.run_sync(enter)
    finally:
        # What a cancelled handler left in a thread has ended: threads are waited for.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stack.close)


async def close_idle(history: History) -> None:
    """Until cancelled: files that are replaced or removed under a process at rest give their room back all the same."""
    while True:
        await trio.sleep(IDLE_SECONDS)
        await trio.to_thread.run_sync(history.close_idle)
