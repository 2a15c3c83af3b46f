"""Read rates of a snapshot file in the snapshot mount, against the source file itself and against a bare passthrough.

    python -m tests.benchmarks.read_rates [--quick]

Cold: the page cache is dropped before each run.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.benchmarks.mounts import (
    BARE,
    bare_mount,
    drop_caches,
    fio,
    interleaved,
    print_table,
    protected_mount,
    rewindfs,
    workplace,
)

SOURCE = "the source file"
SNAPSHOT = "snapshot file"


@contextmanager
def browsed(store: Path, mountpoint: Path) -> Iterator[Path]:
    """The snapshot mount of a store."""
    mountpoint.mkdir()
    rewindfs("browse", store, mountpoint)
    try:
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)


def sequential(file: Path) -> float:
    drop_caches()
    return fio(file, "--rw=read", "--bs=1m", "--readonly")


def random_4k(seconds: int, file: Path) -> float:
    drop_caches()
    return fio(file, "--rw=randread", "--bs=4k", "--readonly", "--time_based", f"--runtime={seconds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, a smaller file")
    quick = parser.parse_args().quick
    rounds, seconds, size = (3, 2, 256 << 20) if quick else (5, 5, 1 << 30)
    with (
        workplace() as directory,
        bare_mount(directory / "bare", size) as bare,
        protected_mount(directory / "protected", size, "async") as mountpoint,
        browsed(mountpoint.parent / "store", directory / "snapshots") as snapshots,
    ):
        files = {
            SOURCE: mountpoint.parent / "source" / "data",
            BARE: bare / "data",
            SNAPSHOT: snapshots / "volumes" / "data" / "base",
        }
        print_table("sequential read, cold, 1 MiB", interleaved(rounds, files, sequential), "MB/s", 1e6, SOURCE)
        results = interleaved(rounds, files, partial(random_4k, seconds))
        print_table("random 4 KiB reads, cold", results, "IOPS", 4096, BARE)


if __name__ == "__main__":
    main()
