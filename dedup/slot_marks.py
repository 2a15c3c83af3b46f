"""A set of addresses: one bit per slot, 2 KiB per container that has any (32 MiB for each TiB that is stored)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.layout import SLOT_BITS, SLOT_MASK, SLOTS_MAX
from dedup.pointer_map import Addresses
from dedup.types import HOLE, ContainerId

Slots = NDArray[np.int64]
"""Slot numbers of one container, ascending."""

_BATCH: Final = 1 << 16
"""Addresses gathered before they are sorted and marked."""


def pack_slots(slots: Slots) -> bytes:
    """The slots as a bit each, SLOTS_MAX bits."""
    bits = np.zeros(SLOTS_MAX, dtype=np.uint8)
    bits[slots] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_slots(packed: bytes) -> Slots:
    """Inverse of pack_slots."""
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    return np.flatnonzero(bits)


class SlotMarks:
    """Grows only. For one thread at a time."""

    def __init__(self) -> None:
        self._rows: dict[int, NDArray[np.uint8]] = {}
        self._pending: list[Addresses] = []
        self._pending_count = 0

    def add(self, addresses: Addresses) -> None:
        """Marks them all; HOLE, and a slot that no container has, is skipped."""
        self._pending.append(addresses)
        self._pending_count += len(addresses)
        if self._pending_count >= _BATCH:
            self._flush()

    def add_each(self, addresses: Iterable[int]) -> None:
        """The same, for a few."""
        for where in addresses:
            slot = where & SLOT_MASK
            if where != HOLE and slot < SLOTS_MAX:
                self._row(where >> SLOT_BITS)[slot >> 3] |= np.uint8(1 << (slot & 7))

    def slots(self, container: ContainerId) -> Slots:
        """The marked slots of the container."""
        self._flush()
        row = self._rows.get(container)
        if row is None:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(np.unpackbits(row, bitorder="little"))

    def has(self, addresses: Addresses) -> NDArray[np.bool_]:
        """Which of the addresses are marked."""
        self._flush()
        found = np.zeros(len(addresses), dtype=np.bool_)
        containers = addresses >> np.uint64(SLOT_BITS)
        for container in np.unique(containers).tolist():
            row = self._rows.get(container)
            if row is not None:
                chosen = np.flatnonzero(containers == container)
                slots = (addresses[chosen] & np.uint64(SLOT_MASK)).astype(np.int64)
                chosen, slots = chosen[slots < SLOTS_MAX], slots[slots < SLOTS_MAX]
                found[chosen] = (row[slots >> 3] >> (slots & 7).astype(np.uint8)) & 1
        return found

    @property
    def containers(self) -> int:
        """Containers that have a mark, those apart that were added since the last look."""
        return len(self._rows)

    def __len__(self) -> int:
        self._flush()
        return sum(int(np.unpackbits(row).sum()) for row in self._rows.values())

    def __iter__(self) -> Iterator[ContainerId]:
        """The containers that have a mark."""
        self._flush()
        return iter([ContainerId(number) for number in sorted(self._rows)])

    def _row(self, container: int) -> NDArray[np.uint8]:
        row = self._rows.get(container)
        if row is None:
            row = self._rows[container] = np.zeros(SLOTS_MAX // 8, dtype=np.uint8)
        return row

    def _flush(self) -> None:
        if not self._pending:
            return
        addresses = np.unique(np.concatenate(self._pending).astype(np.uint64, copy=False))
        self._pending, self._pending_count = [], 0
        addresses = addresses[(addresses != HOLE) & ((addresses & np.uint64(SLOT_MASK)) < SLOTS_MAX)]
        if len(addresses) == 0:
            return
        containers = (addresses >> np.uint64(SLOT_BITS)).astype(np.int64)
        starts = [0, *(np.flatnonzero(np.diff(containers)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(addresses)], strict=True):
            slots = (addresses[start:end] & np.uint64(SLOT_MASK)).astype(np.int64)
            row = self._row(int(containers[start]))
            np.bitwise_or.at(row, slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8))
