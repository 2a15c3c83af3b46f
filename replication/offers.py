"""Offers: an aggregate without the blocks that the second appliance has already. Pure.

What is offered of an aggregate are the whole aligned blocks of its data, extent by extent, each extent's in the order
of their offsets. Both ends count them by the same table, so a block is named by its place in that order alone.

Invariant: `remainder` and `completed` are inverse. What does not fit together byte for byte is a ProtocolError, and no
aggregate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain

from xxhash import xxh3_128_digest

from dedup.types import BLOCK_BYTES, Aggregate, Extent
from replication.errors import ProtocolError
from replication.frame_layout import COMPARE_RESULT, OFFER, OFFERED_BYTES
from replication.messages import DIGEST_BYTES, FINGERPRINT_BYTES, Offer, Piece, Remainder
from replication.wire import Buffer


def digest_of(block: Buffer, key: bytes) -> bytes:
    """What proves a block in a session with this key."""
    return blake2b(block, key=key, digest_size=DIGEST_BYTES).digest()


def whole_blocks(aggregate: Aggregate) -> list[memoryview]:
    """The blocks that an offer of it names, in order; views of its data."""
    blocks: list[memoryview] = []
    for extent in aggregate.extents:
        head, count = _within(extent.offset, len(extent.data))
        data = memoryview(extent.data)
        blocks += [data[at : at + BLOCK_BYTES] for at in range(head, head + count * BLOCK_BYTES, BLOCK_BYTES)]
    return blocks


def offer_of(aggregate: Aggregate, blocks: Iterable[Buffer], key: bytes) -> Offer:
    """The offer of its whole blocks, of which there must be one at least; costs some 6 µs for each."""
    named = chain.from_iterable((xxh3_128_digest(block), digest_of(block, key)) for block in blocks)
    return Offer(aggregate.seq, b"".join(named))


def offer_bytes(blocks: int) -> int:
    """What an offer of so many blocks and its answer cost on the wire."""
    return OFFER.size + blocks * OFFERED_BYTES + COMPARE_RESULT.size + blocks


def named_by(offer: Offer) -> tuple[list[bytes], list[bytes]]:
    """Fingerprints and digests of the offered blocks."""
    named = offer.blocks
    starts = range(0, len(named), OFFERED_BYTES)
    fingerprints = [named[at : at + FINGERPRINT_BYTES] for at in starts]
    return fingerprints, [named[at + FINGERPRINT_BYTES : at + OFFERED_BYTES] for at in starts]


def remainder(aggregate: Aggregate, missing: bytes) -> Remainder:
    """The aggregate without the blocks that are not `missing`. ProtocolError when that is the answer to another."""
    pieces: list[Piece] = []
    parts: list[Buffer] = []
    at = 0
    for extent in aggregate.extents:
        size = len(extent.data)
        pieces.append(Piece(extent.volume, extent.offset, size, extent.zeros))
        head, count = _within(extent.offset, size)
        data = memoryview(extent.data)
        parts += [data[start:end] for start, end in _kept(missing[at : at + count], head, size)]
        at += count
    if at != len(missing):
        raise ProtocolError(f"an answer of {len(missing)} blocks is not that to the offer {aggregate.seq}")
    stamp = (aggregate.first_seq, aggregate.seq, aggregate.time, aggregate.run)
    return Remainder(*stamp, tuple(pieces), b"".join(parts))


def completed(rest: Remainder, held: Sequence[Buffer | None]) -> Aggregate:
    """The aggregate again: `held` has the bytes of each offered block that was not missing. ProtocolError when the
    remainder is not what the answer leaves of an aggregate with so many whole blocks."""
    data = memoryview(rest.data)
    extents: list[Extent] = []
    block = at = 0
    for piece in rest.pieces:
        if not piece.data_bytes:
            extents.append(Extent(piece.volume, piece.offset, b"", piece.zeros))
            continue
        _, count = _within(piece.offset, piece.data_bytes)
        known = held[block : block + count]
        if len(known) < count:
            raise ProtocolError(f"the remainder {rest.seq} has more whole blocks than the {len(held)} of its offer")
        size = piece.data_bytes - BLOCK_BYTES * sum(one is not None for one in known)
        if at + size > len(data):
            raise ProtocolError(f"the remainder {rest.seq} lacks data")
        extents.append(Extent(piece.volume, piece.offset, _filled(piece, data[at : at + size], known)))
        at += size
        block += count
    if block != len(held) or at != len(data):
        raise ProtocolError(
            f"the remainder {rest.seq} has {block} whole blocks for an offer of {len(held)}, "
            f"and {len(data) - at} bytes too many"
        )
    return Aggregate(rest.first_seq, rest.seq, rest.time, rest.run, tuple(extents))


def _filled(piece: Piece, data: memoryview, known: Sequence[Buffer | None]) -> Buffer:
    if len(data) == piece.data_bytes:
        return data
    head, _ = _within(piece.offset, piece.data_bytes)
    parts: list[Buffer] = [data[:head]]
    at = head
    for block in known:
        if block is None:
            parts.append(data[at : at + BLOCK_BYTES])
            at += BLOCK_BYTES
        else:
            parts.append(block)
    parts.append(data[at:])
    return b"".join(parts)


def _within(offset: int, size: int) -> tuple[int, int]:
    """How many bytes come before the first aligned block of size bytes at the offset, and how many whole ones there
    are. With none, where the first one would be does not matter."""
    head = -offset % BLOCK_BYTES
    return head, max(0, (size - head) // BLOCK_BYTES)


def _kept(marks: bytes, head: int, size: int) -> Iterator[tuple[int, int]]:
    """What of an extent's data is sent: its edges and its missing blocks, as (start, end), neighbours joined."""
    start = 0
    for index, mark in enumerate(marks):
        if not mark:
            here = head + index * BLOCK_BYTES
            if here > start:
                yield start, here
            start = here + BLOCK_BYTES
    if start < size:
        yield start, size
