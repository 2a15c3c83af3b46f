"""Databases in a virtual machine's place: on an ext4 on a loop device on an image on the mount, against the same on a
bare pyfuse3 passthrough.

    python -m tests.benchmarks.stacked [--quick] [--tables sqlite,pgbench]

All stacks are up at the same time, on one disk, and run in turn; the others rest. Between two runs everything has
become durable at the store, and the disk has what was written. Memory of all processes is watched meanwhile.

sqlite: transactions that update one row of 10,000, one after the other, in WAL mode with synchronous FULL: each commit
appends to the log and waits for one fsync, which the loop device turns into one fsync of the image. The bare
passthrough does the same with the source, on its loop; the mount does so in a thread, journals it besides, and in sync
waits until the store is as durable as the source.

pgbench: PostgreSQL with its defaults but for a small cache, pgbench's standard transactions from four clients.

Beside them the least replication (`least_replication`): the floor.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from tests.benchmarks.loop_disk import ext4_on_loop
from tests.benchmarks.mounts import (
    BARE,
    LEAST,
    bare_mount,
    interleaved,
    least_mount,
    protected_mount,
    settled,
    workplace,
)
from tests.benchmarks.peak_memory import PeakMemory
from tests.benchmarks.postgresql import Database, installed_programs, reachable
from tests.benchmarks.report import Report, floor_ratio, ratio, run_subject

IMAGE_BYTES = 1 << 30
ROWS = 10_000
ROW_BYTES = 100
CLIENTS = 4


@contextmanager
def stacks(modes: Sequence[str], peaks: PeakMemory, least: Sequence[str]) -> Iterator[dict[str, Path]]:
    """An ext4 on each mount, and on the least replication in some modes, side by side; gives the mountpoints. The file
    system is beside each, `disk`."""
    with workplace() as directory, ExitStack() as stack:
        mounts = {BARE: stack.enter_context(bare_mount(directory / "bare", 0))}
        for mode in least:
            mounts[LEAST[mode]] = stack.enter_context(least_mount(directory / f"least-{mode}", 0, mode))
        for mode in modes:
            mounts[mode] = stack.enter_context(protected_mount(directory / mode, 0, mode))
            peaks.watch_mount(mounts[mode])
        for place in mounts.values():
            image = place / "disk.img"
            with open(image, "xb") as file:
                file.truncate(IMAGE_BYTES)
            stack.enter_context(ext4_on_loop(image, place.parent / "disk"))
        yield mounts


def _made_sqlite(place: Path) -> Path:
    """A database of ROWS rows on the stack over `place`."""
    file = place.parent / "disk" / "rows.db"
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE row (number INTEGER PRIMARY KEY, content BLOB)")
        database.executemany("INSERT INTO row VALUES (?, ?)", ((n, os.urandom(ROW_BYTES)) for n in range(ROWS)))
    return file


def commits(files: dict[Path, Path], seconds: float, place: Path) -> float:
    """Transactions a second of one connection; closing it, which empties the log, is not in the time."""
    dice = random.Random(time.time_ns())
    with closing(sqlite3.connect(files[place], isolation_level=None)) as database:
        mode = database.execute("PRAGMA journal_mode").fetchone()
        database.execute("PRAGMA synchronous = FULL")
        assert mode == ("wal",), mode
        count = 0
        began = now = time.perf_counter()
        while now < began + seconds:
            content = dice.randbytes(ROW_BYTES)
            database.execute("UPDATE row SET content = ? WHERE number = ?", (content, dice.randrange(ROWS)))
            count += 1
            now = time.perf_counter()
        return count / (now - began)


def sqlite(report: Report, quick: bool, peaks: PeakMemory) -> None:
    rounds, seconds = (3, 1) if quick else (5, 2)
    modes = ["sync", "async"]
    with stacks(modes, peaks, [] if quick else modes) as mounts:
        files = {place: _made_sqlite(place) for place in mounts.values()}
        for place in mounts.values():
            settled(place)
        results = interleaved(rounds, mounts, partial(commits, files, seconds))
    what = "SQLite commits (WAL, synchronous FULL) on ext4 on loop"
    report.table(what, "commits/s", results, BARE)
    for mode, wanted in (("sync", 0.50), ("async", 0.90)):
        floor = floor_ratio(results, LEAST[mode], BARE)
        report.at_least(f"{what}: {mode}", BARE, ratio(results, mode, BARE), wanted, floor=floor)


def pgbench(report: Report, quick: bool, peaks: PeakMemory) -> None:
    rounds, seconds, scale = (3, 2, 1) if quick else (5, 3, 5)
    programs = installed_programs()
    with stacks(["async"], peaks, [] if quick else ["async"]) as mounts, ExitStack() as stack:
        databases = {}
        for place in mounts.values():
            home = place.parent / "disk" / "postgres"
            reachable(home, place.parent.parent)
            databases[place] = stack.enter_context(Database(home, programs).running())
            databases[place].pgbench("-i", "-q", "-s", str(scale))

        def transactions(place: Path) -> float:
            databases[place].checkpoint()
            settled(place)
            return databases[place].transactions(seconds, CLIENTS)

        results = interleaved(rounds, mounts, transactions)
    what = "pgbench on ext4 on loop"
    report.table(what, "transactions/s", results, BARE)
    floor = floor_ratio(results, LEAST["async"], BARE)
    report.at_least(f"{what}: async", BARE, ratio(results, "async", BARE), 0.90, floor=floor)


TABLES = {"sqlite": sqlite, "pgbench": pgbench}


def measure(report: Report, quick: bool, tables: Sequence[str] = tuple(TABLES)) -> None:
    with PeakMemory() as peaks:
        for name in tables:
            TABLES[name](report, quick, peaks)
    peaks.tell(report, "under SQLite and PostgreSQL")


def main() -> None:
    run_subject(measure, __doc__, tuple(TABLES))


if __name__ == "__main__":
    main()
