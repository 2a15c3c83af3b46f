"""Fingerprints and their addresses in memory, sorted, 24 bytes each: what need not be in a run yet.

Invariants:
- each part has rows, and at least _GROWTH times as many as the one after it when something was just added; so there
  are few, and each fingerprint is sorted again a few times only;
- `_seen` has the bit of every fingerprint that is there: nearly all of those that are not end with that look;
- a fingerprint is there once, with the first address that was added for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.layout import FINGERPRINT_BYTES
from dedup.types import HOLE, Address

U64 = NDArray[np.uint64]
Rows = tuple[U64, U64, U64]
"""Of fingerprints: their first halves, their second halves, their addresses."""
_HALF_BYTES: Final = FINGERPRINT_BYTES // 2
_GROWTH: Final = 3
_FEW: Final = 8
"""Up to so many are sought one by one: numpy costs some microseconds before it begins."""
_PIECES: Final = 16
_PIECE_RANGE: Final = (1 << 64) // _PIECES
_SEEN_BITS: Final = 22
"""4 MiB; the first half tells the byte, the second the bit. One bit in 32 is set with a million fingerprints."""
_SEEN_SHIFT: Final = np.uint64(64 - _SEEN_BITS)
_BIT_MASK: Final = np.uint64(7)
_BITS: Final = np.left_shift(1, np.arange(8)).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of a table's fingerprints. `high` ascends, and the three stand for the same fingerprint at each place."""

    high: U64
    low: U64
    where: U64
    sought: memoryview
    """`high`; gives ints, and quicker than the array does."""

    @classmethod
    def of(cls, rows: Rows) -> _Part:
        return cls(*rows, memoryview(rows[0].data))

    @property
    def rows(self) -> Rows:
        return self.high, self.low, self.where

    def between(self, first: int, end: int) -> Rows:
        """Those whose first half is from `first` up to `end`."""
        some = slice(bisect_left(self.sought, first), bisect_left(self.sought, end))
        return self.high[some], self.low[some], self.where[some]

    def find_one(self, high: int, low: int) -> Address:
        at = bisect_left(self.sought, high)
        while at < len(self.sought) and self.sought[at] == high:
            if self.low[at] == low:
                return Address(int(self.where[at]))
            at += 1
        return HOLE

    def find(self, high: U64, low: U64) -> U64:
        inside = np.minimum(np.searchsorted(self.high, high), len(self.high) - 1)
        alike = self.high[inside] == high
        same = alike & (self.low[inside] == low)
        found: U64 = np.where(same, self.where[inside], np.uint64(HOLE))
        for other in np.flatnonzero(alike & ~same).tolist():  # half of it is the same, which hardly happens
            found[other] = self.find_one(int(high[other]), int(low[other]))
        return found


class FingerprintTable:
    """Not thread-safe. Adding costs a sort, of what is there, too, now and then; so add many at a time."""

    __slots__ = ("_parts", "_quick_seen", "_seen")

    def __init__(self) -> None:
        self._seen = np.zeros(1 << _SEEN_BITS, np.uint8)
        self._quick_seen = memoryview(self._seen.data)
        """Gives ints, and quicker than the array does."""
        self._parts: list[_Part] = []

    def __len__(self) -> int:
        return sum(len(part.high) for part in self._parts)

    def find_one(self, high: int, low: int) -> Address:
        """The address of the fingerprint with these halves, HOLE if it is not there."""
        if self._quick_seen[high >> (64 - _SEEN_BITS)] >> (low & 7) & 1:
            return self._find_seen(high, low)
        return HOLE

    def _find_seen(self, high: int, low: int) -> Address:
        for part in self._parts:
            if (where := part.find_one(high, low)) != HOLE:
                return where
        return HOLE

    def find(self, high: U64, low: U64) -> U64:
        """`find_one` of each."""
        found = np.zeros(len(high), np.uint64)
        maybe = np.flatnonzero(self._seen[high >> _SEEN_SHIFT] & _BITS[low & _BIT_MASK])
        if len(maybe) <= _FEW:
            for at, one, other in zip(maybe.tolist(), high[maybe].tolist(), low[maybe].tolist(), strict=True):
                found[at] = self._find_seen(one, other)
        else:
            high, low = high[maybe], low[maybe]
            for part in self._parts:
                found[maybe] |= part.find(high, low)  # it is in one of them at most, and HOLE is 0
        return found

    def add(self, fingerprints: bytes, addresses: U64) -> None:
        """Adds those that are not there yet; `fingerprints` are FINGERPRINT_BYTES for each address, none a HOLE."""
        high, low, where = ascending(*halves(fingerprints), addresses.astype(np.uint64))
        new = self.find(high, low) == HOLE
        if not new.any():
            return
        np.bitwise_or.at(self._seen, high >> _SEEN_SHIFT, _BITS[low & _BIT_MASK])
        self._parts.append(_Part.of((high[new], low[new], where[new])))
        while len(self._parts) > 1 and len(self._parts[-2].high) < _GROWTH * len(self._parts[-1].high):
            self._join_last()

    def _join_last(self) -> None:
        """The last two parts become one; a column at a time, for memory."""
        last = self._parts[-2:]
        order = np.argsort(np.concatenate([part.high for part in last]), kind="stable")
        columns = zip(*(part.rows for part in last), strict=True)
        high, low, where = (np.concatenate(column)[order] for column in columns)
        self._parts[-2:] = [_Part.of((high, low, where))]

    def pieces(self) -> Iterator[Rows]:
        """All of it, ascending by their first halves, a piece at a time: for memory, too."""
        for number in range(_PIECES):
            some = [part.between(number * _PIECE_RANGE, (number + 1) * _PIECE_RANGE) for part in self._parts]
            if some:
                high, low, where = (np.concatenate(column) for column in zip(*some, strict=True))
                yield ascending(high, low, where)

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> None:
        """Takes out each fingerprint that still has that address."""
        if not entries:
            return
        found = self.find(*halves(b"".join([mark for mark, _ in entries])))
        gone = found[found == np.array([where for _, where in entries], np.uint64)]
        if len(gone):
            kept = ((part, ~np.isin(part.where, gone)) for part in self._parts)
            left = [_Part.of((part.high[some], part.low[some], part.where[some])) for part, some in kept]
            self._parts = [part for part in left if len(part.high)]


def ascending(high: U64, low: U64, where: U64) -> Rows:
    """The rows by their first halves; of a fingerprint that is there twice the first one only."""
    order = np.argsort(high)  # a stable one takes six times as long, and is the same where no two are alike
    sought = high[order]
    if (sought[1:] == sought[:-1]).any():
        order = np.lexsort((low, high))  # stable, too
        sought, beside = high[order], low[order]
        new = np.ones(len(order), bool)
        new[1:] = (sought[1:] != sought[:-1]) | (beside[1:] != beside[:-1])
        order, sought = order[new], sought[new]
    return sought, low[order], where[order]


def halves(fingerprints: bytes) -> tuple[U64, U64]:
    """The first and the last 8 bytes of each, as numbers in their order."""
    rows = np.frombuffer(fingerprints, ">u8").reshape(-1, 2)
    return rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64)


def halves_of_one(fingerprint: bytes) -> tuple[int, int]:
    """`halves` of one."""
    return int.from_bytes(fingerprint[:_HALF_BYTES], "big"), int.from_bytes(fingerprint[_HALF_BYTES:], "big")
