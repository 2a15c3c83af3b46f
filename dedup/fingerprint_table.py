"""Fingerprints and their addresses in memory, sorted, 24 bytes each: what need not be in LMDB yet.

Invariants:
- `_high` ascends; `_high`, `_low` and `_where` have the same length, and stand for the same fingerprint at each place;
- `_seen` is true at the first bits of every fingerprint that is there: most of those that are not end with that look;
- a fingerprint is there once, with the first address that was added for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.layout import FINGERPRINT_BYTES
from dedup.types import HOLE, Address

U64 = NDArray[np.uint64]
_HALF_BYTES: Final = FINGERPRINT_BYTES // 2
_FEW: Final = 8
"""Up to so many are sought one by one: numpy costs some microseconds before it begins."""
SLICE_BITS: Final = 6
SLICES: Final = 1 << SLICE_BITS
"""Parts of all fingerprints there may be, by their first bits: they are spread evenly."""
_SLICE_SHIFT: Final = 64 - SLICE_BITS
_SEEN_BITS: Final = 23
"""8 MiB, an eighth of it true with a million fingerprints."""
_SEEN_SHIFT: Final = np.uint64(64 - _SEEN_BITS)
_SEEN_SLICE_BITS: Final = _SEEN_BITS - SLICE_BITS


class FingerprintTable:
    """Not thread-safe. Adding costs a copy of the whole; so add many at a time."""

    __slots__ = ("_high", "_low", "_seen", "_sought", "_where")

    def __init__(self) -> None:
        self._seen = np.zeros(1 << _SEEN_BITS, bool)
        self._set(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint64))

    def _set(self, high: U64, low: U64, where: U64) -> None:
        self._high, self._low, self._where = high, low, where
        self._sought = memoryview(high.data)  # gives ints, and quicker than the array does

    def __len__(self) -> int:
        return len(self._high)

    def find(self, fingerprints: Sequence[bytes]) -> dict[bytes, Address]:
        """The addresses of those that are there."""
        if len(fingerprints) <= _FEW:
            each = [(mark, self._find_one(mark)) for mark in fingerprints]
            return {mark: Address(where) for mark, where in each if where != HOLE}
        found = self._find(*halves(b"".join(fingerprints)))
        return {fingerprints[at]: Address(int(found[at])) for at in np.flatnonzero(found).tolist()}

    def _find_one(self, mark: bytes) -> int:
        high = int.from_bytes(mark[:_HALF_BYTES], "big")
        if not self._seen[high >> (64 - _SEEN_BITS)]:
            return HOLE
        at = bisect_left(self._sought, high)
        while at < len(self._sought) and self._sought[at] == high:
            if self._low[at] == int.from_bytes(mark[_HALF_BYTES:], "big"):
                return int(self._where[at])
            at += 1
        return HOLE

    def _find(self, high: U64, low: U64) -> U64:
        found = np.zeros(len(high), np.uint64)
        maybe = np.flatnonzero(self._seen[high >> _SEEN_SHIFT])
        if not len(maybe) or not len(self._high):
            return found
        high, low = high[maybe], low[maybe]
        places = np.searchsorted(self._high, high)
        inside = np.minimum(places, len(self._high) - 1)
        alike = self._high[inside] == high
        same = alike & (self._low[inside] == low)
        found[maybe[same]] = self._where[inside[same]]
        for other in np.flatnonzero(alike & ~same).tolist():  # half of it is the same, which hardly happens
            mark = int(high[other]).to_bytes(_HALF_BYTES, "big") + int(low[other]).to_bytes(_HALF_BYTES, "big")
            found[maybe[other]] = self._find_one(mark)
        return found

    def add(self, fingerprints: bytes, addresses: U64) -> None:
        """Adds those that are not there yet; `fingerprints` are FINGERPRINT_BYTES for each address, none a HOLE."""
        high, low = halves(fingerprints)
        order = np.argsort(high, kind="stable")
        if (np.diff(high[order]) == 0).any():
            order = np.lexsort((low, high))  # stable: of those that are twice in there the first one stays
        high, low, where = high[order], low[order], addresses[order]
        new = self._find(high, low) == HOLE
        new[1:] &= (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        if not new.all():
            high, low, where = high[new], low[new], where[new]
        places = np.searchsorted(self._high, high)
        self._seen[high >> _SEEN_SHIFT] = True
        self._set(
            np.insert(self._high, places, high),
            np.insert(self._low, places, low),
            np.insert(self._where, places, where.astype(np.uint64)),
        )

    def slice(self, number: int) -> list[tuple[bytes, Address]]:
        """Part `number` of SLICES, ascending."""
        start, end = self._bounds(number)
        marks = _joined(self._high[start:end], self._low[start:end])
        edges = pairwise(range(0, len(marks) + 1, FINGERPRINT_BYTES))
        return [
            (marks[first:last], Address(where))
            for (first, last), where in zip(edges, self._where[start:end].tolist(), strict=True)
        ]

    def drop_slice(self, number: int) -> None:
        """Part `number` is not in there any more."""
        start, end = self._bounds(number)
        self._set(*(np.concatenate((one[:start], one[end:])) for one in (self._high, self._low, self._where)))
        self._seen[number << _SEEN_SLICE_BITS : (number + 1) << _SEEN_SLICE_BITS] = False

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> None:
        """Takes out each fingerprint that still has that address."""
        found = self.find([mark for mark, _ in entries])
        gone = [where for mark, where in entries if found.get(mark) == where]
        if gone:
            self._keep(~np.isin(self._where, np.array(gone, np.uint64)))

    def _bounds(self, number: int) -> tuple[int, int]:
        start = bisect_left(self._sought, number << _SLICE_SHIFT)
        return start, bisect_left(self._sought, (number + 1) << _SLICE_SHIFT)

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self._set(self._high[kept], self._low[kept], self._where[kept])


def halves(fingerprints: bytes) -> tuple[U64, U64]:
    """The first and the last 8 bytes of each, as numbers in their order."""
    rows = np.frombuffer(fingerprints, ">u8").reshape(-1, 2)
    return rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64)


def _joined(high: U64, low: U64) -> bytes:
    return np.stack((high, low), axis=1).astype(">u8").tobytes()


def slice_numbers(fingerprints: bytes) -> U64:
    """Which of SLICES each is in."""
    return halves(fingerprints)[0] >> np.uint64(_SLICE_SHIFT)
