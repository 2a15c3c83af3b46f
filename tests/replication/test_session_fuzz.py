"""Sessions whose frames are mutated, cut, repeated and mixed up: one ends with a typed error, the next one is served.

A case is a seed or a list of mutations, applied to the bytes of an ordinary session. Whatever comes of it: what the
appliance says are whole frames, a Failure is the last of them, the connection ends once the peer has; and then another
agent is served, by an appliance that holds a history without a hole.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.types import (
    Aggregate,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Reconcile,
    ReconcileBegin,
    ReconcileEnd,
    Retire,
    Seq,
    TimeNs,
    VolumeId,
)
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
    Offer,
    Reply,
    Request,
    Role,
    SyncRequest,
    Uncompared,
    VolumePage,
    Wanted,
    Welcome,
)
from replication.session_hearing import ANSWERS_MAX, HELLO_BYTES_MAX
from replication.transport import Connection, memory_pair
from replication.wire import Decoder, encode
from tests.replication.fake_store import FakeStore
from tests.replication.test_second_appliance import ONE, RUN, Peer, World, beat, running, write

Mutation = tuple[str, int, int, int]
KINDS = ("flip", "cut", "drop", "repeat", "swap", "insert", "grow", "shrink", "retype", "foreign", "noise")
LONG_SEEDS = 3000


def at(seq: int) -> tuple[Seq, TimeNs, ClockRun]:
    return Seq(seq), TimeNs(seq), RUN


SESSION: Sequence[Message] = (
    Hello(PROTOCOL_VERSION, Role.AGENT, "g", Epoch(1), "a"),
    EpochStart(*at(1), Epoch(1), False),
    Create(*at(2), ONE, "disk", 64 << 10, 0o600, 0, 0),
    ReconcileBegin(*at(3), "the first time"),
    Reconcile(*at(4), Extent(ONE, 0, b"r" * 8192)),
    ReconcileEnd(*at(5)),
    write(6),
    write(7, b"y" * 300, 100),
    SyncRequest(),
    Compare(*at(8), ONE, 0, bytes(32)),
    Request(1, "status", {}),
    Aggregate(Seq(9), *at(11), (Extent(ONE, 0, b"a" * 100), Extent(ONE, 8192, b"", 4096))),
    Offer(Seq(12), bytes(64)),
    Flush(*at(12), ONE),
    Request(2, "name.check", {"name": "x"}),
    beat(13),
    write(14),
)
FOREIGN: Sequence[Message] = (
    Ack(Seq(1), Seq(1), Seq(1), Seq(1)),
    CompareResult(Seq(8), b"\1\0"),
    Uncompared(Seq(8), b"key"),
    Wanted(Seq(12), b"\1"),
    Reply(1, {}),
    VolumePage((), True),
    Failure(3, "no"),  # type: ignore[arg-type]
    Hello(PROTOCOL_VERSION, Role.ADMIN, "", Epoch(0)),
    Request(1, "gc", {}),
    Request(9, "snapshot.delete", {"name": ["x"] * 100}),
    Retire(*at(6), VolumeId(9)),
    EpochStart(*at(6), Epoch(9), True),
    beat(1 << 60),
)
"""What an agent may not say, or not there."""


def frames_of(messages: Sequence[Message]) -> list[bytes]:
    return [b"".join(encode(message)) for message in messages]


HELLO_FRAME = frames_of(SESSION[:1])[0]


def mutated(mutations: Sequence[Mutation]) -> list[bytes]:
    """The session's frames after the mutations, each (kind, which, where, what)."""
    frames = frames_of(SESSION)
    foreign = frames_of(FOREIGN)
    for kind, which, where, what in mutations:
        index = which % len(frames)
        frame = bytearray(frames[index])
        match kind:
            case "flip" if frame:
                frame[where % len(frame)] ^= 1 << (what % 8)
            case "cut":
                del frame[where % (len(frame) + 1) :]
            case "grow" | "shrink" if len(frame) >= 4:
                length = int.from_bytes(frame[:4], "little") + (what if kind == "grow" else -what)
                frame[:4] = (length % (1 << 32)).to_bytes(4, "little")
            case "retype" if len(frame) >= 5:
                frame[4] = what % 256
            case "noise":
                frame += random.Random(what).randbytes(where % 300)
        frames[index] = bytes(frame)
        other = where % len(frames)
        match kind:
            case "drop":
                frames[index] = b""
            case "repeat":
                frames.insert(other, frames[index])
            case "swap":
                frames[index], frames[other] = frames[other], frames[index]
            case "insert" | "foreign":
                frames.insert(index, foreign[what % len(foreign)])
    return frames


class Half(Peer):
    """A peer that sends bytes, ends its direction, and hears what is left to hear."""

    def __init__(self, connection: Connection, stream: trio.StapledStream) -> None:  # type: ignore[type-arg]
        super().__init__(connection)
        self._stream = stream

    async def all_it_hears(self, before: bytes) -> list[Message]:
        """`before` came already."""
        await self._stream.send_stream.aclose()
        decoder = Decoder()
        heard: list[Message] = []
        data = before
        while data or (data := await self._next()):
            decoder.receive_data(data)
            while (message := decoder.next_message()) is not None:
                heard.append(message)
            data = b""
        assert not decoder.incomplete
        return heard

    async def _next(self) -> bytes:
        try:
            return await self.connection.receive()
        except LinkDown:
            return b""


async def attack(
    serve: Callable[[Connection], Awaitable[object]], frames: Sequence[bytes], piece: int
) -> list[Message]:
    """Sends the frames in pieces of so many bytes; what it heard until the connection ended. `serve` has the other end
    of it served."""
    ours, theirs = memory_pair()
    await serve(theirs)
    peer = Half(ours, ours._stream)  # type: ignore[arg-type]
    data = b"".join(frames)
    # What follows the Hello comes after the Welcome, as from everybody who is to be listened to.
    hello, welcomed = len(frames[0]), b""
    try:
        await peer.say_raw(data[:hello])
        # A Hello that is whole is answered; one that is not may wait for its end.
        with trio.move_on_after(20 if frames[0] == HELLO_FRAME else 0.02):
            welcomed = await ours.receive()
        for start in range(hello, len(data), piece):
            await peer.say_raw(data[start : start + piece])
    except LinkDown:
        pass  # it was put out already
    return await peer.all_it_hears(welcomed)


def check_heard(heard: Sequence[Message]) -> None:
    assert all(not isinstance(message, Failure) for message in heard[:-1])


async def serves_another(world: World, store: FakeStore, epoch: int) -> None:
    """A good agent of the same group, which goes on where the bad one ended; that may have had any name."""
    peer = await world.connect()
    answer = await peer.greet(epoch=epoch, take_over=True)
    assert isinstance(answer, Welcome), answer
    assert answer.held == store.group("g").held
    seq = answer.held + 1
    await peer.say(EpochStart(*at(seq), Epoch(epoch), False), beat(seq + 1))
    await peer.hear_ack(seq + 1)
    await peer.connection.aclose()
    expected = 1
    for record in store.group("g").records:
        first = record.first_seq if isinstance(record, Aggregate) else record.seq
        assert first == expected
        expected = record.seq + 1


def one_case(mutations: Sequence[Mutation], piece: int) -> None:
    async def main() -> None:
        store = FakeStore()
        async with running(store) as world:
            with trio.fail_after(30):
                check_heard(await attack(world.channel.send, mutated(mutations), piece))
                await serves_another(world, store, 40)

    trio.run(main)


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 63), st.integers(0, 10_000), st.integers(0, 1 << 31)), max_size=4
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MUTATIONS, st.sampled_from([1 << 20, 4096, 61, 7]))
def test_a_session_that_is_mutated_ends_alone(mutations: list[Mutation], piece: int) -> None:
    one_case(mutations, piece)


def seeded(seed: int) -> tuple[list[Mutation], int]:
    dice = random.Random(seed)
    count = dice.choice([1, 1, 2, 3, 8, 30])
    mutations = [
        (dice.choice(KINDS), dice.randrange(64), dice.randrange(10_000), dice.randrange(1 << 31)) for _ in range(count)
    ]
    return mutations, dice.choice([1 << 20, 4096, 61, 7])


@pytest.mark.slow
def test_sessions_that_are_mutated_end_alone_at_length() -> None:
    """One appliance through all of them; `one_case(*seeded(SEED))` replays one by itself."""

    async def main() -> None:
        store = FakeStore()
        async with running(store) as world:
            for seed in range(LONG_SEEDS):
                try:
                    with trio.fail_after(60):
                        mutations, piece = seeded(seed)
                        check_heard(await attack(world.channel.send, mutated(mutations), piece))
                        await serves_another(world, store, 40 + seed)
                        store.group("g").records.clear()
                        store._groups.clear()
                        world.appliance._fences.clear()
                except BaseException:
                    print(f"seed {seed}")
                    raise

    trio.run(main)


async def test_the_ordinary_session_is_served_whole() -> None:
    """Else the mutations would test little."""
    store = FakeStore()
    async with running(store) as world:
        peer = await world.connect()
        await peer.greet()
        await peer.say_raw(b"".join(frames_of(SESSION[1:])))
        await peer.say_raw(b"".join(encode(Request(3, "status", {}))))
        decoder = Decoder()
        due = {CompareResult: 1, Wanted: 1, Reply: 3}
        acknowledged = 0
        with trio.fail_after(30):
            while any(due.values()) or acknowledged < 14:
                decoder.receive_data(await peer.connection.receive())
                while (message := decoder.next_message()) is not None:
                    if isinstance(message, Ack):
                        acknowledged = message.received
                    else:
                        due[type(message)] -= 1
    assert store.group("g").held == 14


async def test_a_peer_that_stalls_within_a_frame_is_put_out(autojump_clock: trio.testing.MockClock) -> None:
    """Between frames an agent may be silent for ever."""
    async with running(FakeStore()) as world:
        quiet, stalls = await world.agent("a"), await world.agent("b")
        await stalls.say_raw(frames_of([beat(1)])[0][:-1])
        answer = await stalls.hear()
        assert isinstance(answer, Failure)
        assert "in the middle of a frame" in answer.text
        await quiet.say(beat(1))
        await quiet.hear_ack(1)


async def test_what_comes_before_a_welcome_is_bounded() -> None:
    async with running(FakeStore()) as world:
        peer = await world.connect()
        header = (4 << 20).to_bytes(4, "little") + bytes([33, 0, 0, 0])  # an aggregate is to come
        await peer.say_raw(header + bytes(HELLO_BYTES_MAX))
        answer = await peer.hear()
        assert isinstance(answer, Failure)
        assert answer.code is ErrorCode.PROTOCOL


async def test_only_a_few_commands_of_a_session_run_at_a_time() -> None:
    """So that what a peer does not read is bounded."""
    async with running(FakeStore()) as world:
        running_now = most = 0
        go_on = trio.Event()

        async def slow(*_: object) -> dict[str, object]:
            nonlocal running_now, most
            running_now += 1
            most = max(most, running_now)
            await go_on.wait()
            running_now -= 1
            return {}

        world.appliance.commands.run = slow  # type: ignore[method-assign, assignment]
        peer = await world.agent()
        await peer.say(*(Request(number, "status", {}) for number in range(1, 21)))
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        replies = 0
        while replies < 20:
            replies += isinstance(await peer.hear(), Reply)
        assert most == ANSWERS_MAX
