"""An image: the bytes of one volume at one moment, read through its pointers. Immutable: a read never changes."""

from __future__ import annotations

import threading

from dedup.catalog import Index
from dedup.container import ContainerPool
from dedup.errors import Damaged, WouldBlock
from dedup.synthesis import VolumePointers
from dedup.types import BLOCK_BYTES, HOLE


class Image:
    """Read access to a volume as it was. Any thread may read; images of one store take turns.

    `label` names volume and moment in error messages.
    """

    def __init__(
        self, index: Index, pool: ContainerPool, lock: threading.Lock, pointers: VolumePointers, size: int, label: str
    ) -> None:
        self._index = index
        self._pool = pool
        self._lock = lock
        self._pointers = pointers
        self.size = size
        self.label = label

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        """The bytes offset..offset+length, fewer past the end; every block is checked against its fingerprint.

        Damaged names the volume, the moment and where. With wait=False: WouldBlock instead of waiting for the disk or
        for another reader.
        """
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        first, skip = divmod(offset, BLOCK_BYTES)
        count = -(-(skip + length) // BLOCK_BYTES)
        out = bytearray(count * BLOCK_BYTES)
        if not self._lock.acquire(blocking=wait):
            raise WouldBlock
        try:
            with self._index.read() as txn:
                addresses = self._pointers.addresses(txn, first, count)
            self._pool.read_addresses(addresses, memoryview(out), wait=wait)
        except Damaged as damage:
            raise Damaged(f"{self.label}, bytes {offset}..{offset + length}: {damage}") from damage
        finally:
            self._lock.release()
        return bytes(memoryview(out)[skip : skip + length])

    def next_data(self, offset: int) -> int:
        """The first offset at or after `offset` whose block is not a hole; `size` when there is none."""
        block, end = offset // BLOCK_BYTES, -(-self.size // BLOCK_BYTES)
        with self._lock, self._index.read() as txn:
            while block < end:
                count = min(_SCAN_BLOCKS, end - block)
                data = (self._pointers.addresses(txn, block, count) != HOLE).nonzero()[0]
                if len(data):
                    return min(self.size, max(offset, (block + int(data[0])) * BLOCK_BYTES))
                block += count
        return self.size


_SCAN_BLOCKS = 1 << 16
"""Blocks looked at in one step of `next_data`: 128 leaves."""
