"""What a server says on one connection: one message at a time, whole, and Acks that never decrease.

Invariants:
- One task sends at a time; the others wait their turn. A message is made when its turn has come.
- A peer that takes nothing for STALL_SECONDS, and some more for what is long, has broken the link.
- `cut` is true from a message's first byte to its last, and for ever when the sending failed or was cancelled between:
  then nothing more can be said, for the peer would read it as a part of that message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from dedup.types import Seq
from replication.errors import LinkDown
from replication.frame_layout import ACK
from replication.messages import Ack, Failure, Message
from replication.session import Session, State
from replication.transport import Connection
from replication.wire import Buffer, encode

STALL_SECONDS: Final = 60.0
STALL_BYTES_PER_SECOND: Final = 16 << 10
"""A link that is slower than this is none."""

log = logging.getLogger("rewindfs.second_appliance")


class Levels(Protocol):
    """How far a group has come."""

    @property
    def held(self) -> Seq: ...

    @property
    def durable(self) -> Seq: ...


class Speech:
    """The sending half of a server's end of one connection."""

    def __init__(self, connection: Connection, session: Session) -> None:
        self.cut = False
        self._connection = connection
        self._session = session
        self._turn = trio.Lock()

    async def say(self, message: Message) -> None:
        """Sends it in its turn. Raises LinkDown, or LocalProtocolError for what may not be said: then nothing is."""
        await self._say(lambda: message)

    async def ack(self, group: Levels) -> None:
        """Sends how far the group has come by the time it is sent. Raises LinkDown."""
        if not self._turn.locked():
            # Nobody is sending, and nobody can begin before the next await: no lock, when the link takes all of it.
            frame = self._frame(_levels(group))
            self.cut = True
            sent = self._connection.send_nowait(frame)
            if sent < ACK.size:
                await self._say_rest(memoryview(b"".join(frame))[sent:])
            self.cut = False
            return
        # Made when it is this task's turn to send: an Ack never decreases.
        await self._say(lambda: _levels(group))

    async def farewell(self, failure: Failure) -> None:
        """The last word, if it can be said; to be called when no other task speaks. Raises nothing of the link's."""
        if self.cut:
            return
        try:
            # Not by way of the session: after what the peer broke, that one says nothing more.
            await self._connection.send(encode(failure))
        except LinkDown as error:
            log.info("%s could not be told: %s", failure.code.name, error)

    def _frame(self, message: Message) -> list[Buffer]:
        if self._session.state is State.CLOSED:
            raise LinkDown("the peer left before it was answered")
        return self._session.send(message)

    async def _say_rest(self, rest: Buffer) -> None:
        self._turn.acquire_nowait()
        try:
            await send_in_time(self._connection, [rest])
        finally:
            self._turn.release()

    async def _say(self, make: Callable[[], Message]) -> None:
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            frame = self._frame(make())
            self.cut = True
            await send_in_time(self._connection, frame)
            self.cut = False
        finally:
            self._turn.release()


async def send_in_time(connection: Connection, buffers: Sequence[Buffer]) -> None:
    """Sends them; LinkDown when the peer is too slow to take them."""
    seconds = STALL_SECONDS + sum(map(len, buffers)) / STALL_BYTES_PER_SECOND
    with trio.move_on_after(seconds):
        await connection.send(buffers)
        return
    raise LinkDown(f"the peer has taken nothing of what it was sent for {seconds:.0f} s")


def _levels(group: Levels) -> Ack:
    held, durable = group.held, group.durable
    return Ack(held, durable, held, durable)
