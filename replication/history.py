"""Opens the history of a group for a command that goes back, wherever the store is, and holds the moments it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

from dedup.errors import MomentGone
from dedup.history import History
from dedup.pins import Pinning
from dedup.reader import StoreReader
from dedup.types import Moment
from replication.address import parse_address, store_path
from replication.block_cache import BlockCache
from replication.cache_options import CachePlace
from replication.endpoint import connect
from replication.history_link import HistoryLink
from replication.remote_history import RemoteHistory
from replication.route import Route

ATTEMPTS_MAX: Final = 8
"""How often a TIME is looked up anew because what it named was thinned out before it was held."""


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


@contextmanager
def held_moments(history: History, *texts: str) -> Iterator[tuple[Moment, ...]]:
    """The recovery points that the TIMEs name, held while the block runs. BadTime, UnknownName, MomentRefused."""
    with ExitStack() as held:
        yield tuple(_held(history, text, held) for text in texts)


def _held(history: History, text: str, held: ExitStack) -> Moment:
    for attempt in range(ATTEMPTS_MAX):
        moment = history.resolve(text)
        try:
            history.hold(moment.seq)
        except MomentGone:
            if attempt + 1 == ATTEMPTS_MAX:
                raise
            continue
        held.callback(history.release, moment.seq)
        return moment
    raise AssertionError("the last attempt returns or raises")
