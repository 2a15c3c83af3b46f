"""The raw form of a container: how its bytes lie in the file, and how to get at a slot's block.

Header page | fingerprint table | slots, each at its number × 4096. What says whether a block is right is not here but
in `container.ContainerReader`.

Invariants:
- another may still be appending: pages of the table are read when they are first needed, and again after `refresh`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.errors import Damaged
from dedup.layout import FINGERPRINT_BYTES, RAW_SLOTS_OFFSET, RAW_TABLE_OFFSET, SLOTS_MAX
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES

_TABLE_PAGE_SLOTS: Final = 256
"""Fingerprints cached at a time: 4096 bytes of the table."""
_TABLE_PAGE_BYTES: Final = _TABLE_PAGE_SLOTS * FINGERPRINT_BYTES
_ROW: Final = np.dtype(f"V{FINGERPRINT_BYTES}")


class RawForm:
    """An open raw file. Owned by its `ContainerReader`, which closes the descriptor; safe between threads."""

    def __init__(self, storage: Storage, path: Path, fd: int) -> None:
        self._storage = storage
        self._path = path
        self._fd = fd
        self._pages: dict[int, bytes] = {}

    def slots(self) -> list[int]:
        """The slots that were filled: inside the file, with a fingerprint."""
        whole = max(0, self._storage.size(self._fd) - RAW_SLOTS_OFFSET) // BLOCK_BYTES
        table = self._storage.pread(self._fd, min(whole, SLOTS_MAX) * FINGERPRINT_BYTES, RAW_TABLE_OFFSET)
        rows = np.frombuffer(table, dtype="<u8").reshape(-1, 2)
        slots: list[int] = np.flatnonzero(rows.any(axis=1)).tolist()
        return slots

    def offset_of(self, slot: int) -> int:
        return RAW_SLOTS_OFFSET + slot * BLOCK_BYTES

    def fingerprints(self, slot: int, count: int, *, wait: bool = True) -> bytes:
        number, start = divmod(slot, _TABLE_PAGE_SLOTS)
        end = start + count
        if end <= _TABLE_PAGE_SLOTS:
            page = self._pages.get(number) or self._page(number, wait)
            return page[start * FINGERPRINT_BYTES : end * FINGERPRINT_BYTES]
        last = (slot + count - 1) // _TABLE_PAGE_SLOTS
        pages = b"".join([self._pages.get(n) or self._page(n, wait) for n in range(number, last + 1)])
        return pages[start * FINGERPRINT_BYTES : end * FINGERPRINT_BYTES]

    def fingerprints_of(self, slots: NDArray[np.uint64]) -> bytes:
        """`fingerprints` of slots, not all of which are neighbours."""
        pages, rows = np.divmod(slots, np.uint64(_TABLE_PAGE_SLOTS))
        numbers, places = np.unique(pages, return_inverse=True)
        table = b"".join([self._pages.get(number) or self._page(number, True) for number in numbers.tolist()])
        return np.frombuffer(table, _ROW).take(places * _TABLE_PAGE_SLOTS + rows.astype(np.intp)).tobytes()

    def _page(self, number: int, wait: bool) -> bytes:
        page = bytearray(_TABLE_PAGE_BYTES)
        self._storage.pread_into(self._fd, [memoryview(page)], RAW_TABLE_OFFSET + number * _TABLE_PAGE_BYTES, wait=wait)
        kept = self._pages[number] = bytes(page)
        return kept

    def refresh(self) -> bool:
        """Drops what is cached; True when that was anything, so that a second look may differ."""
        was_cached = bool(self._pages)
        self._pages = {}
        return was_cached

    def load(self, slot: int, count: int, out: memoryview, *, wait: bool = True) -> None:
        offset = RAW_SLOTS_OFFSET + slot * BLOCK_BYTES
        if slot + count > SLOTS_MAX or self._storage.pread_into(self._fd, [out], offset, wait=wait) != len(out):
            raise Damaged(f"{self._path}: offset {offset}: slots {slot}..{slot + count - 1} are past the file's end")

    def is_compressed(self, slot: int) -> bool:
        """As the one of `ContainerReader`."""
        return False
