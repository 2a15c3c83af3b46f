"""The bandwidth limit of a link."""

from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from dedup.types import ClockRun, Epoch, Extent, Seq, TimeNs, VolumeId, Write
from replication.bandwidth import Bandwidth, _pieces
from replication.first_appliance import FirstAppliance
from replication.modes import Mode
from replication.wire import Buffer
from tests.replication.scripted_second import ScriptedSecond


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 40))
def test_pieces_are_the_bytes_in_their_order(buffers: list[bytes], length: int) -> None:
    pieces = _pieces(list(buffers), length)
    assert b"".join(b"".join(piece) for piece in pieces) == b"".join(buffers)
    lengths = [sum(map(len, piece)) for piece in pieces]
    assert all(found == length for found in lengths[:-1])
    assert all(0 < found <= length for found in lengths)


async def test_no_more_leaves_than_the_limit_and_nothing_is_saved_up(autojump_clock: MockClock) -> None:
    left: list[tuple[float, int]] = []

    async def send(buffers: list[Buffer]) -> None:
        await trio.lowlevel.checkpoint()
        left.append((trio.current_time() - began, sum(map(len, buffers))))

    bandwidth = Bandwidth(100_000)
    began = trio.current_time()
    await bandwidth.send(send, [bytes(150_000), bytes(150_000)])
    assert sum(length for _, length in left) == 300_000
    assert trio.current_time() - began > 2.8
    await trio.sleep(60)
    await bandwidth.send(send, [bytes(100_000)])
    for at, (start, _) in enumerate(left):
        total = 0
        for time, length in left[at:]:
            total += length
            assert total <= 100_000 * (time - start) + bandwidth.piece_bytes + 1
    bandwidth.bytes_per_second = 0
    before = trio.current_time()
    await bandwidth.send(send, [bytes(9_000_000)])
    assert trio.current_time() - before < 0.2


async def test_a_first_appliance_keeps_the_limit_also_with_a_lone_writer(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery)
        first = FirstAppliance(
            second.connect, group="g", epoch=Epoch(1), agent="a", mode=Mode.SYNC, bytes_per_second=50_000
        )
        await first.start()
        nursery.start_soon(first.run)
        began = trio.current_time()
        for seq in range(1, 101):
            assert await first.room(4096)
            first.append(Write(Seq(seq), TimeNs(seq), ClockRun(0), Extent(VolumeId(1), 0, bytes(4096))))
            await first.acknowledged(Seq(seq))
            assert 50_000 * (trio.current_time() - began) >= (seq - 1) * 4096 - first.bandwidth.piece_bytes
        first.bandwidth.bytes_per_second = 0
        before = trio.current_time()
        for seq in range(101, 201):
            first.append(Write(Seq(seq), TimeNs(seq), ClockRun(0), Extent(VolumeId(1), 0, bytes(4096))))
            await first.acknowledged(Seq(seq))
        assert trio.current_time() - before < 0.2
        assert [record.seq for record in second.log] == list(range(1, 201))
        nursery.cancel_scope.cancel()
