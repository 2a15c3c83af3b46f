"""A mount's control socket: what cannot be answered ends one request, and never the mount."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from dedup.errors import RewindError
from fusefs.agent_control import Body, ask, serve_control
from fusefs.mount_control import ask_mount
from replication.errors import LinkDown, ProtocolError
from replication.messages import Reply, Request
from replication.transport import listen_unix
from replication.wire import encode


async def number(body: Body) -> Body:
    value = body["value"]
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return {"bytes": value.to_bytes(1).hex()}


Ask = Callable[[Path, str, Body], Awaitable[Body]]


async def in_a_thread(socket: Path, command: str, body: Body) -> Body:
    return await trio.to_thread.run_sync(ask_mount, socket, command, body)


@pytest.mark.parametrize("ask", [ask, in_a_thread])
async def test_a_body_that_makes_no_sense_ends_its_own_request(tmp_path: Path, ask: Ask) -> None:
    socket = tmp_path / "control"
    async with trio.open_nursery() as nursery:
        listener = listen_unix(socket)
        nursery.start_soon(serve_control, listener, {"number": number})
        for value in ("seven", 256, -1):
            with pytest.raises(RewindError, match="this mount could not make sense of number"):
                await ask(socket, "number", {"value": value})
        with pytest.raises(RewindError, match="does not know the command"):
            await ask(socket, "nothing", {})
        assert await ask(socket, "number", {"value": 7}) == {"bytes": "07"}
        nursery.cancel_scope.cancel()
    await listener.aclose()


@pytest.mark.parametrize("ask", [ask, in_a_thread])
async def test_what_is_no_answer_is_said(tmp_path: Path, ask: Ask) -> None:
    with pytest.raises(LinkDown, match="cannot connect to"):
        await ask(tmp_path / "nobody", "number", {})
    listener = listen_unix(tmp_path / "control")

    async def answer(data: bytes) -> None:
        async with await listener.accept() as connection:
            await connection.receive()
            if data:
                await connection.send([data])

    cut = b"".join(encode(Reply(1, {})))[:-1]
    another = b"".join(encode(Request(1, "number", {})))
    for data, error in ((b"", LinkDown), (cut, LinkDown), (another, ProtocolError), (bytes(8), ProtocolError)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, data)
            with pytest.raises(error):
                await ask(tmp_path / "control", "number", {})
    await listener.aclose()


async def test_a_mount_that_says_nothing_is_not_waited_for_forever(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "control")
    with pytest.raises(RewindError, match=r"number: no answer from the mount's process within 0.01 s"):
        await trio.to_thread.run_sync(partial(ask_mount, tmp_path / "control", "number", {}, timeout=0.01))
    await listener.aclose()
