"""What each mode decides."""

from __future__ import annotations

import random

import pytest

from dedup.types import (
    Aggregate,
    Bookmark,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    Record,
    Rename,
    Resize,
    Retire,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from replication.errors import LocalProtocolError
from replication.messages import Compare, Level
from replication.modes import (
    BATCH_BYTES_MAX,
    BATCH_SECONDS,
    BATCH_WRITES_MAX,
    Mode,
    ModePolicy,
    Outage,
    mode_policy,
)
from replication.outbox import Frame
from replication.wire import decode_all

NOW, RUN, DISK = TimeNs(1), ClockRun(0), VolumeId(1)


def write(seq: int, data: bytes = b"data", *, offset: int | None = None, run: ClockRun = RUN) -> Write:
    return Write(Seq(seq), NOW, run, Extent(DISK, seq * 8 if offset is None else offset, data))


def policy_of(mode: Mode) -> ModePolicy:
    return mode_policy(mode, lambda: 100.0)


def contents(frames: list[Frame]) -> list[object]:
    return [message for frame in frames for message in decode_all(b"".join(frame.buffers))]


@pytest.mark.parametrize(
    ("mode", "write_level", "flush_level", "outage"),
    [
        (Mode.SYNC, Level.RECEIVED, Level.DURABLE, Outage.BLOCK),
        (Mode.ASYNC, Level.QUEUED, Level.QUEUED, Outage.CONTINUE),
        (Mode.BATCH, Level.QUEUED, Level.QUEUED, Outage.CONTINUE),
    ],
)
def test_what_is_waited_for(mode: Mode, write_level: Level, flush_level: Level, outage: Outage) -> None:
    policy = policy_of(mode)
    assert policy.mode is mode
    assert (policy.write_waits_for, policy.flush_waits_for, policy.outage) == (write_level, flush_level, outage)


@pytest.mark.parametrize("mode", [Mode.SYNC, Mode.ASYNC])
def test_each_record_is_a_frame(mode: Mode) -> None:
    policy = policy_of(mode)
    for seq in (1, 2):
        (frame,) = policy.add(write(seq))
        assert contents([frame]) == [write(seq)]
        assert (frame.first_seq, frame.seq) == (seq, seq)
    assert policy.close() == []
    assert policy.closes_at is None


def test_batch_combines_writes() -> None:
    policy = policy_of(Mode.BATCH)
    assert policy.closes_at is None
    assert policy.add(write(1, b"aaaa", offset=0)) == []
    assert policy.closes_at == 100.0 + BATCH_SECONDS
    assert policy.add(write(2, b"bb", offset=1)) == []
    assert policy.open_records == 2
    assert policy.open_bytes > 6
    frames = policy.close()
    (aggregate,) = contents(frames)
    assert aggregate == Aggregate(Seq(1), Seq(2), NOW, RUN, (Extent(DISK, 0, b"abba"),))
    assert (frames[0].first_seq, frames[0].seq, frames[0].kind) == (1, 2, Aggregate)
    assert (policy.closes_at, policy.open_bytes, policy.open_records) == (None, 0, 0)
    assert policy.close() == []


def test_a_batch_of_one_is_a_write() -> None:
    policy = policy_of(Mode.BATCH)
    policy.add(write(1))
    assert contents(policy.close()) == [write(1)]


BARRIERS: list[Record | Compare] = [
    Flush(Seq(3), NOW, RUN, DISK),
    Resize(Seq(3), NOW, RUN, DISK, 5),
    Create(Seq(3), NOW, RUN, DISK, "a", 0, 0, 0, 0),
    Rename(Seq(3), NOW, RUN, ((DISK, "b"),)),
    Retire(Seq(3), NOW, RUN, DISK),
    Bookmark(Seq(3), NOW, RUN, "name"),
    Heartbeat(Seq(3), NOW, RUN),
    EpochStart(Seq(3), NOW, RUN, Epoch(1), True),
    Compare(Seq(3), NOW, RUN, DISK, 0, bytes(16)),
]


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda barrier: type(barrier).__name__)
def test_a_barrier_closes_the_aggregate(barrier: Record | Compare) -> None:
    policy = policy_of(Mode.BATCH)
    policy.add(write(1))
    policy.add(write(2))
    aggregate, after = contents(policy.add(barrier))
    assert isinstance(aggregate, Aggregate)
    assert (aggregate.first_seq, aggregate.seq) == (1, 2)
    assert after == barrier
    assert policy.closes_at is None


def test_a_new_clock_run_closes_the_aggregate() -> None:
    policy = policy_of(Mode.BATCH)
    policy.add(write(1))
    later = write(2, run=ClockRun(1))
    assert contents([*policy.add(later), *policy.close()]) == [write(1), later]


def test_number_of_writes_closes_the_aggregate() -> None:
    policy = policy_of(Mode.BATCH)
    frames = [frame for seq in range(1, BATCH_WRITES_MAX + 1) for frame in policy.add(write(seq))]
    assert [(frame.first_seq, frame.seq) for frame in frames] == [(1, BATCH_WRITES_MAX)]
    assert policy.open_records == 0


def test_bytes_close_the_aggregate_before_they_are_passed() -> None:
    policy = policy_of(Mode.BATCH)
    data = random.Random(1).randbytes(BATCH_BYTES_MAX // 4 - 1)
    for seq in range(1, 5):
        assert policy.add(write(seq, data, offset=seq << 20)) == []
    (frame,) = policy.add(write(5, data))
    assert (frame.first_seq, frame.seq) == (1, 4)
    assert policy.open_records == 1


def test_frames_are_compressed_where_it_helps() -> None:
    policy = policy_of(Mode.BATCH)
    for seq in (1, 2):
        policy.add(write(seq, b"text" * 1000, offset=seq * 4096))
    (frame,) = policy.close()
    assert sum(map(len, frame.buffers)) < 1000


def test_a_bad_write_is_refused_alone() -> None:
    policy = policy_of(Mode.BATCH)
    policy.add(write(1))
    with pytest.raises(LocalProtocolError):
        policy.add(write(2, b""))
    assert contents(policy.close()) == [write(1)]
