"""The second appliance's part in a reconcile: what a Compare says of the source, held against what the store holds.

Invariants:
- a Compare is answered by what is held at its seq: the addresses are taken between the ingest of what came before it
  and of what follows, under the writer's lock; the bytes are read and hashed afterwards, beside ingest, in a thread;
- bounded: THREADS of a session read at a time; whoever sends more Compares waits for the answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from dedup.errors import UnknownName
from dedup.held_range import HeldRange
from dedup.types import BLOCK_BYTES
from replication.digests import MANY, Digester
from replication.messages import DIGEST_BYTES, SUM_UNITS, Compare, CompareResult, Uncompared
from replication.store_writer import StoreWriter

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter

THREADS: Final = 1
"""A core's worth: the others are left to ingest."""


class Comparer:
    """Answers the Compares of one session, whose digests have one key."""

    def __init__(self, writer: StoreWriter, key: bytes) -> None:
        self._writer = writer
        self._digester = Digester(key)
        self._threads = trio.CapacityLimiter(THREADS)

    async def take(self, group: GroupWriter, compare: Compare) -> HeldRange:
        """What is held of the range now: to be called when all before the Compare was ingested, and nothing after it.
        Raises UnknownName, StoreFailed."""
        return await self._writer.run(group.held_range, compare.volume, compare.offset, _blocks(compare))

    async def answer(self, group: GroupWriter, compare: Compare, held: HeldRange) -> CompareResult | Uncompared:
        """What to say to the Compare, of which `take` gave `held`. Uncompared when a part of it was collected before it
        could be read. Raises StoreFailed."""
        differing, bad = await trio.to_thread.run_sync(self._compare, compare, held, limiter=self._threads)
        if bad and await self._is_gone(group, compare, held, bad):
            return Uncompared(compare.seq, self._digester.key)
        return CompareResult(compare.seq, differing)

    def _compare(self, compare: Compare, held: HeldRange) -> tuple[bytes, frozenset[int]]:
        digester, unit = self._digester, compare.unit
        if held.is_hole:
            ours = digester.zeros(unit) * (_blocks(compare) * BLOCK_BYTES // unit)
            return digester.differing(ours, compare.digests, unit), frozenset()
        content, bad = held.read()
        differing = digester.differing(digester.units(content, unit), compare.digests, unit)
        return _with_damage(differing, unit, bad), bad

    async def _is_gone(self, group: GroupWriter, compare: Compare, held: HeldRange, bad: frozenset[int]) -> bool:
        """Whether any of the blocks that could not be read was overwritten since: then it may be collected, not
        damaged, and a comparison of what is held now tells."""
        try:
            now = await self.take(group, compare)
        except UnknownName:
            return True
        blocks = np.fromiter(bad, dtype=np.int64)
        return bool((now.addresses[blocks] != held.addresses[blocks]).any())


def _blocks(compare: Compare) -> int:
    digests = len(compare.digests) // DIGEST_BYTES
    return digests * compare.unit // BLOCK_BYTES // (2 if compare.unit in SUM_UNITS else 1)


def _with_damage(differing: bytes, unit: int, bad: frozenset[int]) -> bytes:
    """A block that is damaged differs, whatever was read in its place."""
    if not bad:
        return differing
    found = bytearray(differing)
    for block in bad:
        place = block * BLOCK_BYTES // unit
        if unit in SUM_UNITS:
            found[2 * place : 2 * place + 2] = MANY.to_bytes(2, "little")
        else:
            found[place] = 1
    return bytes(found)
