"""Where a reconcile found that source and store differ: a bounded list, and an exact sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from dedup.types import VolumeId

RANGES_MAX: Final = 1000
"""Ranges that are named; the others are counted."""


@dataclass(slots=True)
class Differences:
    """Ranges in the order in which they were found."""

    ranges: list[tuple[VolumeId, int, int]] = field(default_factory=list)
    """(volume, offset, length)."""
    omitted: int = 0
    """Ranges that are not in the list."""
    bytes: int = 0
    """Of all ranges, in whole blocks."""

    def add(self, volume: VolumeId, offset: int, length: int) -> None:
        self.bytes += length
        if len(self.ranges) < RANGES_MAX:
            self.ranges.append((volume, offset, length))
        else:
            self.omitted += 1
