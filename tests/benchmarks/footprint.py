"""The most anonymous memory (RssAnon) that each process holds at any time of its work, on a volume full of data and on
a huge sparse one.

    python -m tests.benchmarks.footprint [--quick]

Looked at every 50 ms, from before the first write until the unmount has ended: the mount process, the second appliance,
each process that either starts, and a snapshot mount. The work, in async mode: random 4 KiB writes all over the volume,
16 at a time; sequential 1 MiB writes of new data; then, while random writes go on, 1,000 a second: snapshots are taken,
one is read in a row and, all over the volume, at random, and points and snapshots are listed. At the end the store is
collected and consolidated, which gives way to writes and would take long beside them; a history so young has nothing to
thin yet.

`write_rates` and `stacked` look at the processes behind their mounts in the same way.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.mounts import NEW_DATA, fio, protected_mount, rewindfs, workplace
from tests.benchmarks.peak_memory import PeakMemory
from tests.benchmarks.report import Report, run_subject
from tests.benchmarks.served import browsed

SEQUENTIAL_BYTES_MAX = 2 << 30
BACKGROUND_IOPS = 1000
RANDOM_WRITES = ("--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=16", "--direct=1", "--norandommap")


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    size: int
    sparse: bool


@contextmanager
def _random_writes(file: Path) -> Iterator[None]:
    """In the background, until the block ends."""
    command = ["fio", "--name=job", f"--filename={file}", *RANDOM_WRITES, *NEW_DATA]
    command += ["--time_based", "--runtime=1h", f"--rate_iops={BACKGROUND_IOPS}"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"fio ended with {process.returncode} while the rest was at work")
    finally:
        process.terminate()
        process.wait()


def _work(mountpoint: Path, volume: Volume, seconds: float, peaks: PeakMemory) -> None:
    data, store = mountpoint / "data", mountpoint.parent / "store"
    timed = ("--time_based", f"--runtime={seconds * 1000:.0f}ms")
    some = f"--size={min(volume.size, SEQUENTIAL_BYTES_MAX)}"
    fio(data, *RANDOM_WRITES, *NEW_DATA, *timed)
    fio(data, "--rw=write", "--bs=1m", some, *NEW_DATA, *timed)
    with _random_writes(data):
        rewindfs("snapshot", "create", store, "--name", "one")
        snapshots = mountpoint.parent / "snapshots"
        with browsed(store, snapshots) as process:
            peaks.watch("snapshot mount", process)
            snapshot = snapshots / "volumes" / "data" / "one"
            fio(snapshot, "--rw=read", "--bs=1m", "--readonly", some, *timed)
            rewindfs("snapshot", "create", store, "--name", "two")
            fio(snapshot, "--rw=randread", "--bs=4k", "--readonly", "--norandommap", *timed)
            rewindfs("points", store)
            rewindfs("snapshot", "list", store)
    rewindfs("consolidate", store)
    rewindfs("gc", store)


def measure(report: Report, quick: bool) -> None:
    size, seconds = (128 << 20, 0.7) if quick else (1 << 30, 4)
    for volume in (Volume(f"{size >> 20:,} MiB of data", size, False), Volume("1 TiB, sparse", 1 << 40, True)):
        with (
            workplace() as directory,
            PeakMemory() as peaks,
            protected_mount(directory / "volume", volume.size, "async", sparse=volume.sparse) as mountpoint,
        ):
            peaks.watch_mount(mountpoint)
            _work(mountpoint, volume, seconds, peaks)
        peaks.tell(report, volume.name)


def main() -> None:
    run_subject(measure, __doc__)


if __name__ == "__main__":
    main()
