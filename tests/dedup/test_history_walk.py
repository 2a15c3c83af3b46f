"""Random walks through everything that changes history at once: records over several leaves, cuts and regrowth, names,
data journals, thinning in tiny pieces, collection, kills, lost indexes, and readers that hold moments meanwhile."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dedup import consolidation, fold, group_recovery, reindex
from dedup.consolidator import consolidate
from dedup.gc import collect
from dedup.image import Image
from dedup.pins import ReaderPins
from dedup.reader import GroupReader, StoreReader
from dedup.retention import DAY_NS, HOUR_NS, MINUTE_NS, Policy
from dedup.storage import Storage
from dedup.types import Seq, VolumeId
from dedup.verify import verify
from tests.dedup.test_consolidation import SECOND, World
from tests.dedup.test_store import check_moment

POLICIES = (
    Policy(),
    Policy(every_write_ns=60 * SECOND, minutes_ns=0, hours_ns=0, days_ns=3 * DAY_NS),
    Policy(every_write_ns=0, minutes_ns=HOUR_NS, hours_ns=0, days_ns=0),
    Policy(every_write_ns=10 * SECOND, minutes_ns=0, hours_ns=0, days_ns=0),
    Policy(every_write_ns=HOUR_NS, minutes_ns=3 * HOUR_NS, hours_ns=DAY_NS, days_ns=0),
)
BLOCKS = (0, 1, 512, 600, 1200)
"""Where writes go: three leaves, and a border."""
SIZES = (0, 4096, 5000, 513 * 4096 + 7, 600 * 4096, 1300 * 4096)


class Walk:
    """One seed's walk."""

    def __init__(self, path: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.world = World(path)
        self.model = self.world.model
        self.policy = self.dice.choice(POLICIES)
        self.names: dict[str, int] = {}
        self.pins: ReaderPins | None = None
        self.reader: GroupReader | None = None
        self.held: list[tuple[Seq, dict[VolumeId, Image]]] = []

    def run(self, steps: int) -> None:
        moves: list[Callable[[], None]] = [self.write] * 8 + [self.cut, self.come_and_go, self.move, self.aggregate]
        moves += [self.checkpoint, self.flush, self.name, self.forget, self.switch, self.reopen, self.wait]
        moves += [self.world.group.complete_segment, self.hold, self.thin, self.thin]
        for _ in range(steps):
            self.model.elapsed_ns += self.dice.choice((0, SECOND, 7 * SECOND, 40 * SECOND, 10 * MINUTE_NS))
            move = self.dice.choice(moves)
            # The group is another object after it was opened anew.
            self.world.group.complete_segment() if move == moves[-4] else move()
        kept = self.check()
        self.let_go()
        self.world.reopen(lose_index=True)
        assert self.check() == kept
        self.world.store.close()
        report = verify(self.world.path, read_data=True)
        assert report.ok, report

    def volume(self) -> VolumeId:
        return self.dice.choice(sorted(self.model.content))

    def write(self) -> None:
        for _ in range(self.dice.choice((1, 4))):
            offset = self.dice.choice(BLOCKS) * 4096 + self.dice.choice((0, 0, 100))
            data = self.dice.randbytes(self.dice.choice((100, 4096, 9000)))
            self.world.group.ingest([self.model.write(self.volume(), offset, data)])

    def cut(self) -> None:
        self.world.group.ingest([self.model.resize(self.volume(), self.dice.choice(SIZES))])

    def come_and_go(self) -> None:
        if len(self.model.content) < 4:
            self.world.group.ingest([self.model.create(f"v{self.model.next_volume}", 40 * 4096)])
        else:
            self.world.group.ingest([self.model.retire(self.volume())])

    def move(self) -> None:
        path = self.dice.choice([f"moved{self.model.seq}", *self.model.paths.values()])
        self.world.group.ingest([self.model.rename(self.volume(), path)])

    def aggregate(self) -> None:
        writes = [(8192 * number, self.dice.randbytes(4096)) for number in range(3)]
        self.world.group.ingest([self.model.aggregate(self.volume(), writes)])

    def checkpoint(self) -> None:
        self.world.store.checkpoint()

    def flush(self) -> None:
        self.world.group.ingest([self.model.flush(self.volume())])

    def name(self) -> None:
        name = f"n{self.model.seq}"
        if name not in self.names:
            self.world.group.create_snapshot(name)
            self.names[name] = self.model.seq

    def forget(self) -> None:
        if self.names:
            name = self.dice.choice(sorted(self.names))
            self.world.group.delete_snapshot(name)
            del self.names[name]

    def switch(self) -> None:
        group = self.world.group
        if len(group.state.journals) < 3:
            group.create_journal(f"j{len(group.state.journals)}", self.dice.choice((0, 10 * SECOND, 60 * SECOND)))
        group.use_journal(self.dice.choice([spec.name for spec in group.state.journals]))

    def reopen(self) -> None:
        self.let_go()
        self.world.reopen(lose_index=self.dice.random() < 0.5)

    def wait(self) -> None:
        self.model.elapsed_ns += self.dice.choice((MINUTE_NS, 3 * HOUR_NS, 2 * DAY_NS, 40 * DAY_NS))
        self.world.group.ingest([self.model.heartbeat()])

    def hold(self) -> None:
        """A reader begins to hold a moment, or lets one go."""
        store = self.world.store
        if self.reader is None:
            self.pins = ReaderPins.open(self.world.path, Storage())
            self.reader = StoreReader(store.path, Storage(), store.index, store.pool, self.pins).group()
        reader = self.reader
        reader.refresh()
        if self.held and self.dice.random() < 0.5:
            reader.release(self.held.pop(self.dice.randrange(len(self.held)))[0])
            return
        asked = self.dice.choice((self.model.seq, self.dice.randrange(self.world.group.state.base, self.model.seq + 1)))
        seq = reader.view(Seq(asked)).state.held
        if seq in self.model.history and seq >= self.world.group.state.base:
            reader.hold(seq)
            self.held.append((seq, {volume: reader.image(volume, seq) for volume in self.model.history[seq][0]}))

    def let_go(self) -> None:
        if self.reader is not None and self.pins is not None:
            for seq, _ in self.held:
                self.reader.release(seq)
            self.pins.close()
        self.held, self.reader, self.pins = [], None, None

    def thin(self) -> None:
        consolidate(self.world.group, self.policy, self.world.group.time)
        if self.dice.random() < 0.4:
            collect(self.world.store)
        if self.dice.random() < 0.6:
            self.check()

    def check(self) -> list[int]:
        """Every point that there is, every name and all that is held; the seqs of the points."""
        reader = self.world.group.reader()
        kept = []
        for seq in sorted(self.model.history):
            if seq >= self.world.group.state.base and reader.view(Seq(seq)).state.held == seq:
                check_moment(reader, self.model, seq)
                kept.append(seq)
        for name, seq in self.names.items():
            assert reader.resolve(name).seq == seq
        for held, images in self.held:
            for volume, image in images.items():
                assert image.read(0, image.size) == self.model.history[held][0][volume], f"held seq {held}"
        return kept


def walk(tmp_path: Path, seed: int, steps: int) -> None:
    dice = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "ENTRY_BLOCKS_MAX", dice.choice((3, 50, 43_690)))
        patch.setattr(fold, "FILE_BYTES_MAX", dice.choice((800, 5000, 64 << 20)))
        patch.setitem(fold.Fold.__init__.__kwdefaults__, "leaves_max", dice.choice((1, 2, 4096)))
        patch.setattr(consolidation, "PIECE_BYTES_MAX", dice.choice((1, 4000, 4 << 20)))
        patch.setattr(reindex, "ANCHOR_POINTERS", dice.choice((5, 40, 16_384)))
        patch.setattr(reindex, "ANCHOR_RECORDS", dice.choice((2, 8192)))
        patch.setattr(reindex, "_FLUSH_POINTERS", dice.choice((1, 10, 1 << 18)))
        patch.setattr(group_recovery, "_REBUILD_POINTERS", dice.choice((5, 16_384)))
        Walk(tmp_path / f"store-{seed}", seed).run(steps)
    shutil.rmtree(tmp_path / f"store-{seed}")


@pytest.mark.parametrize("seed", range(4))
def test_walk(tmp_path: Path, seed: int) -> None:
    walk(tmp_path, seed, 50)


@pytest.mark.slow
def test_many_walks(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    seeds = 120
    for seed in range(100, 100 + seeds):
        walk(tmp_path, seed, 80)
    record_property("walks", seeds)
