"""A day of load in a minute: consolidation, garbage collection and sealing run beside ingest, and history stays right.

The agent's clock is simulated; everything else is real: the appliance's maintenance, its child processes, the disk.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pytest
import trio
import zstandard

from dedup.container_size import examine
from dedup.gc import Collection, Collector
from dedup.journal_reader import first_position, scan
from dedup.layout import CONTAINERS_NAME, SLOT_BITS
from dedup.manifest import read_manifest
from dedup.retention import HOUR_NS, MINUTE_NS, Policy
from dedup.slot_marks import SlotMarks
from dedup.space import used_bytes
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    ClockRun,
    ContainerForm,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    ReconcileEnd,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from dedup.verify import verify
from replication import maintenance as module
from replication import thinning
from replication.maintenance import Maintenance
from replication.store_writer import StoreWriter

DAY_NS = 24 * HOUR_NS
RUN = ClockRun(0)
A = VolumeId(1)
BLOCKS = 4096
"""Of the volume: 16 MiB."""
STEP_NS = 2 * 10**9
"""Between two writes: 43,200 of them in the day."""
HOT_BLOCKS = 256
"""Half of the writes go here, as a database's log and catalog do."""


class Day:
    """What was written when: block → seqs, and the content's number after each."""

    def __init__(self) -> None:
        self.dice = random.Random(7)
        self.seq = 0
        self.time = time.time_ns() - DAY_NS - HOUR_NS
        self.seqs: dict[int, list[int]] = {}
        self.contents: dict[int, list[int]] = {}
        self.points: list[tuple[int, int]] = []

    def next(self) -> tuple[Seq, TimeNs, ClockRun]:
        self.seq += 1
        self.time += STEP_NS
        self.points.append((self.seq, self.time))
        return Seq(self.seq), TimeNs(self.time), RUN

    def write(self) -> Record:
        hot = self.dice.random() < 0.5
        block = self.dice.randrange(HOT_BLOCKS) if hot else self.dice.randrange(BLOCKS)
        content = self.dice.randrange(5000) if self.dice.random() < 0.1 else 10_000 + self.seq
        head = self.next()
        self.seqs.setdefault(block, []).append(self.seq)
        self.contents.setdefault(block, []).append(content)
        return Write(*head, Extent(A, block * BLOCK_BYTES, block_of(content)))

    def at(self, seq: int, block: int) -> bytes:
        index = bisect_right(self.seqs.get(block, []), seq)
        return block_of(self.contents[block][index - 1]) if index else bytes(BLOCK_BYTES)


def block_of(content: int) -> bytes:
    """Half of it compresses well, half does not."""
    dice = random.Random(content)
    return dice.randbytes(BLOCK_BYTES // 2) + (b"row %06d; " % content * 300)[: BLOCK_BYTES // 2]


@pytest.mark.slow
async def test_a_day_with_everything_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUND_SECONDS", 1.0)
    monkeypatch.setattr(module, "SEAL_AGE_SECONDS", 0.5)
    monkeypatch.setattr(module, "COLLECT_SECONDS_MIN", 5.0)
    monkeypatch.setattr(thinning, "SEGMENT_SECONDS", 0.5)
    path, day = tmp_path / "store", Day()
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    group.ingest(
        [
            EpochStart(*day.next(), Epoch(1), clean=False),
            Create(*day.next(), A, "disk.img", BLOCKS * BLOCK_BYTES, 0o644, 0, 0),
            ReconcileEnd(*day.next()),
        ]
    )
    writer = StoreWriter(store)
    maintenance = Maintenance(writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.serve)
        nursery.start_soon(maintenance.serve)
        while day.time < time.time_ns() - HOUR_NS:
            batch = [day.write() for _ in range(15)] + [Flush(*day.next(), A)]
            await writer.ingest(group, batch, 15 * BLOCK_BYTES)
            await trio.sleep(0.02)
            if day.seq % 16_384 < 16:
                # Containers are closed when they are full; a small store's never are.
                await writer.run(store.fine_journal.rotate)
        beside = read_manifest(store.storage, group.directory).number
        await maintenance.consolidate()
        nursery.cancel_scope.cancel()
    assert beside >= 3, "history was thinned beside ingest"
    seal_all(store)
    await trio.to_thread.run_sync(check_points, store, day)
    least = least_bytes(store)
    store.close()
    report = verify(path, read_data=True)
    assert report.ok, report
    used = used_bytes(path)
    print(f"\n{day.seq} records; {used} bytes on disk, at least {least}: {used / least:.3f} times that")
    assert used < 2 * least + (8 << 20)


def seal_all(store: Store) -> None:
    """As the background does once a container is closed."""
    from dedup.sealed import seal

    store.fine_journal.rotate()
    store.settle()
    directory = store.path / CONTAINERS_NAME
    for name in sorted(directory.iterdir()):
        number = int(name.name.split(".")[0])
        size = examine(store.storage, directory, number)  # type: ignore[arg-type]
        if size.form is ContainerForm.RAW and size.slots:
            seal(store.storage, directory, number, None)  # type: ignore[arg-type]
            store.pool.forget(number)  # type: ignore[arg-type]


def check_points(store: Store, day: Day) -> None:
    """Every write of the last two hours is a point, each minute of the day before has one; what they hold is right."""
    group = store.group("g")
    start = first_position(store.storage, group.directory)
    entries = scan(store.storage, group.directory, start)
    held = {scanned.seq for scanned in entries if scanned.kind.consumes_seq}
    kept = [(seq, at) for seq, at in day.points[2:] if seq in held]
    assert all(seq in held for seq, at in day.points[2:] if day.time - at <= Policy().every_write_ns)
    reader = group.reader()
    minutes = {at // MINUTE_NS for _, at in kept}
    assert minutes >= {at // MINUTE_NS for _, at in day.points[2:]}
    dice = random.Random(3)
    for seq, _ in dice.sample(kept, 200):
        assert reader.view(Seq(seq)).state.held == seq
        image = reader.image(A, Seq(seq))
        for block in dice.sample(range(BLOCKS), 40):
            assert image.read(block * BLOCK_BYTES, BLOCK_BYTES) == day.at(seq, block), f"block {block} at {seq}"


def least_bytes(store: Store) -> int:
    """What the blocks that recovery points need take, compressed 32 at a time, without anything about them."""
    collection = Collection.begin(store)
    try:
        collector = Collector(store.storage, store.path, store.index, collection.boundary)
        collector.mark()
        marks: SlotMarks = collector.live
    finally:
        collection.end()
    coder = zstandard.ZstdCompressor(level=3)
    total = 0
    for container in marks:
        slots = marks.slots(container)
        for at in range(0, len(slots), 32):
            where = (np.uint64(container << SLOT_BITS) + slots[at : at + 32].astype(np.uint64)).astype(np.uint64)
            data = bytearray(len(where) * BLOCK_BYTES)
            store.pool.read_addresses(where, memoryview(data))
            total += len(coder.compress(bytes(data)))
    return total
