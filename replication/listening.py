"""Where a service listens: all of its addresses or none."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from replication.address import Address, UnixAddress, parse_address
from replication.endpoint import listen
from replication.errors import LinkDown, ReplicationError
from replication.route import Route
from replication.transport import Listener, connect_unix


def listen_addresses(texts: Sequence[str], route: Route) -> list[Address]:
    """The addresses given to a command; paths absolute, for its background process is elsewhere. Raises AddressError,
    ReplicationError for a store's path."""
    found: list[Address] = []
    for text in texts:
        place = parse_address(text)
        if isinstance(place, UnixAddress):
            if place.store is not None:
                raise ReplicationError(f"cannot listen at {text!r}: use unix:PATH, tls://HOST:PORT or tcp://HOST:PORT")
            place = UnixAddress(place.path.absolute())
        else:
            place.allow(insecure_tcp=route.insecure_tcp)
        if place not in found:
            found.append(place)
    return found


async def open_listeners(addresses: Sequence[Address], route: Route, *, own: Path | None = None) -> list[Listener]:
    """Listens at each. `own`: a socket that nobody else can be listening at, for a lock that the caller holds says so;
    another one that is there is taken away only if nobody answers at it. Raises ReplicationError; then at none."""
    async with AsyncExitStack() as undo:
        listeners = []
        for address in addresses:
            stale = isinstance(address, UnixAddress) and (address.path == own or await _is_stale(address.path))
            listener = await listen(
                address, identity=route.identity, insecure_tcp=route.insecure_tcp, replace_stale=stale
            )
            undo.push_async_callback(listener.aclose)
            listeners.append(listener)
        undo.pop_all()
    return listeners


async def _is_stale(path: Path) -> bool:
    """Whether a socket is there that nobody listens at. Raises ReplicationError where somebody does."""
    if not path.is_socket():
        return False
    try:
        connection = await connect_unix(path)
    except LinkDown as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED:
            return True
        raise ReplicationError(f"cannot listen at {path}: {error}") from error
    await connection.aclose()
    raise ReplicationError(f"cannot listen at {path}: another process does")
