"""Opens the history of a group for a command that goes back, wherever the store is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from dedup.history import History
from dedup.pins import Pinning
from dedup.reader import StoreReader
from replication.address import parse_address, store_path
from replication.block_cache import BlockCache
from replication.cache_options import CachePlace
from replication.endpoint import connect
from replication.history_link import HistoryLink
from replication.remote_history import RemoteHistory
from replication.route import Route


@contextmanager
def open_history(
    address: str,
    group: str | None,
    route: Route = Route(),  # noqa: B008
    *,
    pinning: Pinning = Pinning.EVERYTHING,
    cache: CachePlace = CachePlace(),  # noqa: B008
) -> Iterator[History]:
    """The history of a group (None: the only one) of the store at a path, or behind an appliance's address, while the
    block runs.

    `pinning` is for how long what is read stays: EVERYTHING for a command that ends soon; MOMENTS for one that stays,
    which holds the moments that it needs. Over an address it is always MOMENTS. `cache` is for addresses. Raises
    NotAStore, UnknownName, StoreBusy and their like; for an address LinkDown, HandshakeRefused, CacheFailed, and what
    `endpoint.connect` does. Not for the thread of a trio loop.
    """
    path = store_path(address)
    if path is None:
        with _remote_history(address, group, route, cache) as history:
            yield history
        return
    store = StoreReader.open(path, pinning=pinning)
    try:
        yield store.group(group)
    finally:
        store.close()


@contextmanager
def _remote_history(address: str, group: str | None, route: Route, place: CachePlace) -> Iterator[RemoteHistory]:
    where = parse_address(address)
    cache = BlockCache(place.path, place.bytes_max)
    try:
        link = HistoryLink(
            str(where), partial(connect, where, identity=route.identity, insecure_tcp=route.insecure_tcp), group
        )
        link.open()
        history: RemoteHistory | None = None
        try:
            history = RemoteHistory(link, cache)
            yield history
        finally:
            link.close()
            if history is not None:
                history.close()
    finally:
        cache.close()
