"""A mount's control socket: what cannot be answered ends one request, and never the mount."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from dedup.errors import RewindError
from fusefs.agent_control import Body, ask, serve_control
from replication.transport import listen_unix


async def number(body: Body) -> Body:
    value = body["value"]
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return {"bytes": value.to_bytes(1).hex()}


async def test_a_body_that_makes_no_sense_ends_its_own_request(tmp_path: Path) -> None:
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
