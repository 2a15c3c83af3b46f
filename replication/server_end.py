"""The server's end of one connection, without what it serves: Hello, what is said in order, the last word.

Invariants:
- What is said goes out in the order of the calls; one task sends, and beside it `say` itself while that one has nothing
  to send.
- A peer that says nothing within a frame, takes nothing of what it is told, or says much before its Welcome has broken
  the link or the protocol: its own session ends.
- Whatever ends the conversation, what was said before goes out first, the Failure last, if the peer takes it within
  FAREWELL_SECONDS.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from replication.errors import LinkDown, ProtocolError
from replication.identity import Peer
from replication.messages import PROTOCOL_VERSION, ErrorCode, Failure, Hello, Message
from replication.refused import Refused
from replication.session import Session, Side, State
from replication.session_hearing import FOR_EVER, HELLO_SECONDS, hear_hello, receive_in_time
from replication.session_speech import send_in_time
from replication.transport import Connection
from replication.wire import Buffer, encode

log = logging.getLogger("rewindfs.first_service")

FAREWELL_SECONDS: Final = 2.0
"""How long a peer may take to hear what it is owed, its Failure included."""
UNSAID_BYTES_MAX: Final = 1 << 20
"""What may wait to be sent before `room_to_say` waits."""
LINE_CHARACTERS_MAX: Final = 1000


class ServerEnd:
    """One connection. `run` is its life; within it `hello`, `receive` and `say` are called."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.session = Session(Side.SERVER)
        self.name = "a session without Hello"
        self.when_idle: Callable[[], None] | None = None
        """Called when all that was said has been sent; may say more, may not wait or raise."""
        self._unsaid: deque[Buffer] = deque()
        self._unsaid_bytes = 0
        self._wake: trio.Event | None = None
        """Set while the sender's task has nothing to send."""
        self._room = trio.Event()
        self._talk = trio.CancelScope()
        self._life = trio.CancelScope()
        self._over = False
        self._farewell: Failure | None = None

    @property
    def peer(self) -> Peer | None:
        """Who the other end has proved to be; known once it has said Hello."""
        return self.connection.peer

    @property
    def idle(self) -> bool:
        """Whether all that was said has been sent."""
        return not self._unsaid and self._wake is not None

    async def run(self, converse: Callable[[], Awaitable[None]]) -> None:
        """Calls `converse`, whose errors of the peer's making end the session, each with its Failure; closes the
        connection. `converse` may be cancelled wherever it waits."""
        try:
            with self._life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send)
                    with self.guard(), self._talk:
                        await converse()
                    self._leave()
        finally:
            await self.connection.aclose()

    def end(self, code: ErrorCode, text: str) -> None:
        """End it soon, with this Failure as its last word."""
        if self._farewell is None and not self._over:
            self._farewell = Failure(code, one_line(text))
            log.warning("%s: ended: %s", self.name, text)
        self._talk.cancel()

    async def hello(self) -> Hello | None:
        """The first message, of a version that is spoken here; None when the peer left without. Raises Refused and what
        `receive` does."""
        with trio.move_on_after(HELLO_SECONDS) as patience:
            hello = await hear_hello(self.session, self.receive)
        if patience.cancelled_caught:
            raise Refused(f"no Hello within {HELLO_SECONDS:g} s", ErrorCode.PROTOCOL)
        if hello is None:
            return None
        if hello.version != PROTOCOL_VERSION:
            text = f"protocol version {hello.version} is not spoken here, {PROTOCOL_VERSION} is; use equal versions"
            raise Refused(text, ErrorCode.VERSION)
        self.name = f"{hello.role.value} of {hello.group or 'no group'}, epoch {hello.epoch}"
        if self.peer is not None:
            self.name += f", {self.peer.name}"
        return hello

    async def receive(self, idle: float = FOR_EVER) -> bytes:
        """What arrived; b"" at the end. Raises LinkDown; ProtocolError where the end cut a frame, or the peer said
        nothing for too long: within a frame, or for `idle` seconds."""
        data = await receive_in_time(self.connection, self.session, idle)
        if not data:
            self.session.receive_eof()
        return data

    def say(self, message: Message) -> None:
        """Has it sent, after all that was said before; nothing where the peer has left, or the session is over. Raises
        LocalProtocolError for what may not be said. The caller bounds how much it says, or asks for `room_to_say`."""
        if self._over or self.session.state is State.CLOSED:
            return
        idle = self.idle
        for buffer in self.session.send(message):
            self._unsaid.append(buffer)
            self._unsaid_bytes += len(buffer)
        if not idle:
            return
        assert self._wake is not None, "idle says so"
        try:
            sent = self.connection.send_nowait(list(self._unsaid))
        except LinkDown:
            sent = 0  # the sender's task meets it, too
        if sent == self._unsaid_bytes:
            self._unsaid.clear()
            self._unsaid_bytes = 0
            return
        self._sent(sent)
        self._wake.set()

    async def room_to_say(self) -> None:
        """Waits while more than UNSAID_BYTES_MAX wait to be sent."""
        while self._unsaid_bytes > UNSAID_BYTES_MAX:
            await self._room.wait()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What may happen to a session ends it, from whichever of its tasks."""
        try:
            yield
        except LinkDown as error:
            log.info("%s: %s", self.name, error)
            self._life.cancel()
        except ProtocolError as error:
            self.end(ErrorCode.PROTOCOL, str(error))
        except Refused as error:
            self.end(error.code, str(error))

    def _leave(self) -> None:
        self._over = True
        self.when_idle = None
        if self._farewell is not None:
            # Not by way of the session: after what the peer broke, that one says nothing more.
            self._unsaid += encode(self._farewell)
        self._life.deadline = trio.current_time() + FAREWELL_SECONDS
        if self._wake is not None:
            self._wake.set()

    async def _send(self) -> None:
        with self.guard():
            while True:
                if self._unsaid:
                    buffers, self._unsaid, self._unsaid_bytes = list(self._unsaid), deque(), 0
                    self._room.set()
                    self._room = trio.Event()
                    await send_in_time(self.connection, buffers)
                elif self._over:
                    return
                else:
                    self._wake = trio.Event()
                    if self.when_idle is not None:
                        self.when_idle()
                    await self._wake.wait()
                    self._wake = None

    def _sent(self, count: int) -> None:
        self._unsaid_bytes -= count
        while count:
            buffer = self._unsaid.popleft()
            if count < len(buffer):
                self._unsaid.appendleft(memoryview(buffer)[count:])
                return
            count -= len(buffer)


def one_line(text: str) -> str:
    """One line that fits a Failure or a Reply."""
    return " ".join(text.split())[:LINE_CHARACTERS_MAX].replace("\0", "")
