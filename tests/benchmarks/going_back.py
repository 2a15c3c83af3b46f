"""What going back costs on a sparse volume of 64 GiB of which 1 % has changed in random blocks of 4 KiB.

    python -m tests.benchmarks.going_back [--quick] [--stores DIR]

Two readings of it: 1 % of 64 GiB, on a volume that is full of data; and 1 % of 2 GiB of data that lie at random in a
volume of 64 GiB that is else a hole. `diff` is the command, `dry run` the plan of a restore in place, ranges and all,
without the mount's say; both from pointers. `read` is reading the volume's data once, blocks checked: of the full one
a part of it, scaled. The seconds are medians of three, each in a process of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from dedup.group_writer import GroupWriter
from dedup.reader import StoreReader
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Reconcile,
    ReconcileEnd,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from tests.benchmarks.mounts import ENVIRONMENT, ROOT, workplace
from tests.benchmarks.synthetic_store import FIRST_TIME, GROUP, PATH, RUN, SECOND, VOLUME

GIB: Final = 1 << 30
EXTENT_BLOCKS: Final = 256
_KNOWN_EXTENTS: Final = 64
"""What the full volume is made of: 64 MiB, again and again, so that its store fits anywhere."""
READ_BYTES_MAX: Final = 4 * GIB


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read `1 % of a sparse volume`. `data_bytes` equal to `volume_bytes`: no part of it is a hole."""

    title: str
    volume_bytes: int
    data_bytes: int

    @property
    def changed_blocks(self) -> int:
        return self.data_bytes // BLOCK_BYTES // 100


class _Maker:
    """Makes the store: a base, a checkpoint, the changes."""

    def __init__(self, store: Store, reading: Reading) -> None:
        self._store = store
        self._reading = reading
        self._group: GroupWriter = store.group(GROUP)
        self._random = random.Random(1)
        self._blocks = reading.volume_bytes // BLOCK_BYTES

    def make(self) -> tuple[Seq, Seq]:
        """The moments before and after the changes."""
        self._take([EpochStart(*self._stamp(1), Epoch(1), clean=False),
                    Create(*self._stamp(2), VOLUME, PATH, self._reading.volume_bytes, 0o644, 0, 0)])  # fmt: skip
        full = self._reading.data_bytes == self._reading.volume_bytes
        places = self._fill() if full else self._scatter()
        self._take([ReconcileEnd(*self._stamp(1))])
        self._store.checkpoint()
        before = self._group.held
        for first in range(0, len(places), 1000):
            some = places[first : first + 1000]
            self._take([Write(*self._stamp(ahead), self._extent(block)) for ahead, block in enumerate(some, 1)])
        self._store.checkpoint()
        return before, self._group.held

    def _fill(self) -> list[int]:
        known = [self._random.randbytes(EXTENT_BLOCKS * BLOCK_BYTES) for _ in range(_KNOWN_EXTENTS)]
        for block in range(0, self._blocks, EXTENT_BLOCKS):
            data = known[block // EXTENT_BLOCKS % len(known)]
            self._take([Reconcile(*self._stamp(1), Extent(VOLUME, block * BLOCK_BYTES, data))])
        return self._random.sample(range(self._blocks), self._reading.changed_blocks)

    def _scatter(self) -> list[int]:
        places = self._random.sample(range(self._blocks), self._reading.data_bytes // BLOCK_BYTES)
        for first in range(0, len(places), 1000):
            some = places[first : first + 1000]
            self._take([Reconcile(*self._stamp(ahead), self._extent(block)) for ahead, block in enumerate(some, 1)])
        return self._random.sample(places, self._reading.changed_blocks)

    def _extent(self, block: int) -> Extent:
        return Extent(VOLUME, block * BLOCK_BYTES, self._random.randbytes(BLOCK_BYTES))

    def _take(self, records: list[Record]) -> None:
        self._group.ingest(records)
        if self._store.checkpoint_due():
            self._store.checkpoint()

    def _stamp(self, ahead: int) -> tuple[Seq, TimeNs, ClockRun]:
        seq = self._group.held + ahead
        return Seq(seq), TimeNs(FIRST_TIME + seq * SECOND), RUN


def made(path: Path, reading: Reading) -> tuple[Seq, Seq]:
    """Makes the store, unless it is there."""
    if not path.exists():
        Store.create(path)
        store = Store.open(path)
        found = _Maker(store, reading).make()
        store.close()
        (path.parent / f"{path.name}.seqs").write_text(f"{found[0]} {found[1]}")
    before, after = map(int, (path.parent / f"{path.name}.seqs").read_text().split())
    return Seq(before), Seq(after)


if __name__ == "__main__":
    import cProfile, pstats

    which = sys.argv[1]
    r = {
        "full": Reading("f", 64 * GIB, 64 * GIB),
        "sparse": Reading("s", 64 * GIB, 2 * GIB),
        "q": Reading("q", 4 * GIB, 4 * GIB),
    }[which]
    p = Path(sys.argv[2]) / which
    t = time.time()
    b, a = made(p, r)
    print("made", time.time() - t, b, a)
    g = StoreReader.open(p).group()
    t = time.time()
    prof = cProfile.Profile()
    if len(sys.argv) > 3:
        prof.enable()
    n = sum(1 for _ in g.differing((VOLUME, b), (VOLUME, a)))
    if len(sys.argv) > 3:
        prof.disable()
    print(n, time.time() - t)
    if len(sys.argv) > 3:
        pstats.Stats(prof).sort_stats("tottime").print_stats(20)
