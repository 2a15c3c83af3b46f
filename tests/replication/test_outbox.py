"""The retention queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.types import Aggregate, ClockRun, Extent, Heartbeat, Seq, TimeNs, VolumeId, Write
from replication.errors import HistoryLost, LocalProtocolError
from replication.messages import Compare
from replication.outbox import FRAME_OVERHEAD_BYTES, Frame, Outbox, frame_of

NOW, RUN, DISK = TimeNs(1), ClockRun(0), VolumeId(1)


def write(seq: int, length: int = 100) -> Frame:
    return frame_of(Write(Seq(seq), NOW, RUN, Extent(DISK, 0, bytes(length))))


def aggregate(first: int, last: int) -> Frame:
    return frame_of(Aggregate(Seq(first), Seq(last), NOW, RUN, (Extent(DISK, 0, b"x"),)))


def filled(last: int) -> Outbox:
    outbox = Outbox(Seq(0))
    for seq in range(1, last + 1):
        outbox.append(write(seq))
    return outbox


def seqs(frames: list[Frame]) -> list[int]:
    return [frame.seq for frame in frames]


def test_frames_leave_when_durable_only() -> None:
    outbox = filled(5)
    assert outbox.records == 5
    assert seqs(outbox.take(1 << 20)) == [1, 2, 3, 4, 5]
    full = outbox.bytes
    assert not outbox.acknowledge(Seq(4), Seq(0))
    assert (outbox.bytes, len(outbox)) == (full, 5)
    assert outbox.held_bytes == full * 4 // 5
    assert outbox.unheld
    assert outbox.acknowledge(Seq(5), Seq(3))
    assert seqs(outbox.take(1 << 20)) == []
    assert (len(outbox), outbox.bytes, outbox.unheld, outbox.records) == (2, full * 2 // 5, False, 2)
    outbox.acknowledge(Seq(5), Seq(5))
    assert (len(outbox), outbox.bytes, outbox.held_bytes, outbox.records) == (0, 0, 0, 0)


def test_small_frames_are_counted_with_their_objects() -> None:
    outbox = Outbox(Seq(0))
    outbox.append(frame_of(Heartbeat(Seq(1), NOW, RUN)))
    assert outbox.bytes >= FRAME_OVERHEAD_BYTES


def test_taking_gathers_up_to_the_limit_and_at_least_one() -> None:
    outbox = filled(5)
    each = outbox.bytes // 5
    assert seqs(outbox.take(1)) == [1]
    assert seqs(outbox.take(each * 3)) == [2, 3, 4]
    assert seqs(outbox.take(each * 3)) == [5]


def test_frames_must_follow() -> None:
    outbox = filled(2)
    for wrong in (2, 4):
        with pytest.raises(LocalProtocolError):
            outbox.append(write(wrong))
    assert outbox.last_seq == 2


def test_an_aggregate_is_received_when_its_last_record_is() -> None:
    outbox = Outbox(Seq(0))
    outbox.append(aggregate(1, 5))
    outbox.take(1)
    outbox.acknowledge(Seq(4), Seq(4))
    assert len(outbox) == 1
    assert outbox.records == 5


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_rewind_sends_exactly_the_missing_again(sent: int, received: int, durable: int, held: int) -> None:
    sent, received, durable = sorted((sent, received, durable), reverse=True)
    outbox = filled(12)
    for _ in range(sent):
        outbox.take(1)
    outbox.acknowledge(Seq(received), Seq(durable))
    kept = outbox.bytes
    if not durable <= held <= sent:
        with pytest.raises(HistoryLost) as caught:
            outbox.rewind(Seq(held))
        assert caught.value.first_kept == durable + 1
        assert outbox.bytes == kept
        return
    outbox.rewind(Seq(held))
    assert outbox.bytes == kept
    assert seqs(outbox.take(1 << 20)) == list(range(held + 1, 13))
    outbox.acknowledge(Seq(12), Seq(held))
    assert len(outbox) == 12 - held


def test_half_an_aggregate_at_the_store_is_a_loss() -> None:
    outbox = Outbox(Seq(0))
    outbox.append(aggregate(1, 5))
    outbox.take(1)
    with pytest.raises(HistoryLost, match="aggregate"):
        outbox.rewind(Seq(3))
    outbox.rewind(Seq(5))
    assert not outbox.unsent


def test_a_compare_is_sent_in_one_session_only() -> None:
    outbox = Outbox(Seq(0))
    outbox.append(frame_of(Compare(Seq(1), NOW, RUN, DISK, 0, bytes(160))))
    outbox.append(write(2))
    assert [frame.compare is not None for frame in outbox.take(1 << 20)] == [True, False]
    before = outbox.bytes
    outbox.rewind(Seq(0))
    assert [frame.kind for frame in outbox.take(1 << 20)] == [Heartbeat, Write]
    assert outbox.bytes < before
    outbox.acknowledge(Seq(2), Seq(2))
    assert outbox.bytes == 0
