"""What the first appliance says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dedup.types import Seq, TimeNs
from replication.messages import Level, Mode


class LinkState(Enum):
    CONNECTED = "connected"
    DOWN = "down"
    """No session; connecting again and again."""
    FULL = "full"
    """The store's disk is full; records are kept and offered again."""
    LOST = "lost"
    """Ordered replication in this epoch is over; see HistoryLost."""


@dataclass(frozen=True, slots=True)
class FirstApplianceStatus:
    """A picture of one instant."""

    link: LinkState
    outage: bool
    mode: Mode
    waits_for: Level
    """What a write waits for now; only in auto it changes by itself."""
    last_seq: Seq
    received: Seq
    durable: Seq
    queued_bytes: int
    queued_records: int
    """Records that are not durable yet, those of the open aggregate included."""
    oldest_queued: TimeNs | None
    """Time of the oldest queued frame."""
    error: str
    """Why the link is not connected; empty when it is."""
    written_bytes: int = 0
    """Data of the writes taken so far."""
    sent_bytes: int = 0
    """Put on the wire so far: frames, over all links."""
    saved_bytes: int = 0
    """What offers of blocks have kept off the wire, less what they cost."""
    spool_bytes: int = 0
    """What the spool's files take."""
    spool_limit: int = 0
    """Most that they may take; 0 when there is no spool."""
    spool_error: str = ""
    """Why the spool takes nothing more, or what of it is lost."""
