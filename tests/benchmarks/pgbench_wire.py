"""What crosses the wire for a PostgreSQL under pgbench, against what it writes: in batch mode, and in async.

    python -m tests.benchmarks.pgbench_wire [--quick] [--modes batch,async] [--round-trip MS]

The database lies on an ext4 image on the mount, as in a virtual machine. Written is what the loop device wrote to the
image; on the wire is what the relay between mount and second appliance took in, TCP's own headers not counted. Needs
root, and PostgreSQL's server and pgbench (Debian: postgresql).
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.loop_disk import ext4_on_loop
from tests.benchmarks.mounts import rewindfs, workplace
from tests.benchmarks.postgresql import Database, installed_programs, reachable
from tests.benchmarks.remote import drained, remote_mount

IMAGE_BYTES = 1 << 30
CLIENTS = 4
SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Wire:
    """Of one phase: bytes written to the image, and taken in by the relay each way."""

    written: int
    up: int
    down: int


def measure(directory: Path, mode: str, programs: Path, round_trip: float, scale: int, seconds: int) -> None:
    """One database in one mode, from initdb to its end; prints its table."""
    phases: dict[str, Wire] = {}
    with remote_mount(directory, 0, mode) as (mountpoint, relay):
        image = mountpoint / "disk.img"
        with open(image, "xb") as file:
            file.truncate(IMAGE_BYTES)
        with ext4_on_loop(image, directory / "disk") as stat:
            place = directory / "disk" / "postgres"
            reachable(place, directory.parent)

            def count() -> Wire:
                """With everything written, and all of that durable at the store."""
                subprocess.run(["sync", "-f", place], check=True)
                drained(mountpoint)
                counted = relay.tell("count")
                return Wire(int(stat.read_text().split()[6]) * SECTOR_BYTES, counted["up"], counted["down"])

            with Database(place, programs).running() as database:
                relay.tell("delay", round_trip / 2e3)
                last = count()

                def phase(name: str) -> None:
                    nonlocal last
                    database.checkpoint()
                    now = count()
                    phases[name] = Wire(now.written - last.written, now.up - last.up, now.down - last.down)
                    last = now

                database.pgbench("-i", "-q", "-s", str(scale))
                phase(f"pgbench -i -s {scale}")
                tps = database.transactions(seconds, CLIENTS)
                phase(f"pgbench -c {CLIENTS} -T {seconds}")
        status = rewindfs("status", mountpoint)
    table = Table(title=f"{mode}, {round_trip:g} ms added round trip: {tps:,.0f} transactions a second")
    for column in ("phase", "written MB", "to the store MB", "from it MB", "of written"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, wire in phases.items():
        sent = (wire.up + wire.down) / wire.written
        table.add_row(name, *(f"{value / 1e6:,.1f}" for value in (wire.written, wire.up, wire.down)), f"{sent:.3f}")
    Console(width=100).print(table)
    print(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller database and a shorter run")
    parser.add_argument("--modes", default="batch,async")
    parser.add_argument("--round-trip", type=float, default=0.0, metavar="MS", help="added milliseconds")
    asked = parser.parse_args()
    programs = installed_programs()
    for mode in asked.modes.split(","):
        with workplace() as directory:
            measure(directory / mode, mode, programs, asked.round_trip, *((2, 10) if asked.quick else (10, 60)))


if __name__ == "__main__":
    main()
