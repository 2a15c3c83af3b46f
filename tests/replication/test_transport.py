"""Connections: the same demands on every kind, then what is special about Unix sockets."""

from __future__ import annotations

import itertools
import os
import socket
import stat
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from replication.errors import LinkDown, ReplicationError
from replication.messages import Role
from replication.tls import TlsConnection
from replication.transport import (
    GATHER_BUFFERS_MAX,
    RECEIVE_BYTES_MAX,
    Connection,
    MemoryConnection,
    connect_unix,
    listen_unix,
    memory_pair,
    socket_pair,
)
from tests.replication.links import OpenPair, open_pair

KINDS = ["memory", "pair", "unix", "tcp", "tls"]


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> OpenPair:
    return partial(open_pair, request.param, tmp_path)


async def receive_exactly(connection: Connection, length: int) -> bytes:
    got = bytearray()
    while len(got) < length:
        piece = await connection.receive()
        assert 0 < len(piece) <= RECEIVE_BYTES_MAX
        got += piece
    return bytes(got)


async def test_buffers_arrive_in_order(pair: OpenPair) -> None:
    async with pair() as (one, other):
        await one.send([b"abc", bytearray(b"de"), memoryview(b"xfgx")[1:3], b""])
        assert await receive_exactly(other, 7) == b"abcdefg"
        await other.send([b"back"])
        assert await receive_exactly(one, 4) == b"back"


async def test_nothing_is_no_end(pair: OpenPair) -> None:
    async with pair() as (one, other):
        await one.send([])
        await one.send([b"", b""])
        await one.send([b"x"])
        assert await other.receive() == b"x"


async def test_much_data_through_partial_sends(pair: OpenPair) -> None:
    buffers = [os.urandom(1 + 37 * number % 5000) for number in range(3 * GATHER_BUFFERS_MAX)]
    whole = b"".join(buffers)
    async with pair() as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.send, buffers)
        assert await receive_exactly(other, len(whole)) == whole


async def test_much_data_both_ways_at_once(pair: OpenPair) -> None:
    """More than any buffer on the way holds, so that each side must receive while it sends."""
    there, back = os.urandom(16 << 20), os.urandom(16 << 20)
    got = {}

    async def receive(connection: Connection, length: int) -> None:
        got[connection] = await receive_exactly(connection, length)

    async with pair() as (one, other):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, [there])
            nursery.start_soon(other.send, [memoryview(back)[:5], memoryview(back)[5:]])
            nursery.start_soon(receive, one, len(back))
            nursery.start_soon(receive, other, len(there))
        assert got == {one: back, other: there}


async def test_the_end_of_the_stream(pair: OpenPair) -> None:
    async with pair() as (one, other):
        await one.send([b"last"])
        await one.aclose()
        await one.aclose()
        assert await receive_exactly(other, 4) == b"last"
        assert await other.receive() == b""
        assert await other.receive() == b""
        with pytest.raises(LinkDown):
            await one.receive()
        with pytest.raises(LinkDown):
            await one.send([b"x"])


async def test_sending_to_nobody_is_link_down(pair: OpenPair) -> None:
    async with pair() as (one, other):
        await other.aclose()
        with pytest.raises(LinkDown):
            for _ in range(1000):
                await one.send([b"x" * 100])


async def test_closing_wakes_who_waits(pair: OpenPair) -> None:
    async def receive(connection: Connection) -> None:
        with pytest.raises(LinkDown):
            await connection.receive()

    async def send(connection: Connection) -> None:
        with pytest.raises(LinkDown):
            while True:
                await connection.send([bytes(1 << 20)])
                await trio.lowlevel.checkpoint()

    async with pair() as (one, _other), trio.open_nursery() as nursery:
        nursery.start_soon(receive, one)
        if not isinstance(one, MemoryConnection):  # which takes everything
            nursery.start_soon(send, one)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await one.aclose()


async def test_one_task_sends(pair: OpenPair) -> None:
    async with pair() as (one, other):
        if isinstance(one, MemoryConnection):
            return  # it never waits
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, [bytes(32 << 20), b"tail"])
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError):
                await one.send([b"never"])
            assert one.send_nowait([b"never"]) == 0
            assert (await receive_exactly(other, (32 << 20) + 4))[-4:] == b"tail"


async def test_a_cancelled_receive_loses_nothing(pair: OpenPair) -> None:
    """Cancelled again and again at whatever moment, also in the middle of a record."""
    whole = os.urandom(8 << 20)
    got = bytearray()

    async def receive(other: Connection, scope: trio.CancelScope) -> None:
        with scope:
            while len(got) < len(whole):
                got.extend(await other.receive())

    async with pair() as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.send, [whole])
        for round_ in itertools.count():
            if len(got) == len(whole):
                break
            scope = trio.CancelScope()
            async with trio.open_nursery() as receiving:
                receiving.start_soon(receive, other, scope)
                for _ in range(round_ % 20):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    assert got == whole


async def test_receive_is_a_checkpoint_also_when_there_is_much(pair: OpenPair) -> None:
    async with pair() as (one, other):
        await one.send([bytes(100 << 10)])
        received = 0
        while received < 100 << 10:
            with trio.testing.assert_checkpoints():
                received += len(await other.receive())


async def test_what_is_sent_before_the_first_receive(pair: OpenPair) -> None:
    async with pair() as (one, other):
        await one.send([b"a"])
        await other.send([b"b"])
        assert (await one.receive(), await other.receive()) == (b"b", b"a")
        assert other.receive_soon(1) == b""
        await one.send([b"c"])
        assert (other.receive_soon(1000) or await other.receive()) == b"c"


async def test_who_is_there(pair: OpenPair) -> None:
    async with pair() as (one, other):
        if isinstance(one, TlsConnection):
            assert one.peer is not None and one.peer.name == "server" and one.peer.role is None and one.peer.server
            assert other.peer is not None and other.peer.name == "client" and other.peer.role is Role.AGENT
        else:
            assert one.peer is other.peer is None


async def test_send_nowait_takes_what_fits_and_a_second_sender_is_refused() -> None:
    one, other = socket_pair()
    async with one, other:
        assert one.send_nowait([b"ab", b"c"]) == 3
        assert await receive_exactly(other, 3) == b"abc"
        sent = 0
        while (taken := one.send_nowait([bytes(1 << 20)])) > 0:
            sent += taken
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, [b"tail"])
            await trio.testing.wait_all_tasks_blocked()
            assert one.send_nowait([b"never"]) == 0
            with pytest.raises(trio.BusyResourceError):
                await one.send([b"never"])
            assert (await receive_exactly(other, sent + 4))[-4:] == b"tail"


async def test_unix_sockets_connect(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = listen_unix(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client = await connect_unix(path)
    server = await listener.accept()
    async with client, server:
        await client.send([b"hello"])
        assert await receive_exactly(server, 5) == b"hello"
    await listener.aclose()
    assert not path.exists()
    with pytest.raises(LinkDown):
        await connect_unix(path)


async def test_directories_of_any_length(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 200) / ("e" * 200)
    directory.mkdir(parents=True)
    path = directory / "socket"
    listener = listen_unix(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client = await connect_unix(path)
    server = await listener.accept()
    async with client, server:
        await server.send([b"hello"])
        assert await receive_exactly(client, 5) == b"hello"
    await listener.aclose()
    with pytest.raises(ReplicationError, match="too long"):
        listen_unix(directory / ("s" * 100))


async def test_a_stale_socket_is_replaced_by_who_may(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(LinkDown):
        await connect_unix(path)
    with pytest.raises(ReplicationError, match="in use"):
        listen_unix(path)
    listener = listen_unix(path, replace_stale=True)
    await (await connect_unix(path)).aclose()
    await listener.aclose()


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(ReplicationError):
        listen_unix(path, replace_stale=True)
    assert path.read_text() == "precious"


async def test_receive_soon_takes_what_comes_and_leaves_the_rest_to_receive() -> None:
    one, other = socket_pair()
    async with one, other:
        assert one.receive_soon(1) == b""
        await other.send([b"abc"])
        assert one.receive_soon(1) == b"abc"
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await one.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await other.send([b"def"])
            assert one.receive_soon(1) == b"def"  # the other one goes on waiting
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            await other.send([b"ghi"])
        assert got == [b"ghi"]
        await other.aclose()
        assert one.receive_soon(1) == b""
        assert await one.receive() == b""
    with pytest.raises(LinkDown):
        one.receive_soon(1)


async def test_receive_soon_where_nothing_can_be_awaited_on_the_spot() -> None:
    one, other = memory_pair()
    async with one, other:
        await other.send([b"abc"])
        assert one.receive_soon(1) == b""
        assert await one.receive() == b"abc"
