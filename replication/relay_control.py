"""A command's session at a first appliance: passed on to the second one, which is who answers it.

Invariants:
- Nothing is answered here, and nothing is kept: when one of the two connections ends, so does the other.
- The second appliance sees this appliance's key, and not the peer's. A peer that is trusted with some groups only gets
  a session about one of those, and nothing in it that is about another.
"""

from __future__ import annotations

import trio

from replication.errors import LinkDown, ProtocolError
from replication.messages import ErrorCode, Failure, Hello, Message, Query, Reply, Request, Result, Role, Welcome
from replication.refused import Refused
from replication.relay import UPSTREAM_SECONDS, Connect
from replication.server_end import ServerEnd
from replication.session import Session, Side, State
from replication.session_hearing import CONTROL_IDLE_SECONDS
from replication.session_speech import send_in_time
from replication.transport import Connection


async def relay_control(end: ServerEnd, hello: Hello, connect: Connect) -> None:
    """Serves the session until one side ends it. Raises Refused."""
    peer = end.connection.peer
    limited = peer is not None and bool(peer.groups)
    if limited and (not hello.group or hello.role is Role.ADMIN):
        raise Refused("whoever is trusted with some groups only reads one of them through a first appliance: name it")
    session = Session(Side.CLIENT)
    with trio.move_on_after(UPSTREAM_SECONDS) as patience:
        connection = await _connected(connect)
    if patience.cancelled_caught:
        raise Refused(f"the second appliance does not answer within {UPSTREAM_SECONDS:g} s", ErrorCode.UNAVAILABLE)
    async with connection:
        try:
            await send_in_time(connection, session.send(hello))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pass_requests, end, connection, session, nursery.cancel_scope, limited, hello.group)
                with end.guard():
                    await _pass_replies(end, connection, session)
                nursery.cancel_scope.cancel()
        except LinkDown as error:
            raise Refused(str(error), ErrorCode.UNAVAILABLE) from error


async def _connected(connect: Connect) -> Connection:
    try:
        return await connect()
    except LinkDown as error:
        raise Refused(f"the first appliance cannot reach the second one: {error}", ErrorCode.UNAVAILABLE) from error


async def _pass_replies(end: ServerEnd, connection: Connection, session: Session) -> None:
    """What the second appliance says, until it says no more."""
    while True:
        message = await _next(connection, session)
        if isinstance(message, Failure):
            raise Refused(message.text, message.code)
        if not isinstance(message, (Welcome, Reply, Result)):
            raise Refused(f"the second appliance said {type(message).__name__} to a command", ErrorCode.UNAVAILABLE)
        end.say(message)
        await end.room_to_say()


async def _next(connection: Connection, session: Session) -> Message:
    try:
        while (message := session.next_event()) is None:
            data = await connection.receive()
            if not data:
                raise Refused("the second appliance closed the connection", ErrorCode.UNAVAILABLE)
            session.receive_data(data)
    except (LinkDown, ProtocolError) as error:
        # Of the link behind this one: the peer has done nothing wrong.
        raise Refused(f"the link to the second appliance: {error}", ErrorCode.UNAVAILABLE) from error
    return message


async def _pass_requests(
    end: ServerEnd, connection: Connection, session: Session, both: trio.CancelScope, limited: bool, group: str
) -> None:
    with end.guard():
        while True:
            while (message := end.session.next_event()) is not None:
                if session.state is State.CLOSED:
                    return  # the second appliance has said its last word, which is on its way to the peer
                if isinstance(message, Request):
                    if limited and message.body.get("group", group) != group:
                        raise Refused(f"only group {group!r} can be asked about here")
                    await _pass_on(connection, session, message)
                elif isinstance(message, Query):  # about the session's group alone
                    await _pass_on(connection, session, message)
                elif isinstance(message, Failure):
                    both.cancel()
            if not (data := await end.receive(CONTROL_IDLE_SECONDS)):
                both.cancel()
                return
            end.session.receive_data(data)


async def _pass_on(connection: Connection, session: Session, request: Request | Query) -> None:
    try:
        await send_in_time(connection, session.send(request))
    except LinkDown as error:
        # Of the link behind this one: the peer has done nothing wrong.
        raise Refused(f"the link to the second appliance: {error}", ErrorCode.UNAVAILABLE) from error
