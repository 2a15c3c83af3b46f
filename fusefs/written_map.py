"""Which blocks of a file were written: one bit a block, kept only where there is one.

Memory: 1/32768 of the size of the part of the file that is written to (32 MiB for a TiB), and some 150 bytes for each
16 MiB of the file with a written block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_CHUNK_BLOCKS: Final = 4096
_ALL: Final = (1 << _CHUNK_BLOCKS) - 1


class WrittenMap:
    """A set of block numbers, good at ranges. For one thread at a time to change it; others may read meanwhile."""

    def __init__(self) -> None:
        self.count = 0
        """How many blocks are in it."""
        self._chunks: dict[int, int] = {}
        """Chunk number → its blocks as the bits of an integer; never 0."""

    def __contains__(self, block: int) -> bool:
        chunk, bit = divmod(block, _CHUNK_BLOCKS)
        return bool(self._chunks.get(chunk, 0) >> bit & 1)

    def count_in(self, first: int, stop: int) -> int:
        """How many of first..stop-1 are in it."""
        return sum((self._chunks.get(chunk, 0) & mask).bit_count() for chunk, mask in _masks(first, stop))

    def add(self, first: int, stop: int) -> None:
        """Adds first..stop-1."""
        for chunk, mask in _masks(first, stop):
            old = self._chunks.get(chunk, 0)
            self.count += (mask & ~old).bit_count()
            self._chunks[chunk] = old | mask

    def cut(self, first: int) -> int:
        """Removes all from `first` on; returns how many those were."""
        before = self.count
        edge, bit = divmod(first, _CHUNK_BLOCKS)
        for chunk in [chunk for chunk in self._chunks if chunk >= edge]:
            old = self._chunks[chunk]
            kept = old & ((1 << bit) - 1) if chunk == edge else 0
            self.count -= (old & ~kept).bit_count()
            if kept:
                self._chunks[chunk] = kept
            else:
                del self._chunks[chunk]
        return before - self.count

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """first..stop-1 cut into runs (first, stop, whether they are in it), in order."""
        while first < stop:
            chunk, bit = divmod(first, _CHUNK_BLOCKS)
            bits = self._chunks.get(chunk, 0) >> bit
            written = bool(bits & 1)
            if written:
                bits = ~bits
            # The lowest bit that is different now, if there is one within the chunk.
            length = (bits & -bits).bit_length() - 1 if bits else _CHUNK_BLOCKS
            end = min(first + length, (chunk + 1) * _CHUNK_BLOCKS, stop)
            yield first, end, written
            first = end


def _masks(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """(chunk, its bits of first..stop-1)."""
    while first < stop:
        chunk, bit = divmod(first, _CHUNK_BLOCKS)
        end = min(stop, (chunk + 1) * _CHUNK_BLOCKS)
        mask = _ALL if end - first == _CHUNK_BLOCKS else ((1 << (end - first)) - 1) << bit
        yield chunk, mask
        first = end
