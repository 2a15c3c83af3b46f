"""What can go wrong between the appliances, one type for each thing a caller does differently about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dedup.errors import RewindError

if TYPE_CHECKING:
    from dedup.ids import Seq
    from replication.control_messages import ErrorCode


class ReplicationError(RewindError):
    """Base of every error of this package."""


class ProtocolError(ReplicationError):
    """The peer sent what the protocol does not allow. The session is over; nothing of the bad frame was used."""


class LocalProtocolError(ReplicationError):
    """This side tried to send what the protocol does not allow. A defect here, not at the peer; nothing was sent."""


class LinkDown(ReplicationError):
    """There is no connection to the second appliance, or it broke."""


class LinkReset(LinkDown):
    """The connection broke while an answer was awaited: whether the peer acted is unknown. Ask again."""


class HandshakeRefused(ReplicationError):
    """The peer answered Hello with a Failure. `code` says why; STORE_FULL and STORE_FAILED pass with time."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class RequestRefused(ReplicationError):
    """The second appliance answered a request with an error; the text is its line for a person."""


class OutageError(ReplicationError):
    """The outage policy is `fail` and an outage lasts: the write is refused (EIO), nothing was queued."""


class HistoryLost(ReplicationError):
    """The store's history and the queue no longer meet: records `held + 1` .. `first_kept - 1` exist nowhere, or the
    store holds what was never sent. Ordered replication cannot go on; the agent reconciles in a new epoch."""

    def __init__(self, held: Seq, first_kept: Seq, text: str) -> None:
        super().__init__(text)
        self.held = held
        self.first_kept = first_kept


class Fenced(HistoryLost):
    """Another agent feeds the group now: nothing more of this one is taken, until it takes the group over again."""


class SpoolError(ReplicationError):
    """The spool cannot do what was asked."""


class SpoolBusy(SpoolError):
    """Another process uses this spool."""


class SpoolFailed(SpoolError):
    """A write or a sync of the spool failed: it takes nothing more. What was synced before can still be read."""


class SpoolDamaged(SpoolError):
    """The spool does not give back what was written: the records from there on are lost to it."""
