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


class Ends:
    """An outbox, the disk of its spool, and a peer, all lists; the peer asserts the order."""

    def __init__(self) -> None:
        self.outbox = Outbox(Seq(0))
        self.outbox.rewind(Seq(0))
        self.disk: list[Frame] = []
        self.got: list[int] = []
        self.durable = 0
        self.linked = True

    def append(self, count: int) -> None:
        for _ in range(count):
            self.outbox.append(write(self.outbox.last_seq + 1, 10))

    def take(self, count: int) -> None:
        for _ in range(count if self.linked else 0):
            self.got += seqs(self.outbox.take(0))

    def hold(self, back: int) -> None:
        if self.linked and self.got:
            self.outbox.acknowledge(Seq(max(self.got[-1] - back, 0)), Seq(self.durable))

    def keep(self, back: int) -> None:
        if self.linked and self.got:
            self.durable = max(self.durable, self.got[-1] - back)
            self.outbox.acknowledge(Seq(self.got[-1]), Seq(self.durable))
            if self.disk and self.disk[-1].seq <= self.durable:
                self.disk = []

    def spool(self, count: int) -> None:
        frames = self.outbox.unspooled(1 << 20)[:count]
        if frames and (not self.disk or self.disk[-1].seq + 1 == frames[0].first_seq):
            self.disk += frames
            self.outbox.spooled(frames[-1].seq)

    def load(self, count: int) -> None:
        if self.linked and self.outbox.unloaded:
            at = self.outbox.next_to_load
            self.outbox.load([frame for frame in self.disk if frame.seq >= at][: count + 1])

    def cut(self, _: int) -> None:
        self.linked = False

    def link(self, lost: int) -> None:
        """The peer comes back, perhaps without what was not durable."""
        self.linked = True
        held = max(self.durable, len(self.got) - lost)
        del self.got[held:]
        self.outbox.rewind(Seq(held))

    def check(self) -> None:
        outbox = self.outbox
        assert self.got == list(range(1, len(self.got) + 1))
        parts = (outbox._held, outbox._sent, outbox._loaded, outbox._waiting)
        assert outbox.bytes == sum(frame.bytes for part in parts for frame in part)
        assert outbox.held_bytes == sum(frame.bytes for frame in outbox._held)
        memory = {frame.seq for part in parts for frame in part}
        assert memory | set(seqs(self.disk)) >= set(range(self.durable + 1, outbox.last_seq + 1))
        if self.linked:
            assert outbox.unsent == (len(self.got) < outbox.last_seq)
            assert outbox.unheld or outbox.last_seq == len(self.got)


moves = st.tuples(
    st.sampled_from(["append", "take", "hold", "keep", "spool", "load", "cut", "link"]), st.integers(0, 5)
)


@given(st.lists(moves, max_size=60))
def test_what_goes_by_way_of_the_disk_keeps_its_order(taken: list[tuple[str, int]]) -> None:
    ends = Ends()
    for name, number in taken:
        getattr(ends, name)(number)
        ends.check()
    ends.link(0)
    while len(ends.got) < ends.outbox.last_seq:
        ends.load(3)
        ends.take(2)
        ends.check()
    ends.keep(0)
    assert (ends.outbox.bytes, len(ends.outbox), ends.outbox.records, ends.outbox.unheld) == (0, 0, 0, False)


def test_what_the_peer_has_not_on_a_disk_is_not_kept() -> None:
    """Of a first appliance that begins where another one, killed, has ended: it has none of these records itself."""
    outbox = Outbox(Seq(12), durable=Seq(8))
    assert outbox.kept_seq == 8
    outbox.append(write(13))
    with pytest.raises(HistoryLost):
        outbox.rewind(Seq(8))  # the peer lost power
    outbox.rewind(Seq(12))
    assert seqs(outbox.take(1 << 20)) == [13]


@pytest.mark.parametrize("spooled", [10, 12, 15])
def test_a_spool_that_ends_before_what_the_peer_holds_does_not_hide_the_hole(spooled: int) -> None:
    outbox = Outbox(Seq(12), durable=Seq(8))
    outbox.found_on_disk(Seq(spooled), Seq(8))
    outbox.rewind(Seq(12))
    outbox.append(write(max(12, spooled) + 1))
    if spooled < 12:
        with pytest.raises(HistoryLost):
            outbox.rewind(Seq(8))
    else:
        outbox.rewind(Seq(8))
        assert (outbox.unloaded, outbox.next_to_load) == (True, 9)


def test_spooled_frames_do_not_stand_for_those_before_them() -> None:
    outbox = Outbox(Seq(12), durable=Seq(8))
    outbox.append(write(13))
    outbox.spooled(Seq(13))
    with pytest.raises(HistoryLost):
        outbox.rewind(Seq(8))
    outbox.rewind(Seq(12))
    assert outbox.next_to_load == 13
