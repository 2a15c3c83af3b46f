"""Entries of the metadata journal: exact bytes, round trips, what is not well made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import layout
from dedup.layout import block_span
from dedup.metadata_journal import (
    EntryKind,
    Logged,
    LoggedExtent,
    decode,
    encode,
    extents_of,
)
from dedup.types import (
    VOLUME_BYTES_MAX,
    Attributes,
    Bookmark,
    ClockRun,
    Correct,
    Create,
    Entry,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    JournalId,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
    Seq,
    SnapshotCreate,
    SnapshotDelete,
    TimeNs,
    VolumeId,
)
from tests.dedup.journal_samples import noted, write

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
SIZE = st.integers(0, VOLUME_BYTES_MAX)
TEXT = st.text(max_size=30)
HEAD = (Seq(7), TimeNs(8), ClockRun(9))


def extents() -> st.SearchStrategy[LoggedExtent]:
    def build(volume: int, offset: int, length: int, seed: int) -> LoggedExtent:
        blocks = block_span(offset, length)[1]
        source = np.random.default_rng(seed)
        return LoggedExtent(
            VolumeId(volume),
            offset,
            length,
            source.integers(0, 1 << 63, blocks).astype("<u8"),
            source.bytes(16 * blocks),
        )

    return st.builds(build, U32, st.integers(0, VOLUME_BYTES_MAX - (1 << 20)), st.integers(0, 40_000), U32)


BODIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(Resize, *map(st.just, HEAD), U32, SIZE),
    st.builds(Create, *map(st.just, HEAD), U32, TEXT, SIZE, U32, U32, U32),
    st.builds(
        Rename, *map(st.just, HEAD), st.lists(st.tuples(U32, TEXT), max_size=3).map(tuple), st.lists(U32).map(tuple)
    ),
    st.builds(Retire, *map(st.just, HEAD), U32),
    st.builds(Attributes, *map(st.just, HEAD), U32, U32, U32, U32),
    st.builds(Flush, *map(st.just, HEAD), U32),
    st.builds(Bookmark, *map(st.just, HEAD), TEXT),
    st.builds(Heartbeat, *map(st.just, HEAD)),
    st.builds(EpochStart, *map(st.just, HEAD), U32.map(Epoch), st.booleans()),
    st.builds(ReconcileBegin, *map(st.just, HEAD), TEXT),
    st.builds(ReconcileEnd, *map(st.just, HEAD)),
    st.builds(
        SnapshotCreate, *map(st.just, HEAD), TEXT, U64, U64, st.none() | U32.map(VolumeId), st.none() | U64.map(TimeNs)
    ),
    st.builds(SnapshotDelete, *map(st.just, HEAD), TEXT),
    st.builds(Correct, *map(st.just, HEAD), st.integers(1, 6), SIZE, st.builds(Extent, U32, U64, st.just(b""))),
)


@given(BODIES, extents(), U64)
def test_round_trip_of_bodies(body: Entry, extent: LoggedExtent, seed: int) -> None:
    logged = noted(body)
    if isinstance(body, Correct | Resize):
        logged = Logged(logged.kind, *([body.seq] * 2), body.time, body.run, JournalId(3), (extent,), body)
    encoded = encode(logged, seed)
    assert len(encoded) % 8 == 0
    assert decode(encoded) == logged


@given(
    st.sampled_from([EntryKind.WRITE, EntryKind.AGGREGATE, EntryKind.RECONCILE]), st.lists(extents(), max_size=5), U64
)
def test_round_trip_of_extents(kind: EntryKind, parts: list[LoggedExtent], seed: int) -> None:
    first = Seq(3) if kind is EntryKind.AGGREGATE else Seq(9)
    logged = Logged(kind, first, Seq(9), TimeNs(5), ClockRun(6), JournalId(65535), tuple(parts), None)
    encoded = encode(logged, seed)
    assert decode(encoded) == logged
    assert extents_of(memoryview(encoded)) == tuple(parts)


def test_exact_bytes_of_a_write() -> None:
    extent = LoggedExtent(VolumeId(2), 4000, 200, np.array([0x10005, 0], dtype="<u8"), bytes(range(16)) + bytes(16))
    logged = Logged(EntryKind.WRITE, Seq(6), Seq(6), TimeNs(7), ClockRun(8), JournalId(1), (extent,), None)
    encoded = encode(logged, 99)
    assert encoded[8:].hex() == (
        "78000000" + "01" + "00" + "0100" + "0600000000000000" * 2 + "0700000000000000" + "08000000" + "01000000"
        "02000000" + "00000000" + "a00f000000000000" + "c8000000" + "02000000"
        "0500010000000000" + "0000000000000000" + bytes(range(16)).hex() + "00" * 16
    )
    assert encoded[:8] == layout.checksum(encoded[8:], 99).to_bytes(8, "little")


def test_exact_bytes_of_a_flush() -> None:
    encoded = encode(noted(Flush(Seq(6), TimeNs(7), ClockRun(8), VolumeId(2))), 99)
    assert encoded[8:].hex() == (
        "38000000" + "0a" + "06" + "0000" + "0600000000000000" * 2 + "0700000000000000" + "08000000" + "00000000"
        "9102" + "00" * 6
    )


@pytest.mark.parametrize(
    "change",
    [
        {"first_seq": Seq(1)},
        {"body": Heartbeat(Seq(5), TimeNs(50), ClockRun(0))},
        {"kind": EntryKind.FLUSH},
        {"kind": EntryKind.FLUSH, "extents": (), "body": Heartbeat(Seq(5), TimeNs(50), ClockRun(0))},
        {"kind": EntryKind.HEARTBEAT, "extents": (), "body": Heartbeat(Seq(6), TimeNs(50), ClockRun(0))},
        {"kind": EntryKind.AGGREGATE, "first_seq": Seq(6)},
        {"extents": (LoggedExtent(VolumeId(1), 0, 4097, np.zeros(1, dtype="<u8"), bytes(16)),)},
        {"extents": (LoggedExtent(VolumeId(1), 0, 4096, np.zeros(1, dtype="<u8"), bytes(15)),)},
        {"extents": (LoggedExtent(VolumeId(1), VOLUME_BYTES_MAX, 1, np.zeros(1, dtype="<u8"), bytes(16)),)},
    ],
)
def test_what_is_not_well_made_is_not_written(change: dict[str, object]) -> None:
    good = write(5)
    fields = {name: getattr(good, name) for name in Logged.__slots__} | change
    with pytest.raises(ValueError, match="not well made"):
        encode(Logged(**fields), 0)


def test_an_entry_has_a_largest_size() -> None:
    blocks = layout.ENTRY_BYTES_MAX // 24 + 1
    with pytest.raises(ValueError, match="more than"):
        encode(write(1, blocks), 0)
