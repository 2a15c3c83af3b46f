"""Asks a running appliance, wherever it is: one connection, one request, one reply.

A STORE given as a path finds its appliance at the socket in the store; with none running, NoAppliance tells the caller
that it may take the store's lock and do the work itself. Over a network nobody can know that, and it is never said.
"""

from __future__ import annotations

from pathlib import Path

import trio

from replication.address import SOCKET_NAME, UNIX_PREFIX, AddressError, UnixAddress, parse_address
from replication.endpoint import connect
from replication.errors import LinkDown
from replication.exchange import REPLY_SECONDS, Exchange, NoAppliance, no_answer, nobody_there
from replication.identity import Identity
from replication.messages import Role
from replication.tls import Untrusted
from replication.transport import Connection

__all__ = ["SOCKET_NAME", "UNIX_PREFIX", "NoAppliance", "exchange", "request", "socket_path"]


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
        if isinstance(place, UnixAddress) and nobody_there(error.__cause__):
            raise NoAppliance(f"no appliance runs at {place.path}") from error
        raise
    async with connection:
        with trio.move_on_after(timeout):
            return await exchange(connection, group or "", command, body or {}, role=role)
    raise no_answer(command, place, timeout)


async def exchange(
    connection: Connection, group: str, command: str, body: dict[str, object], *, role: Role = Role.ADMIN
) -> dict[str, object]:
    """The same over a connection that is there. It serves this one request; the caller closes it."""
    talk = Exchange(group, command, body, role)
    await connection.send(talk.begin())
    while talk.reply is None:
        try:
            data = await connection.receive()
        except Untrusted:
            raise  # before anything was asked
        except LinkDown as error:
            raise talk.broken(str(error)) from error
        if buffers := talk.receive(data):
            await connection.send(buffers)
    return talk.reply
