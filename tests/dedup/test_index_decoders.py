"""Decoders of the index's values, which LMDB keeps without a checksum of its own: each may say anything.

A value that was changed is not believed. Those of the first stores had no checksums, and groups, paths and keys have
none: of these, what a checkpoint could have written is taken for what it says (`verify` holds it against the journal),
all else is refused. Whatever it is, reading a moment over it gives an image or an error of the store's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import catalog
from dedup.catalog import Catalog, Index
from dedup.errors import StoreError
from dedup.group_state import Checkpoint
from dedup.layout import LEAF_BLOCKS
from dedup.metadata_journal import JournalPosition
from dedup.pointer_map import SEQ_MAX, decode_whole, encode_delta, encode_whole, named_by, split_key
from dedup.reader import StoreReader
from dedup.store import Store
from dedup.types import (
    ClockRun,
    ContainerId,
    Epoch,
    Gap,
    PointKind,
    RunStart,
    Seq,
    Snapshot,
    TimeNs,
    VolumeId,
    VolumeState,
)
from dedup.watermark import Merged, Watermark
from tests.dedup.model import Model
from tests.dedup.mutations import FEW, either, mutated, outcome

DATABASES: Final = (
    "groups", "anchors", "times", "volumes", "paths", "names", "gaps", "runs", "pointers", "store",
)  # fmt: skip
A: Final = VolumeId(1)


def _filled(path: Path) -> None:
    Store.create(path)
    store, model, dice = Store.open(path), Model(), random.Random(7)
    group = store.group("g")
    group.ingest([*model.begin(), model.create("a.img", 60_000), model.create("b.img", 3 << 20)])
    for turn in range(10):
        group.ingest([model.write(A, turn * 4096, dice.randbytes(5000)), model.flush(A)])
        group.ingest([model.write(VolumeId(2), turn * 300_000, dice.randbytes(50))])
        store.checkpoint()
    refused = model.write(A, 0, b"refused")
    group.ingest([refused, model.correct(A, refused.seq, 50_000, 0, b"true")])
    group.create_snapshot("early", "seq=9")
    group.ingest([model.rename(A, "c.img"), model.retire(VolumeId(2))])
    store.checkpoint()
    group.ingest([model.write(A, 100, b"after the last checkpoint")])
    store.abandon()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "store"
    _filled(path)
    return path


@pytest.fixture(scope="module")
def reader(path: Path) -> Iterator[StoreReader]:
    """A reader whose index can be written, for the tests to change values in."""
    reader = StoreReader.open(path)
    reader.index.close()
    reader.index = Index(path / "index", writer=True)
    yield reader
    reader.close()


@contextmanager
def changed(index: Index, data: st.DataObject, database: str) -> Iterator[None]:
    """One key or value of one database replaced, in a transaction that all readers share and that is given up."""
    txn, db = index.env.begin(write=True), index.db[database]
    try:
        with txn.cursor(db) as cursor:
            key, value = data.draw(st.sampled_from(list(cursor)))
        if not value or data.draw(st.integers(0, 4)) == 0:
            txn.delete(key, db=db)
            txn.put(data.draw(mutated(key, same_length=data.draw(st.booleans()))) or b"\0", value, db=db)
        else:
            txn.put(key, data.draw(either(value)), db=db)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "read", lambda: nullcontext(txn))
            yield
    finally:
        txn.abort()


def _decode_all(index: Index) -> None:
    """Everything that reads a value, each alone."""
    group = Catalog(index, 1)
    with index.read() as txn:
        runs = outcome(lambda: group.runs(txn)) or []
        reads: list[Callable[[], object]] = [
            lambda: index.group_ids(txn),
            index.watermark,
            index.merged,
            index.fingerprint_runs,
            lambda: group.paths(txn),
            lambda: group.snapshots(txn),
            lambda: group.snapshot(txn, "early"),
            lambda: group.gaps(txn),
            lambda: group.routes(txn),
            lambda: group.journal_number(txn),
            *[lambda run=run: group.anchor_by_time(txn, run, TimeNs(1 << 62)) for run in runs],
        ]
        for seq in (Seq(5), Seq(20), SEQ_MAX):
            reads += [lambda seq=seq: group.volumes(txn, seq), lambda seq=seq: group.anchor(txn, seq)]
            reads += [lambda seq=seq: group.gap_from(txn, seq)]
            for volume in (A, VolumeId(2)):
                for leaf in outcome(lambda volume=volume: list(group.pointers.leaves(txn, volume))) or []:
                    reads.append(lambda volume=volume, leaf=leaf, seq=seq: group.pointers.leaf(txn, volume, leaf, seq))
        for read in reads:
            outcome(read)


def _read_moments(reader: StoreReader) -> None:
    """As a person would: points, names, moments by seq and by time, and their content."""
    reader._groups.clear()
    try:
        group = reader.group("g")
    except StoreError:
        return
    asks: list[Callable[[], Any]] = [group.points, group.snapshots, group.gaps, group.paths]
    for text in ("latest", "seq=9", "seq=25", "early", "base", "latest~flush", "2023-11-14T22:13:20.010Z", "0s"):
        asks.append(lambda text=text: group.resolve(text, now=TimeNs(1_700_000_000_012_000_000)))
        asks.append(lambda text=text: _read(group, text))
    for ask in asks:
        try:
            ask()
        except StoreError:
            continue


def _read(group: Any, text: str) -> None:
    moment = group.resolve(text, now=TimeNs(1_700_000_000_012_000_000))
    for volume in group.volumes_at(moment.seq).values():
        image = group.image(volume.volume, moment.seq)
        image.read(0, 8192)
        image.next_data(0) if image.size < 1 << 30 else None


@pytest.mark.parametrize("database", DATABASES)
@FEW
@given(data=st.data())
def test_values(reader: StoreReader, database: str, data: st.DataObject) -> None:
    with changed(reader.index, data, database):
        _decode_all(reader.index)


@FEW
@given(data=st.data())
def test_moments_over_a_changed_value(reader: StoreReader, data: st.DataObject) -> None:
    with changed(reader.index, data, data.draw(st.sampled_from(DATABASES[:-2]))):
        _read_moments(reader)


_GAP: Final = Gap(Seq(5), Seq(9), TimeNs(1), TimeNs(2), "outage")
VALUES: Final = (
    Checkpoint(
        *(Seq(9), TimeNs(8), ClockRun(1), Epoch(2), Seq(3), VolumeId(4), PointKind.FLUSH, Seq(6), 7, _GAP),
        JournalPosition(Seq(1), 48),
        1 << 40,
    ),
    VolumeState(VolumeId(1), "größe.img", 1 << 40, 0o644, 0, 0),
    Snapshot("before the upgrade", Seq(9), TimeNs(8), "snapshot"),
    _GAP,
    RunStart(ClockRun(1), Seq(5), TimeNs(6), TimeNs(7)),
    Watermark(ContainerId(9), {ContainerId(7): 100}),
    Merged(Watermark(ContainerId(9), {}), Watermark(ContainerId(12), {ContainerId(11): 5}), 17),
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@FEW
@given(data=st.data())
def test_a_changed_value_is_never_believed(value: object, data: st.DataObject) -> None:
    encoded = catalog._encode(value)
    changed = data.draw(mutated(encoded, same_length=True))
    found = outcome(lambda: catalog._decode(changed, type(value)))
    assert found == value if changed == encoded else found is None
    assert catalog._decode(msgspec.msgpack.encode(value), type(value)) == value  # as the first stores have it


@given(data=st.data())
def test_a_changed_pointer_is_never_believed(reader: StoreReader, data: st.DataObject) -> None:
    pointers, db = Catalog(reader.index, 1).pointers, reader.index.db["pointers"]
    txn = reader.index.env.begin(write=True)
    try:
        with txn.cursor(db) as cursor:
            versions = list(cursor)
        asked = [split_key(key)[1:] for key, _ in versions]
        written = [pointers.leaf(txn, *where) for where in asked]
        key, value = data.draw(st.sampled_from(versions))
        txn.put(key, data.draw(mutated(value, same_length=True)), db=db)
        for where, was in zip(asked, written, strict=True):
            found = outcome(lambda where=where: pointers.leaf(txn, *where))
            assert found is None or np.array_equal(found, was)
    finally:
        txn.abort()


# ---- pointer maps ----------------------------------------------------------------------------------------------------

_LEAF: Final = np.concatenate(
    (np.zeros(100), np.arange(70_000, 70_200), [5, 9, 70_200], np.zeros(200), np.arange(9))
).astype(np.uint64)[:LEAF_BLOCKS]
_WHOLE: Final = encode_whole(_LEAF)
_DELTA: Final = encode_delta(np.array([3, 511], dtype=np.uint16), np.array([0, 1 << 40], dtype=np.uint64), 8)


@given(either(_WHOLE))
def test_whole_leaves(value: bytes) -> None:
    found = outcome(lambda: decode_whole(value))
    if found is not None:
        assert len(found) == LEAF_BLOCKS
        assert np.array_equal(decode_whole(encode_whole(found)), found)
    if value[2:] == _WHOLE[2:]:
        assert found is not None
        assert np.array_equal(found, _LEAF)


@given(either(_WHOLE) | either(_DELTA))
def test_versions(value: bytes) -> None:
    found = outcome(lambda: named_by(value))
    assert found is None or 0 < len(found) <= max(LEAF_BLOCKS, len(value))


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_candidate_may_be_anything(path: Path, tmp_path: Path) -> None:
    """Ingest looks at what the index says of a fingerprint; whatever it is, the block that is kept is the right one."""
    _filled(tmp_path / "store")
    store, model, dice = Store.open(tmp_path / "store"), Model(), random.Random(7)
    block = dice.randbytes(5000)[:4096]
    with store.index.env.begin(write=True) as txn, txn.cursor(store.index.db["fingerprints"]) as cursor:
        for number, key in enumerate([key for key, _ in cursor]):
            txn.put(key, random.Random(number).randbytes(8), db=store.index.db["fingerprints"])
    group = store.group("g")
    model.seq, model.content[A], model.paths[A] = group.held, bytes(60_000), "c.img"
    group.ingest([model.write(A, 0, block)])
    assert group.head_block(A, 0) == block
    store.close()
