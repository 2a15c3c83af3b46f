"""Reading ranges of a source's file as a reconcile wants them: a hole costs nothing. Blocks: call it in a thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from dedup.types import BLOCK_BYTES
from replication.digests import Digester


def data_at(fd: int, length: int, offset: int) -> bytes:
    """The bytes of a range, as os.pread; b"" if it is one hole or past the end."""
    start = _next_data(fd, offset)
    return b"" if start is None or start >= offset + length else os.pread(fd, length, offset)


def read_range(digester: Digester, unit: int, fd: int, length: int, offset: int) -> bytes:
    """What a Compare says of a range in units of `unit`, the last one completed with zeros."""
    content = data_at(fd, length, offset)
    return digester.units(content, unit) if content else digester.zeros(unit) * -(-length // unit)


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not a hole, ascending, in whole blocks."""
    end = 0
    while end < size and (start := _next_data(fd, end)) is not None:
        end = os.lseek(fd, start, os.SEEK_HOLE)
        first = start // BLOCK_BYTES * BLOCK_BYTES
        yield first, end - first


def _next_data(fd: int, offset: int) -> int | None:
    """Where the next data begins; None where there is none up to the end."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
