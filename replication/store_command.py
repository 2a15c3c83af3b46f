"""A command that changes a store: asked of its second appliance, or done here where none runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from dedup.errors import StoreBusy, UnknownName
from dedup.group_writer import GroupWriter
from dedup.store import Store
from replication.control import REPLY_SECONDS, UNIX_PREFIX, NoAppliance, request


def on_store(
    address: str,
    command: str,
    body: dict[str, object],
    here: Callable[[Store], dict[str, object]],
    *,
    group: str | None = None,
    timeout: float = REPLY_SECONDS,
) -> dict[str, Any]:
    """The reply of the appliance at `address`; with none running, what `here` gives, which has the store's lock.

    StoreBusy when an appliance just starts or leaves; else what the command raises.
    """
    try:
        return trio.run(partial(request, address, group, command, body, timeout=timeout))
    except NoAppliance:
        if address.startswith(UNIX_PREFIX):
            raise
    try:
        store = Store.open(Path(address))
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
) -> dict[str, Any]:
    """The same of one group: the one of that name, or the only one. UnknownName."""
    return on_store(address, command, body, lambda store: here(_group_of(store, group)), group=group)


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
