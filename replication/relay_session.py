"""A first appliance's end of an agent's connection: takes records into a queue, passes back what comes of them.

Invariants:
- order: records enter the queue in the order of the stream.
- An Ack says only what the relay holds, or what the second appliance has said. While the queue is full nothing is read:
  that is the back-pressure, and the agent's queue fills up in turn.
- bounded: an agent that does not take what it is told is not listened to any more, then its session ends; commands that
  wait for the second appliance, or to be answered, have a limit.
- A Compare is passed on only if its digests were keyed for the session with the second appliance that stands now. The
  agent was told that key in Welcome; once there is another one its session ends, to begin anew with that.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from dedup.types import Aggregate, Correct, EpochStart, Reconcile, Seq, Write
from replication.errors import HistoryLost, LocalProtocolError, ProtocolError, ReplicationError
from replication.frame_layout import OFFERED_BYTES
from replication.messages import (
    VOLUMES_PER_PAGE_MAX,
    Compare,
    CompareResult,
    ErrorCode,
    Failure,
    Message,
    Offer,
    Reply,
    Request,
    SyncRequest,
    Uncompared,
    VolumePage,
    Wanted,
)
from replication.modes import Mode
from replication.refused import Refused
from replication.relay import Relay
from replication.server_end import ServerEnd, one_line
from replication.session import RECORD_TYPES, State
from replication.session_hearing import ANSWERS_MAX, MESSAGES_ROW

log = logging.getLogger("rewindfs.first_service")

LOCAL_COMMANDS: Final = frozenset({"mode.set", "link.status"})
"""What is answered here, at once."""
RECORD_BYTES: Final = 512
"""What a record without data is counted as when it asks for room."""
QUEUED_ACK_SECONDS: Final = 0.05
"""How late an agent may learn that its records are held here, where its writes wait for the second appliance's word."""


class RelaySession:
    """One agent's connection, from Welcome to its end. It is the `Feeder` of its relay."""

    def __init__(self, end: ServerEnd, relay: Relay) -> None:
        self.ended = trio.Event()
        self._end = end
        self._relay = relay
        self._first = relay.first
        self._session = end.session
        self._told_key = b""
        """The digest key that the agent knows."""
        self._unsaid_queued = trio.Event()
        """Set when an Ack is due that only says what is held here."""
        self._next_event = end.session.next_event
        self._asking = trio.CapacityLimiter(ANSWERS_MAX)

    async def run(self) -> None:
        """Feeds the relay, for which it is the feeder, until the connection ends or `end` is called. Raises what
        ServerEnd.run takes."""
        try:
            await self._greet()
            async with trio.open_nursery() as nursery:
                with self._end.guard():
                    nursery.start_soon(self._say_queued)
                    self._end.when_idle = self.levels_rose
                    await self._stream(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._end.when_idle = None
            self._relay.release(self)
            self.ended.set()

    # --- what the relay tells ---

    def end(self, code: ErrorCode, text: str) -> None:
        self._end.end(code, text)

    def levels_rose(self) -> None:
        """Says the levels if that is news, and everything before was sent; else they are said once it was."""
        session = self._session
        if session.state is not State.STREAMING or not self._end.idle:
            return
        levels = self._relay.levels()
        if (levels.queued, levels.kept, levels.received, levels.durable) != (
            session.queued,
            session.kept,
            session.received,
            session.durable,
        ):
            self._end.say(levels)

    def compared(self, seq: Seq, result: CompareResult | None) -> None:
        self._end.say(Uncompared(seq, self._told_key) if result is None else result)

    # --- what the agent says ---

    async def _greet(self) -> None:
        # One synchronous look: records are taken by this session only.
        welcome, volumes = self._relay.welcome()
        self._told_key = welcome.digest_key
        self._end.say(welcome)
        for start in range(0, max(len(volumes), 1), VOLUMES_PER_PAGE_MAX):
            page = tuple(volumes[start : start + VOLUMES_PER_PAGE_MAX])
            self._end.say(VolumePage(page, last=start + VOLUMES_PER_PAGE_MAX >= len(volumes)))
            await self._end.room_to_say()
        log.info("%s: feeds from record %d", self._end.name, welcome.held + 1)

    async def _stream(self, answers: trio.Nursery) -> None:
        while True:
            try:
                await self._take(answers)
            except HistoryLost as error:
                raise Refused(str(error), ErrorCode.UNAVAILABLE) from error
            if self._first.waits_for_second:
                self._unsaid_queued.set()
            else:
                self.levels_rose()
            data = await self._end.receive()
            if not data:
                return
            self._session.receive_data(data)

    async def _take(self, answers: trio.Nursery) -> None:
        """Everything that has arrived completely."""
        first, next_event = self._first, self._next_event
        taken = 0
        while (message := next_event()) is not None:
            taken += 1
            if not taken % MESSAGES_ROW:
                await trio.lowlevel.checkpoint()
            if type(message) is Write:
                size = len(message.extent.data)
                if not first.has_room(size):
                    await self._room(size)
                first.append(message)
            elif type(message) in RECORD_TYPES:
                if isinstance(message, EpochStart) and message.epoch > self._relay.epoch:
                    raise ProtocolError(f"epoch {message.epoch} starts in a session of epoch {self._relay.epoch}")
                await self._room(_size(message))
                first.append(message)  # type: ignore[arg-type]  # the line before says that it is a record
            elif isinstance(message, Compare):
                await self._compare(message)
            elif isinstance(message, SyncRequest):
                self._relay.sync()
            elif isinstance(message, Request):
                answers.start_soon(self._answer, message)
            elif isinstance(message, Offer):
                # Agents combine nothing on the way to a first appliance, and so have no reason to ask.
                self._end.say(Wanted(message.seq, b"\1" * (len(message.blocks) // OFFERED_BYTES)))
                await self._end.room_to_say()
            elif isinstance(message, Failure):
                log.warning("%s: the peer gave up: %s", self._end.name, message.text)
                return
            else:
                raise Refused(f"{type(message).__name__} is not for a first appliance", ErrorCode.PROTOCOL)

    async def _room(self, size: int) -> None:
        if not self._first.has_room(size):
            self.levels_rose()
            await self._first.room(size)

    async def _compare(self, message: Compare) -> None:
        await self._room(len(message.digests) + RECORD_BYTES)
        if self._told_key != self._first.digest_key:
            # Which of the Compares under way have which key cannot be told; after a new Welcome there is none.
            text = "the link to the second appliance was made anew: connect again, for digests with its new key"
            raise Refused(text, ErrorCode.UNAVAILABLE)
        self._relay.compare(message)
        await self._end.room_to_say()

    async def _say_queued(self) -> None:
        while True:
            await self._unsaid_queued.wait()
            await trio.sleep(QUEUED_ACK_SECONDS)
            self._unsaid_queued = trio.Event()
            self.levels_rose()

    # --- commands ---

    async def _answer(self, request: Request) -> None:
        with self._end.guard():
            if request.command in LOCAL_COMMANDS:
                # Not behind those that wait for a second appliance that may not answer: how it is, is what is asked.
                await self._reply(request)
            else:
                async with self._asking:
                    await self._reply(request)

    async def _reply(self, request: Request) -> None:
        try:
            reply = Reply(request.id, await self._run(request.command, request.body))
        except ReplicationError as error:
            reply = Reply(request.id, {}, one_line(str(error)) or type(error).__name__)
        await self._end.room_to_say()
        try:
            self._end.say(reply)
        except LocalProtocolError as error:
            self._end.say(Reply(request.id, {}, one_line(f"{request.command} has no answer that fits: {error}")))

    async def _run(self, command: str, body: dict[str, object]) -> dict[str, object]:
        if command == "mode.set":
            try:
                self._first.switch_mode(Mode(body.get("mode")))
            except ValueError as error:
                raise ReplicationError(f"mode.set: {error}") from error
            return {"mode": self._first.mode.value}
        if command == "link.status":
            return link_status(self._relay)
        return await self._first.request(command, body)


def link_status(relay: Relay) -> dict[str, object]:
    """How a relay is doing, JSON-like."""
    status = relay.first.status()
    return {
        "link": status.link.value,
        "error": status.error,
        "outage": status.outage,
        "down_seconds": None if relay.down_since is None else trio.current_time() - relay.down_since,
        "mode": status.mode.value,
        "waits_for": status.waits_for.name.lower(),
        "queued_bytes": status.queued_bytes,
        "queued_records": status.queued_records,
        "spool_bytes": status.spool_bytes,
        "spool_error": status.spool_error,
        "last": status.last_seq,
        "durable": status.durable,
    }


def _size(record: Message) -> int:
    """About the memory that a record's frame takes."""
    if isinstance(record, (Reconcile, Correct)):
        return RECORD_BYTES + len(record.extent.data)
    if isinstance(record, Aggregate):
        return RECORD_BYTES + sum(len(extent.data) for extent in record.extents)
    return RECORD_BYTES
