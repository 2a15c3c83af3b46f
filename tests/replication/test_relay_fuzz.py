"""A first appliance whose agents are mutated, stall, flood or do not listen: each ends its own session, and only that.

As in test_session_fuzz, but what is behind is a second appliance that takes what it is sent: it checks that the records
which come through are a session's.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from trio.testing import MockClock

from replication import open_sessions
from replication.errors import LinkDown
from replication.forwarding import Forwarding
from replication.messages import Ack, ErrorCode, Failure, Hello, Message, Reply, Request, Role, Welcome
from replication.session import State
from replication.session_hearing import ANSWERS_MAX, HELLO_BYTES_MAX
from replication.transport import Connection, SocketConnection
from replication.wire import encode
from tests.replication.test_relay import Site, Stranger, hello, site, write
from tests.replication.test_session_fuzz import MUTATIONS, Mutation, attack, check_heard, mutated, seeded

LONG_SEEDS = 1000


def raw(*messages: Message) -> list[bytes]:
    return [b"".join(encode(message)) for message in messages]


async def serves_another(here: Site, epoch: int) -> None:
    """A good agent of the same group goes on where the bad one ended."""
    agent = await here.started(epoch, take_over=True)
    start = agent.last_seq
    agent.append(write(start + 1))
    agent.append(write(start + 2))
    await agent.drain()
    # The bad one may have fed another group, or in batches.
    assert here.second.held == start + 2


async def one_case(mutations: Sequence[Mutation], piece: int) -> None:
    async with trio.open_nursery() as nursery, site(forwarding=Forwarding(offers=False)) as here:

        async def serve(connection: Connection) -> None:
            nursery.start_soon(here.service.serve_connection, connection)

        with trio.fail_after(300):
            check_heard(await attack(serve, mutated(mutations), piece))
            await serves_another(here, 40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MUTATIONS)
def test_an_agent_that_is_mutated_ends_alone(mutations: list[Mutation]) -> None:
    trio.run(one_case, mutations, 61, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
def test_agents_that_are_mutated_end_alone_at_length() -> None:
    for seed in range(LONG_SEEDS):
        try:
            trio.run(one_case, *seeded(seed), clock=MockClock(autojump_threshold=0))
        except BaseException:
            print(f"seed {seed}")
            raise


async def listed(stranger: Stranger) -> None:
    """Hears the Welcome and the volumes."""
    while stranger.session.state is not State.STREAMING:
        assert await stranger.hear() is not None


async def last_word(stranger: Stranger) -> Failure:
    while not isinstance(message := await stranger.hear(), Failure):
        assert message is not None
    return message


STALLS = [(hello(), write(1)), (hello(role=Role.ADMIN, group="", epoch=0, agent=""), Request(1, "echo", {}))]


@pytest.mark.parametrize(("greeting", "begun"), STALLS)
async def test_a_peer_that_stalls_within_a_frame_is_put_out(
    greeting: Hello, begun: Message, autojump_clock: MockClock
) -> None:
    async with site() as here:
        stalls = Stranger(await here.connect())
        await stalls.say(greeting)
        assert isinstance(await stalls.hear(), Welcome)
        await stalls.connection.send([raw(begun)[0][:-1]])
        answer = await last_word(stalls)
        assert answer.code is ErrorCode.PROTOCOL and "in the middle of a frame" in answer.text
        assert here.seqs() == []


async def test_an_agent_may_be_silent_for_ever_between_frames(autojump_clock: MockClock) -> None:
    async with site() as here:
        quiet = Stranger(await here.connect())
        await quiet.say(hello())
        await listed(quiet)
        await trio.sleep(10_000)
        await quiet.say(write(1))
        assert isinstance(await quiet.hear(), Ack)


async def test_what_comes_before_a_welcome_is_bounded(autojump_clock: MockClock) -> None:
    async with site() as here:
        stranger = Stranger(await here.connect())
        header = (4 << 20).to_bytes(4, "little") + bytes([33, 0, 0, 0])  # an aggregate is to come
        await stranger.connection.send([header + bytes(HELLO_BYTES_MAX)])
        assert (await last_word(stranger)).code is ErrorCode.PROTOCOL


async def test_who_says_nothing_takes_no_place_from_who_does(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_sessions, "UNGREETED_MAX", 3)
    async with site(sessions_max=1) as here:
        silent = []
        for _ in range(4):
            silent.append(Stranger(await here.connect()))
            await trio.testing.wait_all_tasks_blocked()
        assert "wait without a Hello" in (await last_word(silent[0])).text
        agent = await here.started()
        late = Stranger(await here.connect())
        await late.say(hello(group="h"))
        assert "1 sessions are open already" in (await last_word(late)).text
        agent.append(write(1))
        await agent.drain()


async def test_only_a_few_commands_of_an_agent_wait_for_the_second_at_a_time(autojump_clock: MockClock) -> None:
    """And what is answered here does not wait behind them."""
    async with site() as here:
        stranger = Stranger(await here.connect())
        await stranger.say(hello())
        await listed(stranger)
        await stranger.say(*(Request(number, "never answered", {}) for number in range(1, 21)))
        await trio.testing.wait_all_tasks_blocked()
        assert len(here.second.requests) == ANSWERS_MAX
        await stranger.say(Request(99, "link.status", {}))
        answer = await stranger.hear()
        assert isinstance(answer, Reply) and answer.id == 99 and answer.body["link"] == "connected"


async def test_an_agent_that_never_listens_is_not_listened_to_and_put_out(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery, site() as here:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ended = trio.Event()

        async def serve() -> None:
            await here.service.serve_connection(SocketConnection(far))
            ended.set()

        nursery.start_soon(serve)
        async with SocketConnection(near) as connection:
            stranger = Stranger(connection)
            await stranger.say(hello())
            await listed(stranger)
            # Replies as large as may be: some fill the socket, one waits, and the rest of the questions are not read.
            question: dict[str, object] = {"x": ["y" * 4000] * 200}
            with trio.fail_after(1000), contextlib.suppress(LinkDown):
                for number in range(1, 64):
                    await stranger.say(Request(number, "echo", question))
            with trio.fail_after(1000):
                await ended.wait()
        agent = await here.started()
        agent.append(write(1))
        await agent.drain()
