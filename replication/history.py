"""Opens the history of a group for a command that goes back, wherever the store is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dedup.history import History
from dedup.pins import Pinning
from dedup.reader import StoreReader
from replication.route import Route
from replication.store_command import local_store


@contextmanager
def open_history(
    address: str,
    group: str | None,
    route: Route = Route(),  # noqa: B008
    *,
    pinning: Pinning = Pinning.EVERYTHING,
) -> Iterator[History]:
    """The history of a group (None: the only one) of the store at a path, while the block runs.

    `pinning` is for how long what is read stays: EVERYTHING for a command that ends soon; MOMENTS for one that stays,
    which holds the moments that it needs. Raises NotAStore, UnknownName, StoreBusy and their like.
    """
    store = StoreReader.open(local_store(address), pinning=pinning)
    try:
        yield store.group(group)
    finally:
        store.close()
