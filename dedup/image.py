"""An image: the bytes of one volume at one moment, read through its pointers. Immutable: a read never changes."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Final

import numpy as np

from dedup.catalog import Index
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged, MomentGone, WouldBlock
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.read_ahead import ReadAhead
from dedup.synthesis import VolumePointers
from dedup.types import BLOCK_BYTES, HOLE, TimeNs

CHUNK_BLOCKS: Final = 256
"""What is decoded at a time ahead of a sequential reader: as much as the kernel's largest request."""
AHEAD_CHUNKS: Final = 4
"""The threads that decode find work while the reader takes what is ready; and what is ready for a few readers lies in
half of the cache: twice as much, and they drive it out of there before it is read, to decode it all again."""


def room_for(length: int) -> int:
    """The bytes of buffer that a read of `length` needs, wherever it begins: whole blocks."""
    return (max(0, length) // BLOCK_BYTES + 2) * BLOCK_BYTES


class Image:
    """Read access to a volume as it was. Any thread may read; images of one store take turns to look up pointers.

    `label` names volume and moment in error messages.
    """

    def __init__(
        self,
        index: Index,
        pool: ContainerPool,
        lock: threading.Lock,
        pointers: VolumePointers,
        size: int,
        time: TimeNs,
        label: str,
    ) -> None:
        self._index = index
        self._pool = pool
        self._lock = lock
        self._pointers = pointers
        self._reading = ReadAhead(CHUNK_BLOCKS, AHEAD_CHUNKS)
        self.size = size
        self.time = time
        self.label = label

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        """The bytes offset..offset+length, fewer past the end; every block is checked against its fingerprint.

        Damaged names the volume, the moment and where. With wait=False: WouldBlock instead of waiting for the disk or
        for another reader.
        """
        length = min(length, self.size - offset)
        return bytes(self.read_into(offset, length, memoryview(bytearray(room_for(length))), wait=wait))

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        """As `read`, without allocating: the result is a part of `buffer`, which has `room_for(length)` or more.

        Anything else in `buffer`, and all of it when this raises, is undefined.
        """
        length = min(length, self.size - offset)
        if length <= 0:
            return buffer[:0]
        first, skip = divmod(offset, BLOCK_BYTES)
        count = -(-(skip + length) // BLOCK_BYTES)
        for chunk in self._reading.chunks(first, count, -(-self.size // BLOCK_BYTES)):
            self._decode_ahead(chunk)
        try:
            addresses = self.addresses(first, count, wait=wait)
            self._pool.read_addresses(addresses, buffer[: count * BLOCK_BYTES], wait=wait)
        except Damaged as damage:
            raise Damaged(f"{self.label}, bytes {offset}..{offset + length}: {damage}") from damage
        return buffer[skip : skip + length]

    def _decode_ahead(self, chunk: int) -> None:
        """For a sequential reader, who finds out himself whether anything of it is amiss."""
        first = chunk * CHUNK_BLOCKS
        count = min(CHUNK_BLOCKS, -(-self.size // BLOCK_BYTES) - first)
        with suppress(WouldBlock, Damaged, MomentGone):
            self._pool.decode_ahead(self.addresses(first, count, wait=False))

    def addresses(self, first: int, count: int, *, wait: bool = True) -> Addresses:
        """Where the blocks first..first+count (1 or more) lie; not to be changed. WouldBlock, MomentGone, Damaged."""
        # The lock is for the decoded leaves; what is read by address, others may read meanwhile.
        if not self._lock.acquire(blocking=wait):
            raise WouldBlock
        try:
            known = self._pointers.cached(first, count)
            if known is not None:
                return known
            with self._index.read() as txn:
                return self._pointers.addresses(txn, first, count)
        finally:
            self._lock.release()

    def next_data(self, offset: int, *, until: int | None = None) -> int:
        """The first offset at or after `offset` whose block is not a hole; `size` when there is none.

        `until`, the beginning of a block: no farther than there, and that when there is none before it.
        """
        block, end = offset // BLOCK_BYTES, -(-self.size // BLOCK_BYTES)
        if until is not None and until < self.size:
            end = max(block, until // BLOCK_BYTES)
        with self._lock, self._index.read() as txn:
            while block < end:
                count = min(_SCAN_BLOCKS, end - block)
                data = (self._pointers.addresses(txn, block, count) != HOLE).nonzero()[0]
                if len(data):
                    return min(self.size, max(offset, (block + int(data[0])) * BLOCK_BYTES))
                block += count
        return min(self.size, max(offset, block * BLOCK_BYTES))

    def allocated(self) -> int:
        """At most so many bytes are not holes, to the leaf; 0 only where every block is a hole. MomentGone.

        Looks at no pointer, but at the key of each written leaf: 40 ms where 64 GiB are written.
        """
        with self._lock, self._index.read() as txn:
            leaves = self._pointers.written_leaves(txn)
        return int(np.clip(self.size - leaves * _LEAF_BYTES, 0, _LEAF_BYTES).sum())


_SCAN_BLOCKS = 1 << 16
"""Blocks looked at in one step of `next_data`: 128 leaves."""
_LEAF_BYTES = LEAF_BLOCKS * BLOCK_BYTES
