"""The second appliance's part in offers: which of the offered blocks it has, and their bytes until the remainder comes.

A fingerprint only finds a candidate among the group's own blocks; the keyed digest of the bytes that are read says
whether it is the block. So neither alone stores anything: what is filled in is what the digest was made of.

Invariants:
- Nothing in the store changes here. A block is kept as bytes, so it may be collected meanwhile; one that cannot be
  read, or is damaged, is missing.
- Kept are the blocks of OFFERS_OPEN_MAX offers at most, and as many offers are being answered: the next one waits.
"""

from __future__ import annotations

import logging
from hmac import compare_digest
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from dedup.container_pool import ContainerPool
from dedup.errors import Damaged
from dedup.ingest import ZEROS_FINGERPRINT
from dedup.layout import ZERO_BLOCK
from dedup.pointer_map import Addresses
from dedup.types import BLOCK_BYTES, HOLE, Address, Aggregate, Seq
from replication.errors import ProtocolError
from replication.messages import Offer, Remainder, Wanted
from replication.offers import completed, digest_of, named_by
from replication.session import OFFERS_OPEN_MAX, Session
from replication.store_writer import StoreWriter
from replication.wire import Buffer

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter

log = logging.getLogger("rewindfs.second_appliance")

THREADS: Final = 1
"""A core's worth for each session: the others are left to ingest."""


class HeldBlocks:
    """Answers the offers of one session, whose digests have one key."""

    def __init__(self, writer: StoreWriter, session: Session, key: bytes) -> None:
        self._writer = writer
        self._session = session
        self._key = key
        self._threads = trio.CapacityLimiter(THREADS)
        self._turns = trio.Semaphore(OFFERS_OPEN_MAX)
        self._held: dict[Seq, list[Buffer | None]] = {}

    async def take(self, group: GroupWriter, offer: Offer) -> Addresses:
        """Where the candidates are; `answer` must follow. Waits while OFFERS_OPEN_MAX offers are being answered. Raises
        StoreFailed, Damaged where the index is."""
        await self._turns.acquire()
        try:
            fingerprints, _ = named_by(offer)
            return await self._writer.run(group.store.own_blocks.candidates, group, fingerprints)
        except BaseException:
            self._turns.release()
            raise

    async def answer(self, offer: Offer, candidates: Addresses) -> Wanted:
        """What to say to the offer. What is held is kept until its remainder, or something else, has its seq."""
        try:
            held = await trio.to_thread.run_sync(self._matched, offer, candidates, limiter=self._threads)
        finally:
            self._turns.release()
        passed = self._session.last_seq
        self._held = {seq: blocks for seq, blocks in self._held.items() if seq > passed}
        if offer.seq > passed:
            self._held[offer.seq] = held
        return Wanted(offer.seq, bytes(block is None for block in held))

    def completed(self, rest: Remainder) -> Aggregate:
        """The aggregate of which this remained. Raises ProtocolError."""
        held = self._held.pop(rest.seq, None)
        if held is None:
            raise ProtocolError(f"the remainder {rest.seq} has no offer that was answered")
        return completed(rest, held)

    def _matched(self, offer: Offer, candidates: Addresses) -> list[Buffer | None]:
        """The bytes of each block that is here, and what its digest says; None for the others."""
        fingerprints, digests = named_by(offer)
        blocks = _read(self._writer.store.pool, candidates)
        held: list[Buffer | None] = []
        for fingerprint, digest, block in zip(fingerprints, digests, blocks, strict=True):
            found = ZERO_BLOCK if fingerprint == ZEROS_FINGERPRINT else block
            if found is not None and not compare_digest(digest_of(found, self._key), digest):
                found = None
            held.append(found)
        return held


def _read(pool: ContainerPool, candidates: Addresses) -> list[Buffer | None]:
    """The candidates' blocks, verified against their stored fingerprints; None for a hole, and for a damaged one."""
    blocks: list[Buffer | None] = [None] * len(candidates)
    places = np.flatnonzero(candidates != HOLE)
    if not len(places):
        return blocks
    read = memoryview(bytearray(len(places) * BLOCK_BYTES))
    try:
        pool.read_addresses(candidates[places], read)
    except Damaged:
        for place in places.tolist():
            try:
                blocks[place] = pool.read_block(Address(int(candidates[place])))
            except Damaged as damage:
                log.info("an offered block is asked for: %s", damage)
        return blocks
    for index, place in enumerate(places.tolist()):
        blocks[place] = read[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
    return blocks
