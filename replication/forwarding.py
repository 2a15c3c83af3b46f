"""How records are forwarded: with which spool, how fast, and whether blocks are offered before they are sent."""

from __future__ import annotations

from dataclasses import dataclass

from replication.group_spools import GroupSpools


@dataclass(frozen=True, slots=True)
class Forwarding:
    """All of it is for each group."""

    spools: GroupSpools | None = None
    bytes_per_second: int = 0
    """Most that goes over the link; 0 for no limit."""
    offers: bool | None = None
    """Whether batches leave out blocks that are held already; None: where the link is a network's."""
