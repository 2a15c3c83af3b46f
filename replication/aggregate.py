"""Many writes as few extents: the last write of each byte wins. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Final

from dedup.types import WRITE_BYTES_MAX, Extent, VolumeId, Write

_EMPTY: Final = b""


def coalesce(writes: Sequence[Write]) -> tuple[Extent, ...]:
    """What the writes leave behind when applied in order, as disjoint extents ordered by volume and offset.

    Neighbours are joined up to WRITE_BYTES_MAX, data with data and zeros with zeros. `n` writes give at most 2n − 1
    extents. Data is copied
    only to join it, or to keep a piece that is less than half of its write.
    """
    covered: dict[VolumeId, _Covered] = {}
    pieces: list[Extent] = []
    # From the last write backward: what is covered already was written later, and stays.
    for write in reversed(writes):
        extent = write.extent
        seen = covered.setdefault(extent.volume, _Covered())
        for start, end in seen.add(extent.offset, extent.offset + extent.length):
            pieces.append(_cut(extent, start, end))
    pieces.sort(key=lambda piece: (piece.volume, piece.offset))
    return tuple(_joined(pieces))


class _Covered:
    """Disjoint ranges of one volume, ascending; touching ranges are merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Covers start..end and returns the parts of it that were not covered before, ascending."""
        if start == end:
            return []
        # The ranges that overlap or touch start..end.
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        fresh = []
        at = start
        for index in range(first, last):
            if at < self._starts[index]:
                fresh.append((at, self._starts[index]))
            at = max(at, self._ends[index])
        if at < end:
            fresh.append((at, end))
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        return fresh


def _cut(extent: Extent, start: int, end: int) -> Extent:
    if end - start == extent.length:
        return extent
    if extent.zeros:
        return Extent(extent.volume, start, _EMPTY, end - start)
    piece = memoryview(extent.data)[start - extent.offset : end - extent.offset]
    # A view keeps the whole write alive: never for less than half of it.
    return Extent(extent.volume, start, piece if 2 * len(piece) >= extent.length else bytes(piece))


def _joined(pieces: Sequence[Extent]) -> Iterator[Extent]:
    run: list[Extent] = []
    run_bytes = 0
    for piece in pieces:
        if run and not _continues(run[-1], piece, run_bytes):
            yield _join(run, run_bytes)
            run, run_bytes = [], 0
        run.append(piece)
        run_bytes += piece.length
    if run:
        yield _join(run, run_bytes)


def _continues(last: Extent, piece: Extent, run_bytes: int) -> bool:
    return (
        piece.volume == last.volume
        and piece.offset == last.offset + last.length
        and bool(piece.zeros) == bool(last.zeros)
        and run_bytes + piece.length <= WRITE_BYTES_MAX
    )


def _join(run: Sequence[Extent], run_bytes: int) -> Extent:
    first = run[0]
    if len(run) == 1:
        return first
    if first.zeros:
        return Extent(first.volume, first.offset, _EMPTY, run_bytes)
    return Extent(first.volume, first.offset, b"".join(piece.data for piece in run))
