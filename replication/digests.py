"""What a Compare says of the units of a range, and where two such say that it differs. PROTOCOL.md specifies it.

A unit of one block, or of a whole region, is told by its digest: equal or not. A unit in between is told by two sums
over its blocks' digests, as numbers modulo a prime: the plain one, and one in which each place has its own secret
factor. Where a single block differs, the two differences have that place's factor as their ratio, so that the block is
found at once; where more differ, the ratio is no place's, but with a probability of 2^-119.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Final

from dedup.types import BLOCK_BYTES
from replication.messages import DIGEST_BYTES, SUM_UNITS

PRIME: Final = (1 << 127) - 1
SUMS_BYTES: Final = 2 * DIGEST_BYTES
MANY: Final = 65535
"""Of a unit that is told by sums: more than one block differs, or it is not known which."""
_PLACES: Final = max(SUM_UNITS) // BLOCK_BYTES


def answer_bytes(unit: int) -> int:
    """How long the part of a CompareResult is that tells of one unit."""
    return 2 if unit in SUM_UNITS else 1


class Digester:
    """Digests with one session's key. Its methods may be called in any thread."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._zeros: dict[int, bytes] = {}

    def block(self, content: bytes | memoryview) -> bytes:
        """The keyed digest of some bytes, a block or more."""
        return hashlib.blake2b(content, key=self.key, digest_size=DIGEST_BYTES).digest()

    def units(self, content: bytes | bytearray | memoryview, unit: int) -> bytes:
        """What a Compare says of the units of `content`, the last one completed with zeros."""
        view = memoryview(content)
        if len(view) % unit:
            view = memoryview(bytes(view).ljust(-(-len(view) // unit) * unit, b"\0"))
        if unit in SUM_UNITS:
            return b"".join(self._sums(view[at : at + unit]) for at in range(0, len(view), unit))
        return b"".join(self.block(view[at : at + unit]) for at in range(0, len(view), unit))

    def zeros(self, unit: int) -> bytes:
        """The same of a unit that is a hole."""
        if unit not in self._zeros:
            self._zeros[unit] = self.units(bytes(unit), unit)
        return self._zeros[unit]

    def differing(self, ours: bytes, theirs: bytes, unit: int) -> bytes:
        """CompareResult.differing of what two sides say of the same units."""
        if unit in SUM_UNITS:
            pairs = zip(_numbers(ours), _numbers(theirs), strict=True)
            return b"".join(self._place(*mine, *yours).to_bytes(2, "little") for mine, yours in pairs)
        steps = range(0, len(theirs), DIGEST_BYTES)
        return bytes(ours[at : at + DIGEST_BYTES] != theirs[at : at + DIGEST_BYTES] for at in steps)

    def _sums(self, unit: memoryview) -> bytes:
        plain = weighted = 0
        for place, at in enumerate(range(0, len(unit), BLOCK_BYTES)):
            number = self._number(unit[at : at + BLOCK_BYTES])
            plain += number
            weighted += number * self._factors[place]
        return (plain % PRIME).to_bytes(DIGEST_BYTES, "little") + (weighted % PRIME).to_bytes(DIGEST_BYTES, "little")

    def _place(self, plain: int, weighted: int, their_plain: int, their_weighted: int) -> int:
        plain, weighted = (plain - their_plain) % PRIME, (weighted - their_weighted) % PRIME
        if not plain:
            return MANY if weighted else 0
        return self._places.get(weighted * pow(plain, -1, PRIME) % PRIME, MANY)

    def _number(self, block: bytes | memoryview) -> int:
        return int.from_bytes(self.block(block), "little") % PRIME

    @cached_property
    def _factors(self) -> list[int]:
        return [self._number(b"place" + place.to_bytes(4, "little")) for place in range(_PLACES)]

    @cached_property
    def _places(self) -> dict[int, int]:
        return {factor: place + 1 for place, factor in enumerate(self._factors)}


def read_places(differing: bytes) -> list[int]:
    """What a CompareResult says of units that are told by sums: 0, a block's number from 1, or MANY."""
    return [int.from_bytes(differing[at : at + 2], "little") for at in range(0, len(differing), 2)]


def _numbers(sums: bytes) -> Iterator[tuple[int, int]]:
    for at in range(0, len(sums), SUMS_BYTES):
        middle, end = at + DIGEST_BYTES, at + SUMS_BYTES
        yield int.from_bytes(sums[at:middle], "little"), int.from_bytes(sums[middle:end], "little")
