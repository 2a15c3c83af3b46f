"""A first appliance as a service, between agents and a second appliance that does what the test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from dedup.types import ClockRun, Epoch, Extent, Flush, Seq, TimeNs, VolumeId, Write
from replication import first_service, spool, spooler
from replication.control import exchange
from replication.errors import Fenced, HandshakeRefused, HistoryLost, LinkReset, RequestRefused
from replication.first_appliance import FirstAppliance
from replication.first_service import FirstService
from replication.forwarding import Forwarding
from replication.group_spools import GroupSpools
from replication.messages import (
    PROTOCOL_VERSION,
    Compare,
    ErrorCode,
    Failure,
    Hello,
    Level,
    Message,
    Role,
    Welcome,
)
from replication.modes import Mode, Outage
from replication.relay import Relay
from replication.session import Session, Side
from replication.status import LinkState
from replication.transport import Connection, memory_pair
from tests.replication.scripted_second import VOLUME, ScriptedSecond

RUN, DISK = ClockRun(0), VolumeId(1)


def write(seq: int, length: int = 8) -> Write:
    return Write(Seq(seq), TimeNs(seq), RUN, Extent(DISK, seq * 4096, bytes([seq % 255 + 1]) * length))


class Site:
    """A service, and agents that are real first appliances too: in their mount they run the same code."""

    def __init__(self, nursery: trio.Nursery, **options: object) -> None:
        self.second = ScriptedSecond(nursery)
        self.service = FirstService(self.second.connect, **options)  # type: ignore[arg-type]
        self.connections: list[Connection] = []
        self._nursery = nursery

    async def connect(self) -> Connection:
        near, far = memory_pair()
        self.connections.append(far)
        self._nursery.start_soon(self.service.serve_connection, far)
        return near

    def agent(self, epoch: int = 3, agent: str = "a", group: str = "g", **options: object) -> FirstAppliance:
        return FirstAppliance(
            self.connect,
            group=group,
            epoch=Epoch(epoch),
            agent=agent,
            through=True,
            **options,  # type: ignore[arg-type]
        )

    async def started(self, epoch: int = 3, agent: str = "a", **options: object) -> FirstAppliance:
        first = self.agent(epoch, agent, **options)
        await first.start()
        self._nursery.start_soon(first.run)
        return first

    async def break_links(self) -> None:
        """Breaks what agents have to the service."""
        for connection in self.connections:
            await connection.aclose()
        self.connections.clear()
        await trio.testing.wait_all_tasks_blocked()

    @property
    def relay(self) -> Relay:
        (relay,) = self.service.relays()
        return relay

    def seqs(self) -> list[int]:
        """What has arrived at the second appliance."""
        return [seq for one in self.second.log for seq in range(getattr(one, "first_seq", one.seq), one.seq + 1)]


@asynccontextmanager
async def site(**options: object) -> AsyncIterator[Site]:
    async with trio.open_nursery() as nursery:
        made = Site(nursery, **options)
        await nursery.start(made.service.serve, [])
        yield made
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(300):
        while not condition():  # noqa: ASYNC110  # nobody tells of what is waited for
            await trio.sleep(0.01)


@pytest.mark.parametrize("mode", list(Mode))
async def test_records_go_through_in_order_and_levels_come_back(mode: Mode, autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started(mode=mode)
        assert here.relay.first.mode is mode
        for seq in range(1, 101):
            assert await agent.room(8)
            agent.append(write(seq))
            assert await agent.acknowledged(Seq(seq))
        await agent.drain()
        assert here.seqs() == list(range(1, 101))
        assert agent.durable == agent.kept == 100
        assert here.second.hellos[0].agent == "a" and here.second.hellos[0].epoch == 3


async def test_a_first_appliance_gives_its_mode_and_takes_another(autojump_clock: MockClock) -> None:
    async with site(mode=Mode.BATCH) as here:
        agent = await here.started(mode=None)
        assert agent.mode is Mode.BATCH
        agent.switch_mode(Mode.SYNC)
        assert await agent.request("mode.set", {"mode": "sync"}) == {"mode": "sync"}
        assert here.relay.first.mode is Mode.SYNC
        with pytest.raises(RequestRefused, match="nonsense"):
            await agent.request("mode.set", {"mode": "nonsense"})


async def test_batch_combines_here_and_a_flush_is_durable_on_request(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started(mode=Mode.BATCH)
        for seq in range(1, 51):
            agent.append(write(seq))
        agent.append(Flush(Seq(51), TimeNs(51), RUN, DISK))
        await agent.reached(Seq(51), Level.DURABLE)
        assert here.seqs() == list(range(1, 52))
        assert len(here.second.log) < 10


async def test_sync_waits_for_the_second_and_async_does_not(autojump_clock: MockClock) -> None:
    async with site() as here:
        here.second.acks = False
        agent = await here.started(mode=Mode.SYNC)
        agent.append(write(1))
        with trio.move_on_after(5) as patience:
            await agent.acknowledged(Seq(1))
        assert patience.cancelled_caught
        agent.switch_mode(Mode.ASYNC)
        await agent.request("mode.set", {"mode": "async"})
        agent.append(write(2))
        assert await agent.acknowledged(Seq(2))
        assert agent.received == 0 and here.relay.first.last_seq == 2


async def test_an_agent_that_connects_again_goes_on_without_the_second(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        agent.append(write(1))
        await agent.drain()
        here.second.reachable = False
        await here.second.drop()
        await here.break_links()
        for seq in range(2, 12):
            agent.append(write(seq))
        for seq in range(2, 12):
            assert await agent.acknowledged(Seq(seq))  # held here
        assert agent.link is LinkState.CONNECTED and agent.received == 1
        here.second.reachable = True
        await agent.drain()
        assert here.seqs() == list(range(1, 12))
        assert len(here.connections) == 1


async def test_what_became_durable_while_the_link_was_down_is_passed_on(autojump_clock: MockClock) -> None:
    async with site() as here:
        here.second.acks = here.second.syncs = False
        agent = await here.started()
        for seq in range(1, 6):
            agent.append(write(seq))
        await until(lambda: here.second.held == 5)
        here.second.durable = 5
        await here.second.drop()
        await until(lambda: agent.durable == 5)
        assert agent.kept == 5


async def test_what_a_killed_first_appliance_held_comes_from_the_agent(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        agent.append(write(1))
        await agent.drain()
        here.second.stop_reading()
        for seq in range(2, 40):
            agent.append(write(seq))
            assert await agent.acknowledged(Seq(seq))
        # A new process knows nothing of that.
        async with trio.open_nursery() as nursery:
            await here.second.drop()
            here.second.go_on_reading()
            here.relay.close()
            here.service = FirstService(here.second.connect)
            await nursery.start(here.service.serve, [])
            await here.break_links()
            await agent.drain()
            assert agent.durable == 39
            assert sorted(set(here.seqs())) == list(range(1, 40))
            nursery.cancel_scope.cancel()


async def test_a_full_queue_stops_the_agent_and_not_memory(autojump_clock: MockClock) -> None:
    async with site(queue_bytes_max=64 << 10) as here:
        here.second.syncs = False
        agent = await here.started(queue_bytes_max=128 << 10, outage=Outage.CONTINUE, outage_after=5.0)
        taken = 0
        while await agent.room(4096):
            taken += 1
            agent.append(write(taken, 4096))
            assert here.relay.first.queued_bytes <= (64 << 10) + 8192
            await trio.testing.wait_all_tasks_blocked()
        # The agent keeps what is on no disk yet, so its own queue is what fills up last.
        assert 27 <= taken <= 29 and here.relay.first.last_seq < 16
        here.second.syncs = True
        here.second.durable = here.second.held
        await here.second.ack(here.second.held, here.second.held)
        await agent.drain()
        assert here.seqs() == list(range(1, taken + 1))


async def test_unreachable_second_and_its_refusals_reach_the_agent(autojump_clock: MockClock) -> None:
    async with site() as here:
        here.second.reachable = False
        with pytest.raises(HandshakeRefused, match="cannot reach the second one") as refused:
            await here.agent().start()
        assert refused.value.code is ErrorCode.UNAVAILABLE
        here.second.reachable = True
        for code in (ErrorCode.REFUSED, ErrorCode.FENCED, ErrorCode.STORE_FULL):
            here.second.refuses = code
            with pytest.raises(HandshakeRefused, match="the test says no") as refused:
                await here.agent().start()
            assert refused.value.code is code
        assert here.service.relays() == []


async def test_a_newer_epoch_waits_for_the_older_ones_records(autojump_clock: MockClock) -> None:
    async with site() as here:
        old = await here.started(epoch=3)
        await here.second.drop()
        here.second.reachable = False
        for seq in range(1, 6):
            old.append(write(seq))
            assert await old.acknowledged(Seq(seq))
        with pytest.raises(HandshakeRefused, match="5 records of the agent's start before are kept here"):
            await here.agent(epoch=4).start()
        here.second.reachable = True
        new = await here.started(epoch=4)
        assert new.last_seq == 5 and here.seqs() == [1, 2, 3, 4, 5]
        assert here.relay.epoch == 4
        with pytest.raises(HandshakeRefused, match="epoch 3 of group 'g' is over"):
            await here.agent(epoch=3).start()


async def test_records_of_an_older_epoch_that_never_get_through_are_given_up(autojump_clock: MockClock) -> None:
    async with site() as here:
        old = await here.started(epoch=3)
        here.second.syncs = False
        old.append(write(1))
        await old.acknowledged(Seq(1))
        began = trio.current_time()
        while True:
            try:
                await here.agent(epoch=4).start()
                break
            except HandshakeRefused as error:
                assert error.code is ErrorCode.UNAVAILABLE
                await trio.sleep(1)
        assert trio.current_time() - began >= first_service.DISCARD_SECONDS
        assert here.relay.epoch == 4


async def test_another_agent_takes_over_only_if_the_second_says_so(autojump_clock: MockClock) -> None:
    async with site() as here:
        old = await here.started(agent="a")
        here.second.refuses = ErrorCode.FENCED
        with pytest.raises(HandshakeRefused):
            await here.agent(agent="b", epoch=7).start()
        assert here.relay.agent == "a" and old.link is LinkState.CONNECTED
        here.second.refuses = None
        new = await here.started(agent="b", epoch=7, take_over=True)
        assert here.relay.agent == "b"
        with pytest.raises(Fenced):
            await old.room(8)
            await old.reached(Seq(99), Level.RECEIVED)
        new.append(write(1))
        await new.drain()


async def test_a_lost_history_is_lost_for_the_agent_too(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        for seq in range(1, 6):
            agent.append(write(seq))
        await agent.drain()
        here.second.held = here.second.durable = 2  # the store was put back to an older state
        await here.second.drop()
        agent.append(write(6))
        with pytest.raises(HistoryLost):
            await agent.reached(Seq(6), Level.DURABLE)
        assert agent.link is LinkState.LOST


async def test_comparisons_are_answered_and_never_with_another_sessions_key(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        assert agent.digest_key == b"key 1"
        agent.append(Compare(Seq(1), TimeNs(1), RUN, DISK, 0, bytes(32)))
        assert await agent.compared(Seq(1)) == b"\0\1"
        await here.second.drop()
        await until(lambda: here.relay.first.link is LinkState.CONNECTED)
        # The agent does not know of the new key.
        agent.append(Compare(Seq(2), TimeNs(2), RUN, DISK, 0, bytes(32)))
        with pytest.raises(LinkReset):
            await agent.compared(Seq(2))
        await until(lambda: agent.link is LinkState.CONNECTED)
        assert agent.digest_key == b"key 2"
        agent.append(Compare(Seq(3), TimeNs(3), RUN, DISK, 0, bytes(32)))
        assert await agent.compared(Seq(3)) == b"\0\1"
        assert sum(isinstance(one, Compare) for one in here.second.log) == 2


async def test_a_comparison_without_a_link_is_not_made(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        here.second.reachable = False
        await here.second.drop()
        agent.append(Compare(Seq(1), TimeNs(1), RUN, DISK, 0, bytes(32)))
        with pytest.raises(LinkReset):
            await agent.compared(Seq(1))
        assert agent.link is LinkState.CONNECTED
        here.second.reachable = True
        await agent.drain()


async def test_requests_are_passed_on_and_the_link_behind_is_told(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        assert await agent.request("echo", {"a": 1}) == {"a": 1}
        with pytest.raises(RequestRefused, match="refused, says the test"):
            await agent.request("refuse", {})
        status = await agent.request("link.status", {})
        assert status["link"] == "connected" and status["down_seconds"] is None
        here.second.reachable = False
        await here.second.drop()
        with pytest.raises(RequestRefused, match="no link to the second appliance"):
            await agent.request("echo", {})
        await trio.sleep(20)
        status = await agent.request("link.status", {})
        assert status["link"] == "down" and 19 <= status["down_seconds"] <= 21  # type: ignore[operator]


async def test_commands_are_passed_on(autojump_clock: MockClock) -> None:
    async with site() as here:
        async with await here.connect() as connection:
            assert await exchange(connection, "g", "echo", {"b": 2}) == {"b": 2}
        here.second.refuses = ErrorCode.REFUSED
        async with await here.connect() as connection:
            with pytest.raises(HandshakeRefused, match="the test says no"):
                await exchange(connection, "g", "echo", {})
        here.second.reachable = False
        async with await here.connect() as connection:
            with pytest.raises(HandshakeRefused, match="cannot reach the second one"):
                await exchange(connection, "g", "echo", {})


async def test_volumes_are_listed_again_until_something_was_sent(autojump_clock: MockClock) -> None:
    async with site() as here:
        for _ in range(2):
            agent = here.agent()
            _welcome, volumes = await agent.start()
            assert volumes == [VOLUME]
            await here.break_links()
        agent = await here.started()
        agent.append(write(1))
        await agent.drain()
        await here.break_links()
        welcome, volumes = await here.agent().start()
        assert welcome.held == 1 and volumes == []


async def test_an_idle_relay_is_closed_and_made_again(autojump_clock: MockClock) -> None:
    async with site() as here:
        async with trio.open_nursery() as mount:
            agent = here.agent()
            await agent.start()
            mount.start_soon(agent.run)
            agent.append(write(1))
            await agent.drain()
            mount.cancel_scope.cancel()
        await trio.sleep(first_service.IDLE_SECONDS / 2)
        assert here.relay.settled
        await trio.sleep(first_service.IDLE_SECONDS)
        assert here.service.relays() == []
        agent = await here.started()
        assert agent.last_seq == 1


async def test_stop_makes_durable_what_was_taken(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        here = Site(nursery, mode=Mode.BATCH)
        ended = trio.Event()

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await here.service.serve([], task_status=task_status)
            ended.set()

        await nursery.start(serve)
        agent = await here.started(mode=None)
        for seq in range(1, 30):
            agent.append(write(seq))
            await agent.acknowledged(Seq(seq))
        here.service.stop()
        await ended.wait()
        assert here.second.durable == 29
        nursery.cancel_scope.cancel()


class Stranger:
    """A peer that says what a test tells it to."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.session = Session(Side.CLIENT)

    async def say(self, *messages: Message) -> None:
        await self.connection.send([part for message in messages for part in self.session.send(message)])

    async def hear(self) -> Message | None:
        while (message := self.session.next_event()) is None:
            data = await self.connection.receive()
            if not data:
                return None
            self.session.receive_data(data)
        return message


def hello(**fields: object) -> Hello:
    known: dict[str, object] = {"version": PROTOCOL_VERSION, "role": Role.AGENT, "group": "g", "epoch": Epoch(3)}
    return Hello(**{**known, "agent": "a", **fields})  # type: ignore[arg-type]


async def test_a_peer_that_breaks_the_protocol_ends_alone(autojump_clock: MockClock) -> None:
    async with site() as here:
        stranger = Stranger(await here.connect())
        await stranger.say(hello(group="h"))
        answer = await stranger.hear()
        assert isinstance(answer, Welcome)
        await stranger.connection.send([b"\xff" * 64])
        heard = [message async for message in _all(stranger)]
        assert isinstance(heard[-1], Failure) and heard[-1].code is ErrorCode.PROTOCOL
        old = Stranger(await here.connect())
        await old.say(hello(version=1))
        answer = await old.hear()
        assert isinstance(answer, Failure) and answer.code is ErrorCode.VERSION
        silent = Stranger(await here.connect())
        answer = await silent.hear()
        assert isinstance(answer, Failure) and "no Hello" in answer.text
        agent = await here.started()
        agent.append(write(1))
        await agent.drain()


async def test_one_agent_twice_is_refused_while_it_lives(autojump_clock: MockClock) -> None:
    async with site() as here:
        agent = await here.started()
        with pytest.raises(HandshakeRefused, match="another agent of epoch 3 feeds group 'g'"):
            await here.agent().start()
        agent.append(write(1))
        await agent.drain()


async def test_what_was_spooled_goes_on_without_its_agent(tmp_path: Path) -> None:
    spools = GroupSpools(tmp_path / "spool")
    async with site(forwarding=Forwarding(spools)) as here:
        agent = await here.started()
        here.second.reachable = False
        await here.second.drop()
        for seq in range(1, 21):
            agent.append(write(seq))
            assert await agent.acknowledged(Seq(seq))
        with trio.fail_after(10):
            await until(lambda: agent.kept == 20)
        assert agent.durable == 0 and agent.queued_bytes == 0
    async with site(forwarding=Forwarding(spools)) as here:
        with trio.fail_after(10):
            await until(lambda: here.second.held == 20)
            agent = await here.started(epoch=4)
        assert agent.last_seq == 20 and here.seqs() == list(range(1, 21))


async def test_a_killed_first_appliance_s_successor_keeps_only_what_is_on_a_disk(autojump_clock: MockClock) -> None:
    """Else the agent would drop what a power cut at the second appliance still takes away."""
    async with site() as here:
        here.second.held, here.second.durable, here.second.syncs = 12, 8, False
        agent = await here.started()
        assert here.relay.levels().kept == 8
        agent.append(write(13))
        await agent.reached(Seq(13), Level.RECEIVED)
        assert here.relay.levels().kept == 8 and agent.kept == 8


async def test_an_agent_learns_that_what_was_spooled_for_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has dropped those records: it must reconcile, not connect for ever to who still counts them as held."""
    monkeypatch.setattr(spool, "SPOOL_SEGMENT_BYTES", 4096)
    monkeypatch.setattr(spooler, "SPOOL_AFTER_SECONDS", 0.05)
    async with site(forwarding=Forwarding(GroupSpools(tmp_path))) as here:
        agent = await here.started()
        here.second.reachable = False
        await here.second.drop()
        with trio.fail_after(20):
            for seq in range(1, 33):
                agent.append(write(seq, 1000))
                if seq % 8 == 0:
                    await until(lambda: agent.kept == agent.last_seq)
        damaged = sorted((tmp_path / "g").glob("*.rwq"))[1]
        content = bytearray(damaged.read_bytes())
        content[2500:2550] = b"\xff" * 50
        damaged.write_bytes(content)
        here.second.reachable = True
        with trio.fail_after(20):
            await until(lambda: agent.link is LinkState.LOST)
        assert here.seqs() == list(range(1, here.second.held + 1)) and here.second.held < 16
        assert list((tmp_path / "g").glob("*.rwq")) == []


async def test_a_service_that_has_met_many_groups_starts_again(tmp_path: Path) -> None:
    """Each of them has left the directory of its spool, and most have nothing in it."""
    for number in range(first_service.GROUPS_MAX + 3):
        (await GroupSpools(tmp_path).open(f"group{number}")).close()
    async with site(forwarding=Forwarding(GroupSpools(tmp_path))) as here:
        await trio.testing.wait_all_tasks_blocked()
        agent = await here.started()
        agent.append(write(1))
        await agent.drain()


async def test_a_spool_goes_on_after_its_agent_was_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_at_the_start(self: FirstService, group: str) -> None:
        await trio.lowlevel.checkpoint()

    forwarding = Forwarding(GroupSpools(tmp_path))
    async with site(forwarding=forwarding) as here:
        agent = await here.started()
        here.second.reachable = False
        await here.second.drop()
        for seq in range(1, 21):
            agent.append(write(seq))
        with trio.fail_after(10):
            await until(lambda: agent.kept == 20)
    with monkeypatch.context() as patched:
        patched.setattr(FirstService, "_take_up", not_at_the_start)
        async with site(forwarding=forwarding) as here:
            await trio.testing.wait_all_tasks_blocked()
            patched.undo()
            here.second.reachable = False
            for epoch in (4, 5):
                with pytest.raises(HandshakeRefused):
                    await here.agent(epoch=epoch).start()
            here.second.reachable = True
            with trio.fail_after(20):
                await until(lambda: here.second.held == 20)
                agent = await here.started(epoch=6)
            assert agent.last_seq == 20 and here.seqs() == list(range(1, 21))


async def test_what_a_fenced_agent_left_in_the_spool_is_discarded(tmp_path: Path) -> None:
    forwarding = Forwarding(GroupSpools(tmp_path))
    async with site(forwarding=forwarding) as here:
        agent = await here.started()
        here.second.reachable = False
        await here.second.drop()
        agent.append(write(1))
        with trio.fail_after(10):
            await until(lambda: agent.kept == 1)
    async with trio.open_nursery() as nursery:
        here = Site(nursery, forwarding=forwarding)
        here.second.refuses = ErrorCode.FENCED
        await nursery.start(here.service.serve, [])
        with trio.fail_after(10):
            await until(lambda: not list((tmp_path / "g").glob("*.rwq")))
        nursery.cancel_scope.cancel()


async def _all(stranger: Stranger) -> AsyncIterator[Message]:
    while (message := await stranger.hear()) is not None:
        yield message
