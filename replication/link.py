"""One session of the first appliance with the second, from Hello to its end: what goes out, in which order.

Invariants:
- One task sends. What `offer` puts on the socket itself goes out only while that task has nothing to send and no frame
  is cut, so frames never mix and never change places.
- Where aggregates are offered first (`offering`), they and what is behind them wait for the answers.
- A frame is counted by the session in the step in which its first byte may leave.
- Whatever ends the session ends both tasks; the frames stay in the outbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Final

import trio

from dedup.types import Aggregate, Seq, VolumeState
from replication.bandwidth import Bandwidth
from replication.errors import HandshakeRefused, LinkDown, ProtocolError
from replication.linger import heard
from replication.messages import (
    Failure,
    Hello,
    Message,
    Offer,
    Request,
    SyncRequest,
    VolumePage,
    Wanted,
    Welcome,
)
from replication.offering import AHEAD_FRAMES, Offering, Traffic
from replication.outbox import Frame, Outbox
from replication.session import REQUESTS_OPEN_MAX, Session, Side, State
from replication.session_hearing import receive_in_time
from replication.transport import Connection
from replication.wire import Buffer

SEND_BYTES: Final = 1 << 20
"""About how much goes to the socket in one call."""
HANDSHAKE_SECONDS: Final = 10.0
"""Longest that a peer may take from Hello to its last VolumePage."""
VOLUMES_MAX: Final = 1 << 20
"""Most volumes that a peer may list."""
PATHS_CHARACTERS_MAX: Final = 256 << 20
"""Most that their paths may come to."""
ANSWER_MILLISECONDS: Final = 1
"""The least that poll(2) can wait; an embedded second appliance answers in about 0.15 ms."""
ANSWER_ROW: Final = 32
"""After so many answers that were waited for on the spot, one is not, so that writers beside it can show themselves."""
ANSWER_REST: Final = 64
"""Frames in a row that are not waited for, once the peer was too slow or a writer was not alone."""


class SessionEnded(Exception):
    """The peer said Failure. Never leaves this package."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


async def greet(connection: Connection, hello: Hello) -> tuple[Session, Welcome, list[VolumeState]]:
    """Says Hello as an agent and takes the answer. Raises LinkDown, ProtocolError or HandshakeRefused; the caller
    closes the connection then."""
    session = Session(Side.CLIENT)
    welcome: Welcome | None = None
    volumes: list[VolumeState] = []
    characters = 0
    with trio.move_on_after(HANDSHAKE_SECONDS):
        await connection.send(session.send(hello))
        while session.state is not State.STREAMING:
            match await next_message(connection, session):
                case Welcome() as message:
                    welcome = message
                case VolumePage(volumes=page):
                    volumes += page
                    characters += sum(len(volume.path) for volume in page)
                    if len(volumes) > VOLUMES_MAX or characters > PATHS_CHARACTERS_MAX:
                        raise ProtocolError(f"the peer lists more volumes than {VOLUMES_MAX}, or too long paths")
                case Failure(code, text):
                    raise HandshakeRefused(code, text)
        if welcome is not None:
            return session, welcome, volumes
    raise LinkDown(f"no answer to Hello within {HANDSHAKE_SECONDS:g} s")


async def next_message(connection: Connection, session: Session) -> Message:
    """The second appliance's next message. LinkDown, ProtocolError."""
    while (message := session.next_event()) is None:
        data = await receive_in_time(connection, session)
        if not data:
            session.receive_eof()
            raise LinkDown("the second appliance closed the connection")
        session.receive_data(data)
    return message


GATHER_FRAMES: Final = 64
GATHER_BYTES: Final = 64 << 10
"""So many frames, or one so large, do not wait for more."""


class Link:
    """A streaming session. `offer` and `command` put things on their way; `run` moves them until the session ends."""

    def __init__(
        self,
        connection: Connection,
        session: Session,
        outbox: Outbox,
        gather_seconds: float = 0.0,
        *,
        traffic: Traffic | None = None,
        offering: Offering | None = None,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        """`traffic` is counted on; without `offering` every frame goes as it is; `bandwidth` limits what is sent."""
        self.gather_seconds = gather_seconds
        """How long a frame may wait for company; may be changed at any time."""
        self._connection = connection
        self._session = session
        self._outbox = outbox
        self._traffic = traffic or Traffic()
        self._offering = offering
        self._bandwidth = bandwidth or Bandwidth()
        self._requests: deque[Request] = deque()
        self._cut: list[Buffer] = []
        """The rest of a frame of which a part has left."""
        self._sync_after: Seq | None = None
        """A SyncRequest is due once this record was sent."""
        self._sync_wanted = Seq(0)
        """The newest record for which somebody wants DURABLE."""
        self._sync_asked = Seq(0)
        """What the last SyncRequest covers."""
        self._wake: trio.Event | None = None
        """Set while the sender's task waits for something to send."""
        self._hurry = trio.Event()
        """Set when what waits to be sent is not to wait for company."""
        self._row = 0
        """Answers that were waited for on the spot, one after the other."""
        self._rest = 0
        """Frames for whose answers nobody waits on the spot."""
        self._handle: Callable[[Message], None] | None = None
        self._scope = trio.CancelScope()
        self._reason: Exception | None = None

    def offer(self, frame: Frame) -> None:
        """Appends the frame to the outbox and sees that it is sent.

        While nothing is on its way it goes to the socket here and now: that is the shortest way there is for a lone
        writer. Otherwise, and always where the mode says to gather, the sender's task takes it together with what else
        has gathered by then: a record in company costs both sides a third of one alone.
        """
        alone = not self._outbox.unheld
        self._outbox.append(frame)
        if frame.bytes >= GATHER_BYTES or self._outbox.unsent_frames >= GATHER_FRAMES:
            self._hurry.set()
        if self._wake is None or self._reason is not None:
            return
        if not alone:
            self._rest = ANSWER_REST
        elif self._may_send_now and not self.gather_seconds and (self._offering is None or frame.kind is not Aggregate):
            self._send_now()
            if not self._cut and not self._due():
                return
        self._wake.set()

    def hear_soon(self) -> None:
        """Takes the answer to a lone frame here and now, if it comes within ANSWER_MILLISECONDS. Raises nothing.

        Blocks for so long at most, and a PatientPoll's moment, and the loop with it: where the peer answers in a
        fraction of that, it saves a lone writer two turns of the loop. Writers side by side are better off without, for
        their frames then travel together: an offer that meets an unheld frame puts this to rest, and after each
        ANSWER_ROW answers one is left to the loop, so that such an offer can happen. A peer that is too slow puts it to
        rest, too.
        """
        if self._rest:
            self._rest -= 1
            return
        # Only while the sender's task has nothing to do: what that one has yet to send is not answered soon.
        if self._handle is None or self._wake is None or self._cut or self._reason is not None:
            return
        if not self._outbox.lone:
            return
        if not self._hear(ANSWER_MILLISECONDS):
            self._row, self._rest = 0, ANSWER_REST
            return
        self._row += 1
        if self._row >= ANSWER_ROW:
            self._row, self._rest = 0, 1

    def command(self, request: Request) -> None:
        """Sends the request when fewer than REQUESTS_OPEN_MAX are open. The caller bounds how many it gives."""
        self._requests.append(request)
        self.wake()

    @property
    def sync_open(self) -> bool:
        """Whether a SyncRequest was sent that no Ack has answered yet."""
        return self._session.durable < self._sync_asked

    def ask_for_sync(self, seq: Seq) -> None:
        """Asks for DURABLE of everything up to `seq`, once it is sent; one question covers all before it."""
        if seq > self._sync_asked:
            self._sync_wanted = max(self._sync_wanted, seq)
            # The oldest wish goes first: newer ones must not put it off.
            if self._sync_after is None:
                self._sync_after = seq
                if self._may_send_now and self._due():
                    self._put_now(self._sync_request())
                if self._cut or self._sync_after is not None:
                    self.wake()

    def wake(self) -> None:
        """Has the sender's task send what there is now, without letting anything gather."""
        self._hurry.set()
        if self._wake is not None:
            self._wake.set()

    def end(self, reason: Exception) -> None:
        """Has `run` end, and return the reason."""
        self._break(reason)

    async def run(self, handle: Callable[[Message], None]) -> Exception:
        """Sends and receives until the session ends; gives each message of the peer to `handle`. Returns why it ended:
        LinkDown, ProtocolError or SessionEnded. The connection is closed then. Cancelled, it closes it as well."""
        handle = self._handle = partial(self._heard, handle)
        async with self._connection:
            descriptor = self._connection.descriptor
            with self._scope, nullcontext() if descriptor is None else heard(descriptor, partial(self._hear, 0)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._until_broken, self._send)
                    nursery.start_soon(self._until_broken, self._receive, handle)
        return self._reason or LinkDown("the session ended")

    def _hear(self, milliseconds: int) -> bool:
        """Takes what has come, or comes within so many milliseconds, for which it blocks. False: nothing, or the
        session has ended."""
        if self._handle is None or self._reason is not None:
            return False
        try:
            data = self._connection.receive_soon(milliseconds)
            self._session.receive_data(data)
            while (message := self._session.next_event()) is not None:
                if isinstance(message, Failure):
                    raise SessionEnded(message)
                self._handle(message)
        except (LinkDown, ProtocolError, SessionEnded) as error:
            self._break(error)
            return False
        return bool(data)

    def _heard(self, handle: Callable[[Message], None], message: Message) -> None:
        if not isinstance(message, Wanted):
            handle(message)
        elif self._offering is not None and self._offering.answered(message):
            self.wake()
        if self._requests:
            self.wake()

    async def _until_broken(self, task: Callable[..., object], *args: object) -> None:
        try:
            await task(*args)  # type: ignore[misc]
        except (LinkDown, ProtocolError, SessionEnded) as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        if self._reason is None:
            self._reason = error  # from now on: what the last words bring about must not send, and break it once more
            if isinstance(error, LinkDown):
                self._reason = self._last_words() or error
        self._scope.cancel()

    def _last_words(self) -> SessionEnded | None:
        """Why the peer closed, where a send broke before that was read."""
        try:
            while data := self._connection.receive_soon(0):
                self._session.receive_data(data)
                while (message := self._session.next_event()) is not None:
                    if isinstance(message, Failure):
                        return SessionEnded(message)
                    if self._handle is not None:
                        self._handle(message)
        except (LinkDown, ProtocolError):
            return None  # it said nothing; what broke the link first is the reason
        return None

    async def _send(self) -> None:
        while True:
            offer = None
            if self._offering is not None:
                offer = await self._offering.prepare(self._outbox.ahead(AHEAD_FRAMES))
            if self._reason is not None:
                await trio.sleep_forever()  # the session is over; the scope is cancelled
            buffers = self._next_buffers(offer)
            if buffers:
                self._traffic.sent += sum(map(len, buffers))
                if self._bandwidth.limited:
                    await self._bandwidth.send(self._connection.send, buffers)
                else:
                    await self._connection.send(buffers)
                continue
            self._wake, self._hurry = trio.Event(), trio.Event()
            try:
                await self._wake.wait()
            finally:
                self._wake = None
            if self._hurry.is_set():
                continue
            if self.gather_seconds:
                with trio.move_on_after(self.gather_seconds):
                    await self._hurry.wait()
            else:
                await self._gather_by_turns()

    async def _gather_by_turns(self) -> None:
        """Where somebody waits for the answer: as long as each turn of the loop brings another frame."""
        unsent = 0
        while unsent < self._outbox.unsent_frames and not self._hurry.is_set():
            unsent = self._outbox.unsent_frames
            await trio.lowlevel.checkpoint()

    @property
    def _may_send_now(self) -> bool:
        """Whether what comes next may go to the socket here and now: the sender's task has nothing to do."""
        return not (self._wake is None or self._reason or self._cut or self._bandwidth.bytes_per_second)

    def _send_now(self) -> None:
        """Sends the one frame that waits, or a part of it."""
        frame = self._outbox.take_one()
        if frame.compare is not None:
            buffers = self._session.send(frame.compare)
        else:
            self._session.sending(frame.kind, frame.first_seq, frame.seq)
            buffers = frame.buffers
        self._put_now(buffers)

    def _put_now(self, buffers: list[Buffer]) -> None:
        """What the socket does not take is `_cut`, for the sender's task, which the caller wakes then."""
        try:
            sent = self._connection.send_nowait(buffers)
        except LinkDown as error:
            self._break(error)
            return
        self._traffic.sent += sent
        for buffer in buffers:
            if sent >= len(buffer):
                sent -= len(buffer)
            else:
                self._cut.append(memoryview(buffer)[sent:] if sent else buffer)
                sent = 0

    def _due(self) -> bool:
        return self._sync_after is not None and self._sync_after <= self._session.last_seq

    def _next_buffers(self, offer: Offer | None) -> list[Buffer]:
        buffers, self._cut = self._cut, []
        if offer is not None:
            buffers += self._session.send(offer)
        buffers += self._frames()
        while self._requests and self._session.requests_open < REQUESTS_OPEN_MAX:
            buffers += self._session.send(self._requests.popleft())
        if self._due():
            buffers += self._sync_request()
        return buffers

    def _sync_request(self) -> list[Buffer]:
        self._sync_asked = self._session.last_seq
        self._sync_after = self._sync_wanted if self._sync_wanted > self._sync_asked else None
        return self._session.send(SyncRequest())

    def _frames(self) -> list[Buffer]:
        buffers: list[Buffer] = []
        for frame in self._next_frames():
            if frame.compare is not None:
                buffers += self._session.send(frame.compare)
            elif self._offering is not None:
                buffers += self._offering.say(frame, self._session)
            else:
                self._session.sending(frame.kind, frame.first_seq, frame.seq)
                buffers += frame.buffers
        return buffers

    @property
    def _send_bytes(self) -> int:
        return self._bandwidth.piece_bytes if self._bandwidth.limited else SEND_BYTES

    def _next_frames(self) -> list[Frame]:
        if self._offering is None:
            return self._outbox.take(self._send_bytes)
        frames: list[Frame] = []
        total = 0
        while total < self._send_bytes and (ahead := self._outbox.ahead(1)) and not self._offering.held_back(ahead[0]):
            frames += self._outbox.take(0)
            total += frames[-1].bytes
        return frames

    async def _receive(self, handle: Callable[[Message], None]) -> None:
        while True:
            message = await next_message(self._connection, self._session)
            if isinstance(message, Failure):
                raise SessionEnded(message)
            handle(message)
