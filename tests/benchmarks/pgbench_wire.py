"""What crosses the wire for a PostgreSQL under pgbench, against what it writes: in batch mode, and in async.

    python -m tests.benchmarks.pgbench_wire [--quick] [--modes batch,async] [--round-trip MS]

The database lies on an ext4 image on the mount, as in a virtual machine. Written is what the loop device wrote to the
image; on the wire is what the relay between mount and second appliance took in, TCP's own headers not counted. Needs
root, and PostgreSQL's server and pgbench (Debian: postgresql).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.mounts import rewindfs, workplace
from tests.benchmarks.remote import drained, remote_mount

USER = "postgres"
IMAGE_BYTES = 1 << 30
CLIENTS = 4
SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Wire:
    """Of one phase: bytes written to the image, and taken in by the relay each way."""

    written: int
    up: int
    down: int


class Database:
    """A PostgreSQL of its own in `place`, reached by a socket there, with no other port."""

    def __init__(self, place: Path, programs: Path) -> None:
        self._data = place / "data"
        self._place = place
        self._programs = programs

    def run(self, program: str, *words: str) -> str:
        command = ["runuser", "-u", USER, "--", str(self._programs / program), *words]
        done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{program}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[Database]:
        self.run("initdb", "-D", str(self._data), "--auth=trust", "--no-locale", "--encoding=UTF8")
        options = f"-k {self._place} -c listen_addresses='' -c shared_buffers=64MB -c max_wal_size=256MB"
        log = str(self._place / "log")
        self.run("pg_ctl", "-D", str(self._data), "-w", "-l", log, "-o", options, "start")
        try:
            yield self
        finally:
            self.run("pg_ctl", "-D", str(self._data), "-w", "-m", "fast", "stop")

    def pgbench(self, *words: str) -> str:
        return self.run("pgbench", "-h", str(self._place), *words, "postgres")

    def checkpoint(self) -> None:
        self.run("psql", "-h", str(self._place), "-q", "-c", "CHECKPOINT", "postgres")


@contextmanager
def ext4_on_loop(image: Path, place: Path) -> Iterator[Path]:
    """The image, made an ext4 and mounted at `place`; gives the counters of its loop device."""
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        device = subprocess.run(["findmnt", "-no", "SOURCE", place], check=True, capture_output=True, text=True).stdout
        yield Path("/sys/block") / Path(device.strip()).name / "stat"
    finally:
        subprocess.run(["umount", place], check=True)
        # The kernel lets go of the image a while after its last user, and says nothing.
        while subprocess.run(["losetup", "-j", image], check=True, capture_output=True).stdout:
            time.sleep(0.1)


def measure(directory: Path, mode: str, programs: Path, round_trip: float, scale: int, seconds: int) -> None:
    """One database in one mode, from initdb to its end; prints its table."""
    phases: dict[str, Wire] = {}
    with remote_mount(directory, 0, mode) as (mountpoint, relay):
        image = mountpoint / "disk.img"
        with open(image, "xb") as file:
            file.truncate(IMAGE_BYTES)
        with ext4_on_loop(image, directory / "disk") as stat:
            place = directory / "disk" / "postgres"
            place.mkdir()
            shutil.chown(place, USER, USER)
            for above in (directory.parent, directory):
                above.chmod(0o711)

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
                said = database.pgbench("-c", str(CLIENTS), "-j", "2", "-T", str(seconds))
                phase(f"pgbench -c {CLIENTS} -T {seconds}")
        status = rewindfs("status", mountpoint)
    tps = re.search(r"tps = ([\d.]+)", said)
    table = Table(title=f"{mode}, {round_trip:g} ms added round trip: {tps[1] if tps else '?'} transactions a second")
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
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if os.geteuid() != 0 or not found:
        sys.exit("pgbench_wire: needs root and PostgreSQL (Debian: apt-get install postgresql)")
    for mode in asked.modes.split(","):
        with workplace() as directory:
            measure(directory / mode, mode, found[-1], asked.round_trip, *((2, 10) if asked.quick else (10, 60)))


if __name__ == "__main__":
    main()
