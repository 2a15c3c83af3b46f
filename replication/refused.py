"""Why a server ends a session that broke nothing: it is not admitted, or over."""

from __future__ import annotations

from replication.errors import ReplicationError
from replication.messages import ErrorCode


class Refused(ReplicationError):
    """The session is not admitted, or over; the message goes to the peer."""

    def __init__(self, text: str, code: ErrorCode = ErrorCode.REFUSED) -> None:
        super().__init__(text)
        self.code = code
