"""Which fingerprints a run does not have: a Bloom filter of pairs of words, so that a look at one pair says it.

The pair is told by a fingerprint's first half, and ascends with it: a run that is written front to back writes its
filter so, too. Four bits in each word are told by the second half. PAIR_ROWS fingerprints share a pair on average. Of
those that are not there the first word lets one in 200 through, the two together one in some 10,000: each of these
costs a read of the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.fingerprint_table import U64

PAIR_ROWS: Final = 4
_SHIFTS: Final = ((0, 6, 12, 18), (24, 30, 36, 42))
_EACH_SHIFT: Final = tuple(np.array(shifts, np.uint64)[:, None] for shifts in _SHIFTS)
_ONE, _LAST_BIT, _HALF_BITS = np.uint64(1), np.uint64(63), np.uint64(32)
_FEW: Final = 24
"""Up to so many are looked at one by one: numpy costs some microseconds before it begins."""
Places = NDArray[np.intp]


def pair_count(rows: int) -> int:
    """Of the filter of a run of at most so many rows."""
    return -(-rows // PAIR_ROWS)


def pair_of(high: U64, pairs: int) -> U64:
    """Which pair of so many stands for each first half."""
    return (high >> _HALF_BITS) * np.uint64(pairs) >> _HALF_BITS


def bits_of(low: U64, word: int) -> U64:
    """The bits that stand for each second half in the first or second word (0 or 1) of its pair."""
    bits: U64 = np.bitwise_or.reduce(_ONE << (low >> _EACH_SHIFT[word] & _LAST_BIT), axis=0)
    return bits


def bits_of_one(low: int) -> tuple[int, int]:
    """`bits_of` of one, for both words."""
    return _word_of_one(low, 0), _word_of_one(low, 1)


def _word_of_one(low: int, word: int) -> int:
    one, two, three, four = _SHIFTS[word]
    return 1 << (low >> one & 63) | 1 << (low >> two & 63) | 1 << (low >> three & 63) | 1 << (low >> four & 63)


def may_have(filters: Sequence[U64], high: U64, low: U64) -> tuple[Places, Places]:
    """Which filter lets which fingerprint through, as numbers of both; of all others the runs have none.

    A filter is an array of its words, one pair behind the other.
    """
    counts = np.array([len(words) >> 1 for words in filters], np.uint64)
    places = np.multiply.outer(counts, high >> _HALF_BITS)
    places >>= _HALF_BITS
    places <<= _ONE
    at = places.view(np.int64)
    found = np.empty(places.shape, np.uint64)
    for words, place, one in zip(filters, at, found, strict=True):
        words.take(place, out=one, mode="clip")
    bits = bits_of(low, 0)
    numbers, marks = np.nonzero((found & bits) == bits)
    if not len(numbers):
        return numbers, marks
    seconds = at[numbers, marks] + 1
    kept: list[int] | Places
    if len(numbers) <= _FEW:
        each = zip(numbers.tolist(), seconds.tolist(), low[marks].tolist(), strict=True)
        kept = [index for index, one in enumerate(each) if _has_second(filters, *one)]
    else:
        bits = bits_of(low[marks], 1)
        kept = np.flatnonzero(_each_at(filters, numbers, seconds) & bits == bits)
    return numbers[kept], marks[kept]


def _has_second(filters: Sequence[U64], number: int, place: int, low: int) -> bool:
    bits = _word_of_one(low, 1)
    return int(filters[number][place]) & bits == bits


def _each_at(filters: Sequence[U64], numbers: Places, at: Places) -> U64:
    """The words at those places, each of the filter of that number, which ascend."""
    ends = np.searchsorted(numbers, np.arange(len(filters)), "right").tolist()
    each = zip(filters, [0, *ends], ends, strict=False)
    return np.concatenate([words[at[start:end]] for words, start, end in each])


def may_have_one(words: memoryview, high: int, bits: tuple[int, int]) -> bool:
    """`may_have` of one filter and one fingerprint, of which these are the bits."""
    at = ((high >> 32) * (len(words) >> 1) >> 32) << 1
    return words[at] & bits[0] == bits[0] and words[at + 1] & bits[1] == bits[1]
