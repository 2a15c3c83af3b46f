"""Which slots the recovery points of a store name, and whether each of them is there: `pointers-resolve`.

Invariants:
- an address is looked at once, however many pointers name it: a bit per slot remembers it (32 MiB for each TiB that
  is stored; everything else here is bounded by a constant);
- nothing is called damaged on a table that was read before the address was known: beside a writer, a container's
  table grows, and a look that fails is done again on a fresh table.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.container import ContainerReader
from dedup.errors import Damaged, UnknownFormat
from dedup.layout import (
    SLOT_BITS,
    SLOT_MASK,
    SLOTS_MAX,
    container_path,
)
from dedup.pointer_map import Addresses
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, HOLE, Address, ContainerId

BAD_MAX: Final = 1 << 16
"""Damaged addresses that are kept to be named; more are only counted."""
_BATCH: Final = 1 << 17
"""Addresses gathered before they are looked at, sorted: 3 MiB, and a container's table is fetched once for them all."""
_TABLES_MAX: Final = 64
"""Fingerprint tables kept: 256 KiB each."""
_READ_BLOCKS: Final = 256

_Slots = NDArray[np.int64]
_Table = NDArray[np.uint64]


def consecutive(numbers: _Slots) -> Iterator[tuple[int, int]]:
    """(first, count) of each stretch of consecutive numbers in an ascending array."""
    if len(numbers) == 0:
        return
    starts = np.concatenate(([0], np.flatnonzero(np.diff(numbers) != 1) + 1, [len(numbers)]))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield int(numbers[start]), end - start


class Reachability:
    """Gathers the addresses that pointers name and holds them against the containers."""

    def __init__(self, storage: Storage, directory: Path) -> None:
        self._storage = storage
        self._directory = directory
        self._addresses: list[Addresses] = []
        self._fingerprints: list[bytes] = []
        self._pending = 0
        self._marks: dict[int, NDArray[np.uint8]] = {}
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self.unreadable: dict[int, str] = {}
        """Containers that are named and cannot be opened, and why."""
        self.bad: dict[int, str] = {}
        """Damaged addresses, and what is wrong: at most BAD_MAX."""
        self.damaged: set[int] = set()
        """Every container that has a damaged address."""
        self.bad_count = 0
        self.items = 0
        """Distinct addresses looked at."""

    def named(self, container: ContainerId) -> bool:
        """Whether any address named the container (after `flush`)."""
        return container in self._marks or container in self.unreadable

    @property
    def blocks(self) -> int:
        """Slots that `read_data` will read (after `flush`)."""
        return sum(int(np.unpackbits(row).sum()) for row in self._marks.values())

    def add(self, addresses: Addresses, fingerprints: bytes | None = None) -> None:
        """These are named; HOLE is skipped. `fingerprints`, 16 bytes each, are what the slots must say they hold."""
        if len(addresses) == 0:
            return
        if bool(self._fingerprints) != (fingerprints is not None) and self._pending:
            self.flush()
        self._addresses.append(addresses.astype(np.uint64))
        if fingerprints is not None:
            self._fingerprints.append(fingerprints)
        self._pending += len(addresses)
        if self._pending >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Looks at everything added so far."""
        if not self._pending:
            return
        addresses = np.concatenate(self._addresses)
        expected = (
            np.frombuffer(b"".join(self._fingerprints), dtype="<u8").reshape(-1, 2) if self._fingerprints else None
        )
        self._addresses, self._fingerprints, self._pending = [], [], 0
        addresses, index = np.unique(addresses, return_index=True)
        first = int(addresses[0] == HOLE)
        addresses, index = addresses[first:], index[first:]
        if not len(addresses):
            return
        containers = (addresses >> np.uint64(SLOT_BITS)).astype(np.int64)
        starts: list[int] = [0, *(np.flatnonzero(np.diff(containers)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(addresses)], strict=True):
            slots = (addresses[start:end] & np.uint64(SLOT_MASK)).astype(np.int64)
            self._look(int(containers[start]), slots, None if expected is None else expected[index[start:end]])

    def _look(self, container: int, slots: _Slots, expected: _Table | None) -> None:
        if container not in self._marks:
            if container not in self.unreadable and self._table(container) is not None:
                self._marks[container] = np.zeros(SLOTS_MAX // 8, dtype=np.uint8)
            if container in self.unreadable:
                self._all_bad(container, slots, self.unreadable[container])
                return
        outside = slots[slots >= SLOTS_MAX]
        if len(outside):
            self._all_bad(container, outside, f"{self._path(container)}: a pointer names a slot that no container has")
            expected = None if expected is None else expected[slots < SLOTS_MAX]
            slots = slots[slots < SLOTS_MAX]
        row = self._marks[container]
        bits = np.left_shift(1, slots & 7).astype(np.uint8)
        new = (row[slots >> 3] & bits) == 0
        slots = slots[new]
        if len(slots) == 0:
            return
        np.bitwise_or.at(row, slots >> 3, bits[new])
        self.items += len(slots)
        self._compare(container, slots, None if expected is None else expected[new])

    def _compare(self, container: int, slots: _Slots, expected: _Table | None) -> None:
        wrong = self._wrong(container, slots, expected)
        if wrong.any():
            self._tables.pop(container, None)
            wrong = self._wrong(container, slots, expected)
        for at in np.flatnonzero(wrong).tolist():
            table = self._table(container)
            there = table is not None and bool(table[slots[at]].any())
            what = "does not hold the block that the journal says" if there else "is not there"
            self._bad(container, int(slots[at]), f"{self._path(container)}: slot {slots[at]} {what}")

    def _wrong(self, container: int, slots: _Slots, expected: _Table | None) -> NDArray[np.bool_]:
        table = self._table(container)
        if table is None:
            return np.ones(len(slots), dtype=np.bool_)
        held = table[slots]
        if expected is None:
            return np.asarray(~held.any(axis=1))
        return np.asarray((held != expected).any(axis=1))

    def _table(self, container: int) -> _Table | None:
        """The fingerprint of each slot, zeros where none is; None when the container cannot be opened."""
        table = self._tables.get(container)
        if table is not None:
            self._tables.move_to_end(container)
            return table
        try:
            reader = ContainerReader.open(self._storage, self._directory, ContainerId(container))
        except (Damaged, UnknownFormat) as error:
            if len(self.unreadable) < BAD_MAX:
                self.unreadable[container] = str(error)
            return None
        try:
            table = np.zeros((SLOTS_MAX, 2), dtype=np.uint64)
            for slot, count in consecutive(np.array(reader.slots(), dtype=np.int64)):
                held = np.frombuffer(reader.fingerprints(slot, count), dtype="<u8").reshape(-1, 2)
                table[slot : slot + len(held)] = held
        finally:
            reader.close()
        self._tables[container] = table
        if len(self._tables) > _TABLES_MAX:
            self._tables.popitem(last=False)
        return table

    def read_data(self, advance: Callable[[int], None]) -> None:
        """Reads the block of every slot that is named and there; calls `advance` with the bytes done."""
        buffer = memoryview(bytearray(_READ_BLOCKS * BLOCK_BYTES))
        for container in sorted(self._marks):
            slots = np.flatnonzero(np.unpackbits(self._marks[container], bitorder="little"))
            try:
                reader = ContainerReader.open(self._storage, self._directory, ContainerId(container))
            except (Damaged, UnknownFormat) as error:
                self._all_bad(container, slots, str(error))
                continue
            try:
                for slot, count in consecutive(slots):
                    for at in range(slot, slot + count, _READ_BLOCKS):
                        self._read(container, reader, at, min(_READ_BLOCKS, slot + count - at), buffer)
                advance(len(slots) * BLOCK_BYTES)
            finally:
                reader.close()

    def _read(self, container: int, reader: ContainerReader, slot: int, count: int, buffer: memoryview) -> None:
        try:
            reader.read_into(slot, count, buffer[: count * BLOCK_BYTES])
        except Damaged as damage:
            if count == 1:
                self._bad(container, slot, str(damage))
                return
            for one in range(slot, slot + count):
                self._read(container, reader, one, 1, buffer)

    def _path(self, container: int) -> Path:
        return container_path(self._directory, ContainerId(container))

    def _all_bad(self, container: int, slots: _Slots, what: str) -> None:
        for slot in slots.tolist():
            self._bad(container, slot, what)

    def _bad(self, container: int, slot: int, what: str) -> None:
        where = Address(container << SLOT_BITS | slot)
        if where in self.bad:
            return
        self.bad_count += 1
        self.damaged.add(container)
        if len(self.bad) < BAD_MAX:
            self.bad[where] = what
