"""What going back costs on a sparse volume of 64 GiB of which 1 % has changed, in random blocks of 4 KiB.

    python -m tests.benchmarks.going_back [--quick]

Two readings of it: 1 % of 64 GiB, of a volume that is full of data; and 1 % of 2 GiB of data that lie at random in a
volume of 64 GiB that is else a hole. `diff` and the dry run of a restore in place are the commands as a person types
them, start of Python and all ranges printed as JSON included; both look at pointers alone. Beside them, what a
comparison of contents would have to do at least: read the volume's data once (of 64 GiB, 4 are read, and
scaled; they are 64 MiB of store, again and again: that is as quick as reading can be).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
from rich.console import Console
from rich.table import Table

from dedup.image import room_for
from dedup.reader import StoreReader
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Reconcile,
    ReconcileEnd,
    Seq,
    Write,
)
from fusefs.state_directory import StateDirectory
from replication.intent_log import IntentLog
from tests.benchmarks.mounts import drop_caches, rewindfs, workplace
from tests.benchmarks.synthetic_store import GROUP, PATH, VOLUME, RecordMaker

GIB: Final = 1 << 30
EXTENT_BLOCKS: Final = 256
_KNOWN_EXTENTS: Final = 64
"""What the full volume is made of: 64 MiB, again and again, so that its store fits anywhere."""
READ_BYTES_MAX: Final = 4 * GIB
READ_BYTES: Final = 1 << 20
CALLS: Final = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read `1 % of a sparse volume`. `data_bytes` equal to `volume_bytes`: no part of it is a hole."""

    volume_bytes: int
    data_bytes: int

    @property
    def is_full(self) -> bool:
        return self.data_bytes == self.volume_bytes

    @property
    def changed_blocks(self) -> int:
        return self.data_bytes // BLOCK_BYTES // 100


class _Maker(RecordMaker):
    """Makes the store: a base, a checkpoint, the changes."""

    def __init__(self, store: Store, reading: Reading) -> None:
        super().__init__(store)
        self._reading = reading
        self._blocks = reading.volume_bytes // BLOCK_BYTES

    def make(self) -> tuple[Seq, Seq]:
        """The moments before and after the changes."""
        self._take([EpochStart(*self._stamp(1), Epoch(1), clean=False),
                    Create(*self._stamp(2), VOLUME, PATH, self._reading.volume_bytes, 0o644, 0, 0)])  # fmt: skip
        places = self._fill() if self._reading.is_full else self._scatter()
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


def made(path: Path, reading: Reading) -> tuple[Seq, Seq]:
    """Makes the store, and says the moments before and after the changes."""
    Store.create(path)
    store = Store.open(path)
    found = _Maker(store, reading).make()
    store.close()
    return found


@contextmanager
def adopted(path: Path, reading: Reading, held: Seq) -> Iterator[Path]:
    """A mount of the store's group, of a source that is a hole of the right size: as one that ended cleanly left it.

    No content is compared, and none is looked at by a dry run.
    """
    with workplace() as directory:
        source, mountpoint = directory / "source", directory / "mnt"
        source.mkdir()
        mountpoint.mkdir()
        with open(source / PATH, "xb") as file:
            file.truncate(reading.volume_bytes)
        store = Store.open(path)
        uuid, epoch, time_ns = store.uuid, store.group(GROUP).epoch, store.group(GROUP).time
        store.close()
        state = StateDirectory.open(source)
        state.begin_epoch(GROUP, Epoch(epoch - 1))
        state.serving(uuid)
        state.ended_cleanly(held, {PATH: os.stat(source / PATH)}, time_ns)
        state.close()
        trio.run(IntentLog.open(state.intent_path).close)
        rewindfs("mount", source, mountpoint, "--store", path, "--name", GROUP, "--wait-base")
        try:
            yield mountpoint
        finally:
            rewindfs("unmount", mountpoint)


def seconds(call: Callable[[], object]) -> float:
    """The median of CALLS."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def read_seconds(path: Path, seq: Seq, reading: Reading) -> float:
    """Reading the data of the volume once, from its beginning: of some of it, scaled to all."""
    drop_caches()
    store = StoreReader.open(path)
    image = store.group(GROUP).image(VOLUME, seq)
    buffer = memoryview(bytearray(room_for(READ_BYTES)))
    start = time.perf_counter()
    at = done = 0
    while (at := image.next_data(at)) < image.size and done < READ_BYTES_MAX:
        # Of data that lies scattered, a block at a time; where all is data, as much as a reader asks for at once.
        length = READ_BYTES if reading.is_full else BLOCK_BYTES
        done += len(image.read_into(at, length, buffer))
        at += length
    passed = time.perf_counter() - start
    store.close()
    return passed * reading.data_bytes / done


def measured(path: Path, reading: Reading) -> tuple[float, float, float, int]:
    """Seconds of diff, of the dry run, and of reading; and how many ranges differ."""
    before, after = made(path, reading)
    moments = f"seq={before}", f"seq={after}"
    ranges = len(json.loads(rewindfs("diff", path, PATH, *moments, "--json"))["ranges"])
    diff = seconds(lambda: rewindfs("diff", path, PATH, *moments, "--json"))
    read = read_seconds(path, after, reading)
    with adopted(path, reading, after) as mountpoint:
        command = ("restore", path, PATH, "--at", moments[0], "--in-place", mountpoint, "--dry-run", "--json")
        found = json.loads(rewindfs(*command))
        if found["ranges"] != ranges:
            raise RuntimeError(f"diff has {ranges} ranges, the dry run {found['ranges']}")
        dry_run = seconds(lambda: rewindfs(*command))
    shutil.rmtree(path)
    return diff, dry_run, read, ranges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="volumes of 4 GiB")
    divisor = 16 if parser.parse_args().quick else 1
    table = Table(title=f"going back in a sparse volume of {64 // divisor} GiB, 1 % of the data changed; seconds")
    for column in ("data", "changed blocks", "ranges", "diff", "in-place dry run", "read the data once"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for data in (64 * GIB, 2 * GIB):
        reading = Reading(64 * GIB // divisor, data // divisor)
        with workplace() as directory:
            diff, dry_run, read, ranges = measured(directory / "store", reading)
        table.add_row(
            f"{data // divisor / GIB:g} GiB", f"{reading.changed_blocks:,}", f"{ranges:,}",
            f"{diff:.2f}", f"{dry_run:.2f}", f"{read:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
