"""The range lock: which part of the group a change owns, from assigning its seq until the source call has returned.

Invariants:
- `exclusive`: no two held claims overlap. Claims are rounded out to whole blocks, so that two writes into one block
  are ordered too: the second appliance merges them block by block.
- `fair`: a claim is held as soon as, and only when, no conflicting claim that was made before it is held or waiting.
  Hence nobody starves: claims made later cannot overtake.
- `blockers`: a waiting claim's `blockers` is the number of earlier conflicting claims still in the lock, each of which
  names it in `waiters` once. It is granted when the number falls to zero.

Everything here but waiting itself is synchronous, so no task can see the lock between two of its states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import trio

from dedup.types import BLOCK_BYTES, VOLUME_BYTES_MAX, VolumeId

_BLOCK_MASK: Final = BLOCK_BYTES - 1
_WHOLE_VOLUME_END: Final = 2 * VOLUME_BYTES_MAX
"""Past the end of any claimed range, also of a write that begins at the largest size of a volume."""


class ClaimState(Enum):
    WAITING = "waiting"
    HELD = "held"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Claim:
    """A part of the group: bytes start..end of `volume` (whole blocks), or everything when `volume` is None."""

    volume: VolumeId | None
    start: int
    end: int
    state: ClaimState = ClaimState.HELD
    blockers: int = 0
    waiters: list[Claim] = field(default_factory=list)
    granted: trio.Event | None = None

    def conflicts(self, other: Claim) -> bool:
        if self.volume is None or other.volume is None:
            return True
        return self.volume == other.volume and self.start < other.end and other.start < self.end


class RangeLock:
    """Claims of ranges, volumes or the whole group, first come, first served among those that conflict.

    A claim that conflicts with nothing is granted without a checkpoint. Bounded by the number of tasks that claim:
    nothing is kept for a volume that has no claim. Not reentrant. Release each claim once, from any task.
    """

    def __init__(self) -> None:
        self._ranges: dict[VolumeId, dict[Claim, None]] = {}
        self._groups: dict[Claim, None] = {}

    def try_claim(self, volume: VolumeId, offset: int, length: int) -> Claim | None:
        """Holds the blocks that `length` bytes at `offset` touch, or returns None when the claim would have to wait."""
        if self._groups:
            return None  # whatever it is, the whole group is claimed or about to be
        claim = _range(volume, offset, length)
        held = self._ranges.get(volume)
        if held is None:
            self._ranges[volume] = {claim: None}
            return claim
        start, end = claim.start, claim.end
        for other in held:  # as `Claim.conflicts`, without a call for each of the writes that are under way
            if other.start < end and start < other.end:
                return None
        held[claim] = None
        return claim

    async def claim(self, volume: VolumeId, offset: int, length: int) -> Claim:
        """Holds the blocks that `length` bytes at `offset` touch (at least one block). Cancelled, it holds nothing."""
        return self.try_claim(volume, offset, length) or await self._wait(_range(volume, offset, length))

    async def claim_volume(self, volume: VolumeId) -> Claim:
        """Holds all of a volume, whatever its size becomes. Cancelled, it holds nothing."""
        return await self._wait(Claim(volume, 0, _WHOLE_VOLUME_END))

    async def claim_all(self) -> Claim:
        """Holds the group: every volume and the namespace. Cancelled, it holds nothing."""
        return await self._wait(Claim(None, 0, 0))

    def release(self, claim: Claim) -> None:
        """Gives a held claim back and grants what waited for nothing else. RuntimeError when it is not held."""
        if claim.state is not ClaimState.HELD:
            raise RuntimeError(f"released a claim that is {claim.state.value}")
        self._leave(claim)

    @property
    def idle(self) -> bool:
        """Nothing is held and nobody waits."""
        return not self._groups and not self._ranges

    async def _wait(self, claim: Claim) -> Claim:
        earlier = self._conflicting(claim)
        self._enter(claim)
        if not earlier:
            return claim
        claim.state = ClaimState.WAITING
        claim.blockers = len(earlier)
        claim.granted = trio.Event()
        for other in earlier:
            other.waiters.append(claim)
        try:
            await claim.granted.wait()
        except BaseException:
            # Perhaps granted already, between the cancellation and this task's turn: it leaves in either state.
            self._leave(claim)
            raise
        return claim

    def _conflicting(self, claim: Claim) -> list[Claim]:
        found = [other for other in self._groups if other.conflicts(claim)]
        buckets = self._ranges.values() if claim.volume is None else (self._ranges.get(claim.volume, {}),)
        found += [other for bucket in buckets for other in bucket if other.conflicts(claim)]
        return found

    def _enter(self, claim: Claim) -> None:
        if claim.volume is None:
            self._groups[claim] = None
        else:
            self._ranges.setdefault(claim.volume, {})[claim] = None

    def _leave(self, claim: Claim) -> None:
        claim.state = ClaimState.RELEASED
        if claim.volume is None:
            del self._groups[claim]
        else:
            bucket = self._ranges[claim.volume]
            del bucket[claim]
            if not bucket:
                del self._ranges[claim.volume]
        for waiter in claim.waiters:
            waiter.blockers -= 1
            if not waiter.blockers and waiter.state is ClaimState.WAITING:
                waiter.state = ClaimState.HELD
                if waiter.granted is not None:
                    waiter.granted.set()
        claim.waiters.clear()


def _range(volume: VolumeId, offset: int, length: int) -> Claim:
    end = offset + (length or 1)
    return Claim(volume, offset & ~_BLOCK_MASK, (end + _BLOCK_MASK) & ~_BLOCK_MASK)
