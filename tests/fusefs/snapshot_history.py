"""A small store with a history: names that come, go and change hands. And the model of what it must show."""

from __future__ import annotations

import random
from pathlib import Path

from dedup.store import Store
from dedup.types import Attributes, Bookmark, VolumeId
from tests.dedup.model import Model

GROUP = "history"
DISK_BYTES = 3 * (1 << 20) + 1234


class History:
    """Closed with `close`. `moments` names some seqs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.random = random.Random(1)
        Store.create(path)
        self.store = Store.open(path)
        self.group = self.store.group(GROUP)
        self.model = model = Model()
        self.moments: dict[str, int] = {}
        self.group.ingest(model.begin())
        disk, first = model.create("disk.img", DISK_BYTES), model.create("vm/a.img", 9000)
        both, gone = model.create("both", 5000), model.create("deep/down/gone.img", 1)
        self.group.ingest([disk, first, both, gone])
        self.disk, self.first, self.both, self.gone = (made.volume for made in (disk, first, both, gone))
        for volume in (self.first, self.both, self.gone):
            self.write(volume, 100, 3000)
        self.write(self.disk, 0, DISK_BYTES)
        self.group.ingest([Attributes(*model._next(), self.first, 0o640, 1234, 5678)])
        model._keep()
        self.snapshot("early")
        self.snapshot("x.img")
        self.snapshot("only-disk", volume="disk.img")
        self.store.checkpoint()
        self.group.ingest([model.rename(self.first, "vm/b.img"), model.retire(self.gone)])
        second = model.create("vm/a.img", 20_000)
        self.group.ingest([second, model.rename(self.both, "vm/c.img"), model.create("both/x.img", 10)])
        self.second = second.volume
        self.write(self.second, 0, 20_000)
        self.bookmark("marked")
        for _ in range(40):
            self.write(self.disk, self.random.randrange(DISK_BYTES - 9000), self.random.choice([512, 4096, 9000]))
        self.group.ingest([model.resize(self.first, 3)])
        self.snapshot("late")

    def write(self, volume: VolumeId, offset: int, length: int) -> None:
        self.group.ingest([self.model.write(volume, offset, self.random.randbytes(length))])

    def snapshot(self, name: str, volume: str | None = None) -> None:
        self.group.create_snapshot(name, volume=volume)
        self.moments[name] = self.model.seq

    def bookmark(self, name: str) -> None:
        seq, time, run = self.model._next()
        self.group.ingest([Bookmark(seq, time, run, name)])
        self.model._keep()
        self.moments[name] = seq

    def refused_write(self) -> int:
        """A write that the source refused: its moment is a gap. Returns its seq."""
        refused = self.model.write(self.disk, 0, b"refused")
        truth = self.model.correct(self.disk, refused.seq, DISK_BYTES, 0, b"truth")
        self.group.ingest([refused, truth])
        return refused.seq

    def content(self, seq: int, path: str) -> bytes | None:
        """What the volume with that path held at a moment; None where there was none."""
        content, paths = self.model.history[seq]
        return next((content[volume] for volume, at in paths.items() if at == path), None)

    def paths(self, seq: int) -> set[str]:
        return set(self.model.history[seq][1].values())

    def close(self) -> None:
        self.store.close()
