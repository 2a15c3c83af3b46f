"""Asks a running appliance, wherever it is: one connection, one request, one reply.

A STORE given as a path finds its appliance at the socket in the store; with none running, NoAppliance tells the caller
that it may take the store's lock and do the work itself. Over a network nobody can know that, and it is never said.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

import trio

from dedup.layout import SOCKET_NAME
from dedup.types import Epoch
from replication.address import UNIX_PREFIX, AddressError, UnixAddress, parse_address
from replication.endpoint import connect
from replication.errors import HandshakeRefused, LinkDown, LinkReset, ProtocolError, ReplicationError, RequestRefused
from replication.identity import Identity
from replication.messages import PROTOCOL_VERSION, Failure, Hello, Message, Reply, Request, Role, Welcome
from replication.session import Session, Side
from replication.tls import Untrusted
from replication.transport import Connection

__all__ = ["SOCKET_NAME", "UNIX_PREFIX", "NoAppliance", "exchange", "request", "socket_path"]

REPLY_SECONDS: Final = 600.0
"""How long a reply may take, unless the caller knows better: a sync or checkpoint on a slow disk."""

_NOBODY: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR})


class NoAppliance(ReplicationError):
    """No appliance runs there: the caller may take the store's lock itself."""


def socket_path(address: str | Path) -> Path:
    """Where the appliance of `address` listens: `unix:PATH`, or a store's path. Raises AddressError for any other."""
    place = parse_address(address)
    if not isinstance(place, UnixAddress):
        raise AddressError(f"{place} is not on this machine; use unix:PATH or the store's path")
    return place.path


async def request(
    address: str | Path,
    group: str | None,
    command: str,
    body: dict[str, object] | None = None,
    *,
    role: Role = Role.ADMIN,
    timeout: float = REPLY_SECONDS,
    identity: Identity | None = None,
    insecure_tcp: bool = False,
) -> dict[str, object]:
    """The reply of the appliance at `address` to one command (replication/commands.py lists them).

    `identity` and `insecure_tcp` are as in `endpoint.connect`. Raises NoAppliance (nobody on this machine listens
    there, nothing was done), RequestRefused (the appliance's own line), HandshakeRefused, AddressError, LinkReset (the
    connection broke or the time passed: whether it was done is unknown), else LinkDown (nothing was done).
    """
    place = parse_address(address)
    try:
        connection = await connect(place, identity=identity, insecure_tcp=insecure_tcp)
    except LinkDown as error:
        cause = error.__cause__
        if isinstance(place, UnixAddress) and isinstance(cause, OSError) and cause.errno in _NOBODY:
            raise NoAppliance(f"no appliance runs at {place.path}") from error
        raise
    async with connection:
        with trio.move_on_after(timeout):
            return await exchange(connection, group or "", command, body or {}, role=role)
    raise LinkReset(
        f"{command}: no answer from {place} within {timeout:g} s; look whether it was done before trying again"
    )


async def exchange(
    connection: Connection, group: str, command: str, body: dict[str, object], *, role: Role = Role.ADMIN
) -> dict[str, object]:
    """The same over a connection that is there. It serves this one request; the caller closes it."""
    session = Session(Side.CLIENT)
    await connection.send(session.send(Hello(PROTOCOL_VERSION, role, group, Epoch(0))))
    welcome = await _next(connection, session, command)
    if not isinstance(welcome, Welcome):
        raise ProtocolError(f"{type(welcome).__name__} instead of a welcome")
    await connection.send(session.send(Request(1, command, body)))
    reply = await _next(connection, session, command)
    if not isinstance(reply, Reply):
        raise ProtocolError(f"{type(reply).__name__} instead of a reply")
    if reply.error:
        raise RequestRefused(reply.error)
    return reply.body


async def _next(connection: Connection, session: Session, command: str) -> Message:
    while (message := session.next_event()) is None:
        try:
            data = await connection.receive()
        except Untrusted:
            raise  # before anything was asked
        except LinkDown as error:
            raise LinkReset(f"{command}: {error}; look whether it was done before trying again") from error
        if not data:
            raise LinkReset(f"{command}: the appliance closed the connection; look whether it was done and try again")
        session.receive_data(data)
    if isinstance(message, Failure):
        raise HandshakeRefused(message.code, message.text)
    return message
