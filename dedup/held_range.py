"""A range of a volume as it was held at one seq, to be read later, while ingest goes on.

It is addresses, taken when it was: an address is permanent and a slot is never used twice, so what is read through them
is what was held then. Only where history is thinned so far that a block is collected before it is read, it is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dedup.container_pool import ContainerPool
from dedup.errors import Damaged
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.types import BLOCK_BYTES, HOLE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldRange:
    """Made by `GroupWriter.held_range`. `read` may be called in any thread, beside whatever the writer does."""

    pool: ContainerPool
    addresses: Addresses

    @property
    def is_hole(self) -> bool:
        """Whether all of it is zeros that are stored nowhere."""
        return not self.addresses.any()

    def read(self) -> tuple[bytearray, frozenset[int]]:
        """The bytes, and the numbers of the blocks that are damaged or gone: those are zeros in the bytes."""
        content = bytearray(len(self.addresses) * BLOCK_BYTES)
        try:
            self.pool.read_addresses(self.addresses, memoryview(content))
            return content, frozenset()
        except Damaged:
            pass  # the blocks are told apart below
        bad = set()
        for number, address in enumerate(self.addresses.tolist()):
            block = memoryview(content)[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            try:
                block[:] = bytes(BLOCK_BYTES) if address == HOLE else self.pool.read_block(address)
            except Damaged as damage:
                log.error("%s", damage)
                block[:] = bytes(BLOCK_BYTES)
                bad.add(number)
        return content, frozenset(bad)


def addresses_in(leaf_of: Callable[[int], Addresses | None], first: int, count: int) -> Addresses:
    """The addresses of `count` blocks from block `first` on, of leaves that `leaf_of` gives: None is one of holes."""
    addresses = np.zeros(count, dtype=np.uint64)
    for number in range(first // LEAF_BLOCKS, (first + count - 1) // LEAF_BLOCKS + 1):
        leaf = leaf_of(number)
        if leaf is not None:
            start = number * LEAF_BLOCKS
            begin, end = max(first, start), min(first + count, start + LEAF_BLOCKS)
            addresses[begin - first : end - first] = leaf[begin - start : end - start]
    return addresses
