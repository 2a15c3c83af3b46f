"""A history for a process whose trio loop must not wait for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from dedup.history import History
from dedup.pins import Pinning
from replication.history import open_history
from replication.route import Route


@asynccontextmanager
async def opened_history(address: str, group: str | None, route: Route, pinning: Pinning) -> AsyncIterator[History]:
    """As `open_history`, entered and left in threads."""
    opened = open_history(address, group, route, pinning=pinning)
    history = await trio.to_thread.run_sync(opened.__enter__)
    try:
        yield history
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(opened.__exit__, None, None, None)
