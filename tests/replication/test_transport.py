"""Connections: the same demands on every kind, then what is special about Unix sockets."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from replication.errors import LinkDown, ReplicationError
from replication.transport import (
    GATHER_BUFFERS_MAX,
    RECEIVE_BYTES_MAX,
    Connection,
    connect_unix,
    listen_unix,
    memory_pair,
    socket_pair,
)

PAIRS = pytest.mark.parametrize("make_pair", [memory_pair, socket_pair])
MakePair = Callable[[], tuple[Connection, Connection]]


async def receive_exactly(connection: Connection, length: int) -> bytes:
    got = b""
    while len(got) < length:
        piece = await connection.receive()
        assert 0 < len(piece) <= RECEIVE_BYTES_MAX
        got += piece
    return got


@PAIRS
async def test_buffers_arrive_in_order(make_pair: MakePair) -> None:
    one, other = make_pair()
    async with one, other:
        await one.send([b"abc", bytearray(b"de"), memoryview(b"xfgx")[1:3], b""])
        assert await receive_exactly(other, 7) == b"abcdefg"
        await other.send([b"back"])
        assert await receive_exactly(one, 4) == b"back"


@PAIRS
async def test_much_data_through_partial_sends(make_pair: MakePair) -> None:
    one, other = make_pair()
    buffers = [os.urandom(1 + 37 * number % 5000) for number in range(3 * GATHER_BUFFERS_MAX)]
    whole = b"".join(buffers)
    async with one, other, trio.open_nursery() as nursery:
        nursery.start_soon(one.send, buffers)
        assert await receive_exactly(other, len(whole)) == whole


@PAIRS
async def test_the_end_of_the_stream(make_pair: MakePair) -> None:
    one, other = make_pair()
    await one.send([b"last"])
    await one.aclose()
    await one.aclose()
    assert await receive_exactly(other, 4) == b"last"
    assert await other.receive() == b""
    with pytest.raises(LinkDown):
        await one.receive()
    with pytest.raises(LinkDown):
        await one.send([b"x"])
    await other.aclose()


@PAIRS
async def test_sending_to_nobody_is_link_down(make_pair: MakePair) -> None:
    one, other = make_pair()
    await other.aclose()
    with pytest.raises(LinkDown):
        for _ in range(3):
            await one.send([b"x" * 100])
    await one.aclose()


@PAIRS
async def test_closing_wakes_the_receiver(make_pair: MakePair) -> None:
    one, other = make_pair()

    async def receive() -> None:
        with pytest.raises(LinkDown):
            await one.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await one.aclose()
    await other.aclose()


@PAIRS
async def test_a_cancelled_receive_loses_nothing(make_pair: MakePair) -> None:
    one, other = make_pair()
    async with one, other:
        with trio.CancelScope() as scope:
            scope.cancel()
            await other.receive()
        assert scope.cancelled_caught
        await one.send([b"kept"])
        assert await receive_exactly(other, 4) == b"kept"


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
