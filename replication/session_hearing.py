"""How a server listens on one connection: until it is told to stop, and soon where a lone writer answers at once.

Invariant: only the wait for the peer is ever cancelled, never the work on what has arrived.
"""

from __future__ import annotations

from typing import Final

import trio

from replication.session import Session
from replication.transport import Connection

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
