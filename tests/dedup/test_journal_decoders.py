"""Decoders of the metadata journal: its entries, a segment of them, the manifest, and what is done with what they say.

A mutated segment gives the entries before the change, and then ends or is refused. Behind checksums that were made anew
it may give others; whatever they say, they are applied and indexed, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import layout
from dedup.catalog import Catalog, Index
from dedup.errors import Damaged, StoreError
from dedup.gaps import merged
from dedup.group_state import GroupState
from dedup.journal_entry import EntryKind, Logged, LoggedExtent, decode, encode, extents_of, kind_of
from dedup.journal_reader import FIRST_POSITION, JournalPosition, read
from dedup.layout import CHECKSUM_BYTES, ENTRY_HEADER_BYTES, SegmentHeader, checksum
from dedup.manifest import Manifest, SegmentRow, pack_manifest, read_manifest, unpack_manifest
from dedup.types import (
    Attributes,
    BaseAdvance,
    Bookmark,
    ClockRun,
    Consolidated,
    Correct,
    Create,
    Entry,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Gap,
    Heartbeat,
    JournalCreate,
    JournalId,
    JournalSpec,
    JournalUse,
    Owner,
    PointKind,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
    Route,
    RunStart,
    Seq,
    Snapshot,
    SnapshotCreate,
    SnapshotDelete,
    TimeNs,
    VolumeId,
    VolumeState,
)
from tests.dedup.mutations import (
    FEW,
    MemoryFiles,
    either,
    mutated,
    outcome,
    peak_bytes,
    with_checksum,
    with_largest_numbers,
)

DIRECTORY: Final = Path("/store/groups/g/journal")
SEED: Final = 0x1234
ONE, TWO = VolumeId(1), VolumeId(2)


def _at(seq: int) -> tuple[Seq, TimeNs, ClockRun]:
    return Seq(seq), TimeNs(1000 * seq), ClockRun(seq // 8)


def _extent(volume: VolumeId, offset: int, length: int) -> LoggedExtent:
    blocks = layout.block_span(offset, length)[1]
    addresses = np.arange((1 << 16) + offset, (1 << 16) + offset + blocks, dtype="<u8")
    return LoggedExtent(volume, offset, length, addresses, bytes(range(16)) * blocks)


def _logged(kind: EntryKind, seq: int, body: Entry | None = None, *extents: LoggedExtent, first: int = 0) -> Logged:
    return Logged(kind, Seq(first or seq), *_at(seq), JournalId(1), extents, body)


def _noted(body: Entry, *extents: LoggedExtent) -> Logged:
    return _logged(kind_of(body), body.seq, body, *extents)


_SPEC: Final = JournalSpec(JournalId(2), "minutes", 60_000_000_000)
_CONSOLIDATED: Final = Consolidated(
    *_at(20),
    epoch=Epoch(1),
    base=Seq(6),
    next_volume=VolumeId(4),
    point=PointKind.FLUSH,
    last_flush=Seq(19),
    flushes=3,
    gap=Gap(Seq(20), None, TimeNs(1), None, "a reason"),
    logical_bytes=5,
    journal=JournalId(2),
    cuts=((ONE, 3),),
    volumes=(VolumeState(ONE, "a", 9000, 0o600, 1, 2), VolumeState(VolumeId(3), "c", 5, 0, 0, 0, retired=True)),
    paths=("a", "c"),
    snapshots=(Snapshot("name", Seq(19), TimeNs(5), "snapshot", ONE, TimeNs(9)),),
    forgotten=("gone",),
    gaps=(Gap(Seq(17), Seq(18), TimeNs(1), TimeNs(2), "closed"),),
    runs=(RunStart(ClockRun(2), Seq(17), TimeNs(3), TimeNs(4)),),
    journals=(_SPEC,),
    routes=(Route(Seq(18), JournalId(2)),),
)
ENTRIES: Final = (
    _noted(EpochStart(*_at(1), Epoch(1), clean=False)),
    _noted(Create(*_at(2), ONE, "disk.img", 40_000, 0o644, 0, 0)),
    _noted(Create(*_at(3), TWO, "größe", 0, 0o644, 0, 0)),
    _logged(EntryKind.RECONCILE, 4, None, _extent(ONE, 0, 20_000)),
    _logged(EntryKind.WRITE, 5, None, _extent(ONE, 4000, 200)),
    _noted(ReconcileEnd(*_at(6))),
    _noted(SnapshotCreate(*_at(6), "name", Seq(6), TimeNs(6000), ONE, TimeNs(9))),
    _logged(EntryKind.AGGREGATE, 9, None, _extent(ONE, 8192, 4096), _extent(TWO, 1, 2), first=7),
    _noted(Resize(*_at(10), ONE, 10_000), _extent(ONE, 8192, 1808)),
    _noted(Correct(*_at(11), Seq(10), 30_000, Extent(ONE, 12_288, b"")), _extent(ONE, 12_288, 4096)),
    _noted(Attributes(*_at(12), TWO, 0o600, 5, 6)),
    _noted(Flush(*_at(13), ONE)),
    _noted(JournalCreate(*_at(13), _SPEC)),
    _noted(JournalUse(*_at(13), JournalId(2))),
    _noted(Bookmark(*_at(14), "before the upgrade")),
    _noted(Rename(*_at(15), ((ONE, "other"),), (TWO,))),
    _noted(ReconcileBegin(*_at(16), "outage")),
    _noted(SnapshotDelete(*_at(16), "name")),
    _noted(BaseAdvance(*_at(16), Seq(13), TimeNs(13_000))),
    _logged(EntryKind.CONSOLIDATED, 20, _CONSOLIDATED, _extent(ONE, 0, 8192), first=17),
    _logged(EntryKind.CONSOLIDATED_MORE, 20, None, _extent(ONE, 0, 8192)),
    _noted(Owner(*_at(20), "0123456789abcdef" * 2)),
    _noted(Retire(*_at(21), ONE)),
    _noted(Heartbeat(*_at(22))),
)
ENCODED: Final = tuple(encode(entry, SEED) for entry in ENTRIES)


def test_the_samples_have_every_kind() -> None:
    assert {entry.kind for entry in ENTRIES} == set(EntryKind)
    assert tuple(entry for entry, _ in _read(_segment(*ENCODED))) == ENTRIES


def _segment(*entries: bytes) -> bytes:
    return layout.pack_segment_header(SegmentHeader(Seq(1), SEED, TimeNs(5))) + b"".join(entries)


def _read(*segments: bytes, torn: bool = False) -> Iterator[tuple[Logged, JournalPosition]]:
    """The entries of a journal of these segments, until it ends or refuses; each begins at seq 1 or at 10."""
    names = (layout.segment_path(DIRECTORY, first) for first in (Seq(1), Seq(10)))
    storage = MemoryFiles(dict(zip(names, segments, strict=False)))
    found = read(storage, DIRECTORY, FIRST_POSITION, torn=torn)
    while (got := outcome(lambda: next(found, None))) is not None:
        yield got
    assert not storage._paths, "a descriptor is left open"


# ---- one entry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(ENTRIES)), ids=[entry.kind.name for entry in ENTRIES])
@FEW
@given(data=st.data())
def test_entries(index: int, data: st.DataObject) -> None:
    """What `decode` takes is well made: `encode` takes it too, and gives bytes of the same meaning."""
    raw = data.draw(mutated(ENCODED[index]))
    raw = raw.ljust(max(ENTRY_HEADER_BYTES, -(-len(raw) // 8) * 8), b"\0")
    raw = raw[:8] + len(raw).to_bytes(4, "little") + raw[12:]  # the scan sees to that
    logged = outcome(lambda: decode(raw))
    extents = outcome(lambda: extents_of(memoryview(raw)))
    if logged is not None:
        assert extents == logged.extents
        assert decode(encode(logged, SEED)) == logged
        if logged.kind is ENTRIES[index].kind and raw[8:] == ENCODED[index][8:]:
            assert logged == ENTRIES[index]


# ---- a segment -------------------------------------------------------------------------------------------------------


@given(data=st.data(), torn=st.booleans())
def test_segments(data: st.DataObject, torn: bool) -> None:
    """Without a right checksum nothing is taken for an entry: what is read is what was written, up to some point."""
    count = data.draw(st.integers(1, len(ENCODED)))
    written = _segment(*ENCODED[:count])
    changed = data.draw(either(written))
    found = list(_read(changed, torn=torn))
    assert tuple(logged for logged, _ in found) == ENTRIES[: len(found)]
    if changed.startswith(written):
        assert len(found) == count


@given(data=st.data())
def test_a_change_before_the_last_entry_is_refused(data: st.DataObject) -> None:
    written = _segment(*ENCODED)
    changed = data.draw(mutated(written[: -len(ENCODED[-1])], same_length=True)) + ENCODED[-1]
    storage = MemoryFiles({layout.segment_path(DIRECTORY, Seq(1)): changed})
    if changed == written:
        assert len(list(read(storage, DIRECTORY, FIRST_POSITION))) == len(ENTRIES)
    else:
        with pytest.raises((Damaged, layout.UnknownFormat)):
            list(read(storage, DIRECTORY, FIRST_POSITION))


@given(data=st.data())
def test_two_segments(data: st.DataObject) -> None:
    split = 8  # the entry behind it has seq 10
    first = data.draw(mutated(_segment(*ENCODED[:split])))
    header = layout.pack_segment_header(SegmentHeader(Seq(10), SEED, TimeNs(5)))
    second = header + b"".join(ENCODED[split:])
    second = data.draw(st.just(second) | mutated(second))
    found = [logged for logged, _ in _read(first, second)]
    assert tuple(found) == ENTRIES[: len(found)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    index = Index(tmp_path_factory.mktemp("index"), writer=True)
    yield index
    index.close()


@given(data=st.data(), torn=st.booleans())
def test_segments_behind_their_checksums(index: Index, data: st.DataObject, torn: bool) -> None:
    """Entries of any content go through replay and into the index, or are refused there."""
    entries = list(ENCODED)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(entries) - 1))
        body = data.draw(mutated(entries[at][CHECKSUM_BYTES:], same_length=data.draw(st.booleans())))
        entries[at] = checksum(body, SEED).to_bytes(CHECKSUM_BYTES, "little") + body
    state, position = GroupState(), FIRST_POSITION
    for logged, after in _read(_segment(*entries), torn=torn):
        try:
            state.apply(logged)
        except Damaged:
            return
        position = after
    with index.env.begin(write=True) as txn:
        try:
            Catalog(index, 1).put(txn, state, position)
        except StoreError:
            pass
        else:
            _check_indexed(index, txn, state, position)
        txn.abort()


def _check_indexed(index: Index, txn: object, state: GroupState, position: JournalPosition) -> None:
    catalog = Catalog(index, 1)
    assert catalog.anchor(txn, state.held) == state.checkpoint(position)
    assert catalog.volumes(txn, state.held) == state.volumes
    assert catalog.snapshots(txn) == {name: one for name, one in state.new_snapshots.items() if one is not None}
    assert catalog.gaps(txn) == merged(state.new_gaps)
    assert catalog.paths(txn) == state.new_paths
    for volume in state.overlay.volumes:
        for leaf, indexes, addresses in state.overlay.leaves(volume):
            held = catalog.pointers.leaf(txn, volume, leaf, state.held)
            assert held is not None
            assert np.array_equal(held[indexes], addresses)


def test_no_number_is_believed_before_there_are_so_many_bytes() -> None:
    def read_all() -> None:
        for entry in ENCODED:
            for changed in with_largest_numbers(entry):
                outcome(lambda changed=changed: decode(changed[:8] + len(changed).to_bytes(4, "little") + changed[12:]))
        for segment in with_largest_numbers(_segment(*ENCODED[:2])):
            for _ in _read(segment):
                pass

    assert peak_bytes(read_all) < 4 << 20


# ---- the manifest ----------------------------------------------------------------------------------------------------

MANIFEST: Final = Manifest(
    7,
    (
        SegmentRow(Seq(1), Seq(90), 3, 3_600_000_000_000, TimeNs(5), 1000, JournalId(1)),
        SegmentRow(Seq(91), Seq(91), 7, 60_000_000_000, TimeNs(6), 2000, JournalId(2)),
        SegmentRow(Seq(92), Seq(300), 0, 0, TimeNs(7), 1 << 40, JournalId(1)),
    ),
)
MANIFEST_PATH: Final = DIRECTORY / layout.MANIFEST_NAME


@given(either(pack_manifest(MANIFEST)))
def test_manifests(changed: bytes) -> None:
    found = outcome(lambda: read_manifest(MemoryFiles({MANIFEST_PATH: changed}), DIRECTORY))
    assert (found is not None) == (changed == pack_manifest(MANIFEST))
    assert found in (None, MANIFEST)


@given(mutated(pack_manifest(MANIFEST)))
def test_manifests_behind_a_checksum(changed: bytes) -> None:
    changed = with_checksum(changed)
    found = outcome(lambda: unpack_manifest(changed, MANIFEST_PATH))
    if found is not None:
        assert unpack_manifest(pack_manifest(found), MANIFEST_PATH) == found
        files = {MANIFEST_PATH: changed, layout.segment_path(DIRECTORY, Seq(1)): _segment(*ENCODED)}
        outcome(lambda: list(read(MemoryFiles(files), DIRECTORY, FIRST_POSITION)))


def test_no_number_of_a_manifest_is_believed() -> None:
    def read_all() -> None:
        for changed in with_largest_numbers(pack_manifest(MANIFEST)):
            outcome(lambda changed=changed: unpack_manifest(with_checksum(changed), MANIFEST_PATH))

    assert peak_bytes(read_all) < 1 << 20
