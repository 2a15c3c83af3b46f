"""Space: what a store occupies against its policy's caps, and whether a batch of records still fits.

What is there is measured by a walk over the store's files, now and then; between two walks each record counts with
the most that it may add. So a store without duplicates and one with nothing else are both below the hard limit; only
the former is never walked in vain.

The hard limit is one on ingest. A reserve below it stays free for what the store adds by itself: checkpoints, entries
of snapshots, records without blocks. What rewrites history (consolidation, collection, sealing) may need more for a
while, and frees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Final

from dedup.errors import StoreError
from dedup.retention import Policy, load_policy
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, Aggregate, Correct, Extent, Reconcile, Record, Resize, Write

BLOCK_GROWTH_BYTES: Final = BLOCK_BYTES + 128
"""A new block: its slot, its fingerprint there, both in the journal, and in the index its fingerprint and pointer."""
RECORD_GROWTH_BYTES: Final = 256
"""A record apart from its blocks. A path may be longer; such records are few."""
RESERVE_BYTES_MAX: Final = 64 << 20
RESERVE_SHARE: Final = 8
"""Of the hard limit, one part in so many is the reserve, RESERVE_BYTES_MAX at most."""


class SpaceState(Enum):
    OK = "ok"
    SOFT = "soft"
    """Above the soft limit: a warning."""
    HARD = "hard"
    """Nothing more fits: the policy's `at_limit` says what writes meet."""


class Fit(Enum):
    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"
    """Not by what was counted, which is the most there may be: measure, then ask again."""


def used_bytes(path: Path) -> int:
    """What the store's files occupy on the disk. Blocks as long as a walk over them takes; a writer may be at work."""
    return sum(status.st_blocks * 512 for _, status in Storage().walk(path))


def full_from(policy: Policy) -> int | None:
    """From how many bytes on a store takes no more blocks: the hard limit less the reserve; None: never."""
    hard = policy.hard_limit_bytes
    return None if hard is None else hard - min(hard // RESERVE_SHARE, RESERVE_BYTES_MAX)


def state_at(policy: Policy, used: int) -> SpaceState:
    """The state of a store that occupies so much."""
    full = full_from(policy)
    if full is not None and used >= full:
        return SpaceState.HARD
    if policy.soft_limit_bytes is not None and used >= policy.soft_limit_bytes:
        return SpaceState.SOFT
    return SpaceState.OK


def space_document(policy: Policy, used: int, state: SpaceState | None = None) -> dict[str, object]:
    """The `space` of `status`."""
    return {
        "used": used,
        "soft_limit": policy.soft_limit_bytes,
        "hard_limit": policy.hard_limit_bytes,
        "state": (state or state_at(policy, used)).value,
    }


def space_of(storage: Storage, store_path: Path, used: int) -> dict[str, object]:
    """The same of a store by its files alone. A damaged policy is told in it: `status` goes on."""
    try:
        return space_document(load_policy(storage, store_path), used)
    except StoreError as error:
        return {**space_document(Policy(), used), "error": str(error)}


def blocks_of(records: Iterable[Record]) -> int:
    """How many blocks the records may add: those that their bytes touch."""
    blocks = 0
    for record in records:
        if isinstance(record, (Write, Reconcile)):
            blocks += _touched(record.extent)
        elif isinstance(record, Aggregate):
            blocks += sum(map(_touched, record.extents))
        elif isinstance(record, Correct):
            blocks += _touched(record.extent) + 1
        elif isinstance(record, Resize):
            blocks += 1
    return blocks


def _touched(extent: Extent) -> int:
    """Zeros count as their edges: the blocks between are holes."""
    first, last = extent.offset // BLOCK_BYTES, (extent.offset + extent.length - 1) // BLOCK_BYTES
    blocks = last - first + 1 if extent.length else 0
    return min(blocks, 2) if extent.zeros else blocks


class SpaceAccount:
    """What is used, as far as it is known, and what is promised to batches. Pure: measures nothing itself.

    Invariant: `used` + what landed since + what is under way is at least what the store occupies, apart from what the
    reserve is for.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.used: int | None = None
        """By the last walk; None before the first."""
        self._landed = 0
        self._under_way = 0

    @property
    def most(self) -> int:
        """The most that the store may occupy now, 0 as long as nothing was measured."""
        return (self.used or 0) + self._landed + self._under_way

    @property
    def soft_is_due(self) -> bool:
        """Whether only a walk can tell that the soft limit is not passed."""
        soft = self.policy.soft_limit_bytes
        return soft is not None and (self.used or 0) < soft <= self.most

    @property
    def has_spare(self) -> bool:
        """Whether there is at least once more the reserve between what is used and where the store is full."""
        full, hard = full_from(self.policy), self.policy.hard_limit_bytes
        return full is None or hard is None or self.most <= full - (hard - full)

    def begin_walk(self) -> int:
        """To be given to `measured` when the walk is done."""
        return self._landed

    def measured(self, used: int, mark: int) -> None:
        """A walk found so much; what landed before it began is in there."""
        self.used = used
        self._landed -= mark

    def fits(self, growth: int, *, bare: bool = False) -> Fit:
        """Whether a batch that adds so much at most still fits. `bare`: it adds no blocks, and may use the reserve."""
        full, hard = full_from(self.policy), self.policy.hard_limit_bytes
        if full is None or hard is None:
            return Fit.YES
        if self.used is None:
            return Fit.UNKNOWN
        if self.most + growth <= hard and (bare or self.most < full):
            return Fit.YES
        return Fit.UNKNOWN if self._landed or self._under_way else Fit.NO

    def begin(self, growth: int) -> None:
        """A batch that fits goes on its way."""
        self._under_way += growth

    def end(self, growth: int) -> None:
        """It is in the store, or was refused there."""
        self._under_way -= growth
        self._landed += growth


def growth_of(records: list[Record]) -> tuple[int, bool]:
    """The most that the batch may add to the store, and whether it is bare of blocks."""
    blocks = blocks_of(records)
    return len(records) * RECORD_GROWTH_BYTES + blocks * BLOCK_GROWTH_BYTES, blocks == 0
