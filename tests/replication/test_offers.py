"""Offers: what is offered of an aggregate, what remains of it, and that both ends put it together again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.types import BLOCK_BYTES, Aggregate, ClockRun, Extent, Seq, TimeNs, VolumeId
from replication.errors import ProtocolError
from replication.messages import Piece
from replication.offers import completed, digest_of, named_by, offer_bytes, offer_of, remainder, whole_blocks
from replication.wire import decode_all, encode

KEY = b"a key"


def aggregate_of(*extents: Extent) -> Aggregate:
    return Aggregate(Seq(3), Seq(9), TimeNs(5), ClockRun(0), extents)


def extent(offset: int, data: bytes, volume: int = 1) -> Extent:
    return Extent(VolumeId(volume), offset, data)


def bytes_of(length: int, seed: int) -> bytes:
    return b"".join(((seed * 7919 + at) % 65521).to_bytes(4, "little") for at in range(length // 4 + 1))[:length]


extents = st.one_of(
    st.builds(
        lambda offset, length, seed: extent(offset, bytes_of(length, seed)),
        st.integers(0, 3 * BLOCK_BYTES),
        st.integers(1, 4 * BLOCK_BYTES),
        st.integers(0, 99),
    ),
    st.builds(
        lambda offset, zeros: Extent(VolumeId(2), offset, b"", zeros), st.integers(0, 9999), st.integers(1, 9999)
    ),
)
aggregates = st.lists(extents, min_size=1, max_size=6).map(lambda found: aggregate_of(*found))


def test_only_whole_aligned_blocks_are_offered() -> None:
    data = bytes_of(3 * BLOCK_BYTES, 1)
    aligned, shifted = extent(BLOCK_BYTES, data), extent(100, data)
    assert [bytes(block) for block in whole_blocks(aggregate_of(aligned))] == [
        data[at : at + BLOCK_BYTES] for at in (0, BLOCK_BYTES, 2 * BLOCK_BYTES)
    ]
    first = BLOCK_BYTES - 100
    assert [bytes(block) for block in whole_blocks(aggregate_of(shifted))] == [
        data[at : at + BLOCK_BYTES] for at in (first, first + BLOCK_BYTES)
    ]
    assert whole_blocks(aggregate_of(extent(1, data[:BLOCK_BYTES]), Extent(VolumeId(1), 0, b"", 8192))) == []


def test_an_offer_names_each_block_by_both() -> None:
    aggregate = aggregate_of(extent(0, bytes_of(2 * BLOCK_BYTES, 4)))
    blocks = whole_blocks(aggregate)
    offer = offer_of(aggregate, blocks, KEY)
    fingerprints, digests = named_by(offer)
    assert offer.seq == aggregate.seq
    assert len(set(fingerprints)) == 2
    assert digests == [digest_of(block, KEY) for block in blocks]
    assert digests != [digest_of(block, b"another key") for block in blocks]
    assert offer_bytes(2) == sum(map(len, encode(offer))) + 16 + 2


@given(aggregates, st.data())
def test_what_remains_is_completed(aggregate: Aggregate, data: st.DataObject) -> None:
    blocks = whole_blocks(aggregate)
    missing = bytes(data.draw(st.lists(st.integers(0, 1), min_size=len(blocks), max_size=len(blocks))))
    rest = remainder(aggregate, missing)
    gone = missing.count(0) * BLOCK_BYTES
    assert len(rest.data) == sum(len(one.data) for one in aggregate.extents) - gone
    (told,) = decode_all(b"".join(encode(rest)))
    assert told == rest
    held = [None if mark else bytes(block) for mark, block in zip(missing, blocks, strict=True)]
    assert completed(rest, held) == aggregate


@given(aggregates, st.data())
def test_what_does_not_fit_is_refused(aggregate: Aggregate, data: st.DataObject) -> None:
    blocks = whole_blocks(aggregate)
    missing = bytes(data.draw(st.lists(st.integers(0, 1), min_size=len(blocks), max_size=len(blocks))))
    rest = remainder(aggregate, missing)
    held = [None if mark else bytes(block) for mark, block in zip(missing, blocks, strict=True)]
    with pytest.raises(ProtocolError):
        remainder(aggregate, missing + b"\1")
    with pytest.raises(ProtocolError):
        completed(rest, [*held, None])
    with pytest.raises(ProtocolError):
        completed(replace(rest, data=bytes(rest.data) + b"x"), held)
    if rest.data:
        with pytest.raises(ProtocolError):
            completed(replace(rest, data=rest.data[:-1]), held)
    if blocks:
        with pytest.raises(ProtocolError):
            remainder(aggregate, missing[:-1])
        with pytest.raises(ProtocolError):
            completed(rest, held[:-1])
        # One block more is held than was said, or one less.
        turned = [None if held[0] is not None else bytes(BLOCK_BYTES), *held[1:]]
        with pytest.raises(ProtocolError):
            completed(rest, turned)


@given(st.lists(st.builds(lambda o, d, z: (o, d, z), st.integers(0, 9999), st.integers(0, 9999), st.integers(0, 9999))))
def test_a_table_of_lies_gives_an_aggregate_or_is_refused(table: list[tuple[int, int, int]]) -> None:
    aggregate = aggregate_of(extent(0, bytes_of(3 * BLOCK_BYTES, 2)))
    rest = remainder(aggregate, b"\1\0\1")
    held = [None, bytes(whole_blocks(aggregate)[1]), None]
    lies = tuple(
        Piece(VolumeId(1), offset, data or (0 if zeros else 1), 0 if data else zeros) for offset, data, zeros in table
    )
    try:
        made = completed(replace(rest, pieces=lies), held)
    except ProtocolError:
        return
    for one, piece in zip(made.extents, lies, strict=True):
        assert len(one.data) == piece.data_bytes
