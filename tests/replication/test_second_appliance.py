"""The second appliance against peers that speak the protocol, and against some that do not."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b

import pytest
import trio
import trio.testing

from dedup.errors import StoreFailed
from dedup.types import (
    BLOCK_BYTES,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Heartbeat,
    Seq,
    TimeNs,
    VolumeId,
    VolumeState,
    Write,
)
from replication import server_session, store_writer
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
from replication.second_appliance import SecondAppliance
from replication.session import Session, Side
from replication.transport import Connection, MemoryConnection, memory_pair
from replication.wire import encode
from tests.replication.fake_store import FakeStore

RUN = ClockRun(0)
ONE = VolumeId(1)


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch as large as those that are held up here is ingested in a thread."""
    monkeypatch.setattr(store_writer, "THREAD_BYTES", 256 << 10)


def write(seq: int, data: bytes = b"x" * BLOCK_BYTES, offset: int = 0) -> Write:
    return Write(Seq(seq), TimeNs(seq), RUN, Extent(ONE, offset, data))


def beat(seq: int) -> Heartbeat:
    return Heartbeat(Seq(seq), TimeNs(seq), RUN)


class Peer:
    """A client that says what a test tells it to, allowed or not."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.session = Session(Side.CLIENT)
        self.welcome: Welcome | None = None

    async def say(self, *messages: Message) -> None:
        """All in one piece, so that they arrive together."""
        await self.connection.send([part for message in messages for part in self.session.send(message)])

    async def say_raw(self, data: bytes) -> None:
        await self.connection.send([data])

    async def hear(self) -> Message | None:
        """The next message; None at the end of the stream."""
        while (message := self.session.next_event()) is None:
            data = await self.connection.receive()
            if not data:
                return None
            self.session.receive_data(data)
        return message

    async def hear_ack(self, received: int, durable: int | None = None) -> Ack:
        """Acks until one has come this far."""
        while True:
            message = await self.hear()
            assert isinstance(message, Ack), message
            if message.received >= received and (durable is None or message.durable >= durable):
                return message

    async def greet(
        self, role: Role = Role.AGENT, group: str = "g", epoch: int = 1, agent: str = "a", *, take_over: bool = False
    ) -> Message | None:
        """Hello; then all volumes of the answer, when it is a Welcome to an agent."""
        name = agent if role is Role.AGENT else ""
        await self.say(Hello(PROTOCOL_VERSION, role, group, Epoch(epoch), name, take_over))
        answer = await self.hear()
        if isinstance(answer, Welcome):
            self.welcome = answer
            if role is Role.AGENT:
                self.pages = [await self._page()]
                while not self.pages[-1].last:
                    self.pages.append(await self._page())
        return answer

    async def _page(self) -> VolumePage:
        page = await self.hear()
        assert isinstance(page, VolumePage)
        return page

    async def ask(self, command: str, **body: object) -> Reply:
        self.asked = getattr(self, "asked", 0) + 1
        await self.say(Request(self.asked, command, body))
        while not isinstance(reply := await self.hear(), Reply):
            assert isinstance(reply, Ack), reply
        return reply


class World:
    """A running appliance over a fake store, and a way to connect to it."""

    def __init__(self, appliance: SecondAppliance, store: FakeStore, connect: trio.MemorySendChannel[Connection]):
        self.appliance = appliance
        self.store = store
        self.channel = connect

    async def connect(self) -> Peer:
        ours, theirs = memory_pair()
        await self.channel.send(theirs)
        return Peer(ours)

    async def agent(self, group: str = "g", epoch: int = 1) -> Peer:
        """Connected and welcomed."""
        peer = await self.connect()
        assert isinstance(await peer.greet(group=group, epoch=epoch), Welcome)
        return peer

    async def feeding(self, group: str = "g", blocks: int = 8) -> Peer:
        """The first agent of a new group, with volume 1."""
        peer = await self.agent(group)
        start = EpochStart(Seq(1), TimeNs(1), RUN, Epoch(1), True)
        await peer.say(start, Create(Seq(2), TimeNs(2), RUN, ONE, "disk", blocks * BLOCK_BYTES, 0o600, 0, 0))
        await peer.hear_ack(2)
        return peer


class ChannelListener:
    def __init__(self, connections: trio.MemoryReceiveChannel[Connection]) -> None:
        self._connections = connections

    async def accept(self) -> Connection:
        return await self._connections.receive()

    async def aclose(self) -> None:
        self._connections.close()


@asynccontextmanager
async def running(store: FakeStore, **options: int) -> AsyncIterator[World]:
    send, receive = trio.open_memory_channel[Connection](0)
    appliance = SecondAppliance(store, **options)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [ChannelListener(receive)])
        yield World(appliance, store, send)
        appliance.stop()


@pytest.fixture(autouse=True)
def quick_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SYNC_SECONDS", 0.02)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


async def thread_wait(wait: object) -> None:
    """Wait for an event that a worker thread sets."""
    with trio.fail_after(10):
        await trio.to_thread.run_sync(wait, abandon_on_cancel=True)  # type: ignore[arg-type]


# -- greeting --------------------------------------------------------------------------------------------------------


async def test_welcome_says_what_the_store_holds(store: FakeStore) -> None:
    group = store.group("g")
    group.held, group.durable, group.epoch, group.time = Seq(7), Seq(5), Epoch(3), TimeNs(99)
    group.has_base = group.reconciling = True
    group.next_volume = VolumeId(601)
    group.listed = [VolumeState(VolumeId(n), f"v{n}", n, 0o600, 0, 0) for n in range(1, 601)]
    async with running(store) as world:
        peer = await world.agent(epoch=4)
        welcome = peer.welcome
        assert welcome is not None
        assert (welcome.held, welcome.durable, welcome.epoch, welcome.time) == (7, 5, 3, 99)
        assert (welcome.has_base, welcome.reconciling, welcome.next_volume) == (True, True, 601)
        assert welcome.store == store.uuid and len(welcome.digest_key) == 32
        assert [len(page.volumes) for page in peer.pages] == [256, 256, 88]
        assert [state for page in peer.pages for state in page.volumes] == group.listed
        # What is held and not durable becomes so without being asked for.
        assert (await peer.hear_ack(7, 7)).durable == 7


async def test_another_version_is_refused(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.connect()
        await peer.say(Hello(99, Role.AGENT, "g", Epoch(1), "a"))
        answer = await peer.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.VERSION
        assert await peer.hear() is None


async def test_a_group_name_the_store_refuses(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.connect()
        answer = await peer.greet(group="-bad")
        assert isinstance(answer, Failure) and answer.code is ErrorCode.REFUSED and "-bad" in answer.text


async def test_a_peer_without_hello_is_ended(store: FakeStore, autojump_clock: trio.testing.MockClock) -> None:
    async with running(store) as world:
        peer = await world.connect()
        answer = await peer.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL and "no Hello" in answer.text


async def test_sessions_are_bounded(store: FakeStore) -> None:
    async with running(store, sessions_max=2) as world:
        first, second = await world.agent("a"), await world.agent("b")
        third = await world.connect()
        answer = await third.greet(group="c")
        assert isinstance(answer, Failure) and answer.code is ErrorCode.REFUSED and "2 sessions" in answer.text
        await first.connection.aclose()
        await second.say(beat(1))
        await second.hear_ack(1)
        while world.appliance.live()[""] > 1:
            await trio.testing.wait_all_tasks_blocked()
        await world.agent("c")


# -- records ---------------------------------------------------------------------------------------------------------


async def test_what_arrives_together_is_one_batch_and_one_ack(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding()
        await peer.say(*[write(seq) for seq in range(3, 23)])
        ack = await peer.hear_ack(3)
        assert ack.received == 22
        assert store.group("g").batches[-1] == 20


async def test_batches_are_bounded_by_records_and_bytes(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding(blocks=4096)
        await peer.say(*[beat(seq) for seq in range(3, 3003)])
        await peer.hear_ack(3002)
        assert max(store.group("g").batches) == server_session.BATCH_RECORDS_MAX
        before = len(store.group("g").batches)
        await peer.say(*[write(3003 + n, b"y" * (1 << 20), n << 20) for n in range(9)])
        await peer.hear_ack(3011)
        assert max(store.group("g").batches[before:]) <= 4


async def test_received_is_acknowledged_only_after_the_ingest(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding(blocks=256)
        store.ingest_gate.clear()
        store.ingest_begun.clear()
        await peer.say(write(3, b"z" * (512 << 10)))
        await thread_wait(store.ingest_begun.wait)
        acks: list[Ack] = []

        async def listen() -> None:
            acks.append(await peer.hear_ack(3))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.testing.wait_all_tasks_blocked()
            assert acks == []
            store.ingest_gate.set()
        assert acks[0].received == 3
        assert store.group("g").content[ONE][: 512 << 10] == b"z" * (512 << 10)


async def test_a_reconnect_resumes_at_held(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding()
        await peer.say(write(3))
        await peer.connection.aclose()
        again = await world.agent()
        assert again.welcome is not None
        held = again.welcome.held
        assert held in (2, 3)
        await again.say(*[write(seq) for seq in range(held + 1, 6)])
        await again.hear_ack(5)
        assert [record.seq for record in store.group("g").records] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("seq", [1, 2, 4, 9])
async def test_a_record_that_does_not_follow_is_refused(store: FakeStore, seq: int) -> None:
    async with running(store) as world:
        peer = await world.feeding()
        await peer.say_raw(b"".join(bytes(part) for part in encode(beat(seq))))
        answer = await peer.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL
        assert await peer.hear() is None
        assert store.group("g").held == 2
        again = await world.agent()
        await again.say(beat(3))
        await again.hear_ack(3)


async def test_a_record_that_the_store_refuses_ends_the_session(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.agent()
        await peer.say(write(1))
        answer = await peer.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL and "volume" in answer.text


async def test_an_epoch_above_the_sessions_own_is_refused(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.agent(epoch=2)
        await peer.say(EpochStart(Seq(1), TimeNs(1), RUN, Epoch(3), True))
        answer = await peer.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL


# -- durability ------------------------------------------------------------------------------------------------------


async def test_durable_follows_without_being_asked_for(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding()
        await peer.say(write(3))
        await peer.hear_ack(3, 3)
        assert store.group("g").durable == 3


async def test_sync_requests_share_a_sync_and_late_ones_wait_for_the_next(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "SYNC_SECONDS", 3600)
    async with running(store) as world:
        one, two = await world.feeding("one"), await world.feeding("two")
        store.sync_gate.clear()
        await one.say(SyncRequest())
        await thread_wait(store.sync_begun.acquire)
        # A sync is under way. What comes now, and asks now, is not covered by it.
        await one.say(write(3), SyncRequest(), SyncRequest())
        await two.say(write(3), SyncRequest())
        await one.hear_ack(3)
        await two.hear_ack(3)
        store.sync_gate.set()
        await one.hear_ack(3, 3)
        await two.hear_ack(3, 3)
        assert store.syncs == 2


async def test_a_sync_request_is_answered_when_nothing_is_new(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding()
        await peer.hear_ack(2, 2)
        await peer.say(SyncRequest())
        assert await peer.hear() == Ack(Seq(2), Seq(2), Seq(2), Seq(2))


async def test_many_bytes_begin_a_sync(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SYNC_SECONDS", 3600)
    monkeypatch.setattr(store_writer, "SYNC_BYTES", 100_000)
    async with running(store) as world:
        peer = await world.feeding()
        await peer.say(*[write(seq) for seq in range(3, 33)])
        await peer.hear_ack(32, 32)


async def test_a_due_checkpoint_is_made_and_makes_durable(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SYNC_SECONDS", 3600)
    async with running(store) as world:
        peer = await world.feeding()
        store.due = True
        await peer.say(write(3))
        await peer.hear_ack(3, 3)
        with trio.fail_after(5):
            while store.due:  # noqa: ASYNC110 - a store knows no events
                await trio.sleep(0.001)
        assert (store.checkpoints, store.syncs) == (1, 1)  # the sync before it runs beside ingest


async def test_what_a_checkpoint_makes_due_is_merged_beside_ingest(store: FakeStore) -> None:
    store.to_merge = 2  # by an earlier writer
    async with running(store) as world:
        peer = await world.feeding()
        for merged in (2, 7):
            with trio.fail_after(5):
                while store.merges < merged:  # noqa: ASYNC110 - a store knows no events
                    await trio.sleep(0.001)
            store.to_merge = 5
            store.due = True
            await peer.say(write(store.groups[0].held + 1))
        with trio.fail_after(5):
            while store.merges < 12:  # noqa: ASYNC110
                await trio.sleep(0.001)
    assert (store.merges, store.to_merge) == (12, 0)


async def test_what_nobody_foresaw_in_a_merge_ends_nothing_but_merging(
    store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.merge_error = AssertionError("more rows than there can be")
    async with running(store) as world:
        peer = await world.feeding()
        with trio.fail_after(5):
            while "not merged any more" not in caplog.text:  # noqa: ASYNC110 - a store knows no events
                await trio.sleep(0.001)
        store.merge_error = None
        store.to_merge = 5
        store.due = True
        await peer.say(write(3))
        await peer.hear_ack(3, 3)
        with trio.fail_after(5):
            while store.due:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await peer.say(write(4))
        await peer.hear_ack(4, 4)
    assert store.merges == 0 and "more rows than there can be" in caplog.text


async def test_a_full_disk_refuses_the_batch_and_later_goes_on(store: FakeStore) -> None:
    async with running(store) as world:
        peer, other = await world.feeding(), await world.agent("other")
        store.full = True
        await peer.say(write(3))
        while isinstance(answer := await peer.hear(), Ack):
            assert answer.received == 2
        assert isinstance(answer, Failure) and answer.code is ErrorCode.STORE_FULL
        assert store.group("g").held == 2
        store.full = False
        await other.say(beat(1))
        await other.hear_ack(1)
        again = await world.agent()
        assert again.welcome is not None and again.welcome.held == 2
        await again.say(write(3))
        await again.hear_ack(3, 3)


@pytest.mark.parametrize("where", ["sync", "ingest", "merge"])
async def test_a_failed_store_ends_the_appliance_and_tells_everyone(store: FakeStore, where: str) -> None:
    heard: list[Message | None] = []
    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(store) as world:
            peer, other = await world.feeding(), await world.agent("other")
            await peer.hear_ack(2, 2)
            store.broken, store.sync_fails, store.merge_fails = (where == one for one in ("ingest", "sync", "merge"))
            store.due = where == "merge"
            await peer.say(write(3))
            for each in (peer, other):
                while isinstance(answer := await each.hear(), Ack):
                    assert answer.durable <= (3 if where == "merge" else 2)
                heard.append(answer)
            await trio.sleep_forever()
    assert caught.group_contains(StoreFailed)
    assert [isinstance(answer, Failure) and answer.code for answer in heard] == [ErrorCode.STORE_FAILED] * 2


# -- hostile and broken peers ----------------------------------------------------------------------------------------

HELLO = b"".join(bytes(part) for part in encode(Hello(PROTOCOL_VERSION, Role.AGENT, "bad", Epoch(1), "a")))
ADMIN = b"".join(bytes(part) for part in encode(Hello(PROTOCOL_VERSION, Role.ADMIN, "", Epoch(0))))
BEAT = b"".join(bytes(part) for part in encode(beat(1)))
WORDS = {
    "noise": bytes(range(256)) * 9,
    "zeros": bytes(1000),
    "a frame too long": b"\xff\xff\xff\x7f\x20\0\0\0" + bytes(100),
    "no Hello first": BEAT,
    "two Hellos": HELLO + HELLO,
    "a Welcome from a client": b"".join(bytes(part) for part in encode(Ack(Seq(1), Seq(1), Seq(1), Seq(1)))),
    "a record from an admin": ADMIN + BEAT,
    "a cut frame": HELLO[:-3],
    "nothing": b"",
}


@pytest.mark.parametrize("words", WORDS)
async def test_a_malformed_peer_ends_only_its_own_session(store: FakeStore, words: str) -> None:
    async with running(store) as world:
        good = await world.feeding()
        bad = await world.connect()
        await bad.say_raw(WORDS[words])
        if words in ("a cut frame", "nothing"):
            await bad.connection.aclose()
        else:
            bad.session = Session(Side.CLIENT)
            heard = b""
            while data := await bad.connection.receive():
                heard += data
            failure = b"".join(bytes(part) for part in encode(Failure(ErrorCode.PROTOCOL, "")))[4:5]
            assert failure in heard
        await good.say(write(3))
        await good.hear_ack(3)
        assert [group.held for group in store.groups] == [3] + [0] * (len(store.groups) - 1)


async def test_a_peer_that_does_not_read_stops_only_itself(store: FakeStore) -> None:
    async with running(store) as world:
        good = await world.feeding()
        one, other = trio.testing.lockstep_stream_pair()
        deaf = Peer(MemoryConnection(one))
        await world.channel.send(MemoryConnection(other))
        await deaf.say(Hello(PROTOCOL_VERSION, Role.AGENT, "deaf", Epoch(1), "a"))
        await trio.testing.wait_all_tasks_blocked()
        for seq in range(3, 50):
            await good.say(write(seq))
            await good.hear_ack(seq)
        assert world.appliance.live()["deaf"] == 1
        await one.aclose()


# -- fencing ---------------------------------------------------------------------------------------------------------


async def test_an_older_epoch_is_refused(store: FakeStore) -> None:
    store.group("g").epoch = Epoch(5)
    async with running(store) as world:
        peer = await world.connect()
        answer = await peer.greet(epoch=4)
        assert isinstance(answer, Failure) and answer.code is ErrorCode.FENCED and "epoch 5" in answer.text
        await world.agent(epoch=5)


async def test_a_newer_agent_ends_the_older_one_for_good(store: FakeStore) -> None:
    async with running(store) as world:
        old = await world.feeding()
        new = await world.agent(epoch=2)
        while isinstance(answer := await old.hear(), Ack):
            pass
        assert isinstance(answer, Failure) and answer.code is ErrorCode.FENCED and "a newer start" in answer.text
        back = await world.connect()
        answer = await back.greet(epoch=1)
        assert isinstance(answer, Failure) and "epoch 2" in answer.text
        await new.say(beat(3))
        await new.hear_ack(3)


async def test_a_newer_agent_is_welcomed_after_the_older_ones_last_batch(store: FakeStore) -> None:
    async with running(store) as world:
        old = await world.feeding(blocks=256)
        store.ingest_gate.clear()
        store.ingest_begun.clear()
        await old.say(write(3, b"z" * (512 << 10)))
        await thread_wait(store.ingest_begun.wait)
        new = await world.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(new.greet, epoch=2))
            await trio.testing.wait_all_tasks_blocked()
            assert new.welcome is None
            store.ingest_gate.set()
        assert new.welcome is not None and new.welcome.held == 3


async def test_a_second_agent_of_the_same_epoch_is_refused_while_the_first_lives(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replication.second_appliance.SAME_EPOCH_SECONDS", 0.05)
    async with running(store) as world:
        first = await world.feeding()
        second = await world.connect()
        answer = await second.greet()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.REFUSED and "another agent" in answer.text
        await first.say(beat(3))
        await first.hear_ack(3)


async def test_the_same_agent_connecting_again_waits_for_its_old_session_to_end(store: FakeStore) -> None:
    async with running(store) as world:
        first = await world.feeding()
        again = await world.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.greet)
            await trio.testing.wait_all_tasks_blocked()
            assert again.welcome is None
            await first.connection.aclose()
        assert again.welcome is not None and again.welcome.held == 2


# -- compare ---------------------------------------------------------------------------------------------------------


async def test_compare_is_journalled_as_a_heartbeat_and_sees_what_came_before_it(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding(blocks=4)
        assert peer.welcome is not None
        blocks = [b"a" * BLOCK_BYTES, bytes(BLOCK_BYTES), b"c" * BLOCK_BYTES, b"d" * BLOCK_BYTES]
        key = peer.welcome.digest_key
        digests = b"".join(blake2b(block, key=key, digest_size=16).digest() for block in blocks)
        await peer.say(
            write(3, blocks[0]),
            Compare(Seq(4), TimeNs(4), RUN, ONE, 0, digests),
            write(5, blocks[2], 2 * BLOCK_BYTES),
        )
        while not isinstance(result := await peer.hear(), CompareResult):
            assert isinstance(result, Ack)
        assert result == CompareResult(Seq(4), bytes([0, 0, 1, 1]))
        await peer.hear_ack(5)
        assert store.group("g").records[3] == Heartbeat(Seq(4), TimeNs(4), RUN)
        assert [record.seq for record in store.group("g").records] == [1, 2, 3, 4, 5]


async def test_compare_of_an_unknown_volume_ends_the_session(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.agent()
        await peer.say(Compare(Seq(1), TimeNs(1), RUN, VolumeId(9), 0, bytes(16)))
        while isinstance(answer := await peer.hear(), Ack):
            pass
        assert isinstance(answer, Failure) and answer.code is ErrorCode.PROTOCOL


# -- commands --------------------------------------------------------------------------------------------------------


async def control(world: World, role: Role = Role.ADMIN, group: str = "") -> Peer:
    peer = await world.connect()
    assert isinstance(await peer.greet(role, group, 0), Welcome)
    return peer


async def test_an_admin_takes_and_deletes_snapshots(store: FakeStore) -> None:
    async with running(store) as world:
        await world.feeding()
        admin = await control(world)
        reply = await admin.ask("snapshot.create", name="mine")
        assert not reply.error
        assert {"group": "g", "name": "mine", "seq": 2, "kind": "snapshot"}.items() <= reply.body.items()
        assert "already has" in (await admin.ask("name.check", name="mine")).error
        again = await admin.ask("snapshot.create", name="mine")
        assert again.error == "the name 'mine' exists", "one line"
        assert (await admin.ask("snapshot.delete", name="mine")).body == {"group": "g", "name": "mine"}
        assert "no snapshot" in (await admin.ask("snapshot.delete", name="mine")).error


async def test_status_sync_and_checkpoint(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SYNC_SECONDS", 3600)
    async with running(store) as world:
        await world.feeding()
        admin = await control(world)
        assert (await admin.ask("sync")).body == {} and store.group("g").durable == 2
        assert not (await admin.ask("checkpoint")).error and store.checkpoints == 1
        status = (await admin.ask("status")).body
        assert status["store"] == {"bytes": 1, "snapshots": 0, "uuid": "5eed"} and status["sessions"] == 2
        (group,) = status["groups"]  # type: ignore[misc]
        assert {"group": "g", "epoch": 1, "held": 2, "durable": 2, "agents": 1}.items() <= group.items()


async def test_what_a_role_may_not_do(store: FakeStore) -> None:
    async with running(store) as world:
        agent = await world.feeding()
        reader = await control(world, Role.READER)
        for peer, command in [(reader, "snapshot.create"), (reader, "sync"), (agent, "snapshot.delete")]:
            assert "not for the role" in (await peer.ask(command, name="n")).error
        assert not (await reader.ask("status")).error
        assert not (await agent.ask("sync")).error
        assert store.group("g").names == set()


async def test_bad_requests_are_answered_and_the_session_goes_on(store: FakeStore) -> None:
    async with running(store) as world:
        await world.feeding()
        await world.feeding("h")
        admin = await control(world)
        assert "unknown command" in (await admin.ask("rm")).error
        assert "lacks 'name'" in (await admin.ask("name.check", group="g")).error
        assert "not text" in (await admin.ask("name.check", group="g", name=5)).error
        assert "--group" in (await admin.ask("name.check", name="n")).error
        assert "no group 'x'" in (await admin.ask("name.check", group="x", name="n")).error
        assert [group.name for group in store.groups] == ["g", "h"], "asking makes no group"
        mine = await control(world, group="h")
        assert (await mine.ask("snapshot.create", name="n")).body["group"] == "h"


async def test_a_name_that_an_agent_checked_is_kept_for_its_bookmark(store: FakeStore) -> None:
    async with running(store) as world:
        agent = await world.feeding()
        admin = await control(world)
        assert (await agent.ask("name.check", name="latest")).error, "a name that parses as TIME"
        assert "base snapshot" in (await agent.ask("name.check", name="point")).error
        store.group("g").has_base = store.group("g").reconciling = True
        assert "reconcile" in (await agent.ask("name.check", name="point")).error
        store.group("g").reconciling = False
        assert not (await agent.ask("name.check", name="point")).error
        assert "bookmark" in (await admin.ask("snapshot.create", name="point")).error


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_stop_finishes_the_batch_and_acknowledges_it(store: FakeStore) -> None:
    async with running(store) as world:
        peer = await world.feeding(blocks=256)
        store.ingest_gate.clear()
        store.ingest_begun.clear()
        await peer.say(write(3, b"z" * (512 << 10)))
        await thread_wait(store.ingest_begun.wait)
        world.appliance.stop()
        await trio.testing.wait_all_tasks_blocked()
        store.ingest_gate.set()
        await peer.hear_ack(3)
        while isinstance(last := await peer.hear(), Ack):
            pass
        assert last is None
    assert store.group("g").held == 3
