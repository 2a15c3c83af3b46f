"""What distance costs: rates and waiting times of 4 KiB writes on a mount whose second appliance is far away, in each
mode, against a bare pyfuse3 passthrough in the same run.

    python -m tests.benchmarks.latency [--quick] [--seconds S] [--round-trips 0,5,50]

The round trip is what the relay adds to that of TCP over the loopback. Each subject is measured alone; the others rest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.mounts import BARE, MODES, bare_mount, workplace
from tests.benchmarks.remote import drained, remote_mount
from tests.system.network import Relay

BLOCK = 4096
VOLUME_BYTES = 64 << 20
DEPTH = 16
ROUND_TRIPS_MS = "0,5,50"


@dataclass(frozen=True, slots=True)
class Measured:
    """Operations a second, and what one of them took, in microseconds."""

    rate: float
    p50: float
    p99: float


def one_at_a_time(file: Path, seconds: float, *, fsync: bool) -> Measured:
    """Random writes of new blocks; with `fsync`, each is one operation with the fsync after it."""
    dice = random.Random(1)
    fd = os.open(file, os.O_RDWR)
    took = []
    try:
        began = now = time.perf_counter()
        while now < began + seconds:
            block, offset = dice.randbytes(BLOCK), BLOCK * dice.randrange(VOLUME_BYTES // BLOCK)
            before = time.perf_counter()
            os.pwrite(fd, block, offset)
            if fsync:
                os.fsync(fd)
            now = time.perf_counter()
            took.append(now - before)
    finally:
        os.close(fd)
    cuts = statistics.quantiles(took, n=100)
    return Measured(len(took) / (now - began), cuts[49] * 1e6, cuts[98] * 1e6)


def many_at_a_time(file: Path, seconds: float) -> Measured:
    """fio: DEPTH writers past the page cache, each with a file of its own: those of one file queue in the kernel."""
    size = VOLUME_BYTES // DEPTH
    for number in range(DEPTH):
        with open(file.with_name(f"writer{number}"), "ab") as one:
            one.truncate(size)
    command = [
        *("fio", "--name=job", f"--directory={file.parent}", "--filename_format=writer$jobnum", f"--size={size}"),
        *("--allow_file_create=0", "--output-format=json", "--ioengine=psync", "--rw=randwrite"),
        *("--bs=4k", "--direct=1", f"--numjobs={DEPTH}", "--group_reporting", "--time_based", f"--runtime={seconds}"),
        *("--refill_buffers", "--percentile_list=50:99"),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
    write = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    percentiles = write["clat_ns"]["percentile"]
    return Measured(write["iops"], percentiles["50.000000"] / 1e3, percentiles["99.000000"] / 1e3)


WORKS: dict[str, Callable[[Path, float], Measured]] = {
    "4 KiB write": lambda file, seconds: one_at_a_time(file, seconds, fsync=False),
    "4 KiB write + fsync": lambda file, seconds: one_at_a_time(file, seconds, fsync=True),
    f"4 KiB write, {DEPTH} writers": many_at_a_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a second each")
    parser.add_argument("--seconds", type=int, default=8, help="of each measurement")
    parser.add_argument("--round-trips", default=ROUND_TRIPS_MS, metavar="MS,MS,…", help="added milliseconds")
    asked = parser.parse_args()
    seconds = 1 if asked.quick else asked.seconds
    round_trips = [float(text) for text in asked.round_trips.split(",")]
    results: dict[str, dict[tuple[str, str], Measured]] = {work: {} for work in WORKS}
    with workplace() as directory, ExitStack() as stack:
        bare = stack.enter_context(bare_mount(directory / "bare", VOLUME_BYTES))
        mounts: dict[str, tuple[Path, Relay]] = {
            mode: stack.enter_context(remote_mount(directory / mode, VOLUME_BYTES, mode)) for mode in MODES
        }
        for work, measure in WORKS.items():
            results[work][BARE, "-"] = measure(bare / "data", seconds)
            for mode, (place, relay) in mounts.items():
                for round_trip in round_trips:
                    relay.tell("delay", round_trip / 2e3)
                    results[work][mode, f"{round_trip:g} ms"] = measure(place / "data", seconds)
                    relay.tell("delay", 0)
                    drained(place)
    for work, measured in results.items():
        show(work, measured)


def show(work: str, results: dict[tuple[str, str], Measured]) -> None:
    table = Table(title=work)
    for column in ("subject", "round trip", "a second", "p50 ms", "p99 ms", "of bare"):
        table.add_column(column, justify="left" if column == "subject" else "right")
    floor = next(iter(results.values())).rate
    for (subject, distance), found in results.items():
        waits = (f"{found.p50 / 1e3:,.2f}", f"{found.p99 / 1e3:,.2f}")
        table.add_row(subject, distance, f"{found.rate:,.0f}", *waits, f"{found.rate / floor:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
