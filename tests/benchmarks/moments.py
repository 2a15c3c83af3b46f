"""Looking up a moment that was never asked before, in a history of a million records.

    python -m tests.benchmarks.moments [--quick]

The store is made by `synthetic_store`: a volume of 64 GiB; of each ten records one write of a new block, two of known
ones, flushes and heartbeats; checkpoints as a second appliance makes them; a hundred snapshots. It is mounted with
`browse`, and each of 100 random `volumes/data/@TIME`s is looked up, opened and read once: stat(2), open(2), and
4 KiB at a random place. Each time of day is asked for once, so nothing answers it from memory; the page cache has the
store, as it would beside an appliance that writes it. The first one of all, which opens the files, is not counted.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path
from typing import Final

from dedup.moment import rfc3339
from dedup.types import BLOCK_BYTES, TimeNs
from tests.benchmarks.mounts import workplace
from tests.benchmarks.report import Report, run_subject
from tests.benchmarks.served import browsed
from tests.benchmarks.synthetic_store import FIRST_TIME, PATH, SECOND, Shape, make_store

MOMENTS: Final = 100
MILLISECONDS_MAX: Final = 100


def look_up(directory: Path, moment: TimeNs, offset: int) -> tuple[float, float]:
    """Milliseconds of the stat, and of all of it."""
    file = directory / f"@{rfc3339(moment)}"
    start = time.perf_counter()
    os.stat(file)
    found = time.perf_counter()
    fd = os.open(file, os.O_RDONLY)
    try:
        if len(os.pread(fd, BLOCK_BYTES, offset)) != BLOCK_BYTES:
            raise RuntimeError(f"{file}: the read at {offset} was short")
    finally:
        os.close(fd)
    return (found - start) * 1e3, (time.perf_counter() - start) * 1e3


def measure(report: Report, quick: bool) -> None:
    shape = Shape(64 << 30, records=250_000 if quick else 1_000_000, snapshots=100, volumes_gone=0, gaps=0)
    chosen = random.Random(6)
    with workplace() as directory:
        began = time.monotonic()
        make_store(directory / "store", shape)
        report.note(f"making the store of {shape.records:,} records took {time.monotonic() - began:.0f} s")
        with browsed(directory / "store", directory / "mnt"):
            versions = directory / "mnt" / "volumes" / PATH
            times = []
            for _ in range(MOMENTS + 1):
                # Half a second behind a record of which there is one each second: between two of them.
                moment = TimeNs(FIRST_TIME + chosen.randrange(1_000, shape.records) * SECOND + SECOND // 2)
                offset = chosen.randrange(shape.volume_bytes // BLOCK_BYTES) * BLOCK_BYTES
                times.append(look_up(versions, moment, offset))
    runs = {"stat, open, read": [whole for _, whole in times[1:]], "the stat alone": [stat for stat, _ in times[1:]]}
    report.table(f"a random @TIME of {shape.records:,} records", "ms", runs, "stat, open, read")
    ordered = sorted(runs["stat, open, read"])
    report.note(f"p99: {ordered[int(len(ordered) * 0.99) - 1]:.1f} ms; the first, not counted: {times[0][1]:.1f} ms")
    subject = f"@TIME never asked before, of {shape.records:,} records"
    report.at_most(subject, "", statistics.median(ordered), MILLISECONDS_MAX, "ms")


def main() -> None:
    run_subject(measure, __doc__)


if __name__ == "__main__":
    main()
