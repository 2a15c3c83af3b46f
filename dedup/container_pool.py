"""The containers that are open to be read: blocks by their addresses, through a bounded number of descriptors.

Invariants:
- at most `open_max` descriptors are kept besides those in use at the moment; one in use is never closed;
- a file that was replaced or removed is held open for CURRENT_SECONDS while it is read, for about IDLE_SECONDS else,
  where somebody calls `close_idle` now and then.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.container import ContainerReader
from dedup.errors import Damaged, WouldBlock
from dedup.layout import SLOT_BITS, SLOT_MASK, ZERO_BLOCK
from dedup.prefetch import Prefetch
from dedup.sealed_form import GroupCache
from dedup.storage import Buffer, Storage
from dedup.types import BLOCK_BYTES, Address, ContainerId

_RUN_BLOCKS_MAX: Final = 1024
"""Blocks of one read."""
IDLE_SECONDS: Final = 60.0
"""A descriptor that nobody used for so long is closed: if its file was replaced, it keeps the old one on the disk."""
CURRENT_SECONDS: Final = 5.0
"""And one in use is held against its name so often."""


def _runs(addresses: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """(start, end) of each stretch of consecutive addresses, or of holes; a hole is one of its own."""
    count = len(addresses)
    if count <= 1:
        return [(0, 1)] if count else []
    before = addresses[:-1]
    starts = [0, *(np.flatnonzero((addresses[1:] != before + np.uint64(1)) | (before == 0)) + 1).tolist()]
    return list(zip(starts, [*starts[1:], count], strict=True))


class ContainerPool:
    """Reads blocks by address through a bounded set of open containers. Safe between threads, `close` excepted.

    A container that was replaced meanwhile is read through its open descriptor, as it was, for CURRENT_SECONDS at most.
    """

    def __init__(self, storage: Storage, directory: Path, *, open_max: int = 64) -> None:
        self._storage = storage
        self._directory = directory
        self._open_max = open_max
        self._cache = GroupCache()
        self._readers: OrderedDict[int, ContainerReader] = OrderedDict()
        self._lock = threading.Lock()
        self.prefetch = Prefetch()
        """Of what is read through this pool."""

    def read_block(self, where: Address) -> bytes:
        """One block that is not a hole, verified. Damaged."""
        reader = self._borrow(where >> SLOT_BITS, True)
        try:
            return reader.read_block(where & SLOT_MASK)
        finally:
            self._give_back(reader)

    def read_addresses(self, addresses: NDArray[np.uint64], out: memoryview, *, wait: bool = True) -> None:
        """Fills `out` (4096 bytes per address) with the blocks, verified; a hole is zeros.

        Runs of consecutive addresses are one read. Damaged names file and offset. With `wait` False: WouldBlock when
        anything of it needs the disk, or a container is not open; `out` is undefined then.
        """
        for start, end in _runs(addresses):
            where = int(addresses[start])
            if where == 0:
                out[start * BLOCK_BYTES : end * BLOCK_BYTES] = ZERO_BLOCK
                continue
            reader = self._borrow(where >> SLOT_BITS, wait)
            try:
                for at in range(start, end, _RUN_BLOCKS_MAX):
                    take = min(end - at, _RUN_BLOCKS_MAX)
                    part = out[at * BLOCK_BYTES : (at + take) * BLOCK_BYTES]
                    reader.read_into((where & SLOT_MASK) + at - start, take, part, wait=wait)
            finally:
                self._give_back(reader)

    def same(self, where: Address, blocks: Buffer, fingerprints: bytes) -> bool:
        """Whether the blocks from that address on are these, one behind the other; else as `same_each`."""
        try:
            reader = self._borrow(where >> SLOT_BITS, True)
        except Damaged:
            return False
        try:
            return reader.holds(where & SLOT_MASK, blocks, fingerprints)
        finally:
            self._give_back(reader)

    def same_pieces(
        self, addresses: NDArray[np.uint64], pieces: Sequence[Buffer], fingerprints: Sequence[bytes]
    ) -> bool:
        """Whether each piece, some blocks one behind the other, lies in one container just so: a read of each. False
        says no more than that it was not found so: `same_each` tells of which blocks it is."""
        if len(pieces[0]) > BLOCK_BYTES and addresses[1] != addresses[0] + np.uint64(1):
            return False  # as nearly always where it is false
        edges = [0, *accumulate(len(piece) // BLOCK_BYTES for piece in pieces)]
        follows = np.diff(addresses, prepend=np.uint64(0)) == 1
        follows[edges[:-1]] = True
        return bool(follows.all()) and all(
            self.same(Address(int(addresses[start])), piece, b"".join(fingerprints[start:end]))
            for piece, (start, end) in zip(pieces, pairwise(edges), strict=True)
        )

    def same_each(
        self, addresses: NDArray[np.uint64], blocks: Sequence[Buffer], fingerprints: Sequence[bytes]
    ) -> list[bool]:
        """Whether the block at each address, none a hole, is this one, whose fingerprint is given.

        False says only that it was not found to be so: it may be damaged, or its container was just replaced.
        """
        order = np.argsort(addresses)
        ascending = addresses[order]
        containers = ascending >> np.uint64(SLOT_BITS)
        edges = [0, *(np.flatnonzero(containers[1:] != containers[:-1]) + 1).tolist(), len(order)]
        places = order.tolist()
        same = np.zeros(len(places), bool)
        for start, end in pairwise(edges):
            inside = places[start:end]
            try:
                reader = self._borrow(int(ascending[start]) >> SLOT_BITS, True)
            except Damaged:
                continue  # the caller looks at each of them, and says what is wrong
            try:
                held = reader.holds_each(
                    ascending[start:end] & np.uint64(SLOT_MASK),
                    list(map(blocks.__getitem__, inside)),
                    list(map(fingerprints.__getitem__, inside)),
                )
            finally:
                self._give_back(reader)
            same[order[start:end]] = held
        return same.tolist()

    def is_compressed(self, addresses: NDArray[np.uint64]) -> bool:
        """Whether any run of the blocks begins with one that is compressed. WouldBlock, instead of waiting, when a
        container is not open."""
        for start, _ in _runs(addresses):
            where = int(addresses[start])
            if where == 0:
                continue
            reader = self._borrow(where >> SLOT_BITS, False)
            try:
                if reader.is_compressed(where & SLOT_MASK):
                    return True
            finally:
                self._give_back(reader)
        return False

    def fingerprints(self, where: Address, count: int = 1) -> bytes:
        """The stored fingerprints of `count` slots from the address on. Damaged."""
        reader = self._borrow(where >> SLOT_BITS, True)
        try:
            return reader.fingerprints(where & SLOT_MASK, count)
        finally:
            self._give_back(reader)

    def _borrow(self, container: int, wait: bool) -> ContainerReader:
        """The container's reader, not to be closed until it is given back."""
        now = time.monotonic()
        with self._lock:
            reader = self._readers.get(container)
            if reader is not None and now - reader.looked_at >= CURRENT_SECONDS:
                reader = self._look_again(reader, now)
            if reader is not None:
                self._readers.move_to_end(container)
                reader.users += 1
                reader.used_at = now
                return reader
        if not wait:
            raise WouldBlock
        opened = ContainerReader.open(self._storage, self._directory, ContainerId(container), cache=self._cache)
        with self._lock:
            reader = self._readers.setdefault(container, opened)
            reader.users += 1
            closing = [] if reader is opened else [opened]
            closing += self._surplus()
        for idle in closing:
            idle.close()
        return reader

    def _look_again(self, reader: ContainerReader, now: float) -> ContainerReader | None:
        """The reader, if its file is still the container's; else it is forgotten. Under the lock."""
        reader.looked_at = now
        if reader.is_current():
            return reader
        del self._readers[reader.header.container]
        if reader.users == 0:
            reader.close()
        return None

    def _give_back(self, reader: ContainerReader) -> None:
        with self._lock:
            reader.users -= 1
            forgotten = reader.users == 0 and self._readers.get(reader.header.container) is not reader
        if forgotten:
            reader.close()

    def _surplus(self) -> list[ContainerReader]:
        """Takes the oldest readers out until the pool fits, and returns those that nobody uses: to be closed.

        One in use is closed by the last to give it back.
        """
        idle = []
        while len(self._readers) > self._open_max:
            _, oldest = self._readers.popitem(last=False)
            if oldest.users == 0:
                idle.append(oldest)
        return idle

    def forget(self, container: ContainerId) -> None:
        """The next read of the container opens its file anew."""
        with self._lock:
            reader = self._readers.pop(container, None)
            idle = reader is not None and reader.users == 0
        if reader is not None and idle:
            reader.close()

    def close_idle(self) -> None:
        """Closes what nobody used for IDLE_SECONDS, and what is another file by now. To be called now and then."""
        self.prefetch.drop_abandoned()
        now = time.monotonic()
        with self._lock:
            for reader in [one for one in self._readers.values() if one.users == 0]:
                if self._look_again(reader, now) and now - reader.used_at >= IDLE_SECONDS:
                    del self._readers[reader.header.container]
                    reader.close()

    def close(self) -> None:
        """Closes every descriptor; nothing may be reading."""
        self.prefetch.close()
        while self._readers:
            self._readers.popitem()[1].close()
