"""A short command's way to the process behind a mount: one request, one reply, without trio (see agent_control)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from dedup.errors import RewindError
from fusefs.mountpoint import absolute, control_socket
from replication.control_frames import ControlDecoder, encode_control
from replication.control_messages import Reply, Request
from replication.errors import LinkDown, ProtocolError
from replication.exchange import REPLY_SECONDS, connected, converse
from replication.frame_head import Buffer

DRAIN_SECONDS: Final = 60.0
"""How long an unmount waits until all is durable at the store, unless it is told otherwise."""


class Unanswered(RewindError):
    """The reply did not come in time."""


class Question:
    """One request to a mount, whose protocol has no greeting; an `exchange.Talk`, for who blocks and who waits."""

    def __init__(self, command: str, body: dict[str, object]) -> None:
        self.reply: dict[str, object] | None = None
        self._request = Request(1, command, body)
        self._decoder = ControlDecoder()

    def begin(self) -> list[Buffer]:
        return encode_control(self._request)

    def receive(self, data: bytes) -> list[Buffer]:
        """RewindError with the mount's own line; ProtocolError, LinkDown."""
        if not data:
            raise self.broken("the connection was closed in the middle")
        self._decoder.receive_data(data)
        message = self._decoder.next_message()
        if isinstance(message, Reply):
            if message.error:
                raise RewindError(message.error)
            self.reply = message.body
        elif message is not None:
            raise ProtocolError("the mount's process did not answer with a reply")
        return []

    def broken(self, reason: str) -> LinkDown:
        return LinkDown(reason)

    def unanswered(self, timeout: float) -> Unanswered:
        """What to raise when the reply did not come in time."""
        return Unanswered(f"{self._request.command}: no answer from the mount's process within {timeout:g} s")


def tell(mountpoint: Path, command: str, body: dict[str, object], *, timeout: float = REPLY_SECONDS) -> dict[str, Any]:
    """The reply of the process behind a source mount to one command. RewindError with its own line, or when nobody
    answers; Unanswered; NotMounted."""
    return ask_mount(control_socket(absolute(mountpoint)), command, body, timeout=timeout)


def ask_mount(
    control: Path, command: str, body: dict[str, object], *, timeout: float = REPLY_SECONDS
) -> dict[str, Any]:
    """As `agent_control.ask`; blocks."""
    question = Question(command, body)
    try:
        with connected(control, timeout) as sock:
            return converse(sock, question, timeout)
    except TimeoutError:
        raise question.unanswered(timeout) from None
