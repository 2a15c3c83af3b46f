"""A command about a store: asked of its second appliance, or done here where none runs.

What the second way needs, and the way over a network, is imported when it is taken: it would double a user's wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedup.errors import StoreBusy, StoreError, UnknownName
from replication.address import UnixAddress, parse_address, store_path
from replication.control_messages import Role
from replication.exchange import REPLY_SECONDS, NoAppliance, ask_here
from replication.route import Route

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from dedup.store import Store


def on_store(
    address: str,
    command: str,
    body: dict[str, object],
    here: Callable[[Store], dict[str, object]],
    *,
    group: str | None = None,
    timeout: float = REPLY_SECONDS,
    route: Route = Route(),  # noqa: B008
) -> dict[str, Any]:
    """The reply of the appliance at `address`; with none running, what `here` gives, which has the store's lock.

    StoreBusy when an appliance just starts or leaves; else what the command raises.
    """
    try:
        return ask(address, group, command, body, route, timeout=timeout)
    except NoAppliance:
        path = store_path(address)
        if path is None:
            raise
    from dedup.store import Store

    try:
        store = Store.open(path)
    except StoreBusy as error:
        raise StoreBusy(f"{error}, and it does not answer: an appliance that starts or ends? try again") from error
    try:
        result = here(store)
    except BaseException:
        store.abandon()
        raise
    store.close()
    return result


def on_group(
    address: str,
    group: str | None,
    command: str,
    body: dict[str, object],
    here: Callable[[GroupWriter], dict[str, object]],
    route: Route = Route(),  # noqa: B008
) -> dict[str, Any]:
    """The same of one group: the one of that name, or the only one. UnknownName."""
    return on_store(address, command, body, lambda store: here(_group_of(store, group)), group=group, route=route)


def ask(
    address: str,
    group: str | None,
    command: str,
    body: dict[str, object],
    route: Route,
    *,
    role: Role = Role.ADMIN,
    timeout: float = REPLY_SECONDS,
) -> dict[str, Any]:
    """`control.request` by that route; blocks."""
    place = parse_address(address)
    if isinstance(place, UnixAddress):
        return ask_here(place, group, command, body, role=role, timeout=timeout)
    import trio

    from replication.control import request

    there = partial(request, identity=route.identity, insecure_tcp=route.insecure_tcp, role=role, timeout=timeout)
    return trio.run(there, address, group, command, body)


def local_store(address: str) -> Path:
    """The store's path. StoreError for an appliance's address: the command reads the store's own files."""
    path = store_path(address)
    if path is None:
        raise StoreError(f"{address}: this command reads the store itself, which an address cannot give it; run it on "
                         "the store's host, with the store's path")  # fmt: skip
    return path


def _group_of(store: Store, name: str | None) -> GroupWriter:
    """The group of that name, or the only one; never makes one."""
    known = {group.name: group for group in store.groups}
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    if name in known:
        return known[name]
    listed = ", ".join(sorted(known)) or "none"
    if name is not None:
        raise UnknownName(f"no group {name!r} in {store.path}; it holds: {listed}")
    raise UnknownName(f"name a group with --group; {store.path} holds: {listed}")
