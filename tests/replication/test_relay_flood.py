"""A peer that asks and does not listen, or leaves before it is answered."""

from __future__ import annotations

import socket

import trio
import trio.testing

from dedup.types import Heartbeat, Seq, TimeNs
from replication.messages import Compare, CompareResult, ErrorCode, Failure, Offer, Reply, Request, Role
from replication.server_end import UNSAID_BYTES_MAX
from replication.session import State
from replication.transport import SocketConnection
from tests.replication.test_relay import DISK, RUN, Stranger, hello, site

BLOCKS = 1024


async def test_answers_that_nobody_reads_do_not_pile_up() -> None:
    near, far = socket.socketpair()
    for one in (near, far):
        one.setblocking(False)
    async with trio.open_nursery() as nursery, site() as here:
        nursery.start_soon(here.service.serve_connection, SocketConnection(far))
        async with SocketConnection(near) as connection:
            stranger = Stranger(connection)
            await stranger.say(hello())
            while stranger.session.state is not State.STREAMING:
                await stranger.hear()
            (end,) = here.service._ends
            with trio.move_on_after(2):  # until it is not read from any more
                for seq in range(1, 2000 + 2 * UNSAID_BYTES_MAX // BLOCKS):
                    offer = Offer(Seq(seq), bytes(32 * BLOCKS))
                    await stranger.say(offer, Heartbeat(Seq(seq), TimeNs(seq), RUN))
            assert end._unsaid_bytes <= UNSAID_BYTES_MAX + 64 * BLOCKS


async def test_an_agent_that_leaves_as_its_answers_come_ends_alone() -> None:
    """The session has read the end of the stream, and has not left yet, when the answers are there."""
    async with site() as here:
        for epoch in range(3, 23):
            stranger = Stranger(await here.connect())
            await stranger.say(hello(epoch=epoch))
            while stranger.session.state is not State.STREAMING:
                await stranger.hear()
            seq = Seq(stranger.session.last_seq + 1)
            here.second.compares = False
            await stranger.say(
                Compare(seq, TimeNs(seq), RUN, DISK, 0, bytes(16), 4096),
                Request(1, "asked", {}),
                Request(2, "asked", {}),
            )
            await trio.testing.wait_all_tasks_blocked()
            await here.second.say(CompareResult(seq, b"\1"))
            for number in (1, 2):
                await here.second.say(Reply(here.second.requests[-number].id, {}))
            await stranger.connection.aclose()
            await trio.testing.wait_all_tasks_blocked()
            here.second.held = here.second.durable = seq
            here.service.relays()[0].sync()
            await trio.testing.wait_all_tasks_blocked()
        agent = await here.started(epoch=99)
        agent.append(Heartbeat(Seq(agent.last_seq + 1), TimeNs(99), RUN))
        await agent.drain()


async def test_a_command_that_comes_as_the_second_appliance_refuses_ends_alone() -> None:
    async with site() as here:
        for _ in range(20):  # which of the two is looked at first is left to chance
            stranger = Stranger(await here.connect())
            await stranger.say(hello(role=Role.READER, agent="", epoch=0))
            while stranger.session.state is not State.STREAMING:
                await stranger.hear()
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as both:
                both.start_soon(here.second.say, Failure(ErrorCode.STORE_FAILED, "the test says no"))
                both.start_soon(stranger.say, Request(1, "asked", {}))
            await trio.testing.wait_all_tasks_blocked()
        await here.started()
