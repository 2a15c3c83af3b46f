"""Decides when a region's mark in the intent log may go.

Invariants:
- acknowledged-is-kept: a region is clearable only when no write is in flight there, its last record is durable at the
  second appliance, a source fdatasync begun after its last pwrite has succeeded, and it has rested `IDLE_SECONDS`, or
  nobody wrote there since a reconcile found it equal.
- bounded: at most `limit` regions are followed, and those with writes in flight.

Pure: no IO and no clock; time is passed in, in seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, NewType

from dedup.types import VOLUME_BYTES_MAX, Seq, VolumeId

Region = NewType("Region", int)
"""Number of a 4 MiB stretch of a volume, from 0."""

REGION_BYTES: Final = 4 << 20
REGIONS_MAX: Final = VOLUME_BYTES_MAX // REGION_BYTES
IDLE_SECONDS: Final = 30.0
"""How long a region rests before its mark may go: a region written now and then keeps its mark, and pays no sync."""
TRACKED_REGIONS_MAX: Final = 65536
"""Regions a RegionTracker follows; what is pushed out keeps its mark."""

_NO_SEQ: Final = Seq(0)
_LONG_AGO: Final = float("-inf")


def regions_of(offset: int, length: int) -> range:
    """Regions that bytes offset..offset + length of a volume touch; none for length 0."""
    return range(offset // REGION_BYTES, -(-(offset + length) // REGION_BYTES)) if length else range(0)


@dataclass(slots=True)
class _Tracked:
    in_flight: int = 0
    seq: Seq = _NO_SEQ
    """Last record that carries bytes of it."""
    ended: int = 0
    """The token at the end of its last write."""
    touched: float = 0.0
    spells: int | None = None
    """How often changes had begun to go unrecorded when a reconcile that found it equal began; None: none did yet."""


class RegionTracker:
    """Follows the writes of one source. No method blocks.

    Past `limit` regions the one longest at rest is forgotten and keeps its mark (`touch` takes it up again). Regions
    with writes in flight are not forgotten; their number is bounded by the writes in flight.
    """

    def __init__(self, limit: int = TRACKED_REGIONS_MAX) -> None:
        self._limit = limit
        # Ordered by `touched`, so that `clearable` looks at rested regions only.
        self._regions: OrderedDict[tuple[VolumeId, int], _Tracked] = OrderedDict()
        self._synced: dict[VolumeId, int] = {}
        self._durable = Seq(0)
        self._token = 0

    def __len__(self) -> int:
        return len(self._regions)

    def __contains__(self, key: tuple[VolumeId, int]) -> bool:
        return key in self._regions

    def write_begin(self, volume: VolumeId, offset: int, length: int, seq: Seq = _NO_SEQ, *, now: float) -> None:
        """A write is on its way. Call it before looking at the mark: from here on the mark stays."""
        for region in regions_of(offset, length):
            self._touch(volume, region, seq, now).in_flight += 1
        if len(self._regions) > self._limit:
            self._forget()

    def write_end(self, volume: VolumeId, offset: int, length: int, seq: Seq = _NO_SEQ, *, now: float) -> None:
        """The source call of that write returned, or was never made. `seq`: its last record, a Correct's too."""
        self._token += 1
        for region in regions_of(offset, length):
            tracked = self._regions.get((volume, region))
            if tracked is None:
                continue  # its volume is gone
            self._touch(volume, region, seq, now)
            tracked.in_flight -= 1
            tracked.ended = self._token

    def touch(self, volume: VolumeId, regions: range, seq: Seq = _NO_SEQ, *, now: float) -> None:
        """Follow regions that are marked without a write of ours: marked ahead, or forgotten. `seq`: the last one given
        out, where it is unknown which record was theirs."""
        self._token += 1
        for region in regions:
            self._touch(volume, region, seq, now).ended = self._token
        self._forget()

    def equal(self, volume: VolumeId, region: int, seq: Seq, spells: int) -> None:
        """A reconcile found the region equal as of `seq`, having looked when `link.spells` was `spells`. Where nobody
        writes there is nothing to rest from."""
        self._token += 1
        tracked = self._regions.get((volume, region))
        if tracked is None:
            tracked = self._regions[volume, region] = _Tracked(touched=_LONG_AGO)
            self._regions.move_to_end((volume, region), last=False)
        tracked.seq = max(tracked.seq, seq)
        tracked.ended = self._token
        tracked.spells = spells
        self._forget()

    def token(self) -> int:
        """To be taken before a source fdatasync begins, and handed to `source_synced` when it has succeeded."""
        return self._token

    def source_synced(self, volume: VolumeId, token: int) -> None:
        """An fdatasync of the volume's source, begun after `token` was taken, succeeded."""
        self._synced[volume] = max(token, self._synced.get(volume, 0))

    def durable(self, seq: Seq) -> None:
        """Records up to `seq` are durable at the second appliance. Lower than before: ignored."""
        self._durable = max(seq, self._durable)

    def clearable(self, now: float, spells: int | None = None) -> list[tuple[VolumeId, int]]:
        """Regions whose marks may go now; they are no longer followed. Clear them with no await in between.

        `spells`, while a reconcile is owed: of those only what was found equal since changes went unrecorded last.
        """
        found = []
        for key, tracked in self._regions.items():
            if now - tracked.touched < IDLE_SECONDS:
                break
            synced = self._synced.get(key[0], 0)
            if spells is not None and tracked.spells != spells:
                continue
            if not tracked.in_flight and tracked.seq <= self._durable and tracked.ended <= synced:
                found.append(key)
        for key in found:
            del self._regions[key]
        return found

    def has_clearable(self, now: float) -> bool:
        """Whether `clearable` would return anything: always True when it would, seldom when it would not."""
        oldest = next(iter(self._regions.values()), None)
        return oldest is not None and now - oldest.touched >= IDLE_SECONDS

    def unsynced(self, now: float) -> set[VolumeId]:
        """Volumes that keep rested regions only for want of a source fdatasync: sync these to let marks go."""
        found = set()
        for (volume, _), tracked in self._regions.items():
            if now - tracked.touched < IDLE_SECONDS:
                break
            if not tracked.in_flight and tracked.ended > self._synced.get(volume, 0):
                found.add(volume)
        return found

    def volume_gone(self, volume: VolumeId) -> None:
        """The volume was retired: nothing of it is followed any more."""
        self._synced.pop(volume, None)
        for key in [key for key in self._regions if key[0] == volume]:
            del self._regions[key]

    def _touch(self, volume: VolumeId, region: int, seq: Seq, now: float) -> _Tracked:
        tracked = self._regions.get((volume, region))
        if tracked is None:
            tracked = self._regions[volume, region] = _Tracked()
        else:
            self._regions.move_to_end((volume, region))
        if seq > tracked.seq:
            tracked.seq = seq
        tracked.touched = now
        return tracked

    def _forget(self) -> None:
        excess = len(self._regions) - self._limit
        if excess <= 0:
            return
        idle = (key for key, tracked in self._regions.items() if not tracked.in_flight)
        for key in [key for _, key in zip(range(excess), idle, strict=False)]:
            del self._regions[key]
