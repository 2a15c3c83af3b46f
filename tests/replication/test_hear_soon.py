"""Answers that are awaited on the spot: a lone writer gains, nobody else loses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from dedup.types import ClockRun, Epoch, Extent, Flush, Seq, TimeNs, VolumeId, Write
from replication import linger, link
from replication.first_appliance import FirstAppliance
from replication.linger import Linger
from replication.link import ANSWER_REST, ANSWER_ROW
from replication.messages import PROTOCOL_VERSION, Ack, ErrorCode, Failure, Message, SyncRequest, VolumePage, Welcome
from replication.modes import Mode
from replication.outbox import QUEUE_BYTES_MAX
from replication.session import Session, Side
from replication.status import LinkState
from replication.transport import SocketConnection, socket_pair
from replication.wire import Buffer, encode


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's regular turn does not come within a test, however slow the machine."""
    monkeypatch.setattr(linger, "TURN_SECONDS", 1e9)


def write(seq: int) -> Write:
    return Write(Seq(seq), TimeNs(seq), ClockRun(0), Extent(VolumeId(1), 0, b"x" * 4096))


class Counted(SocketConnection):
    """Counts how often something was awaited on the spot."""

    asked = 0

    def receive_soon(self, milliseconds: int) -> bytes:
        self.asked += milliseconds > 0  # a send that breaks looks why, and does not wait
        return super().receive_soon(milliseconds)


class Rig:
    """A first appliance in mode sync over a socket; the test is its peer, and takes no task to answer."""

    def __init__(self, queue_bytes_max: int) -> None:
        near, self.far = socket_pair()
        self.near = Counted(near._sock)
        self.first = FirstAppliance(
            self._connect, group="g", epoch=Epoch(1), agent="a", mode=Mode.SYNC, queue_bytes_max=queue_bytes_max
        )
        self.session = Session(Side.SERVER)

    async def _connect(self) -> SocketConnection:
        return self.near

    async def greet(self) -> None:
        await self.hear()
        welcome = Welcome(
            PROTOCOL_VERSION,
            "store",
            Epoch(1),
            Seq(0),
            Seq(0),
            TimeNs(0),
            ClockRun(0),
            True,
            False,
            VolumeId(2),
            b"key",
        )
        self.say(welcome, VolumePage((), True))

    async def hear(self) -> Message:
        while (message := self.session.next_event()) is None:
            self.session.receive_data(await self.far.receive())
        return message

    def say(self, *messages: Message) -> None:
        assert self.far.send_nowait([part for message in messages for part in self.session.send(message)])

    def append(self, seq: int) -> None:
        self.first.append(write(seq))

    async def at_once(self, seq: int) -> bool:
        """Whether the wait for the acknowledgement ends without a turn of the loop."""
        with trio.CancelScope() as scope:
            scope.cancel()
            return await self.first.acknowledged(Seq(seq))
        return False


@asynccontextmanager
async def rig(queue_bytes_max: int = QUEUE_BYTES_MAX) -> AsyncIterator[Rig]:
    made = Rig(queue_bytes_max)
    async with made.far, trio.open_nursery() as nursery:
        nursery.start_soon(made.greet)
        await made.first.start()
        nursery.start_soon(made.first.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


async def one_write(made: Rig, seq: int) -> bool:
    """A write whose answer is there when it is asked for."""
    made.append(seq)
    await made.hear()
    made.say(Ack(Seq(seq), Seq(0), Seq(seq), Seq(0)))
    return await made.at_once(seq)


async def test_a_lone_write_is_answered_without_a_turn_of_the_loop() -> None:
    async with rig() as made:
        assert await one_write(made, 1)
        assert made.first.received == 1
        assert made.near.asked == 1


async def test_a_peer_that_is_slow_is_left_to_the_loop_for_a_while() -> None:
    async with rig() as made:
        made.append(1)
        assert not await made.at_once(1)
        await made.hear()
        made.say(Ack(Seq(1), Seq(0), Seq(1), Seq(0)))
        assert await made.first.acknowledged(Seq(1))
        for seq in range(2, ANSWER_REST + 1):  # the second question about record 1 was the first of the rest
            made.append(seq)
            await made.hear()
            made.say(Ack(Seq(seq), Seq(0), Seq(seq), Seq(0)))
            assert await made.first.acknowledged(Seq(seq))
        assert made.near.asked == 1
        assert await one_write(made, ANSWER_REST + 1)
        assert made.near.asked == 2


async def test_one_answer_of_a_row_is_left_to_the_loop() -> None:
    async with rig() as made:
        for seq in range(1, ANSWER_ROW + 1):
            assert await one_write(made, seq)
        assert not await one_write(made, ANSWER_ROW + 1)
        assert await made.first.acknowledged(Seq(ANSWER_ROW + 1))
        assert await one_write(made, ANSWER_ROW + 2)


async def test_writers_side_by_side_are_left_to_the_loop() -> None:
    async with rig() as made:
        made.append(1)
        made.append(2)
        assert not await made.at_once(1)
        await made.hear()
        made.say(Ack(Seq(1), Seq(0), Seq(1), Seq(0)))
        assert await made.first.acknowledged(Seq(1))
        await made.hear()
        made.say(Ack(Seq(2), Seq(0), Seq(2), Seq(0)))
        assert await made.first.acknowledged(Seq(2))
        assert not await one_write(made, 3)
        assert made.near.asked == 0


@pytest.mark.parametrize("how", ["failure", "cut", "end", "garbage"])
async def test_what_ends_the_session_is_noticed_on_the_spot_and_by_the_loop(how: str) -> None:
    async with rig() as made:
        made.append(1)
        await made.hear()
        if how == "failure":
            made.say(Failure(ErrorCode.STORE_FULL, "full, says the test"))
        elif how == "cut":
            made.far.send_nowait(encode(Ack(Seq(1), Seq(0), Seq(1), Seq(0)))[0:1])
            made.far.send_nowait([b"\x18\0\0\0"])
        elif how == "garbage":
            made.far.send_nowait([b"\xff" * 64])
        if how in ("cut", "end"):
            await made.far.aclose()
        assert await made.at_once(1) is (how == "cut")
        assert made.near.asked == 1
        with trio.fail_after(5):
            while made.first.link is LinkState.CONNECTED:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert made.first.link is (LinkState.FULL if how == "failure" else LinkState.DOWN)
        assert made.first.status().queued_records == 1  # kept for the next session


async def test_the_last_words_of_a_link_that_broke_have_nothing_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say makes room wanted, and that would be asked for at once; why the peer left comes behind it."""
    async with rig(queue_bytes_max=8000) as made:
        for seq in (1, 2):
            made.append(seq)
            await made.hear()
            made.say(Ack(Seq(seq), Seq(0), Seq(seq), Seq(0)))
            await trio.testing.wait_all_tasks_blocked()
            if seq == 1:
                assert isinstance(await made.hear(), SyncRequest)
        ack = Ack(Seq(2), Seq(1), Seq(2), Seq(1))
        made.say(ack, Failure(ErrorCode.STORE_FULL, "full, says the test"))
        monkeypatch.setattr(made.near, "_receive_bytes", len(b"".join(encode(ack))))
        await made.far.aclose()
        whole, sent = made.near.send_nowait, 0

        def counted(buffers: Sequence[Buffer]) -> int:
            nonlocal sent
            sent += 1
            return whole(buffers)

        monkeypatch.setattr(made.near, "send_nowait", counted)
        made.append(3)
        assert sent == 1
        with trio.fail_after(5):
            while made.first.link is LinkState.CONNECTED:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert (made.first.link, made.first.durable) == (LinkState.FULL, 1)


async def test_nothing_is_awaited_while_a_frame_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as made:
        monkeypatch.setattr(made.near, "send_nowait", lambda buffers: 0)
        made.append(1)
        assert not await made.at_once(1)
        assert made.near.asked == 0
        await made.hear()  # the sender's task sent it
        made.say(Ack(Seq(1), Seq(0), Seq(1), Seq(0)))
        assert await made.first.acknowledged(Seq(1))


async def test_a_flush_and_its_sync_go_out_at_once_and_their_answer_is_heard_on_the_spot() -> None:
    async with rig() as made:
        for seq in range(1, 100):
            made.first.append(Flush(Seq(seq), TimeNs(seq), ClockRun(0), VolumeId(1)))
            made.first.flush_soon(Seq(seq))
            # No turn of the loop: both lie in the socket already.
            made.session.receive_data(made.far.receive_soon(0))
            assert [made.session.next_event(), made.session.next_event()] == [
                Flush(Seq(seq), TimeNs(seq), ClockRun(0), VolumeId(1)),
                SyncRequest(),
            ]
            await trio.testing.wait_all_tasks_blocked()
            made.say(Ack(Seq(seq), Seq(seq - 1), Seq(seq), Seq(seq - 1)), Ack(Seq(seq), Seq(seq), Seq(seq), Seq(seq)))
            with trio.CancelScope() as scope:
                scope.cancel()
                assert await made.first.flushed(Seq(seq))
            assert not scope.cancelled_caught
        assert made.first.durable == 99


async def test_a_sync_that_the_link_does_not_take_at_once_is_sent_by_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig() as made:
        whole = made.near.send_nowait
        monkeypatch.setattr(made.near, "send_nowait", lambda buffers: whole([bytes(buffers[0])[:3]]))
        made.first.append(Flush(Seq(1), TimeNs(1), ClockRun(0), VolumeId(1)))
        made.first.flush_soon(Seq(1))
        assert isinstance(await made.hear(), Flush)
        assert isinstance(await made.hear(), SyncRequest)
        await trio.testing.wait_all_tasks_blocked()
        made.first.append(Flush(Seq(2), TimeNs(2), ClockRun(0), VolumeId(1)))
        assert isinstance(await made.hear(), Flush)
        made.first.flush_soon(Seq(2))  # of which three bytes leave
        assert isinstance(await made.hear(), SyncRequest)


async def test_whoever_lingers_hears_the_peer() -> None:
    async with rig() as made:
        lingers = Linger()
        for seq in range(1, 50):
            made.append(seq)
            await made.hear()
            await trio.testing.wait_all_tasks_blocked()
            made.say(Ack(Seq(seq), Seq(0), Seq(seq), Seq(0)))
            assert lingers.until(lambda seq=seq: made.first.received == seq)  # type: ignore[misc]
        assert made.near.asked == 0


@pytest.mark.parametrize("how", ["failure", "end", "garbage"])
async def test_what_ends_the_session_is_heard_by_who_lingers(how: str) -> None:
    async with rig() as made:
        made.append(1)
        await made.hear()
        await trio.testing.wait_all_tasks_blocked()
        if how == "failure":
            made.say(Failure(ErrorCode.STORE_FULL, "full, says the test"))
        elif how == "garbage":
            made.far.send_nowait([b"\xff" * 64])
        else:
            await made.far.aclose()
        assert not Linger().until(lambda: made.first.received == 1)
        with trio.fail_after(5):
            while made.first.link is LinkState.CONNECTED:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert made.first.link is (LinkState.FULL if how == "failure" else LinkState.DOWN)
        assert made.first.status().queued_records == 1  # kept for the next session


def test_the_limits_fit() -> None:
    assert 0 < link.ANSWER_ROW < link.ANSWER_REST
