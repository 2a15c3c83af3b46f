"""How one connection is listened to: not for ever within a frame, until it is told to stop, and soon where a lone
writer answers at once.

Invariants:
- Only the wait for the peer is ever cancelled, never the work on what has arrived.
- What is kept of a peer that was not welcomed yet is bounded by HELLO_BYTES_MAX and one receive.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from replication.errors import ProtocolError
from replication.messages import Hello
from replication.session import Session
from replication.transport import Connection

HELLO_SECONDS: Final = 10.0
"""How long a peer may take to say Hello."""
HELLO_BYTES_MAX: Final = 4096
"""Most that a peer may say before it is welcomed."""
FRAME_IDLE_SECONDS: Final = 60.0
"""How long a peer may say nothing in the middle of a frame."""
CONTROL_IDLE_SECONDS: Final = 600.0
"""How long an admin's or reader's session may say nothing. An agent's may do so for ever."""
FOR_EVER: Final = float("inf")
ANSWERS_MAX: Final = 4
"""Commands of one session that run, or whose reply waits for the peer to read, at a time."""
MESSAGES_ROW: Final = 1024
"""After so many messages in a row other sessions have their turn."""
SOON_MILLISECONDS: Final = 1
"""How long the thread sleeps for the next record of a lone writer: the least that poll(2) can wait."""
SOON_ROW: Final = 16
"""After so many of those one is left to the loop, so that other sessions have their turn."""
SOON_REST: Final = 64
"""Records that are left to the loop once none came so soon."""


class Hearing:
    """The receiving half of a server's end of one connection."""

    def __init__(self, connection: Connection, session: Session) -> None:
        self.scope = trio.CancelScope()
        """What the caller waits in: one scope for the whole loop, and not one for each call, for it costs a tenth of a
        small write."""
        self.lone = False
        """Whether what came last was one record and nothing else."""
        self._connection = connection
        self._session = session
        self.stopped = False
        self._waiting = False
        self._row = self._rest = 0
        """Records that came soon in a row; receives that are left to the loop."""

    def stop(self) -> None:
        """Nothing more is received. Who waits for the peer gets b"" or is cancelled, with `scope`."""
        self.stopped = True
        if self._waiting:
            self.scope.cancel()

    async def receive(self) -> bytes:
        """What arrived; b"" at the end and once stopped. To be called within `scope`. Raises LinkDown, ProtocolError
        when the end cut a frame."""
        if self._leaving():
            return b""
        if self.lone and (data := self._hear_soon()):
            return data
        self._waiting = True
        try:
            data = await self._connection.receive()
        finally:
            self._waiting = False
        if self._leaving():
            return b""
        if not data:
            self._session.receive_eof()
        return data

    def _leaving(self) -> bool:
        return self.stopped

    def _hear_soon(self) -> bytes:
        """What a lone writer sends right after its last answer; b"" to wait for it in the ordinary way.

        Sleeps in the kernel for SOON_MILLISECONDS at most, and the loop with it; saves a turn of the loop.
        """
        if self._rest:
            self._rest -= 1
            return b""
        data = self._connection.receive_soon(SOON_MILLISECONDS)
        self._row += 1
        if not data or self._row >= SOON_ROW:
            self._row, self._rest = 0, 1 if data else SOON_REST
        return data


async def hear_hello(session: Session, receive: Callable[[], Awaitable[bytes]]) -> Hello | None:
    """The first message, or None when the peer left, or was not to be heard any more, without one. Raises ProtocolError
    for anything else, and for more than HELLO_BYTES_MAX."""
    heard = 0
    while data := await receive():
        heard += len(data)
        if heard > HELLO_BYTES_MAX:
            raise ProtocolError(f"more than {HELLO_BYTES_MAX} bytes before the Welcome")
        session.receive_data(data)
        message = session.next_event()
        if isinstance(message, Hello):
            return message
    return None


def fell_silent(session: Session, seconds: float) -> ProtocolError:
    """Why a session ends whose peer said nothing for so long."""
    what = "in the middle of a frame" if session.incomplete else "and asked for nothing"
    return ProtocolError(f"the peer said nothing for {seconds:g} s {what}")


async def receive_in_time(connection: Connection, session: Session, idle: float = FOR_EVER) -> bytes:
    """The next bytes; b"" at the end. Raises LinkDown, and ProtocolError once the peer has said nothing for
    FRAME_IDLE_SECONDS within a frame, or for `idle` seconds between two."""
    while True:
        seconds = FRAME_IDLE_SECONDS if session.incomplete else idle
        if seconds == FOR_EVER:
            return await connection.receive()
        with trio.move_on_after(seconds):
            return await connection.receive()
        # The frame's end may have come by `receive_soon` meanwhile.
        if session.incomplete or seconds == idle:
            raise fell_silent(session, seconds)
