"""The server end of one connection: greets, takes records in batches, acknowledges, answers.

Invariants:
- order: records are ingested in the order of the stream; a Compare or Request is answered after all records before it
  were ingested; an Ack reports only what an ingest or a sync has returned for.
- bounded: a batch, the open compares and requests, and the tasks of a session have limits.
- Whatever the peer does or the store refuses ends this session only, with a typed Failure as its last word where the
  stream still is at the end of a frame.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, cast, get_args

import trio

from dedup.errors import Damaged, RewindError, StoreError, StoreFailed, StoreFull, UnknownName
from dedup.space import growth_of
from dedup.types import (
    Aggregate,
    ClockRun,
    Correct,
    Epoch,
    EpochStart,
    Heartbeat,
    Reconcile,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from replication.commands import Commands
from replication.comparing import Comparer
from replication.errors import LinkDown, LocalProtocolError, ProtocolError
from replication.held_blocks import HeldBlocks
from replication.history_process import HistoryProcesses, HistoryReader
from replication.identity import Peer
from replication.messages import (
    PROTOCOL_VERSION,
    VOLUMES_PER_PAGE_MAX,
    Compare,
    ErrorCode,
    Failure,
    Hello,
    Message,
    Offer,
    Query,
    Remainder,
    Reply,
    Request,
    Role,
    SyncRequest,
    VolumePage,
    Welcome,
)
from replication.permissions import Caller, NotAllowed, check_peer
from replication.refused import Refused
from replication.session import Session, Side
from replication.session_hearing import (
    ANSWERS_MAX,
    CONTROL_IDLE_SECONDS,
    FOR_EVER,
    FRAME_IDLE_SECONDS,
    HELLO_SECONDS,
    MESSAGES_ROW,
    Hearing,
    fell_silent,
    hear_hello,
)
from replication.session_speech import Speech
from replication.space_gate import SpaceGate
from replication.store_writer import Round, StoreWriter
from replication.transport import Connection

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from dedup.held_range import HeldRange
    from dedup.pointer_map import Addresses

log = logging.getLogger("rewindfs.second_appliance")

BATCH_RECORDS_MAX: Final = 1024
BATCH_BYTES_MAX: Final = 4 << 20
FAREWELL_SECONDS: Final = 2.0
"""How long a session that is being ended may take to send what it owes, its Failure included."""
DIGEST_KEY_BYTES: Final = 32
ERROR_CHARACTERS_MAX: Final = 1000
RECORD_BYTES: Final = 128
"""What a record counts in a batch, apart from the bytes it covers."""


class Host(Protocol):
    """The appliance, as a session sees it."""

    writer: StoreWriter
    commands: Commands
    space: SpaceGate
    histories: HistoryProcesses

    def greeted(self, session: ServerSession) -> None:
        """The session has said Hello, and may do what it said. Raises Refused."""

    async def admit(self, session: ServerSession, hello: Hello) -> GroupWriter:
        """The group that the agent may feed from now on, alone. Raises Refused, StoreError."""

    def release(self, session: ServerSession, group: str) -> None:
        """The session feeds the group no longer."""


class ServerSession:
    """One connection's server end. `run` is its life; the other methods may be called at any time."""

    def __init__(self, host: Host, connection: Connection) -> None:
        self.epoch = Epoch(0)
        self.ended = trio.Event()
        """Set when nothing of this session touches the store any more."""
        self._host = host
        self._writer = host.writer
        self._space = host.space
        self._connection = connection
        self._session = Session(Side.SERVER)
        self._speech = Speech(connection, self._session)
        self._hearing = Hearing(connection, self._session)
        self._scope = trio.CancelScope()
        self.waits_for_room = False
        """Whether a batch waits until the store has room for it; nothing of it is in the store."""
        self._farewell: Failure | None = None
        self._digest_key = secrets.token_bytes(DIGEST_KEY_BYTES)
        self._comparer = Comparer(host.writer, self._digest_key)
        self._held = HeldBlocks(host.writer, self._session, self._digest_key)
        self._sync_asked: Round | None = None
        self._answering = trio.CapacityLimiter(ANSWERS_MAX)
        self._readers: trio.Nursery | None = None
        self._reader: HistoryReader | None = None
        """Who answers Queries; from the first one on."""
        self._name = "a session without Hello"

    @property
    def peer(self) -> Peer | None:
        """Who the other end has proved to be; known once it has said Hello."""
        return self._connection.peer

    def end(self, code: ErrorCode, text: str) -> None:
        """End it soon, with this Failure as its last word; a batch that is being ingested is finished."""
        if self._farewell is None:
            self._farewell = Failure(code, _line(text))
            log.warning("%s: ended: %s", self._name, text)
        self.drain(FAREWELL_SECONDS)

    def drain(self, seconds: float) -> None:
        """Receive nothing more; end after the answers to what was received, at the latest after `seconds`. A batch that
        waits for room is given up: nobody was told of it."""
        self._hearing.stop()
        if self.waits_for_room:
            self._hearing.scope.cancel()
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + seconds)

    async def run(self) -> None:
        """From Hello to the end; closes the connection. Raises only what is a bug."""
        try:
            with self._scope, self._guard():
                await self._converse()
        finally:
            self.ended.set()
            with trio.move_on_after(FAREWELL_SECONDS) as patience:
                patience.shield = True
                if self._farewell is not None:
                    await self._speech.farewell(self._farewell)
            await self._connection.aclose()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """What may happen to a session ends it, from whichever of its tasks."""
        try:
            yield
        except LinkDown as error:
            log.info("%s: %s", self._name, error)
            self.drain(0)
        except ProtocolError as error:
            self.end(ErrorCode.PROTOCOL, str(error))
        except Refused as error:
            self.end(error.code, str(error))
        except NotAllowed as error:
            self.end(ErrorCode.REFUSED, str(error))
        except StoreFull as error:
            self.end(ErrorCode.STORE_FULL, str(error))
        except (StoreFailed, Damaged) as error:
            self.end(ErrorCode.STORE_FAILED, str(error))
        except StoreError as error:
            # The store refused what the peer sent: an unknown volume, a name that is taken.
            self.end(ErrorCode.PROTOCOL, str(error))

    async def _converse(self) -> None:
        hello = await self._hello()
        if hello is None:
            return
        if hello.version != PROTOCOL_VERSION:
            text = f"protocol version {hello.version} is not spoken here, {PROTOCOL_VERSION} is; use equal versions"
            raise Refused(text, ErrorCode.VERSION)
        self._name = f"{hello.role.value} of {hello.group or 'no group'}, epoch {hello.epoch}"
        if self.peer is not None:
            self._name += f", {self.peer.name}"
        check_peer(self.peer, hello.role, hello.group)
        self._host.greeted(self)
        if hello.role is Role.AGENT:
            await self._serve_agent(hello)
        else:
            await self._serve_control(hello)

    async def _hello(self) -> Hello | None:
        """The first message, or None when there is none and nothing to say about it."""
        with trio.move_on_after(HELLO_SECONDS) as self._hearing.scope:
            return await hear_hello(self._session, self._hearing.receive)
        if self._hearing.scope.cancelled_caught and not self._hearing.stopped:
            raise Refused(f"no Hello within {HELLO_SECONDS:g} s", ErrorCode.PROTOCOL)
        return None

    async def _serve_agent(self, hello: Hello) -> None:
        self.epoch = hello.epoch
        group = await self._host.admit(self, hello)
        try:
            await self._welcome(group)
            log.info("%s: feeds from record %d", self._name, group.held + 1)
            self._connection.linger()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_durable, group)
                async with trio.open_nursery() as answers:
                    with self._guard():
                        await self._stream(self._caller(hello), group, answers)
                nursery.cancel_scope.cancel()
        finally:
            self._host.release(self, hello.group)

    async def _serve_control(self, hello: Hello) -> None:
        nothing = Seq(0)
        await self._speech.say(
            Welcome(
                version=PROTOCOL_VERSION,
                store=self._writer.store.uuid,
                epoch=Epoch(0),
                held=nothing,
                durable=nothing,
                time=TimeNs(0),
                run=ClockRun(0),
                has_base=False,
                reconciling=False,
                next_volume=VolumeId(0),
                digest_key=b"",
            )
        )
        async with trio.open_nursery() as self._readers:
            async with trio.open_nursery() as answers:
                with self._guard():
                    await self._stream(self._caller(hello), None, answers)
            self._readers.cancel_scope.cancel()

    def _caller(self, hello: Hello) -> Caller:
        return Caller(hello.role, hello.group, self.peer)

    async def _welcome(self, group: GroupWriter) -> None:
        # One synchronous look: what is listed is what exists at `held`.
        volumes = group.volumes()
        welcome = Welcome(
            version=PROTOCOL_VERSION,
            store=self._writer.store.uuid,
            epoch=group.epoch,
            held=group.held,
            durable=group.durable,
            time=group.time,
            run=group.run,
            has_base=group.has_base,
            reconciling=group.reconciling,
            next_volume=group.next_volume,
            digest_key=self._digest_key,
        )
        if group.durable < group.held:
            self._writer.expect_sync()
        await self._speech.say(welcome)
        for start in range(0, max(len(volumes), 1), VOLUMES_PER_PAGE_MAX):
            end = start + VOLUMES_PER_PAGE_MAX
            await self._speech.say(VolumePage(tuple(volumes[start:end]), last=end >= len(volumes)))

    async def _stream(self, caller: Caller, group: GroupWriter | None, answers: trio.Nursery) -> None:
        idle = CONTROL_IDLE_SECONDS if group is None else FOR_EVER
        with trio.CancelScope() as self._hearing.scope:
            while True:
                await self._take(caller, group, answers)
                patience = FRAME_IDLE_SECONDS if self._session.incomplete else idle
                if patience != FOR_EVER:
                    self._hearing.scope.deadline = trio.current_time() + patience
                if not await self._hearing.hear():
                    return
                if patience != FOR_EVER:
                    self._hearing.scope.deadline = FOR_EVER
        if not self._hearing.stopped:
            raise fell_silent(self._session, patience)

    async def _take(self, caller: Caller, group: GroupWriter | None, answers: trio.Nursery) -> None:
        """Everything that has arrived completely, the records in batches."""
        batch: list[Record] = []
        batch_bytes = taken = 0
        next_event = self._session.next_event
        while (message := next_event()) is not None and self._farewell is None:
            taken += 1
            if not taken % MESSAGES_ROW:
                await trio.lowlevel.checkpoint()
            if type(message) is Write:
                batch.append(message)
                batch_bytes += RECORD_BYTES + message.extent.length
                if len(batch) < BATCH_RECORDS_MAX and batch_bytes < BATCH_BYTES_MAX:
                    continue
            elif isinstance(message, Compare):
                batch.append(Heartbeat(message.seq, message.time, message.run))
                batch_bytes += RECORD_BYTES
            elif not isinstance(message, (Request, SyncRequest, Failure, Offer, Query)):
                record = self._record(message)
                batch.append(record)
                batch_bytes += _weight(record)
                if len(batch) < BATCH_RECORDS_MAX and batch_bytes < BATCH_BYTES_MAX:
                    continue
            if batch:
                await self._ingest(group, batch, batch_bytes)
                batch, batch_bytes = [], 0
            if isinstance(message, Compare):
                await self._compare(group, message, answers)
            elif isinstance(message, Offer):
                await self._offer(group, message, answers)
            elif isinstance(message, SyncRequest):
                self._sync(group, answers)
            elif isinstance(message, Request):
                answers.start_soon(self._answer, caller, message)
            elif isinstance(message, Query):
                await self._query(caller, message)
            elif isinstance(message, Failure):
                log.warning("%s: the peer gave up: %s", self._name, message.text)
                self.drain(0)
        if batch:
            await self._ingest(group, batch, batch_bytes)

    def _record(self, message: Message) -> Record:
        if isinstance(message, Remainder):
            return self._held.completed(message)
        if not isinstance(message, get_args(Record)):
            raise ProtocolError(f"{type(message).__name__} is no record")
        if isinstance(message, EpochStart) and message.epoch > self.epoch:
            raise ProtocolError(f"epoch {message.epoch} starts in a session of epoch {self.epoch}")
        return cast(Record, message)

    async def _ingest(self, group: GroupWriter | None, batch: list[Record], batch_bytes: int) -> None:
        assert group is not None, "the session's table lets only agents send records"
        if self._space.open:
            await self._writer.ingest(group, batch, batch_bytes)
        else:
            await self._ingest_within_limits(group, batch, batch_bytes)
        await self._speech.ack(group)
        self._writer.let_pass()

    async def _ingest_within_limits(self, group: GroupWriter, batch: list[Record], batch_bytes: int) -> None:
        growth, bare = growth_of(batch)
        self.waits_for_room = True
        if self._hearing.stopped:
            self._hearing.scope.cancel()  # the batch passes only if it need not wait
        try:
            await self._space.admit(growth, bare=bare)
        finally:
            self.waits_for_room = False
        try:
            await self._writer.ingest(group, batch, batch_bytes)
        finally:
            self._space.landed(growth)

    async def _compare(self, group: GroupWriter | None, message: Compare, answers: trio.Nursery) -> None:
        assert group is not None, "the session's table lets only agents compare"
        held = await self._comparer.take(group, message)
        answers.start_soon(self._answer_compare, group, message, held)

    async def _answer_compare(self, group: GroupWriter, message: Compare, held: HeldRange) -> None:
        with self._guard():
            await self._speech.say(await self._comparer.answer(group, message, held))

    async def _offer(self, group: GroupWriter | None, message: Offer, answers: trio.Nursery) -> None:
        assert group is not None, "the session's table lets only agents offer"
        candidates = await self._held.take(group, message)
        answers.start_soon(self._answer_offer, message, candidates)

    async def _answer_offer(self, message: Offer, candidates: Addresses) -> None:
        with self._guard():
            await self._speech.say(await self._held.answer(message, candidates))

    def _sync(self, group: GroupWriter | None, answers: trio.Nursery) -> None:
        turn = self._writer.request_sync()
        if turn is not self._sync_asked:
            # One answer per sync, however often it was asked for: an Ack is cumulative.
            self._sync_asked = turn
            answers.start_soon(self._answer_sync, group, turn)

    async def _answer_sync(self, group: GroupWriter | None, turn: Round) -> None:
        await turn.done.wait()
        if turn.error is None and group is not None:
            with self._guard():
                await self._speech.ack(group)

    async def _tell_durable(self, group: GroupWriter) -> None:
        with self._guard():
            while True:
                changed = self._writer.changed
                if group.durable > self._session.durable:
                    await self._speech.ack(group)
                await changed.wait()

    async def _query(self, caller: Caller, query: Query) -> None:
        if self._reader is None:
            assert self._readers is not None, "the session's table lets only readers ask about the past"
            self._reader = await self._readers.start(self._read_history, caller)
        await self._reader.ask(query)

    async def _read_history(self, caller: Caller, *, task_status: trio.TaskStatus[HistoryReader]) -> None:
        try:
            group = self._host.commands.group_name(caller)
        except UnknownName as error:
            raise Refused(str(error)) from error
        async with self._host.histories.reading(group, self.peer, local=self._connection.is_local) as reader:
            log.info("%s: goes back in group %s", self._name, group)
            task_status.started(reader)
            with self._guard():
                while True:
                    await self._speech.say(await reader.next_result())

    async def _answer(self, caller: Caller, request: Request) -> None:
        with self._guard():
            async with self._answering:
                await self._reply(caller, request)

    async def _reply(self, caller: Caller, request: Request) -> None:
        try:
            reply = Reply(request.id, await self._host.commands.run(caller, request.command, request.body))
        except StoreFailed:
            raise
        except RewindError as error:
            reply = Reply(request.id, {}, _line(str(error)) or type(error).__name__)
        try:
            await self._speech.say(reply)
        except LocalProtocolError as error:
            await self._speech.say(Reply(request.id, {}, _line(f"{request.command} has no answer that fits: {error}")))


def _weight(message: Record) -> int:
    """What a record counts in a batch: bytes of volumes it covers, zeros too, for they cost pointers."""
    if isinstance(message, (Write, Reconcile, Correct)):
        return RECORD_BYTES + message.extent.length
    if isinstance(message, Aggregate):
        return RECORD_BYTES + sum(extent.length for extent in message.extents)
    return RECORD_BYTES


def _line(text: str) -> str:
    """One line that fits a Failure or a Reply."""
    return " ".join(text.split())[:ERROR_CHARACTERS_MAX].replace("\0", "")
