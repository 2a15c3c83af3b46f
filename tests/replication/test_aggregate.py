"""Coalescing against bytes in an array."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from dedup.types import WRITE_BYTES_MAX, ClockRun, Extent, Seq, TimeNs, VolumeId, Write
from replication.aggregate import coalesce

SIZE = 64


def writes_of(*extents: Extent) -> list[Write]:
    return [Write(Seq(number + 1), TimeNs(0), ClockRun(0), extent) for number, extent in enumerate(extents)]


@st.composite
def some_extents(draw: st.DrawFn) -> Extent:
    volume = VolumeId(draw(st.integers(1, 3)))
    offset = draw(st.integers(0, SIZE - 1))
    length = draw(st.integers(1, SIZE - offset))
    if draw(st.booleans()):
        return Extent(volume, offset, b"", length)
    return Extent(volume, offset, draw(st.binary(min_size=length, max_size=length)))


def applied(extents: Iterable[Extent]) -> tuple[dict[int, bytearray], dict[int, bytearray]]:
    """The bytes of each volume, and which of them were written."""
    images: dict[int, bytearray] = defaultdict(lambda: bytearray(b"\xaa" * SIZE))
    written: dict[int, bytearray] = defaultdict(lambda: bytearray(SIZE))
    for extent in extents:
        end = extent.offset + extent.length
        images[extent.volume][extent.offset : end] = extent.data or bytes(extent.zeros)
        for at in range(extent.offset, end):
            written[extent.volume][at] += 1
    return images, written


@given(st.lists(some_extents(), min_size=1, max_size=20))
def test_the_last_write_of_each_byte_wins(extents: list[Extent]) -> None:
    joined = coalesce(writes_of(*extents))
    image, _ = applied(extents)
    image_joined, written = applied(joined)
    assert image_joined == image
    assert all(count <= 1 for counts in written.values() for count in counts)
    assert len(joined) <= 2 * len(extents) - 1
    places = [(extent.volume, extent.offset) for extent in joined]
    assert places == sorted(places)


def test_neighbours_are_joined_up_to_the_limit() -> None:
    half = bytes([7]) * (WRITE_BYTES_MAX // 2)
    disk = VolumeId(1)
    pieces = [Extent(disk, number * len(half), half) for number in range(4)]
    joined = coalesce(writes_of(*pieces))
    assert [(extent.offset, extent.length) for extent in joined] == [
        (0, WRITE_BYTES_MAX),
        (WRITE_BYTES_MAX, WRITE_BYTES_MAX),
    ]


def test_other_volumes_and_zeros_are_not_joined() -> None:
    one, two = VolumeId(1), VolumeId(2)
    extents = (Extent(one, 0, b"ab"), Extent(two, 2, b"cd"), Extent(one, 2, b"", 2), Extent(one, 4, b"", 3))
    assert coalesce(writes_of(*extents)) == (Extent(one, 0, b"ab"), Extent(one, 2, b"", 5), Extent(two, 2, b"cd"))


def test_whole_data_is_not_copied_and_small_pieces_keep_no_large_write_alive() -> None:
    data = bytes(100)
    (whole,) = coalesce(writes_of(Extent(VolumeId(1), 0, data)))
    assert whole.data is data
    start, over = coalesce(writes_of(Extent(VolumeId(1), 0, data), Extent(VolumeId(1), 10, b"", 90)))
    assert isinstance(start.data, bytes)
    assert (start.length, over.zeros) == (10, 90)
    start, over = coalesce(writes_of(Extent(VolumeId(1), 0, data), Extent(VolumeId(1), 90, b"", 10)))
    assert isinstance(start.data, memoryview)
