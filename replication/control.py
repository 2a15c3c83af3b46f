"""Asks a running second appliance: one connection, one request, one reply.

A STORE given as a path finds its appliance at the socket in the store; with none running, NoAppliance tells the caller
that it may take the store's lock and do the work itself.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

import trio

from dedup.types import Epoch
from replication.errors import HandshakeRefused, LinkDown, LinkReset, ProtocolError, ReplicationError, RequestRefused
from replication.messages import PROTOCOL_VERSION, Failure, Hello, Message, Reply, Request, Role, Welcome
from replication.session import Session, Side
from replication.transport import Connection, connect_unix

SOCKET_NAME: Final = "socket"
"""The second appliance's socket within its store."""
UNIX_PREFIX: Final = "unix:"
REPLY_SECONDS: Final = 600.0
"""How long a reply may take, unless the caller knows better: a sync or checkpoint on a slow disk."""

_NOBODY: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR})


class NoAppliance(ReplicationError):
    """No appliance runs there: the caller may take the store's lock itself."""


def socket_path(address: str | Path) -> Path:
    """Where the appliance of `address` listens: `unix:PATH`, or a store's path.

    Raises ReplicationError for an address that this version cannot connect to.
    """
    if isinstance(address, Path):
        return address / SOCKET_NAME
    if address.startswith(UNIX_PREFIX):
        path = address.removeprefix(UNIX_PREFIX)
        if not path:
            raise ReplicationError(f"{address!r} names no socket; write unix:PATH")
        return Path(path)
    scheme, separator, _ = address.partition("://")
    if separator:
        raise ReplicationError(f"{address}: {scheme} is not supported yet; use unix:PATH or the store's path")
    return Path(address) / SOCKET_NAME


async def request(
    address: str | Path,
    group: str | None,
    command: str,
    body: dict[str, object] | None = None,
    *,
    role: Role = Role.ADMIN,
    timeout: float = REPLY_SECONDS,
) -> dict[str, object]:
    """The reply of the appliance at `address` to one command (replication/commands.py lists them).

    Raises NoAppliance (nobody listens there, nothing was done), RequestRefused (the appliance's own line),
    HandshakeRefused, LinkReset (the connection broke or the time passed: whether it was done is unknown), LinkDown.
    """
    path = socket_path(address)
    try:
        connection = await connect_unix(path)
    except LinkDown as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NOBODY:
            raise NoAppliance(f"no appliance runs at {path}") from error
        raise
    async with connection:
        with trio.move_on_after(timeout):
            return await exchange(connection, group or "", command, body or {}, role=role)
    raise LinkReset(
        f"{command}: no answer from {path} within {timeout:g} s; look whether it was done before trying again"
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
        except LinkDown as error:
            raise LinkReset(f"{command}: {error}; look whether it was done before trying again") from error
        if not data:
            raise LinkReset(f"{command}: the appliance closed the connection; look whether it was done and try again")
        session.receive_data(data)
    if isinstance(message, Failure):
        raise HandshakeRefused(message.code, message.text)
    return message
