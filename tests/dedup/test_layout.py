"""The exact bytes of headers and names, and that each flipped byte of a header is noticed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import layout, sealed_layout
from dedup.errors import Damaged, NotAStore, StoreError, UnknownFormat
from dedup.layout import ContainerHeader, SegmentHeader, StoreMarker
from dedup.manifest import Manifest, pack_manifest, unpack_manifest
from dedup.sealed_layout import SealedHeader
from dedup.types import BLOCK_BYTES, HOLE, ContainerForm, ContainerId, JournalId, Seq, TimeNs

PATH = Path("/store/FILE")
MARKER = StoreMarker(bytes(range(16)), TimeNs(0x1122334455667788))
CONTAINER = ContainerHeader(ContainerId(5), JournalId(1), ContainerForm.RAW, TimeNs(7))
SEGMENT = SegmentHeader(Seq(9), 0x0102030405060708, TimeNs(7))


def test_store_marker_exact_bytes() -> None:
    packed = layout.pack_store_marker(MARKER)
    assert packed[:-8].hex() == (
        "727753544f52450a" + "0100" + "0000" + "00100000" + "000102030405060708090a0b0c0d0e0f" + "8877665544332211"
    )
    assert packed[-8:] == layout.checksum(packed[:-8]).to_bytes(8, "little")
    assert layout.unpack_store_marker(packed, PATH) == MARKER


def test_container_header_exact_bytes() -> None:
    packed = layout.pack_container_header(CONTAINER)
    assert packed[:-8].hex() == (
        "7277434e544e520a" + "0100" + "0100" + "0100" + "0000" + "0500000000000000" + "0700000000000000"
    )
    assert layout.unpack_container_header(packed + bytes(4000), PATH) == CONTAINER


def test_segment_header_exact_bytes() -> None:
    packed = layout.pack_segment_header(SEGMENT)
    assert packed[:-8].hex() == (
        "72774a524e414c0a" + "0100" + "0000" + "00000000" + "0900000000000000" + "0807060504030201" + "0700000000000000"
    )
    assert layout.unpack_segment_header(packed, PATH) == SEGMENT


def test_sealed_header_round_trip_and_offsets() -> None:
    header = SealedHeader.of(slots=33, table_checksum=99)
    page = bytes(sealed_layout.SEALED_HEADER_OFFSET) + sealed_layout.pack_sealed_header(header)
    assert sealed_layout.unpack_sealed_header(page, PATH) == header
    assert header.fingerprints_offset == 4096 + 72
    assert header.groups_offset == header.fingerprints_offset + 33 * 16
    assert header.table_end == header.groups_offset + 3 * 24


@given(st.integers(0, layout.SLOTS_MAX), st.integers(1, sealed_layout.SEALED_GROUP_BLOCKS_MAX))
def test_groups_of_any_size_that_may_be(slots: int, group_blocks: int) -> None:
    header = SealedHeader.of(slots, 7, group_blocks)
    page = bytes(sealed_layout.SEALED_HEADER_OFFSET) + sealed_layout.pack_sealed_header(header)
    assert sealed_layout.unpack_sealed_header(page, PATH) == header
    assert (header.groups - 1) * group_blocks < slots <= header.groups * group_blocks


def test_the_first_sealed_headers_said_nothing_of_the_size_of_groups() -> None:
    first = layout.checked(struct.pack("<IIQQ", 33, 2, 99, 0))
    header = sealed_layout.unpack_sealed_header(bytes(sealed_layout.SEALED_HEADER_OFFSET) + first, PATH)
    assert (header.slots, header.groups, header.blocks_a_group, header.table_checksum) == (33, 2, 32, 99)


@pytest.mark.parametrize(
    ("packed", "unpack"),
    [
        (layout.pack_store_marker(MARKER), layout.unpack_store_marker),
        (layout.pack_container_header(CONTAINER), layout.unpack_container_header),
        (layout.pack_segment_header(SEGMENT), layout.unpack_segment_header),
    ],
    ids=["store", "container", "segment"],
)
def test_every_flipped_bit_and_every_cut_of_a_header_is_noticed(packed, unpack) -> None:
    for index in range(len(packed)):
        for bit in range(8):
            flipped = bytearray(packed)
            flipped[index] ^= 1 << bit
            with pytest.raises(StoreError, match="/store/FILE"):
                unpack(bytes(flipped), PATH)
        with pytest.raises(StoreError, match="/store/FILE"):
            unpack(packed[:index], PATH)


@pytest.mark.parametrize(
    ("packed", "unpack"),
    [
        (layout.pack_store_marker(MARKER), layout.unpack_store_marker),
        (layout.pack_container_header(CONTAINER), layout.unpack_container_header),
        (layout.pack_segment_header(SEGMENT), layout.unpack_segment_header),
        (pack_manifest(Manifest(3)), unpack_manifest),
    ],
    ids=["store", "container", "segment", "manifest"],
)
def test_a_later_version_is_one_by_its_checksum(packed, unpack) -> None:
    """Where nothing but the version does not fit, that is damaged."""
    later = packed[:8] + b"\x02" + packed[9:]
    with pytest.raises(UnknownFormat, match="version 2 .*; use a newer version of rewindfs"):
        unpack(layout.checked(later), PATH)
    with pytest.raises(UnknownFormat, match="version 2"):
        unpack(later[:-1] + bytes([later[-1] ^ 1]), PATH)
    with pytest.raises(Damaged, match="offset 8: the version 2 of .* does not match its checksum"):
        unpack(later, PATH)


def test_what_is_no_store_and_what_is_a_later_one_are_told_apart() -> None:
    packed = layout.pack_store_marker(MARKER)
    with pytest.raises(NotAStore):
        layout.unpack_store_marker(b"hello, world\n" * 10, PATH)
    with pytest.raises(UnknownFormat, match="version 2"):
        layout.unpack_store_marker(layout.checked(packed[:8] + b"\x02" + packed[9:]), PATH)
    with pytest.raises(Damaged):
        layout.unpack_store_marker(packed[:20] + b"\xff" + packed[21:], PATH)


def test_sealed_header_with_impossible_counts_is_damage() -> None:
    for header in (SealedHeader(33, 1, 0), SealedHeader.of(layout.SLOTS_MAX + 1)):
        page = bytes(sealed_layout.SEALED_HEADER_OFFSET) + sealed_layout.pack_sealed_header(header)
        with pytest.raises(Damaged, match="cannot be"):
            sealed_layout.unpack_sealed_header(page, PATH)


def test_groups_that_are_larger_than_any_known_here_are_no_damage() -> None:
    header = SealedHeader.of(99, 0, sealed_layout.SEALED_GROUP_BLOCKS_MAX + 1)
    page = bytearray(sealed_layout.SEALED_HEADER_OFFSET) + sealed_layout.pack_sealed_header(header)
    with pytest.raises(UnknownFormat, match="groups of 33 blocks .*; use a newer version of rewindfs"):
        sealed_layout.unpack_sealed_header(bytes(page), PATH)
    page[-1] ^= 1
    with pytest.raises(Damaged):
        sealed_layout.unpack_sealed_header(bytes(page), PATH)


@given(st.integers(1, layout.CONTAINER_MAX), st.integers(0, layout.SLOTS_MAX - 1))
def test_address_round_trip(container: int, slot: int) -> None:
    where = layout.address(ContainerId(container), slot)
    assert (layout.container_of(where), layout.slot_of(where)) == (container, slot)
    assert 0 < where < 1 << 64


def test_no_address_is_a_hole() -> None:
    assert layout.address(ContainerId(1), 0) != HOLE
    assert layout.container_of(HOLE) == 0


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 22))
def test_block_span_covers_the_bytes_and_no_block_more(offset: int, length: int) -> None:
    first, blocks = layout.block_span(offset, length)
    assert first * BLOCK_BYTES <= offset < (first + 1) * BLOCK_BYTES
    assert (first + blocks - 1) * BLOCK_BYTES < offset + length <= (first + blocks) * BLOCK_BYTES


def test_block_span_of_nothing() -> None:
    assert layout.block_span(4097, 0) == (1, 0)


def test_names_of_files() -> None:
    assert layout.container_name(ContainerId(1)) == "0000000000000001.rwc"
    assert layout.segment_name(Seq(42)) == "00000000000000000042.rwj"
    assert layout.container_named("0000000000000001.rwc") == 1
    assert layout.segment_named("00000000000000000042.rwj") == 42
    for stray in (
        "1.rwc",
        "0000000000000001.rwc.tmp",
        "0000000000000001.rwj",
        "000000000000000x.rwc",
        "²000000000000001.rwc",
    ):
        assert layout.container_named(stray) is None


def test_raw_blocks_are_page_aligned() -> None:
    assert layout.RAW_SLOTS_OFFSET % 4096 == 0
    assert layout.SLOTS_MAX <= layout.SLOT_MASK
