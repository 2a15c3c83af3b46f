"""Fingerprints and their addresses in memory, sorted, 24 bytes each: what need not be in a run yet.

Invariants:
- `_high` ascends; `_high`, `_low` and `_where` have the same length, and stand for the same fingerprint at each place;
- `_seen` is true at the first bits of every fingerprint that is there: most of those that are not end with that look;
- a fingerprint is there once, with the first address that was added for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.layout import FINGERPRINT_BYTES
from dedup.types import HOLE, Address

U64 = NDArray[np.uint64]
Rows = tuple[U64, U64, U64]
"""Of fingerprints: their first halves, their second halves, their addresses."""
_HALF_BYTES: Final = FINGERPRINT_BYTES // 2
_SEEN_BITS: Final = 23
"""8 MiB, an eighth of it true with a million fingerprints."""
_SEEN_SHIFT: Final = np.uint64(64 - _SEEN_BITS)


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

    def find_one(self, high: int, low: int) -> Address:
        """The address of the fingerprint with these halves, HOLE if it is not there."""
        if self._seen[high >> (64 - _SEEN_BITS)]:
            at = bisect_left(self._sought, high)
            while at < len(self._sought) and self._sought[at] == high:
                if self._low[at] == low:
                    return Address(int(self._where[at]))
                at += 1
        return HOLE

    def find(self, high: U64, low: U64) -> U64:
        """`find_one` of each."""
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
            found[maybe[other]] = self.find_one(int(high[other]), int(low[other]))
        return found

    def add(self, fingerprints: bytes, addresses: U64) -> None:
        """Adds those that are not there yet; `fingerprints` are FINGERPRINT_BYTES for each address, none a HOLE."""
        high, low = halves(fingerprints)
        order = np.argsort(high, kind="stable")
        if (np.diff(high[order]) == 0).any():
            order = np.lexsort((low, high))  # stable: of those that are twice in there the first one stays
        high, low, where = high[order], low[order], addresses[order]
        new = self.find(high, low) == HOLE
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

    def rows(self) -> Rows:
        """All of it, ascending by their first halves."""
        return self._high, self._low, self._where

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> None:
        """Takes out each fingerprint that still has that address."""
        if not entries:
            return
        found = self.find(*halves(b"".join([mark for mark, _ in entries])))
        gone = found[found == np.array([where for _, where in entries], np.uint64)]
        if len(gone):
            self._keep(~np.isin(self._where, gone))

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self._set(self._high[kept], self._low[kept], self._where[kept])


def halves(fingerprints: bytes) -> tuple[U64, U64]:
    """The first and the last 8 bytes of each, as numbers in their order."""
    rows = np.frombuffer(fingerprints, ">u8").reshape(-1, 2)
    return rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64)


def halves_of_one(fingerprint: bytes) -> tuple[int, int]:
    """`halves` of one."""
    return int.from_bytes(fingerprint[:_HALF_BYTES], "big"), int.from_bytes(fingerprint[_HALF_BYTES:], "big")
