"""A first appliance whose second one lies: frames mutated, cut, repeated, changed round, said without being asked for.

Whatever it hears, the link ends and is tried again, and nothing else ends; what it forgets is what it was told to be
kept; and once the peer is honest everything arrives, once and in order. `one_case(SEED)` replays one.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from dedup.types import Aggregate, Epoch, Seq, TimeNs, VolumeId, VolumeState
from replication.errors import (
    HandshakeRefused,
    HistoryLost,
    LinkDown,
    LinkReset,
    ProtocolError,
    RequestRefused,
)
from replication.first_appliance import FirstAppliance
from replication.messages import (
    Ack,
    Compare,
    CompareResult,
    ErrorCode,
    Failure,
    Message,
    Reply,
    Uncompared,
    VolumePage,
    Wanted,
    Welcome,
)
from replication.modes import Mode, Outage
from replication.status import LinkState
from replication.transport import Connection, MemoryConnection
from replication.wire import Buffer, Decoder, encode
from tests.replication.scripted_second import ScriptedSecond
from tests.replication.test_first_appliance import DISK, RUN, write
from tests.replication.test_relay import site

SEEDS, LONG_SEEDS = 120, 2000
LIES = ("flip", "cut", "repeat", "swap", "foreign", "noise", "stall", "retype", "close")


def ack(queued: int, kept: int, received: int, durable: int) -> Ack:
    return Ack(Seq(queued), Seq(kept), Seq(received), Seq(durable))


FOREIGN: Sequence[Message] = (
    ack(1 << 60, 0, 1 << 60, 0),
    ack(1 << 60, 1 << 60, 1 << 60, 1 << 60),
    ack(0, 0, 0, 0),
    ack(1, 0, 1, 0),
    CompareResult(Seq(5), b"\1\0"),
    Uncompared(Seq(5), b"key"),
    Wanted(Seq(5), b"\1"),
    Wanted(Seq(1 << 60), b"\1" * 1024),
    Reply(1, {"x": [1] * 100}),
    Reply(1 << 31, {}),
    VolumePage((VolumeState(VolumeId(7), "x" * 200, 0, 0, 0, 0),) * 200, False),
    VolumePage((), True),
    Failure(ErrorCode.PROTOCOL, "you broke it"),
    Failure(ErrorCode.STORE_FULL, "no room"),
    Failure(ErrorCode.FENCED, "another one feeds"),
    Welcome(2, "other", Epoch(9), Seq(1 << 60), Seq(0), TimeNs(0), RUN, True, False, VolumeId(2), b"k"),
    Welcome(2, "store", Epoch(3), Seq(0), Seq(0), TimeNs(0), RUN, True, False, VolumeId(2), b"k", Mode.BATCH),
)


class Liar(Connection):
    """What the second appliance says on this connection, as the dice will have it."""

    def __init__(self, inner: MemoryConnection, world: Liars) -> None:
        self._inner = inner
        self._world = world
        self._said: set[bytes] = set()
        self._decoder: Decoder | None = Decoder()

    async def send(self, buffers: Sequence[Buffer]) -> None:
        await self._inner.send(buffers)

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        return 0

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def receive(self) -> bytes:
        data = await self._inner.receive()
        dice = self._world.dice
        if not data or self._world.honest or dice.random() > self._world.share:
            self._said.update(frames_in(data))
            self._heard(data)
            return data
        frames = frames_in(data)
        self._said.update(frames)
        lie = dice.choice(LIES)
        index = dice.randrange(len(frames))
        frame = bytearray(frames[index])
        match lie:
            case "flip":
                frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
            case "cut" | "stall":
                del frame[dice.randrange(len(frame)) :]
            case "retype":
                frame[4] = dice.randrange(256)
            case "noise":
                frame += dice.randbytes(dice.randrange(1, 300))
        frames[index] = bytes(frame)
        match lie:
            case "repeat":
                frames.insert(dice.randrange(len(frames) + 1), frames[index])
            case "swap":
                dice.shuffle(frames)
            case "foreign":
                count = dice.choice((1, 1, 2, 50))
                frames[index:index] = [b"".join(encode(dice.choice(FOREIGN)))] * count
            case "stall":
                del frames[index + 1 :]
        if lie == "close":
            await self._inner.aclose()
        told = b"".join(frames)
        self._heard(told)
        if lie == "stall":
            self.receive = trio.sleep_forever  # type: ignore[method-assign]
        return told or await self.receive()

    def _heard(self, data: bytes) -> None:
        """Takes note of lies that may be believed, and mean that the history is lost."""
        if self._decoder is None:
            return
        try:
            self._decoder.receive_data(data)
            while (message := self._decoder.next_message()) is not None:
                if isinstance(message, (Ack, Welcome, Failure)) and b"".join(encode(message)) not in self._said:
                    self._world.forged = True
        except ProtocolError:
            self._decoder = None


def frames_in(data: bytes) -> list[bytes]:
    frames = []
    while data:
        length = HEAD + int.from_bytes(data[:4], "little")
        frames.append(data[:length])
        data = data[length:]
    return frames


HEAD = len(b"".join(encode(VolumePage((), True)))) - int.from_bytes(
    b"".join(encode(VolumePage((), True)))[:4], "little"
)
"""What a frame has beside the bytes that its length counts."""


class Strict(ScriptedSecond):
    """It leaves when records do not follow: what a forged Welcome brings about."""

    broken = False

    async def _serve(self, connection: Connection) -> None:
        try:
            await super()._serve(connection)
        except ProtocolError:
            self.broken = True


class Liars:
    """`connect` is what the first appliance is given."""

    def __init__(self, second: ScriptedSecond, seed: int) -> None:
        self.dice = random.Random(seed)
        self.share = self.dice.choice((0.05, 0.2, 0.6))
        """Of what is received, what is no truth."""
        self.honest = False
        self.forged = False
        """Whether something was said that means a lost history, if it is believed."""
        self.connections = 0
        self._second = second
        self._last: Liar | None = None

    async def connect(self) -> Connection:
        self.connections += 1
        inner = await self._second.connect()
        assert isinstance(inner, MemoryConnection)
        self._last = Liar(inner, self)
        return self._last

    async def be_honest(self) -> None:
        """From now on, on new connections: what this one has swallowed would be waited for."""
        self.honest = True
        if self._last is not None:
            await self._last.aclose()


async def started(first: FirstAppliance, liars: Liars) -> None:
    for attempt in range(100):
        try:
            await first.start()
            return
        except (LinkDown, ProtocolError, HandshakeRefused):
            liars.honest = attempt > 50
    raise AssertionError("it never started")


async def ask(first: FirstAppliance) -> None:
    with contextlib.suppress(LinkDown, LinkReset, RequestRefused, HistoryLost):
        await first.request("echo", {"a": 1})


async def compare(first: FirstAppliance, seq: Seq) -> None:
    with contextlib.suppress(LinkReset, HistoryLost):
        await first.compared(seq)


async def a_history(seed: int) -> bool:
    """Whether everything arrived; else the history was lost, by a lie that says so."""
    async with trio.open_nursery() as nursery:
        second = Strict(nursery)
        liars = Liars(second, seed)
        dice = liars.dice
        mode = dice.choice(list(Mode))
        first = FirstAppliance(
            liars.connect, group="g", epoch=Epoch(3), agent="a", mode=mode, outage=Outage.BLOCK, offers=False
        )
        with trio.fail_after(100_000):
            await started(first, liars)
            liars.honest = False
            begin = first.last_seq
            nursery.start_soon(first.run)
            try:
                for number in range(1, 41):
                    seq = Seq(begin + number)
                    await first.room(100)
                    if number % 10:
                        first.append(write(seq))
                    else:
                        first.append(Compare(seq, TimeNs(seq), RUN, DISK, 0, bytes(32)))
                        nursery.start_soon(compare, first, seq)
                    if dice.random() < 0.2:
                        nursery.start_soon(ask, first)
                    await trio.sleep(dice.choice((0, 0, 0.01, 3)))
                    assert first.kept <= second.durable or liars.forged
                await liars.be_honest()
                await first.drain()
            except HistoryLost:
                assert liars.forged and first.link is LinkState.LOST
                nursery.cancel_scope.cancel()
                return False
        if not liars.forged:
            assert not second.broken
            seqs = [s for one in second.log for s in range(getattr(one, "first_seq", one.seq), one.seq + 1)]
            assert seqs == list(range(1, 41))
            assert all(
                record == write(record.seq)
                for record in second.log
                if not isinstance(record, (Aggregate, Compare)) and record.seq % 10
            )
        nursery.cancel_scope.cancel()
    return True


def one_case(seed: int) -> bool:
    return trio.run(a_history, seed, clock=MockClock(autojump_threshold=0))


def many(seeds: int) -> None:
    arrived = 0
    for seed in range(seeds):
        try:
            arrived += one_case(seed)
        except BaseException:
            print(f"seed {seed}")
            raise
    assert arrived > seeds // 3  # else the lies are too many to test much


def test_a_second_appliance_that_lies() -> None:
    many(SEEDS)


@pytest.mark.slow
def test_a_second_appliance_that_lies_at_length() -> None:
    many(LONG_SEEDS)


async def test_a_peer_that_stalls_within_a_frame_is_tried_again(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery)
        first = FirstAppliance(second.connect, group="g", epoch=Epoch(3), agent="a")
        await first.start()
        nursery.start_soon(first.run)
        second.acks = False
        first.append(write(1))
        await trio.sleep(1)
        assert second._connection is not None
        await second._connection.send([b"".join(encode(ack(1, 1, 1, 1)))[:-1]])
        with trio.fail_after(100):
            await first.drain()
        assert len(second.hellos) == 2
        nursery.cancel_scope.cancel()


async def test_a_first_appliance_where_a_second_was_expected_is_refused(autojump_clock: MockClock) -> None:
    async with site() as here:
        with pytest.raises(ProtocolError, match="a first appliance is there"):
            await FirstAppliance(here.connect, group="g", epoch=Epoch(3), agent="a", mode=Mode.BATCH).start()
