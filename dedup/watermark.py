"""How far a checkpoint has come with the slots of the containers: which are durable, whose fingerprints are in runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup import layout
from dedup.fingerprint_table import halves
from dedup.types import Address, ContainerId

Mask = NDArray[np.bool_]
_SLICE_SHIFT: Final = np.uint64(64 - 6)


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
    """Which fingerprints the runs have: of all slots that `whole` covers. Those that were removed aside.

    Older versions put them into LMDB by parts: of those that `round` covers, the ones of the first `slices` of 64
    slices are in, too. Such a mark stays until the next run is made: then `round` is `whole`, and `slices` is 0."""

    whole: Watermark
    round: Watermark
    slices: int

    def has_each(self, fingerprints: bytes, addresses: NDArray[np.uint64]) -> Mask:
        """Whether the fingerprint of each slot is in a run."""
        had = self.whole.covers_each(addresses)
        if self.slices:
            slices = halves(fingerprints)[0] >> _SLICE_SHIFT
            had |= self.round.covers_each(addresses) & (slices < np.uint64(self.slices))
        return had


@dataclass(frozen=True, slots=True)
class RunsNamed:
    """The runs that there are, oldest first."""

    numbers: tuple[int, ...]
