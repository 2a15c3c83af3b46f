"""How long `ls` takes in a snapshot mount with thousands of names, and how much memory the mount has afterwards.

    python -m tests.benchmarks.snapshot_listing [--names N] [--records N] [--volumes N] [--stores DIR]

Three stores: in one each name was given as `snapshot create` does it, behind a checkpoint; in the next the names are
bookmarks, and a checkpoint lies behind each; in the last they were given to moments long past, as `--at` does. In all a
tenth of the writes makes a volume longer. Cold: the first time after the mount; warm: the second. The kernel's caches
are dropped before each.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from dedup.group_writer import GroupWriter
from dedup.journal_entry import EntryKind, Logged
from dedup.store import Store
from dedup.types import (
    BASE_JOURNAL,
    BLOCK_BYTES,
    Bookmark,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    ReconcileEnd,
    Record,
    Seq,
    SnapshotCreate,
    TimeNs,
    VolumeId,
    Write,
)
from tests.benchmarks.mounts import drop_caches, rss_anon, workplace
from tests.benchmarks.served import browsed

FIRST_TIME: Final = 1_700_000_000 * 10**9
SECOND: Final = 10**9
RUN: Final = ClockRun(0)
GROWS_EACH: Final = 10
FIXED_BYTES: Final = 64 << 20


class Naming(Enum):
    """What the names were given to."""

    CHECKPOINTS = "snapshots at checkpoints"
    BOOKMARKS = "bookmarks"
    PAST = "snapshots of past moments"


@dataclass(frozen=True, slots=True)
class Shape:
    names: int
    records: int
    volumes: int
    naming: Naming


class _Maker:
    def __init__(self, store: Store, shape: Shape) -> None:
        self._store = store
        self._shape = shape
        self._group: GroupWriter = store.group("group")
        self._random = random.Random(1)
        self._blocks = [self._random.randbytes(BLOCK_BYTES) for _ in range(64)]
        self._lengths = [FIXED_BYTES] * shape.volumes

    def make(self) -> None:
        shape = self._shape
        first: list[Record] = [EpochStart(*self._stamp(1), Epoch(1), clean=False)]
        for index in range(shape.volumes):
            path = f"disk{index}.img"
            first.append(Create(*self._stamp(2 + index), VolumeId(index + 1), path, FIXED_BYTES, 0o644, 0, 0))
        self._group.ingest([*first, ReconcileEnd(*self._stamp(2 + shape.volumes))])
        ended: list[tuple[Seq, TimeNs]] = []
        for number in range(shape.names):
            count = shape.records * (number + 1) // shape.names - shape.records * number // shape.names
            self._group.ingest([self._write(ahead) for ahead in range(1, count + 1)])
            if self._store.checkpoint_due() or shape.naming is Naming.CHECKPOINTS:
                self._store.checkpoint()
            ended.append((self._group.held, self._group.time))
            if shape.naming is Naming.CHECKPOINTS:
                self._snapshot(number, *ended[-1])
            elif shape.naming is Naming.BOOKMARKS:
                self._group.ingest([Bookmark(*self._stamp(1), f"name-{number}")])
        if shape.naming is Naming.PAST:
            for number, (seq, moment) in enumerate(ended):
                self._snapshot(number, seq, moment)

    def _stamp(self, ahead: int) -> tuple[Seq, TimeNs, ClockRun]:
        seq = self._group.held + ahead
        return Seq(seq), TimeNs(FIRST_TIME + seq * SECOND), RUN

    def _write(self, ahead: int) -> Write:
        index = self._random.randrange(self._shape.volumes)
        offset = self._random.randrange(FIXED_BYTES // BLOCK_BYTES) * BLOCK_BYTES
        if ahead % GROWS_EACH == 0:
            offset = self._lengths[index]
            self._lengths[index] += BLOCK_BYTES
        return Write(*self._stamp(ahead), Extent(VolumeId(index + 1), offset, self._random.choice(self._blocks)))

    def _snapshot(self, number: int, at: Seq, at_time: TimeNs) -> None:
        group = self._group
        seq, moment, run = group.held, group.time, group.run
        body = SnapshotCreate(seq, moment, run, f"name-{number}", at, at_time)
        group.append([Logged(EntryKind.SNAPSHOT_CREATE, seq, seq, moment, run, BASE_JOURNAL, (), body)])


def make_store(path: Path, shape: Shape) -> None:
    """Makes the store at `path`, if it is not there."""
    if path.exists():
        return
    Store.create(path)
    store = Store.open(path)
    _Maker(store, shape).make()
    store.close()


def _ls(*args: str | Path) -> None:
    subprocess.run(["ls", *map(str, args)], stdout=subprocess.DEVNULL, check=True)


def _timed(call: Callable[[], object]) -> float:
    drop_caches()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(store: Path, shape: Shape, directory: Path) -> Iterator[tuple[str, float, float, int]]:
    """(what, cold s, warm s, RssAnon afterwards), each in a mount of its own."""
    volume, name = "volumes/disk0.img", f"name-{shape.names // 2}"
    steps: list[tuple[str, Callable[[Path], object]]] = [
        ("ls volumes/V", lambda place: _ls(place / volume)),
        ("ls -l volumes/V", lambda place: _ls("-l", place / volume)),
        ("ls points", lambda place: _ls(place / "points")),
        ("ls -l points", lambda place: _ls("-l", place / "points")),
        ("stat volumes/V/NAME", lambda place: os.stat(place / volume / name)),
        ("ls points/NAME", lambda place: _ls(place / "points" / name)),
    ]
    for index, (what, step) in enumerate(steps):
        place = directory / f"snap{index}"
        with browsed(store, place) as process:
            cold = _timed(lambda: step(place))  # noqa: B023 - called at once
            warm = _timed(lambda: step(place))  # noqa: B023
            yield what, cold, warm, rss_anon(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--volumes", type=int, default=5)
    parser.add_argument("--stores", type=Path, help="where the stores are kept for another run")
    options = parser.parse_args()
    with workplace() as directory, nullcontext(options.stores or directory) as stores:
        stores.mkdir(exist_ok=True)
        for naming in Naming:
            shape = Shape(options.names, options.records, options.volumes, naming)
            store = stores / f"{shape.names}-{shape.records}-{shape.volumes}-{naming.name}"
            make_store(store, shape)
            table = Table(title=f"{shape.names:,} {naming.value}, {shape.records:,} records, {shape.volumes} volumes")
            for column in ("", "cold s", "warm s", "RssAnon MB"):
                table.add_column(column, justify="right" if column else "left")
            place = directory / naming.name
            place.mkdir()
            for what, cold, warm, rss in measure(store, shape, place):
                table.add_row(what, f"{cold:.2f}", f"{warm:.2f}", f"{rss / 1e6:.0f}")
            Console(width=100).print(table)


if __name__ == "__main__":
    main()
