"""An outage with everything real but the network: each moment of it is a recovery point afterwards."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from dedup.errors import MomentGone
from dedup.reader import StoreReader
from dedup.store import Store
from dedup.types import ClockRun, Create, Epoch, EpochStart, Extent, Record, Seq, TimeNs, VolumeId, Write
from dedup.verify import verify
from replication import spool as spool_module
from replication import spooler, store_writer
from replication.errors import LinkDown
from replication.first_appliance import FirstAppliance
from replication.modes import Mode
from replication.second_appliance import SecondAppliance
from replication.spool import Spool
from replication.transport import Connection, memory_pair
from tests.replication.test_second_appliance import ChannelListener

RUN, DISK = ClockRun(0), VolumeId(1)
SIZE = 128 << 10
QUEUE = 256 << 10
AGENT = "0f" * 16


class Site:
    """The second appliance, and a network before it that can be cut."""

    def __init__(self, connections: trio.MemorySendChannel[Connection]) -> None:
        self._connections = connections
        self._near: Connection | None = None
        self.cut = False

    async def connect(self) -> Connection:
        if self.cut:
            raise LinkDown("the network is cut")
        self._near, far = memory_pair()
        await self._connections.send(far)
        return self._near

    async def break_link(self) -> None:
        self.cut = True
        assert self._near is not None
        await self._near.aclose()


@asynccontextmanager
async def site(path: Path) -> AsyncIterator[Site]:
    store = await trio.to_thread.run_sync(Store.open, path)
    appliance = SecondAppliance(store)
    send, receive = trio.open_memory_channel[Connection](0)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(appliance.serve, [ChannelListener(receive)])
            yield Site(send)
            appliance.stop()
    finally:
        await trio.to_thread.run_sync(store.close)


class Source:
    """What is written, and what the volume holds after each record."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.image = bytearray(SIZE)
        self.after: dict[int, bytes] = {}
        self.bytes = 0

    def record(self, seq: int) -> Record:
        time = TimeNs(1_000_000_000 * seq)
        if seq == 1:
            return EpochStart(Seq(1), time, RUN, Epoch(1), True)
        if seq == 2:
            self.after[2] = bytes(self.image)
            return Create(Seq(2), time, RUN, DISK, "disk.img", SIZE, 0o644, 0, 0)
        length = self.dice.choice((100, 4096, 9000, 30_000))
        offset = self.dice.randrange(SIZE - length)
        data = self.dice.randbytes(length)
        self.image[offset : offset + length] = data
        self.after[seq] = bytes(self.image)
        self.bytes += length
        return Write(Seq(seq), time, RUN, Extent(DISK, offset, data))

    def start(self, seq: int, epoch: int) -> Record:
        self.after[seq] = bytes(self.image)
        return EpochStart(Seq(seq), TimeNs(1_000_000_000 * seq), RUN, Epoch(epoch), True)

    def forget_after(self, seq: int) -> None:
        """What came later was lost with a process."""
        self.after = {kept: image for kept, image in self.after.items() if kept <= seq}
        self.image = bytearray(self.after[seq])

    async def write(self, first: FirstAppliance, count: int) -> None:
        for _ in range(count):
            assert await first.room(30_000)
            first.append(self.record(first.last_seq + 1))
            assert first.queued_bytes <= QUEUE * 5 // 4 + 31_000


@asynccontextmanager
async def first_appliance(at: Site, directory: Path, mode: Mode, epoch: int = 1) -> AsyncIterator[FirstAppliance]:
    """What is queued in memory is lost at its end, as with a killed process."""
    spool = await trio.to_thread.run_sync(Spool.open, directory)
    first = FirstAppliance(
        at.connect,
        group="g",
        epoch=Epoch(epoch),
        agent=AGENT,
        mode=mode,
        outage_after=0.5,
        queue_bytes_max=QUEUE,
        spool=spool,
    )
    try:
        async with trio.open_nursery() as nursery:
            await first.start()
            nursery.start_soon(first.run)
            yield first
            nursery.cancel_scope.cancel()
    finally:
        spool.close()


def check(path: Path, source: Source, batch: bool) -> None:
    """Every moment is a recovery point, and is what the source was."""
    reader = StoreReader.open(path)
    try:
        group = reader.group("g")
        assert group.held == max(source.after)
        assert not group.gaps()
        points = 0
        moments = {seq: image for seq, image in source.after.items() if seq % 3 == 0 or batch}
        for seq, expected in moments.items():
            try:
                group.require(Seq(seq))
            except MomentGone:
                assert batch, seq  # no moment lies inside of an aggregate
                continue
            assert group.image(DISK, Seq(seq)).read(0, SIZE) == expected, seq
            points += 1
        assert points == len(moments) if not batch else points > 10
    finally:
        reader.close()
    report = verify(path, read_data=True)
    assert report.ok, report


@pytest.mark.parametrize("mode", [Mode.ASYNC, Mode.BATCH])
async def test_moments_of_an_outage_are_recovery_points(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooler, "SPOOL_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(spool_module, "SPOOL_SEGMENT_BYTES", 1 << 20)
    monkeypatch.setattr(store_writer, "SYNC_SECONDS", 0.05)
    Store.create(tmp_path / "store")
    source = Source(1)
    with trio.fail_after(60):
        async with site(tmp_path / "store") as at:
            async with first_appliance(at, tmp_path / "spool", mode) as first:
                await source.write(first, 20)
                await first.drain()
                await at.break_link()
                await source.write(first, 300)
                assert source.bytes > 8 * QUEUE
                at.cut = False
                while first.durable < 100:  # noqa: ASYNC110
                    await trio.sleep(0.001)
                await at.break_link()
                await source.write(first, 100)
                assert await first.keep_all()
                last = first.last_seq
            at.cut = False
            async with first_appliance(at, tmp_path / "spool", mode) as first:
                assert first.last_seq == last
                await source.write(first, 20)
                await first.drain()
                await at.break_link()
                await source.write(first, 50)
                last = first.kept
            at.cut = False
            async with first_appliance(at, tmp_path / "spool", mode, epoch=2) as first:
                assert first.durable == first.last_seq >= last
                source.forget_after(first.last_seq)
                first.append(source.start(first.last_seq + 1, 2))
                await source.write(first, 5)
                await first.drain()
    await trio.to_thread.run_sync(check, tmp_path / "store", source, mode is Mode.BATCH)
