"""A peer that asks and does not listen."""

from __future__ import annotations

import socket

import trio

from dedup.types import Heartbeat, Seq, TimeNs
from replication.messages import Offer
from replication.server_end import UNSAID_BYTES_MAX
from replication.session import State
from replication.transport import SocketConnection
from tests.replication.test_relay import RUN, Stranger, hello, site

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
