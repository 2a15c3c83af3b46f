"""What the messages of control_messages.py must satisfy, whichever side made them, and how any such rule is put.

Pure functions that raise Malformed; the codec turns that into the error of the side at fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from dedup.ids import NAME_BYTES_MAX
from replication.control_messages import Failure, Hello, Reply, Request, Role, Welcome

U16_MAX: Final = (1 << 16) - 1
U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1
TEXT_BYTES_MAX: Final = 4096
"""Longest text for a person: a Failure's, a Reply's error, a reconcile's reason."""
COMMAND_DEPTH_MAX: Final = 16
"""Deepest nesting of a Request's or Reply's body."""
DIGEST_KEY_BYTES_MAX: Final = 64
"""Longest key that BLAKE2b takes."""


class Malformed(ValueError):
    """A value breaks a rule of the protocol. Never leaves this package: the codec says whose fault it is."""


def check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise Malformed(f"{what} {value} is not within {low}..{high}")


def check_text(what: str, text: str, bytes_max: int = TEXT_BYTES_MAX) -> None:
    """Any text that UTF-8 can carry, without NUL, within its length."""
    if len(text) > bytes_max or len(_utf8(what, text)) > bytes_max:
        raise Malformed(f"{what} is longer than {bytes_max} bytes")
    if "\0" in text:
        raise Malformed(f"{what} contains NUL")


def check_name(what: str, name: str) -> None:
    """A name that can be one component of a path."""
    check_text(what, name, NAME_BYTES_MAX)
    if name in ("", ".", "..") or "/" in name:
        raise Malformed(f"{what} {name!r} is not a name")


def _utf8(what: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"{what} {text!r} is not valid UTF-8") from error


def _check_hello(message: Hello) -> None:
    check_range("version", message.version, 0, U32_MAX)
    if message.role is Role.AGENT:
        check_name("group", message.group)
        check_name("agent", message.agent)
        check_range("epoch", message.epoch, 1, U32_MAX)
    else:
        # A person's command may concern the whole store: no group then.
        if message.group:
            check_name("group", message.group)
        check_range("epoch", message.epoch, 0, 0)
        if message.agent or message.take_over or message.mode is not None:
            raise Malformed(f"the Hello of a role {message.role.value} says what an agent's does")


def _check_welcome(message: Welcome) -> None:
    check_range("version", message.version, 0, U32_MAX)
    check_text("store", message.store, NAME_BYTES_MAX)
    check_range("epoch", message.epoch, 0, U32_MAX)
    check_range("held", message.held, 0, U64_MAX)
    check_range("durable", message.durable, 0, message.held)
    check_range("time", message.time, 0, U64_MAX)
    check_range("run", message.run, 0, U32_MAX)
    check_range("next_volume", message.next_volume, 0, U32_MAX)
    check_range("digest key length", len(message.digest_key), 0, DIGEST_KEY_BYTES_MAX)


def _check_body(value: object, depth: int = 0) -> None:
    """JSON-like: None, bool, int, float, str, lists and dicts with str keys, not too deep."""
    if depth > COMMAND_DEPTH_MAX:
        raise Malformed(f"body is nested deeper than {COMMAND_DEPTH_MAX}")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise Malformed("a key of the body is not text")
            _check_body(inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_body(inner, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise Malformed(f"body holds a {type(value).__name__}")


def _check_request(message: Request) -> None:
    check_range("request id", message.id, 1, U64_MAX)
    check_name("command", message.command)
    _check_body(message.body)


def _check_reply(message: Reply) -> None:
    check_range("request id", message.id, 1, U64_MAX)
    check_text("error", message.error)
    _check_body(message.body)


def _check_failure(message: Failure) -> None:
    check_text("text", message.text)


CONTROL_CHECKS: Final[dict[type, Callable[[Any], None]]] = {
    Hello: _check_hello,
    Welcome: _check_welcome,
    Request: _check_request,
    Reply: _check_reply,
    Failure: _check_failure,
}
"""The check of each of them."""
