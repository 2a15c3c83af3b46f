"""A store whose history is thinned out, with a reader beside its writer, and the model of what it must show.

Whoever uses it sets `model.STEP_NS` to STEP_NS first, so that there are minutes to thin.
"""

from __future__ import annotations

import random
from pathlib import Path

from dedup.consolidator import Outcome, consolidate
from dedup.group_writer import GroupWriter
from dedup.pins import ReaderPins
from dedup.reader import GroupReader, StoreReader
from dedup.retention import DAY_NS, MINUTE_NS, Policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Epoch, EpochStart, ReconcileEnd, Seq, TimeNs, VolumeId
from tests.dedup.model import Model

STEP_NS = 7_000_000_000
"""Between two records: some nine of them in a minute."""
SIZE = 120_000
POLICY = Policy(every_write_ns=MINUTE_NS, minutes_ns=DAY_NS, hours_ns=2 * DAY_NS, days_ns=3 * DAY_NS)
SOON = TimeNs(1 << 62)
"""A host clock that is ahead: then age counts from the group's last record."""


class World:
    """A store that is written, and a reader with pins beside it, in one process: LMDB wants to be opened once."""

    def __init__(self, path: Path, *, size: int = SIZE) -> None:
        self.path = path
        self.size = size
        Store.create(path)
        self.store = Store.open(path)
        self.group: GroupWriter = self.store.group("g")
        self.model = Model()
        self.random = random.Random(1)
        self.gaps: list[tuple[int, int]] = []
        self.group.ingest(self.model.begin())
        made = self.model.create("a.img", size)
        self.volume: VolumeId = made.volume
        self.group.ingest([made])
        self.pins = ReaderPins.open(path, self.store.storage)
        self.reader = self.open_reader(self.store.storage)

    def open_reader(self, storage: Storage, pins: ReaderPins | None = None) -> GroupReader:
        store = StoreReader(self.path, storage, self.store.index, self.store.pool, pins or self.pins)
        return store.group()

    def write(self, count: int) -> None:
        for _ in range(count):
            length = self.random.choice([10, 4096, 9000])
            offset = self.random.randrange(self.size - length)
            self.group.ingest([self.model.write(self.volume, offset, self.random.randbytes(length))])

    def outage(self, writes: int) -> None:
        """An agent that died, and the reconcile of its successor: a gap."""
        start = EpochStart(*self.model._next(), Epoch(self.group.epoch + 1), clean=False)
        self.model._keep()
        self.group.ingest([start])
        for _ in range(writes):
            data = self.random.randbytes(4096)
            self.group.ingest([self.model.reconcile(self.volume, 4096 * self.random.randrange(20), data)])
        end = ReconcileEnd(*self.model._next())
        self.model._keep()
        self.group.ingest([end])
        self.gaps.append((start.seq, end.seq - 1))

    def history(self, rounds: int) -> None:
        """Writes, flushes and outages, in several segments and checkpoints."""
        for number in range(rounds):
            self.write(20)
            self.group.ingest([self.model.flush(self.volume)])
            if number % 3 == 1:
                self.outage(5)
                self.write(4)
            self.group.complete_segment()
            if number % 2:
                self.store.checkpoint()

    def thin(self, policy: Policy = POLICY) -> Outcome:
        return consolidate(self.group, policy, SOON)

    def kept(self, reader: GroupReader | None = None) -> list[int]:
        """The seqs that history still tells apart, from the base on."""
        found = reader or self.reader
        found.refresh()
        seqs = range(int(found.state.base), self.model.seq + 1)
        return sorted({found.view(Seq(seq)).state.held for seq in seqs})

    def in_gap(self, seq: int) -> bool:
        return any(first <= seq <= last for first, last in self.gaps)

    def content(self, seq: int) -> bytes:
        return self.model.history[seq][0][self.volume]

    def has_volume(self, seq: int) -> bool:
        """Not before it was made, nor before a base that has advanced, where nothing is known any more."""
        return seq in self.model.history and self.volume in self.model.history[seq][0]

    def check(self, reader: GroupReader, seq: int) -> int:
        """Asserts that the moment is shown as the last one that is kept at or before it; returns that one."""
        held = reader.view(Seq(seq)).state.held
        assert held <= seq
        if self.has_volume(held):
            image = reader.image(self.volume, Seq(seq))
            assert image.read(0, image.size) == self.content(held), f"seq {seq}, shown as {held}"
        return held

    def close(self) -> None:
        self.pins.close()
        self.store.close()
