"""Where in an image the bytes of a file are. What no run covers is zeros."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from fusefs.inside.filesystem import Corrupt


class Reader(Protocol):
    """What can be read at any offset."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; Corrupt past the end."""


class Run(NamedTuple):
    """`length` bytes of a file from `offset` on are at `place` of the image."""

    offset: int
    place: int
    length: int


class Runs:
    """Of one file. Corrupt unless they are in order and apart."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs: list[Run] = []
        end = 0
        for run in runs:
            if run.offset < end or run.length <= 0 or run.place < 0:
                raise Corrupt("extents of a file overlap or are out of order")
            end = run.offset + run.length
            last = self._runs[-1] if self._runs else None
            if last and last.offset + last.length == run.offset and last.place + last.length == run.place:
                self._runs[-1] = Run(last.offset, last.place, last.length + run.length)
            else:
                self._runs.append(run)

    @property
    def bytes_mapped(self) -> int:
        """How many bytes are no hole."""
        return sum(run.length for run in self._runs)

    def read(self, image: Reader, offset: int, length: int) -> bytes:
        """Bytes offset..offset+length of the file, however far its runs go."""
        parts: list[bytes] = []
        end = offset + length
        index = max(0, bisect_right(self._runs, offset, key=lambda run: run.offset) - 1)
        for run in self._runs[index:]:
            if run.offset >= end:
                break
            start, stop = max(offset, run.offset), min(end, run.offset + run.length)
            if start >= stop:
                continue
            parts.append(bytes(start - offset))
            parts.append(image.read_at(run.place + start - run.offset, stop - start))
            offset = stop
        parts.append(bytes(end - offset))
        return b"".join(parts)
