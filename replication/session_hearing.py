"""How one connection is listened to: not for ever within a frame, and until it is told to stop.

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


class Hearing:
    """The receiving half of a server's end of one connection."""

    def __init__(self, connection: Connection, session: Session) -> None:
        self.scope = trio.CancelScope()
        """What the caller waits in: one scope for the whole loop, and not one for each call, for it costs a tenth of a
        small write."""
        self._connection = connection
        self._session = session
        self.stopped = False
        self._waiting = False

    def stop(self) -> None:
        """Nothing more is received. Who waits for the peer gets nothing or is cancelled, with `scope`."""
        self.stopped = True
        if self._waiting:
            self.scope.cancel()

    async def receive(self) -> bytes:
        """What arrived; b"" at the end and once stopped. To be called within `scope`. Raises LinkDown, ProtocolError
        when the end cut a frame."""
        data = b""
        if not self.stopped:
            self._waiting = True
            try:
                data = await self._connection.receive()
            finally:
                self._waiting = False
        return data if self._goes_on(len(data)) else b""

    async def hear(self) -> bool:
        """Has the session know of what arrived. False at the end and once stopped; otherwise as `receive`."""
        unfilled = self._session.unfilled if self._connection.fills else None
        if unfilled is None:
            data = await self.receive()
            if data:
                self._session.receive_data(data)
            return bool(data)
        count = 0
        if not self.stopped:
            self._waiting = True
            try:
                count = await self._connection.receive_into(unfilled)
            finally:
                self._waiting = False
        self._session.filled(count)
        return self._goes_on(count)

    def _goes_on(self, count: int) -> bool:
        if self.stopped:
            return False
        if not count:
            self._session.receive_eof()
        return count > 0


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
