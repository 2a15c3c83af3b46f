"""An image: the bytes of one volume at one moment, read through its pointers. Immutable: a read never changes."""

from __future__ import annotations

import itertools
import threading
from functools import partial
from typing import Final

import numpy as np

from dedup.catalog import Index
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged, OnItsWay, StoreError, WouldBlock
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.read_ahead import ReadAhead
from dedup.synthesis import VolumePointers
from dedup.types import BLOCK_BYTES, HOLE, TimeNs

CHUNK_BLOCKS: Final = 256
"""What is fetched at a time ahead of a sequential reader: as much as the kernel's largest request."""
AHEAD_CHUNKS: Final = 4
"""The threads that fetch find work while the reader takes what is ready."""


def room_for(length: int) -> int:
    """The bytes of buffer that a read of `length` needs, wherever it begins: whole blocks."""
    return (max(0, length) // BLOCK_BYTES + 2) * BLOCK_BYTES


class Image:
    """Read access to a volume as it was. Any thread may read; images of one store take turns to look up pointers.

    `label` names volume and moment in error messages.
    """

    _numbers = itertools.count()

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
        self._number = next(self._numbers)
        """Tells its chunks from those of others."""
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
        """As `read`, without allocating: the result is a part of `buffer`, which has `room_for(length)` or more, or of
        other memory that is never changed.

        Anything else in `buffer`, and all of it when this raises, is undefined.
        """
        length = min(length, self.size - offset)
        if length <= 0:
            return buffer[:0]
        first, skip = divmod(offset, BLOCK_BYTES)
        count = -(-(skip + length) // BLOCK_BYTES)
        self._fetch_ahead(first, count)
        try:
            blocks = self._read(first, count, buffer, wait)
        except Damaged as damage:
            raise Damaged(f"{self.label}, bytes {offset}..{offset + length}: {damage}") from damage
        return blocks[skip : skip + length]

    def _read(self, first: int, count: int, buffer: memoryview, wait: bool) -> memoryview:
        """The blocks: in `buffer`, or where they were fetched to."""
        end = first + count
        at = first
        while at < end:
            chunk, start = divmod(at, CHUNK_BLOCKS)
            take = min(end - at, CHUNK_BLOCKS - start)
            out = buffer[(at - first) * BLOCK_BYTES : (at - first + take) * BLOCK_BYTES]
            fetched = self._fetched(chunk, wait)
            if fetched is None:
                self._pool.read_addresses(self.addresses(at, take, wait=wait), out, wait=wait)
            elif take == count:
                buffer = fetched[start * BLOCK_BYTES :]
            else:
                out[:] = fetched[start * BLOCK_BYTES : (start + take) * BLOCK_BYTES]
            at += take
        # Not before all is here: when something has to be waited for, all of it is read once more.
        whole = end // CHUNK_BLOCKS if end * BLOCK_BYTES < self.size else -(-end // CHUNK_BLOCKS)
        for chunk in range(first // CHUNK_BLOCKS, whole):
            self._pool.prefetch.drop((self._number, chunk))
        return buffer

    def _fetched(self, chunk: int, wait: bool) -> memoryview | None:
        """The chunk, when it was fetched ahead. OnItsWay while it is being fetched."""
        while (fetching := self._pool.prefetch.find((self._number, chunk))) is not None:
            if not fetching.done():
                if not wait:
                    raise OnItsWay(fetching)
                fetching.exception()
            elif fetching.exception() is None:
                return fetching.result()
            # else it has failed since it was found, for what may be amiss with other blocks only: it is not there
        return None

    def _fetch_ahead(self, first: int, count: int) -> None:
        """Has what is compressed fetched for a sequential reader. He finds out himself whether anything is amiss.

        What is not compressed the kernel reads ahead, and to check it takes less than to have another thread do so
        (measured: as quick from the disk, a tenth slower from memory, for a fifth more processor time).
        """
        for chunk in self._reading.chunks(first, count, -(-self.size // BLOCK_BYTES)):
            if not self._is_compressed(chunk):
                continue
            if not self._pool.prefetch.begin((self._number, chunk), partial(self._fetch, chunk)):
                self._reading.put_off(chunk)
                return

    def _is_compressed(self, chunk: int) -> bool:
        """Never waits: it may be, when that cannot be told at once."""
        try:
            return self._pool.is_compressed(self.addresses(*self._extent(chunk), wait=False))
        except WouldBlock:
            return True
        except StoreError:
            return False

    def _extent(self, chunk: int) -> tuple[int, int]:
        """Its first block, and how many it has."""
        first = chunk * CHUNK_BLOCKS
        return first, min(CHUNK_BLOCKS, -(-self.size // BLOCK_BYTES) - first)

    def _fetch(self, chunk: int) -> memoryview:
        first, count = self._extent(chunk)
        blocks = np.empty(count * BLOCK_BYTES, np.uint8).data
        self._pool.read_addresses(self.addresses(first, count), blocks)
        return blocks

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
