"""Which fingerprints LMDB does not have: a Bloom filter in a file beside it, so that new blocks need no look there.

In a store with a long history the index is larger than what memory keeps of it, and each fingerprint that is not there
would cost a read of the disk to find that out. The filter is 32 MiB, an eighth of it true at 100 GiB of blocks.

Invariants:
- what is added is DURABLE before LMDB's commit of it, so what LMDB has the filter has, too, in slices that are `built`;
  of others it knows nothing. Losing it costs time, and a bit that rots deduplication, never data;
- the file is read through a map and written by calls: a full disk is an error then, and not a signal;
- a file whose tag is not the one that LMDB has is another index's, and not looked at.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.errors import StoreFailed, Unreadable
from dedup.fingerprint_table import SLICE_BITS, SLICES, U64, halves
from dedup.layout import FORMAT_VERSION, Fields
from dedup.storage import Storage

log = logging.getLogger(__name__)

FILTER_NAME: Final = "filter"
FILTER_MAGIC: Final = b"rwFILTR\n"
FILTER_HEADER: Final = Fields(
    "filter header", ("magic", "8s"), ("version", "H"), ("reserved", "6s"), ("tag", "Q"), ("built", "64s")
)
HEADER_BYTES: Final = 4096
PART_BITS: Final = 22
PART_BYTES: Final = (1 << PART_BITS) // 8
"""Of one slice."""
FILE_BYTES: Final = HEADER_BYTES + SLICES * PART_BYTES
_PART_MASK: Final = np.uint64((1 << PART_BITS) - 1)
_SLICE_SHIFT: Final = np.uint64(64 - SLICE_BITS)
_KEYS_AT_ONCE: Final = 1 << 16


class FingerprintFilter:
    """One writer; not thread-safe."""

    def __init__(self, storage: Storage, fd: int, tag: int, built: bytes) -> None:
        """Use `make` or `open`."""
        self._storage = storage
        self._fd = fd
        self.tag = tag
        self._built = np.frombuffer(built, np.uint8).astype(bool)
        self._map = storage.map_to_read(fd, FILE_BYTES)
        self._bits = np.frombuffer(self._map, np.uint8, offset=HEADER_BYTES)

    @classmethod
    def make(cls, storage: Storage, path: Path) -> FingerprintFilter:
        """An empty one, of which no slice is built, in the place of what is there. StoreFull, StoreFailed."""
        fd = storage.open(path, os.O_RDWR | os.O_CREAT)
        try:
            storage.truncate(fd, 0)
            storage.truncate(fd, FILE_BYTES)
            made = cls(storage, fd, secrets.randbits(63), bytes(SLICES))
            made._write_header()
            storage.sync_directory(path.parent)
        except BaseException:
            storage.close(fd)
            raise
        return made

    @classmethod
    def open(cls, storage: Storage, path: Path, tag: int) -> FingerprintFilter | None:
        """The one that has this tag, None where it is not there whole, or cannot be read."""
        fd = found = None
        try:
            fd = storage.open(path, os.O_RDWR)
            found = cls._opened(storage, fd, tag)
        except FileNotFoundError:
            pass
        except (Unreadable, StoreFailed) as error:
            log.warning("the filter of the fingerprint index is made anew: %s", error)
        finally:
            if fd is not None and found is None:
                storage.close(fd)
        return found

    @classmethod
    def _opened(cls, storage: Storage, fd: int, tag: int) -> FingerprintFilter | None:
        magic, version, _, found, built = FILTER_HEADER.struct.unpack(
            storage.pread(fd, FILTER_HEADER.size, 0).ljust(FILTER_HEADER.size, b"\0")
        )
        if (magic, version, found) != (FILTER_MAGIC, FORMAT_VERSION, tag) or storage.size(fd) != FILE_BYTES:
            return None
        return cls(storage, fd, tag, built)

    def _write_header(self) -> None:
        built = self._built.astype(np.uint8).tobytes()
        header = FILTER_HEADER.struct.pack(FILTER_MAGIC, FORMAT_VERSION, b"", self.tag, built)
        self._storage.pwritev(self._fd, [header], 0)
        self._storage.datasync(self._fd)

    def may_have(self, high: U64, low: U64) -> NDArray[np.bool_]:
        """Whether LMDB may have each fingerprint (see `fingerprint_table.halves`); where not, it has not."""
        slices = high >> _SLICE_SHIFT
        found: NDArray[np.bool_] = ~self._built[slices]
        seen = np.ones(len(high), bool)
        for places in _places(high, low):
            at = (slices << np.uint64(PART_BITS)) | places
            seen &= (self._bits[at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8) & 1).astype(bool)
        return found | seen

    def add(self, number: int, fingerprints: bytes, stored: Iterable[bytes]) -> None:
        """Those of one slice that are about to be put into LMDB. DURABLE when it returns. StoreFull, StoreFailed.

        `stored` gives what LMDB has of the slice; it is looked at when the slice is not built yet.
        """
        start = number * PART_BYTES
        if self._built[number]:
            part = self._bits[start : start + PART_BYTES].copy()
        else:
            part = np.zeros(PART_BYTES, np.uint8)
            marks: list[bytes] = []
            for mark in stored:
                marks.append(mark)
                if len(marks) == _KEYS_AT_ONCE:
                    _set(part, b"".join(marks))
                    marks.clear()
            _set(part, b"".join(marks))
        _set(part, fingerprints)
        self._storage.pwritev(self._fd, [part.tobytes()], HEADER_BYTES + start)
        self._storage.datasync(self._fd)
        if not self._built[number]:
            self._built[number] = True
            self._write_header()

    def forget(self) -> None:
        """It knows nothing any more: something is put into LMDB past it. DURABLE when it returns."""
        self._built[:] = False
        self._write_header()

    def close(self) -> None:
        self._bits = np.zeros(0, np.uint8)
        self._map.close()
        self._storage.close(self._fd)


def _places(high: U64, low: U64) -> list[U64]:
    """Which bits of its slice's part stand for each fingerprint."""
    return [
        high >> np.uint64(16) & _PART_MASK,
        low >> np.uint64(42) & _PART_MASK,
        low >> np.uint64(16) & _PART_MASK,
    ]


def _set(part: NDArray[np.uint8], fingerprints: bytes) -> None:
    if fingerprints:
        for places in _places(*halves(fingerprints)):
            np.bitwise_or.at(part, places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8))
