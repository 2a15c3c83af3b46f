"""The mount's control socket: what `bookmark`, `status`, `unmount` and the like say to the process behind a mount.

One request and one reply a connection, in the protocol's own frames. The socket lies in the source's state directory
with mode 0600.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import trio

from dedup.errors import RewindError
from fusefs.mount_control import Question
from replication.errors import LinkDown, ProtocolError
from replication.exchange import REPLY_SECONDS
from replication.explanation import explain
from replication.messages import Message, Reply, Request
from replication.transport import Connection, Listener, connect_unix
from replication.wire import Decoder, encode

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 16
REQUEST_SECONDS: Final = 10.0
"""How long a connected command may take to say what it wants."""
UNLESS_LEFT: Final = frozenset({"bookmark"})
"""What is not done any more once who asked for it is gone: the application may go on already."""

Body = dict[str, object]
Handlers = Mapping[str, Callable[[Body], Awaitable[Body]]]


async def serve_control(listener: Listener, handlers: Handlers) -> None:
    """Answers requests until cancelled. A handler's RewindError or OSError is the reply's error line."""
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)
    async with trio.open_nursery() as nursery:
        while True:
            async with limit:
                connection = await listener.accept()
            nursery.start_soon(_serve_one, connection, handlers, limit)


async def _serve_one(connection: Connection, handlers: Handlers, limit: trio.CapacityLimiter) -> None:
    async with limit, connection:
        try:
            with trio.fail_after(REQUEST_SECONDS):
                request = await _receive(connection)
            if not isinstance(request, Request):
                raise ProtocolError("not a request")
            reply = None
            async with trio.open_nursery() as nursery:
                if request.command in UNLESS_LEFT:
                    nursery.start_soon(_cancel_when_left, connection, nursery.cancel_scope)
                reply = await _answer(request, handlers)
                nursery.cancel_scope.cancel()
            if reply is not None:
                await connection.send(encode(reply))
        except (RewindError, trio.TooSlowError) as error:
            log.warning("a control connection ended: %s", error)


async def _cancel_when_left(connection: Connection, scope: trio.CancelScope) -> None:
    try:
        while await connection.receive():
            pass  # more than a request is not answered, nor is it an end
    except LinkDown:
        pass
    scope.cancel()


async def _answer(request: Request, handlers: Handlers) -> Reply:
    handler = handlers.get(request.command)
    if handler is None:
        return Reply(request.id, {}, f"this mount does not know the command {request.command!r}")
    try:
        return Reply(request.id, await handler(request.body))
    except (RewindError, OSError) as error:
        return Reply(request.id, {}, explain(error))
    except (TypeError, ValueError, OverflowError) as error:
        # A body that is none of this version's must not end the mount under its applications.
        log.exception("the command %s could not be carried out", request.command)
        return Reply(request.id, {}, f"this mount could not make sense of {request.command}: {error}")


async def _receive(connection: Connection) -> Message:
    decoder = Decoder()
    while (message := decoder.next_message()) is None:
        data = await connection.receive()
        if not data:
            raise LinkDown("the connection was closed in the middle")
        decoder.receive_data(data)
    return message


async def ask(socket: Path, command: str, body: Body, *, timeout: float = REPLY_SECONDS) -> Body:
    """The reply of the mount behind `socket`. RewindError with its own line, or when nobody answers."""
    question = Question(command, body)
    with trio.move_on_after(timeout):
        async with await connect_unix(socket) as connection:
            await connection.send(question.begin())
            while question.reply is None:
                question.receive(await connection.receive())
        return question.reply
    raise question.unanswered(timeout)
