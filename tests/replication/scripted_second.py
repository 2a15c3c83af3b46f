"""A second appliance without a store, that does what a test tells it: over memory, on trio's clock."""

from __future__ import annotations

import trio
import trio.testing

from dedup.types import ClockRun, Record, Seq, TimeNs, VolumeId, VolumeState
from replication.errors import LinkDown
from replication.messages import (
    PROTOCOL_VERSION,
    Ack,
    Compare,
    CompareResult,
    ErrorCode,
    Failure,
    Hello,
    Message,
    Reply,
    Request,
    Role,
    SyncRequest,
    VolumePage,
    Welcome,
)
from replication.session import NUMBERED_TYPES, Session, Side
from replication.transport import Connection, memory_pair

VOLUME = VolumeState(VolumeId(1), "disk.img", 1 << 30, 0o644, 0, 0)


class ScriptedSecond:
    """`connect` is what a first appliance is given. Records are kept in `log`; acknowledgements are given by hand with
    `ack`, or by themselves when `acks` is set."""

    def __init__(self, nursery: trio.Nursery, *, held: int = 0) -> None:
        self._nursery = nursery
        self.held = held
        self.durable = held
        self.store = "store"
        self.acks = True
        """Acknowledge each record as received."""
        self.syncs = True
        """Answer a SyncRequest."""
        self.compares = True
        """Answer a Compare."""
        self.delay = 0.0
        """Seconds until a record is answered."""
        self.reachable = True
        self._reading = trio.Event()
        self._reading.set()
        self.refuses: ErrorCode | None = None
        """Answer Hello with this."""
        self.fails_records: ErrorCode | None = None
        """Answer the next record with this."""
        self.log: list[Record | Compare] = []
        self.sync_requests = 0
        self.requests: list[Request] = []
        self.hellos: list[Hello] = []
        self._connection: Connection | None = None
        self._session = Session(Side.SERVER)

    def stop_reading(self) -> None:
        """From now on it is like a stopped process; what arrives after the next bytes waits."""
        self._reading = trio.Event()

    def go_on_reading(self) -> None:
        self._reading.set()

    async def connect(self) -> Connection:
        await trio.lowlevel.checkpoint()
        if not self.reachable:
            raise LinkDown("the test says nobody is there")
        near, far = memory_pair()
        self._nursery.start_soon(self._serve, far)
        return near

    async def ack(self, received: int, durable: int | None = None) -> None:
        self.durable = self.durable if durable is None else durable
        await self.say(Ack(Seq(received), Seq(self.durable), Seq(received), Seq(self.durable)))
        await trio.testing.wait_all_tasks_blocked()

    async def say(self, message: Message) -> None:
        assert self._connection is not None
        await self._connection.send(self._session.send(message))

    async def drop(self) -> None:
        """Breaks the connection."""
        assert self._connection is not None
        await self._connection.aclose()
        await trio.testing.wait_all_tasks_blocked()

    async def _serve(self, connection: Connection) -> None:
        session = Session(Side.SERVER)
        self._connection, self._session = connection, session
        async with connection:
            try:
                while data := await connection.receive():
                    await self._reading.wait()
                    session.receive_data(data)
                    while (message := session.next_event()) is not None:
                        await self._handle(session, message)
            except LinkDown:
                pass

    async def _handle(self, session: Session, message: Message) -> None:
        match message:
            case Hello():
                self.hellos.append(message)
                if self.refuses is not None:
                    await self.say(Failure(self.refuses, "the test says no"))
                    raise LinkDown("refused")
                held, durable = Seq(self.held), Seq(self.durable)
                await self.say(
                    Welcome(
                        PROTOCOL_VERSION,
                        self.store,
                        message.epoch,
                        held,
                        durable,
                        TimeNs(7),
                        ClockRun(0),
                        True,
                        False,
                        VolumeId(2),
                        b"key %d" % len(self.hellos),
                    )
                )
                if message.role is Role.AGENT:
                    await self.say(VolumePage((VOLUME,), False))
                    await self.say(VolumePage((), True))
            case SyncRequest():
                self.sync_requests += 1
                if self.syncs:
                    self.durable = self.held
                    await self.say(Ack(Seq(self.held), Seq(self.held), Seq(self.held), Seq(self.held)))
            case Request():
                self.requests.append(message)
                if message.command == "echo":
                    await self.say(Reply(message.id, message.body))
                elif message.command == "refuse":
                    await self.say(Reply(message.id, {}, "refused, says the test"))
            case _ if type(message) in NUMBERED_TYPES:
                if self.fails_records is not None:
                    await self.say(Failure(self.fails_records, "the disk is full, says the test"))
                    raise LinkDown("failed")
                await trio.sleep(self.delay)
                self.log.append(message)  # type: ignore[arg-type]
                self.held = message.seq  # type: ignore[union-attr]
                if isinstance(message, Compare) and self.compares:
                    await self.say(CompareResult(message.seq, bytes(len(message.digests) // 16 - 1) + b"\1"))
                if self.acks:
                    await self.say(Ack(Seq(self.held), Seq(self.durable), Seq(self.held), Seq(self.durable)))
