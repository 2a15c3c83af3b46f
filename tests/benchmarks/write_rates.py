"""Write rates on the mount in each mode, against a bare pyfuse3 passthrough in the same run.

python -m tests.benchmarks.write_rates [--quick]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.benchmarks.mounts import BARE, all_mounts, fio, interleaved, print_table, rewindfs, rss_anon, workplace

VOLUME_BYTES = 256 << 20


def random_4k(depth: int, seconds: int, mountpoint: Path) -> float:
    direct = "--direct=1" if depth > 1 else "--direct=0"
    return fio(
        mountpoint / "data",
        "--rw=randwrite",
        "--bs=4k",
        direct,
        f"--numjobs={depth}",
        "--group_reporting",
        "--time_based",
        f"--runtime={seconds}",
    )


def sequential_1m(mountpoint: Path) -> float:
    return fio(mountpoint / "data", "--rw=write", "--bs=1m", "--size=256m", "--refill_buffers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    quick = parser.parse_args().quick
    rounds, seconds = (3, 2) if quick else (5, 5)
    with workplace() as directory, all_mounts(directory, VOLUME_BYTES) as mounts:
        for depth in (1, 16):
            results = interleaved(rounds, mounts, lambda place, depth=depth: random_4k(depth, seconds, place))  # type: ignore[misc]
            print_table(f"4 KiB random writes, depth {depth}", results, "IOPS", 4096, BARE)
        results = interleaved(rounds, mounts, sequential_1m)
        print_table("1 MiB sequential writes of new data", results, "MB/s", 1e6, BARE)
        for mode, place in mounts.items():
            if mode != BARE:
                pids = json.loads(rewindfs("status", place, "--json"))["pids"]
                memory = ", ".join(f"{name} {rss_anon(pid) >> 20} MiB" for name, pid in pids.items())
                print(f"RssAnon in {mode}: {memory}")


if __name__ == "__main__":
    main()
