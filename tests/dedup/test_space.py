"""Space: what is used, what records may add at most, and whether they fit below the hard limit."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import layout
from dedup.retention import LIMIT_BYTES_MIN, Policy, save_policy
from dedup.space import (
    RESERVE_BYTES_MAX,
    Fit,
    SpaceAccount,
    SpaceState,
    blocks_of,
    full_from,
    growth_of,
    space_document,
    space_of,
    state_at,
    used_bytes,
)
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    Aggregate,
    ClockRun,
    Correct,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Heartbeat,
    Reconcile,
    Record,
    Resize,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)

ONE = VolumeId(1)
HEAD = (Seq(5), TimeNs(5), ClockRun(0))
MIB = 1 << 20
CAPPED = Policy(soft_limit_bytes=64 * MIB, hard_limit_bytes=128 * MIB)


def extent(offset: int, length: int) -> Extent:
    return Extent(ONE, offset, bytes(length))


@pytest.mark.parametrize(
    ("record", "blocks"),
    [
        (Write(*HEAD, extent(0, 4096)), 1),
        (Write(*HEAD, extent(0, 1)), 1),
        (Write(*HEAD, extent(4095, 2)), 2),
        (Write(*HEAD, extent(100, 8192)), 3),
        (Write(*HEAD, Extent(ONE, 100, b"", zeros=1 << 30)), 2),
        (Reconcile(*HEAD, extent(4096, 8192)), 2),
        (Correct(*HEAD, Seq(4), 100, extent(0, 4096)), 2),
        (Correct(*HEAD, Seq(4), 100, extent(0, 0)), 1),
        (Aggregate(Seq(2), *HEAD, (extent(0, 10), extent(4090, 10), extent(20000, 0))), 3),
        (Resize(*HEAD, ONE, 5000), 1),
        (Heartbeat(*HEAD), 0),
        (EpochStart(*HEAD, Epoch(1), clean=True), 0),
    ],
)
def test_blocks_that_a_record_may_add(record: Record, blocks: int) -> None:
    assert blocks_of([record]) == blocks
    assert blocks_of([record, record]) == 2 * blocks
    assert growth_of([record])[1] is (blocks == 0)


@pytest.mark.parametrize("length", [100, BLOCK_BYTES, 64 << 10])
def test_a_store_grows_by_no_more_than_was_counted(tmp_path: Path, length: int) -> None:
    """Random bytes at random places, nothing shared; checkpoints come out of the reserve, and fit there."""
    path, dice = tmp_path / "store", random.Random(length)
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    start = EpochStart(Seq(1), TimeNs(1), ClockRun(0), Epoch(1), clean=True)
    group.ingest([start, Create(Seq(2), TimeNs(2), ClockRun(0), ONE, "a", 256 * MIB, 0o600, 0, 0)])
    store.checkpoint()
    before, counted, seq = used_bytes(path), 0, 2
    for _ in range(20):
        batch: list[Record] = []
        for _ in range(64):
            seq += 1
            written = Extent(ONE, dice.randrange(256 * MIB - length), dice.randbytes(length))
            batch.append(Write(Seq(seq), TimeNs(seq), ClockRun(0), written))
        counted += growth_of(batch)[0]
        group.ingest(batch)
    store.sync()
    grown = used_bytes(path) - before
    # A new container's table is not in the count: the reserve is for it.
    assert grown <= counted + layout.RAW_SLOTS_OFFSET
    assert grown > counted // 3, "counted far too much"
    store.checkpoint()
    assert used_bytes(path) - before <= counted + 4 * MIB, "a checkpoint takes half of the least reserve"
    store.close()


def test_used_is_what_the_files_occupy(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "full").write_bytes(os.urandom(MIB))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "elsewhere").symlink_to("/")
    os.sync()
    assert MIB <= used_bytes(tmp_path) < 2 * MIB


def test_states() -> None:
    full = full_from(CAPPED)
    assert full == 112 * MIB
    found = [state_at(CAPPED, used) for used in (0, 64 * MIB - 1, 64 * MIB, full - 1, full, 1 << 50)]
    ok, soft, hard = SpaceState
    assert found == [ok, ok, soft, soft, hard, hard]
    assert state_at(Policy(), 1 << 60) is ok
    assert full_from(Policy()) is None
    assert full_from(Policy(hard_limit_bytes=1 << 50)) == (1 << 50) - RESERVE_BYTES_MAX


def test_the_document_of_status(tmp_path: Path) -> None:
    document = {"used": 5, "soft_limit": 64 * MIB, "hard_limit": 128 * MIB, "state": "ok"}
    assert space_document(CAPPED, 5) == document
    assert space_document(CAPPED, 5, SpaceState.HARD) == {**document, "state": "hard"}
    assert space_of(Storage(), tmp_path, 5) == {"used": 5, "soft_limit": None, "hard_limit": None, "state": "ok"}
    save_policy(Storage(), tmp_path, CAPPED)
    assert space_of(Storage(), tmp_path, 5) == document
    (tmp_path / layout.POLICY_NAME).write_bytes(b"{}")
    assert "retention set" in str(space_of(Storage(), tmp_path, 5)["error"])


def test_nothing_is_known_before_the_first_walk() -> None:
    account = SpaceAccount(CAPPED)
    assert account.fits(1) is Fit.UNKNOWN
    assert SpaceAccount(Policy()).fits(1 << 60) is Fit.YES
    account.measured(0, account.begin_walk())
    assert account.fits(1) is Fit.YES


def test_what_was_counted_is_replaced_by_what_is_there() -> None:
    account = SpaceAccount(CAPPED)
    account.measured(10 * MIB, account.begin_walk())
    account.begin(60 * MIB)
    assert account.most == 70 * MIB
    assert account.soft_is_due
    mark = account.begin_walk()
    account.end(60 * MIB)  # lands while the walk is on: it may or may not have seen it
    account.measured(12 * MIB, mark)
    assert account.most == 72 * MIB
    account.measured(13 * MIB, account.begin_walk())
    assert account.most == 13 * MIB
    assert not account.soft_is_due


def test_the_reserve_is_for_what_is_bare_of_blocks() -> None:
    account = SpaceAccount(CAPPED)
    account.measured(112 * MIB, 0)
    assert account.fits(100) is Fit.NO
    assert account.fits(100, bare=True) is Fit.YES
    assert account.fits(17 * MIB, bare=True) is Fit.NO
    assert not account.has_spare
    account.measured(96 * MIB, 0)
    assert account.has_spare
    assert account.fits(32 * MIB) is Fit.YES
    assert account.fits(32 * MIB + 1) is Fit.NO


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "end", "walk"]), st.integers(0, 40 * MIB), st.floats(0, 1)), max_size=60
    )
)
def test_the_hard_limit_is_never_passed(steps: list[tuple[str, int, float]]) -> None:
    """Whatever order batches and walks come in, and however much less than counted a batch adds."""
    policy = replace(CAPPED, soft_limit_bytes=None, hard_limit_bytes=LIMIT_BYTES_MIN)
    account = SpaceAccount(policy)
    used = 0
    under_way: list[tuple[int, int]] = []
    for what, growth, share in steps:
        if what == "begin" and account.fits(growth) is Fit.YES:
            account.begin(growth)
            under_way.append((growth, int(growth * share)))
        elif what == "end" and under_way:
            counted, real = under_way.pop(growth % len(under_way))
            account.end(counted)
            used += real
        elif what == "walk":
            account.measured(used, account.begin_walk())
        assert used <= LIMIT_BYTES_MIN
        if account.used is not None:
            assert used + sum(real for _, real in under_way) <= account.most <= LIMIT_BYTES_MIN
    while under_way:
        account.end(under_way.pop()[0])
    account.measured(used, account.begin_walk())
    assert account.most == used, "counts that are never given back"
