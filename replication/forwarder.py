"""What is queued, on its way to the peer: over one link after another, by way of the spool, in order.

Invariants:
- A frame that was pushed is in the outbox, and with it in memory or on the spool's disk, until the peer keeps it.
- From a session's Welcome to its Link there is no await: a record pushed between would be sent twice or never.
- LOST is final: nothing more is sent.

Whoever owns it decides when a record may be taken and what is waited for; it is told what comes of them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec
import trio

from dedup.types import Heartbeat, Seq, VolumeState
from replication.bandwidth import Bandwidth
from replication.errors import Fenced, HandshakeRefused, HistoryLost, LinkDown, LinkReset, ProtocolError
from replication.link import Link, SessionEnded, greet
from replication.messages import (
    Ack,
    Compare,
    CompareResult,
    ErrorCode,
    Hello,
    Message,
    Mode,
    Reply,
    Uncompared,
    Welcome,
)
from replication.offering import Habit, Offering, Traffic
from replication.outbox import Frame, Outbox
from replication.questions import Questions
from replication.session import Session
from replication.spool import Spool
from replication.spool_file import Origin
from replication.spooler import Spooler
from replication.status import LinkState
from replication.transport import Connection

RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 2.0

log = logging.getLogger("rewindfs.first_appliance")


class Owner(Protocol):
    """Whose records these are. None of this may wait or raise."""

    def greeted(self, welcome: Welcome) -> None:
        """A session begins: what its peer has."""

    def connected(self) -> None:
        """Its link stands."""

    def link_changed(self) -> None:
        """`state` or `error` did."""

    def acknowledged_by_peer(self, ack: Ack, room: bool) -> None:
        """What the peer has now; `room`: frames have left memory."""

    def spooled(self) -> None:
        """Frames have left memory for the disk, or cannot any more."""

    def room_made(self) -> None:
        """Frames have left memory."""

    def lost(self, error: HistoryLost) -> None:
        """Nothing more is sent."""


class Forwarder:
    """The queue of one first appliance and its link. All calls are made from one trio thread."""

    def __init__(
        self,
        owner: Owner,
        connect: Callable[[], Awaitable[Connection]],
        hello: Hello,
        *,
        through: bool,
        queue_bytes_max: int,
        offers: bool | None,
        bytes_per_second: int,
        spool: Spool | None,
        gather_seconds: float,
    ) -> None:
        """As FirstAppliance says of these; `hello` is said to every peer, `gather_seconds` is the mode's."""
        self.connect = connect
        self.hello = hello
        self.outbox = Outbox(Seq(0), bytes_max=queue_bytes_max)
        self.questions = Questions()
        self.traffic = Traffic()
        self.bandwidth = Bandwidth(bytes_per_second)
        self.digest_key = b""
        self.state = LinkState.DOWN
        self.error = "not connected yet"
        """Why the link is not connected."""
        self.why_lost: HistoryLost | None = None
        self._owner = owner
        self._through = through
        self._offers = offers
        self._habit = Habit()
        self._queue_bytes_max = queue_bytes_max
        self._gather_seconds = gather_seconds
        self._store = ""
        self._link: Link | None = None
        self._received = Seq(0)
        """The last word of it."""
        self._spooler: Spooler | None = None
        if spool is not None:
            self._spooler = Spooler(
                spool,
                on_kept=owner.spooled,
                on_unsent=lambda compare: self.questions.not_compared(compare.seq),
                on_lost=self._spool_lost,
            )

    @property
    def spool(self) -> Spool | None:
        return None if self._spooler is None else self._spooler.spool

    @property
    def spools_more(self) -> bool:
        """Whether who waits for room gets it from the spool, outage or not."""
        return self._spooler is not None and self._spooler.takes_more

    # --- what its owner has it do ---

    async def start(self) -> tuple[Welcome, list[VolumeState]]:
        """Connects for the first time; what the peer said. Raises LinkDown, ProtocolError, HandshakeRefused or
        SpoolError."""
        connection, session, welcome, volumes = await self._open()
        self._store = welcome.store
        self.outbox = Outbox(welcome.held, durable=welcome.durable, bytes_max=self._queue_bytes_max)
        if self._spooler is not None:
            origin = Origin(self.hello.group, self.hello.agent, self.hello.epoch, welcome.store)
            try:
                await self._spooler.begin(self.outbox, origin, welcome)
            except BaseException:
                await connection.aclose()
                raise
        self._owner.greeted(welcome)
        self._connected(connection, session, welcome)
        return welcome, volumes

    async def run(self) -> None:
        """Forwards, and connects again and again. Returns once the history is lost, else until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._spooler is not None:
                nursery.start_soon(self._spooler.run)
            await self._keep_link()
            nursery.cancel_scope.cancel()

    def push(self, frame: Frame) -> None:
        """Takes the next frame."""
        if self._link is not None:
            self._link.offer(frame)
        else:
            self.outbox.append(frame)
        if self._spooler is not None:
            self._spooler.appended()

    def expect(self, compare: Compare) -> Compare | Heartbeat:
        """`Questions.expect`, by the link that there is."""
        return self.questions.expect(compare, self._link)

    async def ask(self, command: str, body: dict[str, object]) -> dict[str, object]:
        """`Questions.ask`, by the link that there is."""
        return await self.questions.ask(self._link, self.error, command, body)

    def hear_soon(self) -> None:
        """`Link.hear_soon`, if there is one."""
        if self._link is not None:
            self._link.hear_soon()

    def ask_for_sync(self, seq: Seq) -> None:
        """Asks for DURABLE of everything up to `seq`. Without a link the owner asks again when it is `connected`."""
        if self._link is not None:
            self._link.ask_for_sync(seq)

    def mode_changed(self, mode: Mode | None, gather_seconds: float) -> None:
        """What a Hello says from now on, and how long a frame may wait for company."""
        self.hello = msgspec.structs.replace(self.hello, mode=mode)
        self._gather_seconds = gather_seconds
        if self._link is not None:
            self._link.gather_seconds = gather_seconds

    def outage(self, lasts: bool) -> None:
        """An outage began, or is over."""
        if self._spooler is not None:
            self._spooler.outage(lasts)

    def went_on(self) -> None:
        """The levels rose: a store that was full takes records again."""
        if self.state is LinkState.FULL and self._link is not None:
            self._set_state(LinkState.CONNECTED, "")

    async def keep_all(self) -> bool:
        """Waits until everything pushed is in the spool, or kept by the peer; False, at once, where it cannot be."""
        return self._spooler is not None and await self._spooler.keep_all()

    # --- one link after another ---

    async def _open(self) -> tuple[Connection, Session, Welcome, list[VolumeState]]:
        connection = await self.connect()
        try:
            session, welcome, volumes = await greet(connection, self.hello)
            if welcome.mode is not None and not self._through:
                raise ProtocolError("a first appliance is there, where a second one was expected")
            return connection, session, welcome, volumes
        except BaseException:
            await connection.aclose()
            raise

    def _connected(self, connection: Connection, session: Session, welcome: Welcome) -> None:
        self.digest_key = welcome.digest_key
        self._link = Link(
            connection,
            session,
            self.outbox,
            self._gather_seconds,
            traffic=self.traffic,
            offering=self._offering(connection, welcome.digest_key),
            bandwidth=self.bandwidth,
        )
        # A full store takes the session and refuses the record: only progress, or nothing to do, shows that it is over.
        if self.state is not LinkState.FULL or not self.outbox.unheld:
            self._set_state(LinkState.CONNECTED, "")
        self._owner.connected()
        if self._spooler is not None:
            self._spooler.link_up(self._link.wake)

    def _offering(self, connection: Connection, key: bytes) -> Offering | None:
        """What offers aggregates on this connection. On the way to a first appliance there are none to offer."""
        offers = not connection.is_local if self._offers is None else self._offers
        return Offering(key, self._habit, self.traffic) if offers and not self._through else None

    async def _keep_link(self) -> None:
        backoff = RECONNECT_SECONDS_MIN
        while self.why_lost is None:
            if self._link is None:
                await self._reconnect()
            if self._link is not None:
                before = self._received
                reason = await self._link.run(self._handle)
                self._disconnected(reason)
                if self._received > before:
                    backoff = RECONNECT_SECONDS_MIN
            if self.why_lost is None:
                await trio.sleep(backoff)
                backoff = min(2 * backoff, RECONNECT_SECONDS_MAX)

    async def _reconnect(self) -> None:
        try:
            connection, session, welcome, _volumes = await self._open()
        except (LinkDown, ProtocolError, HandshakeRefused) as error:
            if isinstance(error, HandshakeRefused) and error.code is ErrorCode.FENCED:
                self._lose(self._fenced(str(error)))
                return
            full = isinstance(error, HandshakeRefused) and error.code is ErrorCode.STORE_FULL
            self._set_state(LinkState.FULL if full else LinkState.DOWN, str(error))
            return
        try:
            self._resume(welcome)
        except HistoryLost as error:
            await connection.aclose()
            self._lose(error)
            return
        self._connected(connection, session, welcome)

    def _resume(self, welcome: Welcome) -> None:
        if welcome.store != self._store:
            text = f"the second appliance now serves store {welcome.store}, not {self._store}"
            raise HistoryLost(welcome.held, Seq(self.outbox.last_seq + 1), text)
        self.outbox.rewind(welcome.held)
        # Before the owner tells of it: what is durable is kept.
        room = self.outbox.acknowledge(welcome.held, welcome.durable)
        self._owner.greeted(welcome)
        if room:
            self._owner.room_made()

    def _disconnected(self, reason: Exception) -> None:
        self._link = None
        if self._spooler is not None:
            self._spooler.link_down()
        full = isinstance(reason, SessionEnded) and reason.failure.code is ErrorCode.STORE_FULL
        self._set_state(LinkState.FULL if full else LinkState.DOWN, str(reason))
        self.questions.fail_all(LinkReset(f"the link broke before the answer came: {reason}"))
        if isinstance(reason, HistoryLost):
            self._lose(reason)
        elif isinstance(reason, SessionEnded) and reason.failure.code is ErrorCode.FENCED:
            self._lose(self._fenced(str(reason)))

    def _fenced(self, text: str) -> Fenced:
        return Fenced(self.outbox.kept_seq, Seq(self.outbox.last_seq + 1), text)

    def _spool_lost(self, error: HistoryLost) -> None:
        if self._link is not None:
            self._link.end(error)
        else:
            self._lose(error)

    def _lose(self, error: HistoryLost) -> None:
        self.why_lost = error
        self._set_state(LinkState.LOST, str(error))
        self._owner.lost(error)

    def _set_state(self, state: LinkState, error: str) -> None:
        if state is self.state and error == self.error:
            return
        if state is not self.state:
            level = logging.INFO if state is LinkState.CONNECTED else logging.WARNING
            log.log(level, "link to the second appliance: %s%s", state.value, f" ({error})" if error else "")
        self.state, self.error = state, error
        self._owner.link_changed()

    # --- what the peer says ---

    def _handle(self, message: Message) -> None:
        match message:
            case Ack():
                self._acknowledge(message)
            case CompareResult():
                self.questions.compare_came(message)
            case Uncompared(seq, key):
                self.digest_key = key
                self.questions.not_compared(seq)
            case Reply():
                self.questions.reply_came(message)

    def _acknowledge(self, ack: Ack) -> None:
        self._received = ack.received
        room = self.outbox.acknowledge(ack.queued, ack.kept)
        self._owner.acknowledged_by_peer(ack, room)
        if self._spooler is not None:
            self._spooler.acknowledged()
        link = self._link
        if link is not None and not link.sync_open and 2 * self.outbox.held_bytes > self._queue_bytes_max:
            link.ask_for_sync(ack.queued)
