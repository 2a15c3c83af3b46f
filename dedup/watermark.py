"""How far a checkpoint has come with the slots of the containers: which are durable, whose fingerprints are in LMDB."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dedup import layout
from dedup.fingerprint_table import slice_numbers
from dedup.types import Address, ContainerId

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Watermark:
    """What a checkpoint made durable of the containers: all of those below `next_container`, but of each in `open` only
    the slots below its number. The highest container may be collected one day; its number is not given again."""

    next_container: ContainerId
    open: dict[ContainerId, int]

    def covers(self, address: Address) -> bool:
        """Whether the block was durable at the checkpoint."""
        container = layout.container_of(address)
        if container >= self.next_container:
            return False
        slots = self.open.get(container)
        return slots is None or layout.slot_of(address) < slots

    def covers_each(self, addresses: NDArray[np.uint64]) -> Mask:
        """`covers` of each."""
        containers = addresses >> np.uint64(layout.SLOT_BITS)
        covered: Mask = containers < np.uint64(self.next_container)
        for container, slots in self.open.items():
            first = np.uint64(layout.address(container, 0))
            covered &= (containers != np.uint64(container)) | (addresses - first < np.uint64(slots))
        return covered

    def covers_whole(self, container: ContainerId) -> bool:
        """Whether no slot of it lies past the mark."""
        return container < self.next_container and container not in self.open


@dataclass(frozen=True, slots=True)
class Merged:
    """Which fingerprints LMDB has: of all slots that `whole` covers, and, of those that `round` covers, the ones of the
    first `slices` of `fingerprint_table.SLICES` slices. Those that were removed aside."""

    whole: Watermark
    round: Watermark
    slices: int

    def has_each(self, fingerprints: bytes, addresses: NDArray[np.uint64]) -> Mask:
        """Whether the fingerprint of each slot is in LMDB."""
        in_slices: Mask = slice_numbers(fingerprints) < np.uint64(self.slices)
        return self.whole.covers_each(addresses) | (self.round.covers_each(addresses) & in_slices)
