"""One request to an appliance and its reply: what is said, without the link, and the plain way of it to a Unix socket.

A command that asks an appliance of this machine needs no more than this: no trio, no TLS, nothing of the store. That is
most of the time that a user waits for a short command.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from dedup.ids import Epoch
from replication.address import Address, UnixAddress
from replication.control_frames import ControlDecoder, ControlMessage, encode_control
from replication.control_messages import PROTOCOL_VERSION, Failure, Hello, Reply, Request, Role, Welcome
from replication.errors import HandshakeRefused, LinkDown, LinkReset, ProtocolError, ReplicationError, RequestRefused
from replication.frame_head import Buffer
from replication.unix_path import connect_or_close

REPLY_SECONDS: Final = 600.0
"""How long a reply may take, unless the caller knows better: a sync or checkpoint on a slow disk."""
RECEIVE_BYTES: Final = 64 << 10
REQUEST_ID: Final = 1

_NOBODY: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR})


class NoAppliance(ReplicationError):
    """No appliance runs there: the caller may take the store's lock itself."""


def nobody_there(cause: BaseException | None) -> bool:
    """Whether a connection to a Unix socket was refused because nobody listens."""
    return isinstance(cause, OSError) and cause.errno in _NOBODY


def no_answer(command: str, place: Address, timeout: float) -> LinkReset:
    """What to raise when the reply did not come in time."""
    return LinkReset(
        f"{command}: no answer from {place} within {timeout:g} s; look whether it was done before trying again"
    )


class Exchange:
    """One request on a connection of its own, which serves nothing else.

    Send what `begin` gives, then give `receive` what arrives and send what it gives, until there is a `reply`. It says
    of the session (session.py) no more than its beginning, and hears no more: a peer that says anything else breaks the
    protocol.
    """

    def __init__(self, group: str, command: str, body: dict[str, object], role: Role) -> None:
        self.reply: dict[str, object] | None = None
        self._group = group
        self._command = command
        self._body = body
        self._role = role
        self._welcomed = False
        self._decoder = ControlDecoder()

    def begin(self) -> list[Buffer]:
        """LocalProtocolError for a group that no Hello can name."""
        return encode_control(Hello(PROTOCOL_VERSION, self._role, self._group, Epoch(0)))

    def receive(self, data: bytes) -> list[Buffer]:
        """What is to be sent now; often nothing. b"" is the end of the stream.

        HandshakeRefused, RequestRefused (the appliance's own line), ProtocolError; LinkReset at the end of the stream;
        LocalProtocolError for a request that cannot be said.
        """
        if not data:
            raise self.broken("the appliance closed the connection")
        self._decoder.receive_data(data)
        buffers: list[Buffer] = []
        while self.reply is None and (message := self._decoder.next_message()) is not None:
            buffers += self._hear(message)
        return buffers

    def _hear(self, message: ControlMessage) -> list[Buffer]:
        if isinstance(message, Failure):
            raise HandshakeRefused(message.code, message.text)
        if not self._welcomed:
            if not isinstance(message, Welcome):
                raise ProtocolError(f"the peer broke the protocol: {type(message).__name__} instead of a welcome")
            if message.version != PROTOCOL_VERSION:
                raise ProtocolError(
                    f"the peer broke the protocol: Welcome in version {message.version} after Hello in "
                    f"{PROTOCOL_VERSION}"
                )
            self._welcomed = True
            return encode_control(Request(REQUEST_ID, self._command, self._body))
        if not isinstance(message, Reply) or message.id != REQUEST_ID:
            raise ProtocolError(f"the peer broke the protocol: {type(message).__name__} instead of the reply")
        if message.error:
            raise RequestRefused(message.error)
        self.reply = message.body
        return []

    def broken(self, reason: str) -> LinkReset:
        """What to raise when the link broke before the reply: whether it was done is unknown."""
        return LinkReset(f"{self._command}: {reason}; look whether it was done before trying again")


class Talk(Protocol):
    """One side of a conversation, without the link; Exchange is one."""

    reply: dict[str, object] | None

    def begin(self) -> list[Buffer]:
        """What is to be sent first."""

    def receive(self, data: bytes) -> list[Buffer]:
        """What is to be sent when this has arrived; b"" is the end of the stream."""

    def broken(self, reason: str) -> LinkDown:
        """What to raise when the link broke before there was a reply."""


def ask_here(
    place: UnixAddress,
    group: str | None,
    command: str,
    body: dict[str, object],
    *,
    role: Role = Role.ADMIN,
    timeout: float = REPLY_SECONDS,
) -> dict[str, object]:
    """As `control.request`, of an appliance on this machine; blocks."""
    talk = Exchange(group or "", command, body, role)
    try:
        sock = connected(place.path, timeout)
    except LinkDown as error:
        if nobody_there(error.__cause__):
            raise NoAppliance(f"no appliance runs at {place.path}") from error
        raise
    try:
        with sock:
            return converse(sock, talk, timeout)
    except TimeoutError:
        raise no_answer(command, place, timeout) from None


def connected(path: Path, timeout: float) -> socket.socket:
    """A blocking socket connected to who listens at `path`. LinkDown."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    connect_or_close(sock, path)
    return sock


def converse(sock: socket.socket, talk: Talk, timeout: float) -> dict[str, object]:
    """The reply to which the talk comes over that socket, which serves nothing else. Blocks; TimeoutError after so many
    seconds."""
    end = time.monotonic() + timeout
    try:
        _send(sock, talk.begin())
        while talk.reply is None:
            sock.settimeout(max(0.001, end - time.monotonic()))
            _send(sock, talk.receive(sock.recv(RECEIVE_BYTES)))
    except TimeoutError:
        raise
    except OSError as error:
        raise talk.broken(f"the link to the peer broke: {error}") from error
    return talk.reply


def _send(sock: socket.socket, buffers: Sequence[Buffer]) -> None:
    # At once, so that whoever hears it wakes up once; and never nothing, which fails where the peer has closed.
    if buffers:
        sock.sendall(b"".join(buffers))
