"""Control messages as frames and back, for who says and hears no others: a command that asks an appliance.

`wire` encodes and decodes them by the same functions, and all other messages besides.

Invariants:
- A ControlDecoder holds at most one incomplete frame, whose length was checked against the limit of its type, and what
  was received with it.
- Malformed input, and a frame of any other type, raises ProtocolError and nothing else; nothing of it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import msgspec

from replication.control_checks import CONTROL_CHECKS, Malformed
from replication.control_messages import CONTROL_BYTES_MAX, Failure, Hello, Reply, Request, Welcome
from replication.errors import LocalProtocolError, ProtocolError
from replication.frame_head import HEADER, Buffer, MessageType

ControlMessage = Hello | Welcome | Request | Reply | Failure

CONTROL_FRAMES: Final[dict[type, tuple[MessageType, int]]] = {
    Hello: (MessageType.HELLO, 4096),
    Welcome: (MessageType.WELCOME, 4096),
    Request: (MessageType.REQUEST, CONTROL_BYTES_MAX),
    Reply: (MessageType.REPLY, CONTROL_BYTES_MAX),
    Failure: (MessageType.FAILURE, 8192),
}
"""Their types and longest frames; all of them travel as msgpack."""
_CLASSES: Final = {int(kind): cls for cls, (kind, _limit) in CONTROL_FRAMES.items()}


def encode_msgpack(message: Any, kind: MessageType, limit: int, check: Callable[[Any], None]) -> list[Buffer]:
    """The frame of a message that travels as msgpack. Raises Malformed, or what msgspec raises."""
    check(message)
    body = msgspec.msgpack.encode(message)
    total = HEADER.size + len(body)
    if total > limit:
        raise Malformed(f"{total} bytes; at most {limit} are allowed")
    return [HEADER.pack(total, kind, 0, 0), body]


def msgpack_decoder(cls: type, check: Callable[[Any], None]) -> Callable[[bytes], Any]:
    """What decodes the body of such a frame. It raises Malformed."""
    decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(cls)

    def decode(body: bytes) -> Any:
        try:
            message = decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise Malformed(str(error)) from error
        check(message)
        # One encoding each: refuses unknown and repeated fields, and integers longer than they need be.
        if msgspec.msgpack.encode(message) != body:
            raise Malformed("not the canonical encoding")
        return message

    return decode


def encode_control(message: ControlMessage) -> list[Buffer]:
    """As `wire.encode`."""
    cls = type(message)
    try:
        return encode_msgpack(message, *CONTROL_FRAMES[cls], CONTROL_CHECKS[cls])
    except (Malformed, TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot send {cls.__name__}: {error}") from error


@cache
def _decoder(kind: int) -> Callable[[bytes], Any]:
    """Made when the first of its type arrives: that takes longer than all else that a command does."""
    cls = _CLASSES[kind]
    return msgpack_decoder(cls, CONTROL_CHECKS[cls])


class ControlDecoder:
    """Bytes in, control messages out: `receive_data` what arrived, then `next_message` until it gives None."""

    def __init__(self) -> None:
        self._data = b""

    def receive_data(self, data: bytes) -> None:
        """Takes what arrived."""
        self._data += data

    def next_message(self) -> ControlMessage | None:
        """The next complete message, or None until more data comes. ProtocolError."""
        try:
            return self._next()
        except Malformed as error:
            raise ProtocolError(f"malformed frame from the peer: {error}") from error

    def _next(self) -> ControlMessage | None:
        if len(self._data) < HEADER.size:
            return None
        length, kind, flags, reserved = HEADER.unpack_from(self._data)
        cls = _CLASSES.get(kind)
        if cls is None:
            raise Malformed(f"type {kind} in the answer to a command")
        if not HEADER.size <= length <= CONTROL_FRAMES[cls][1]:
            raise Malformed(f"a {cls.__name__} frame of {length} bytes")
        if flags or reserved:
            raise Malformed(f"flags {flags} or reserved bits {reserved} in a {cls.__name__} frame")
        if len(self._data) < length:
            return None
        body, self._data = self._data[HEADER.size : length], self._data[length:]
        message: ControlMessage = _decoder(kind)(body)
        return message
