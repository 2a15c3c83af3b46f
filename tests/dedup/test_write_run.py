"""Small writes in columns: the journal, the state and every moment are what they are one by one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.errors import OutOfOrder, StoreError
from dedup.group_state import GroupState
from dedup.journal_entry import EntryKind, Logged, LoggedExtent, encode
from dedup.layout import ZERO_BLOCK
from dedup.metadata_journal import FIRST_POSITION, read
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    VOLUME_BYTES_MAX,
    ClockRun,
    Extent,
    JournalId,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    VolumeState,
    Write,
)
from dedup.verify import verify
from dedup.write_run import RUN_MIN, SmallWrites, WriteRun
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment

A, B = VolumeId(1), VolumeId(2)


def some_run(dice: random.Random, count: int) -> WriteRun:
    first = Seq(dice.randrange(1, 1 << 60))
    records: list[Record] = [
        Write(
            Seq(first + at),
            TimeNs(dice.randrange(1 << 62)),
            ClockRun(3),
            Extent(dice.choice((A, B)), dice.randrange(VOLUME_BYTES_MAX // BLOCK_BYTES) * BLOCK_BYTES, ZERO_BLOCK),
        )
        for at in range(count)
    ]
    writes = SmallWrites.of(records, first, ClockRun(3))
    assert writes is not None
    addresses = np.array([dice.choice((0, dice.randrange(1 << 40))) for _ in range(count)], np.uint64)
    return WriteRun(writes, JournalId(dice.randrange(256)), addresses, dice.randbytes(16 * count))


def one_by_one(run: WriteRun) -> list[Logged]:
    writes = run.writes
    return [
        Logged(
            EntryKind.WRITE,
            Seq(run.first_seq + at),
            Seq(run.first_seq + at),
            writes.times[at],
            writes.run,
            run.journal,
            (
                LoggedExtent(
                    writes.volumes[at],
                    int(writes.offsets[at]),
                    BLOCK_BYTES,
                    run.addresses[at : at + 1],
                    run.fingerprints[at * 16 : at * 16 + 16],
                ),
            ),
            None,
        )
        for at in range(len(run))
    ]


@given(st.integers(0, 1 << 30), st.integers(RUN_MIN, 40), st.integers(0, (1 << 64) - 1))
def test_the_bytes_of_a_run_are_those_of_its_entries(dice: int, count: int, seed: int) -> None:
    run = some_run(random.Random(dice), count)
    assert run.encode(seed) == b"".join(encode(entry, seed) for entry in one_by_one(run))


@given(st.integers(0, 1 << 30), st.integers(RUN_MIN, 40))
def test_a_run_is_applied_as_its_entries_are(dice: int, count: int) -> None:
    run = some_run(random.Random(dice), count)
    states = [GroupState(held=Seq(run.first_seq - 1), run=ClockRun(3)) for _ in range(2)]
    for state in states:
        for volume in (A, B):
            state.volumes[volume] = VolumeState(volume, str(volume), 1 << 40, 0o644, 0, 0)
    states[0].apply_run(run)
    for entry in one_by_one(run):
        states[1].apply(entry)
    overlays = [state.overlay for state in states]
    assert overlays[0].blocks == overlays[1].blocks and overlays[0].count == overlays[1].count
    assert replace(states[0], overlay=overlays[1]) == states[1]


def test_whatever_else_there_is_in_a_batch_makes_it_no_run() -> None:
    records: list[Record] = [
        Write(Seq(5 + at), TimeNs(1), ClockRun(0), Extent(A, at * BLOCK_BYTES, ZERO_BLOCK)) for at in range(RUN_MIN)
    ]
    assert SmallWrites.of(records, Seq(5), ClockRun(0)) is not None
    assert SmallWrites.of(records[1:], Seq(6), ClockRun(0)) is None
    assert SmallWrites.of(records, Seq(4), ClockRun(0)) is None
    assert SmallWrites.of(records, Seq(5), ClockRun(1)) is None
    last = records[-1]
    assert isinstance(last, Write)
    for extent in (
        Extent(A, 1, ZERO_BLOCK),
        Extent(A, 0, ZERO_BLOCK[1:]),
        Extent(A, 0, ZERO_BLOCK * 2),
        Extent(A, 0, b"", BLOCK_BYTES),
        Extent(A, VOLUME_BYTES_MAX, ZERO_BLOCK),
    ):
        assert (
            SmallWrites.of([*records[:-1], msgspec.structs.replace(last, extent=extent)], Seq(5), ClockRun(0)) is None
        )


def filled(path: Path) -> tuple[Store, Model]:
    Store.create(path)
    store, model = Store.open(path), Model()
    store.group("g").ingest(model.begin())
    store.group("g").ingest([model.create("a.img", 1 << 20), model.create("b.img")])
    return store, model


@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_took_runs_equals_one_that_took_them_one_by_one(tmp_path: Path, seed: int) -> None:
    """New blocks, zeros, blocks that are there and blocks twice in one run, of two volumes; then opened anew."""
    dice = random.Random(seed)
    (runs, model), (single, _) = filled(tmp_path / "runs"), filled(tmp_path / "single")
    known = [dice.randbytes(BLOCK_BYTES) for _ in range(20)]
    for _ in range(12):
        records = []
        for _ in range(dice.choice((RUN_MIN - 1, RUN_MIN, 30))):
            block = dice.choice((dice.choice(known), ZERO_BLOCK, dice.randbytes(BLOCK_BYTES)))
            records.append(model.write(dice.choice((A, B)), dice.randrange(300) * BLOCK_BYTES, block))
        runs.group("g").ingest(records)
        for record in records:
            single.group("g").ingest([record])
        if dice.random() < 0.3:
            runs.checkpoint()
    for store in (runs, single):
        store.sync()
        check_moment(store.group("g").reader(), model, model.seq)
    entries = [
        [entry for entry, _ in read(Storage(), store.group("g").directory, FIRST_POSITION)] for store in (runs, single)
    ]
    assert entries[0] == entries[1]
    runs.abandon()
    single.close()
    runs = Store.open(tmp_path / "runs")
    for seq in range(5, model.seq + 1, 17):
        check_moment(runs.group("g").reader(), model, seq)
    runs.close()


def test_a_run_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "store")
    group = store.group("g")
    held = group.held
    records = [model.write(A, at * BLOCK_BYTES, ZERO_BLOCK) for at in range(RUN_MIN)]
    with pytest.raises(OutOfOrder):
        group.ingest([msgspec.structs.replace(record, seq=Seq(record.seq + 1)) for record in records])
    nowhere = Extent(VolumeId(9), 0, ZERO_BLOCK)
    with pytest.raises(StoreError, match="volume 9"):
        group.ingest([*records[:-1], msgspec.structs.replace(records[-1], extent=nowhere)])
    assert group.held == held
    group.ingest(records)
    check_moment(group.reader(), model, model.seq)
    store.close()


def test_a_store_of_nothing_but_zeros_verifies(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "store")
    store.group("g").ingest([model.write(A, at * BLOCK_BYTES, ZERO_BLOCK) for at in range(RUN_MIN)])
    store.close()
    assert verify(tmp_path / "store", read_data=True).ok
