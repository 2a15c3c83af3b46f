"""TCP sockets: how they are made, and what is set on them.

A peer that is gone without a word is noticed: by probes where nothing is under way, by what it does not acknowledge
otherwise, each within PEER_SECONDS.
"""

from __future__ import annotations

import os
import socket
from typing import Final

import trio

from replication.address import NetworkAddress
from replication.errors import LinkDown, ReplicationError
from replication.transport import RECEIVE_BYTES_MAX, Listener, SocketConnection

CONNECT_SECONDS: Final = 10.0
"""How long a name, and then its addresses, may take to answer."""
PEER_SECONDS: Final = 30
"""How long a peer may leave unanswered what was sent, or keep its window shut, before the link counts as broken."""
PROBE_AFTER_SECONDS: Final = 10
PROBE_EVERY_SECONDS: Final = 5
BACKLOG: Final = 128


async def connect_tcp(address: NetworkAddress, receive_bytes_max: int = RECEIVE_BYTES_MAX) -> SocketConnection:
    """Connects to the first of the host's addresses that answers. Raises LinkDown."""
    if not address.port:
        raise LinkDown(f"cannot connect to {address}: port 0 is none; name the port")
    stream = None
    with trio.move_on_after(CONNECT_SECONDS):
        try:
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as error:
            reason = _first(error)
            raise LinkDown(f"cannot connect to {address}: {_text(reason)}") from reason
    if stream is None:
        raise LinkDown(f"cannot connect to {address}: no answer within {CONNECT_SECONDS:g} s")
    return connection_of(socket.socket(fileno=stream.socket.detach()), receive_bytes_max)


def connection_of(sock: socket.socket, receive_bytes_max: int = RECEIVE_BYTES_MAX) -> SocketConnection:
    """A connection over a connected TCP socket. Raises LinkDown where it broke meanwhile."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_SECONDS * 1000)
        return SocketConnection(sock, receive_bytes_max)
    except OSError as error:
        sock.close()
        raise LinkDown(f"the link to the peer broke: {error}") from error


async def bind_tcp(address: NetworkAddress) -> tuple[socket.socket, NetworkAddress]:
    """A listening socket at the first address of the host, and where it listens. Raises ReplicationError."""
    sock = None
    try:
        with trio.fail_after(CONNECT_SECONDS):
            found = await trio.socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        family, _type, _protocol, _name, place = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
        return sock, NetworkAddress(address.host, sock.getsockname()[1], address.tls)
    except trio.TooSlowError as error:
        raise ReplicationError(f"cannot listen at {address}: no answer about the name {address.host}") from error
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):
            raise ReplicationError(f"cannot listen at {address}: {_text(error)}") from error
        raise


class TcpListener(Listener):
    """Connections in plain TCP."""

    async def accept(self) -> SocketConnection:
        while True:
            sock = await self._accept_socket()
            try:
                return connection_of(sock)
            except LinkDown:
                continue  # it left before it was served


def _first(error: OSError) -> OSError:
    """The first reason, where several addresses were tried."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause if isinstance(cause, OSError) else error


def _text(error: OSError) -> str:
    # Without the address, of which the caller's line tells; a failed look-up has no errno but a negative one.
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)
