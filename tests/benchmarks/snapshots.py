"""A snapshot after 1 % random changes, and what the store grows by, against borg, restic and a btrfs snapshot.

    python -m tests.benchmarks.snapshots [--quick]

Two volumes: one of 2 GiB full of random bytes, and one of 64 GiB, sparse, that holds 2 GiB of them in stretches of
8 MiB. Each is there twice, mounted through a sync mount and as a file of a btrfs (a loop image on the same disk). In
each round 1 % of the data changes: 5,242 blocks of 4 KiB at random places. Whatever is timed has that change of its own
just before it, with new random bytes at the same places, and made durable with fsync; who comes first is another one in
each round, and what earlier ones left to be written is on the disk before a round begins:

- `rewindfs snapshot create STORE`, as a user types it: start of Python and the command's imports included;
- the same asked of the second appliance's control socket, over a connection that is made for it: what the operation
  itself takes, in a program that runs already;
- what stops a command in Python, which is timed at the same place, after a change through the mount: a Python that
  imports what the command cannot do without, a parser of command lines (click), the encoding of the protocol (msgspec),
  and sockets; and an empty Python;
- `btrfs subvolume snapshot`, after a change of the file there. It commits the transaction that holds the change, and
  takes longer the more snapshots there are; where btrfs has just committed by itself, which it does every 30 s, it
  takes less, which a second one beside it shows. It is the first one that counts;
- `borg create` and `restic backup` of the source file at the end of the round, when 1 % of it differs from what they
  saw last, with a first backup of it behind them, which is not counted; restic once, for no target is of its time. Both
  store a gigabyte for each 1 % of 2 GiB: it all takes 25 GB of disk.

A change is in nobody's time, but its wake is in everyone's: a snapshot makes durable what is not yet, and the kernel
may still be writing back, so that the command takes some 5 to 10 ms more than at rest. Memory is not short: Python's
modules are in the page cache, as they are for a user who has given any command before. The environment is that of the
tests, whose imports cost what a user's do, and 2 ms more: msgspec imports typing_extensions where it is installed.

What differs in kind: borg and restic have to look for what changed, and move it now; rewindfs moved it when it was
written, which `write_rates` measures; btrfs moved nothing to anywhere. Of 64 GiB borg reads the holes, too, which takes
minutes: it is run once, into the repository that has nearly all of that data already; restic is not run.

Growth: the blocks on disk of all files of the store (metadata, index, containers and all) after the snapshot, less
those before the change, of the bytes that changed; the same of the two repositories, without their caches.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from dedup.layout import TEMPORARY_SUFFIX
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES
from replication.control import request
from tests.benchmarks.borg import BorgRepository
from tests.benchmarks.mounts import ENVIRONMENT, ROOT, rewindfs, workplace
from tests.benchmarks.report import Report, ratio, run_subject
from tests.benchmarks.restic import ResticRepository

COMMAND: Final = "rewindfs snapshot create"
OPERATION: Final = "rewindfs, by control socket"
BORG: Final = "borg create"
RESTIC: Final = "restic backup"
BTRFS: Final = "btrfs subvolume snapshot"
COMMITTED: Final = "another, with nothing to commit"
FLOOR: Final = "an empty Python"
LIBRARIES: Final = "a Python with the command's libraries"
IMPORTS: Final = "import gc; gc.disable(); import click, msgspec, socket; gc.freeze()"
"""As the command does it: the collector walks through none of it."""
MIB: Final = 1 << 20
SCRIPT: Final = Path(sys.executable).with_name("rewindfs")
STRETCH_BYTES: Final = 8 * MIB
WRITERS: Final = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A volume: `data_bytes` of random data, in stretches that lie evenly over `volume_bytes`."""

    volume_bytes: int
    data_bytes: int

    @property
    def stretches(self) -> Iterator[int]:
        """The offsets at which STRETCH_BYTES of data begin."""
        count = self.data_bytes // STRETCH_BYTES
        return (number * (self.volume_bytes // count) for number in range(count))

    def places(self, chosen: random.Random) -> list[int]:
        """The offsets of 1 % of the data's blocks."""
        blocks = self.data_bytes // BLOCK_BYTES
        starts, per_stretch = list(self.stretches), STRETCH_BYTES // BLOCK_BYTES
        found = chosen.sample(range(blocks), blocks // 100)
        return [starts[block // per_stretch] + block % per_stretch * BLOCK_BYTES for block in found]

    @property
    def text(self) -> str:
        return f"{self.volume_bytes / (1 << 30):g} GiB"


def write_stretches(file: Path, shape: Shape) -> None:
    """The volume as it is before the first change; the same bytes in every call."""
    generator = random.Random(1)
    with open(file, "wb") as data:
        for offset in shape.stretches:
            data.seek(offset)
            data.write(generator.randbytes(STRETCH_BYTES))
        data.truncate(shape.volume_bytes)
        data.flush()
        os.fsync(data.fileno())


def stored_bytes(directory: Path) -> int:
    """What the files occupy. A container that is just being sealed is there twice: what is not yet in place of the old
    one does not count."""
    files = Storage().walk(directory)
    return sum(status.st_blocks * 512 for path, status in files if not path.name.endswith(TEMPORARY_SUFFIX))


def change(file: Path, places: Sequence[int], blocks: memoryview) -> None:
    """Writes a block at each place, several at a time, and makes it durable."""
    fd = os.open(file, os.O_RDWR)
    parts = [blocks[start : start + BLOCK_BYTES] for start in range(0, len(blocks), BLOCK_BYTES)]
    try:
        with ThreadPoolExecutor(WRITERS) as writers:
            list(writers.map(partial(os.pwrite, fd), parts, places))
        os.fsync(fd)
    finally:
        os.close(fd)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def btrfs(directory: Path, volume: Path, size: int) -> Iterator[Path]:
    """A btrfs with a subvolume that holds a copy of the volume; gives the mountpoint."""
    image, mountpoint = directory / "btrfs.img", directory / "mnt-btrfs"
    mountpoint.mkdir()
    with open(image, "xb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], stderr=subprocess.DEVNULL, check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
    try:
        _btrfs("subvolume", "create", mountpoint / "now")
        command = ["cp", "--sparse=always", "--reflink=never", str(volume), str(mountpoint / "now" / "data")]
        subprocess.run(command, check=True)
        yield mountpoint
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)
        image.unlink()


def _btrfs(*args: str | Path) -> None:
    subprocess.run(["btrfs", *map(str, args)], stdout=subprocess.DEVNULL, check=True)


@dataclass(slots=True)
class Runs:
    """Seconds of each snapshot, and what the stores grew by, by name."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    growth: dict[str, list[float]] = field(default_factory=dict)

    def taken(self, name: str, call: Callable[[], object]) -> None:
        self.seconds.setdefault(name, []).append(seconds(call))

    def grown(self, name: str, store: Path, before: int, changed: int) -> None:
        self.growth.setdefault(name, []).append((stored_bytes(store) - before) / changed)


@dataclass(frozen=True, slots=True)
class Peers:
    """The repositories, and how often each is run for a volume."""

    borg: BorgRepository
    restic: ResticRepository
    borg_runs: int
    restic_runs: int


def by_command(store: Path) -> None:
    command = [str(SCRIPT), "snapshot", "create", str(store)]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT, check=True)


def by_socket(store: Path) -> None:
    trio.run(request, str(store), None, "snapshot.create")


def bare_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, cwd=ROOT)


def snapshots_in_turns(
    runs: Runs, number: int, places: Sequence[int], store: Path, mountpoint: Path, subvolumes: Path
) -> None:
    """Round `number` of all but the backups: each after a change of its own."""
    there = [subvolumes / f"{number}", subvolumes / f"{number}-again"]
    snapshot, again = (partial(_btrfs, "subvolume", "snapshot", subvolumes / "now", path) for path in there)
    changed: list[tuple[Path, dict[str, Callable[[], object]]]] = [
        (mountpoint, {OPERATION: partial(by_socket, store)}),
        (mountpoint, {COMMAND: partial(by_command, store)}),
        (mountpoint, {LIBRARIES: partial(bare_python, IMPORTS), FLOOR: partial(bare_python, "")}),
        (subvolumes / "now", {BTRFS: snapshot, COMMITTED: again}),
    ]
    os.sync()
    for turn in range(len(changed)):
        place, calls = changed[(number + turn) % len(changed)]
        blocks = memoryview(os.urandom(len(places) * BLOCK_BYTES))
        before = stored_bytes(store)
        change(place / "data", places, blocks)
        for name, call in calls.items():
            runs.taken(name, call)
        if calls.keys() & {OPERATION, COMMAND}:
            runs.grown("rewindfs", store, before, len(blocks))


def measured(directory: Path, shape: Shape, rounds: int, peers: Peers) -> Runs:
    """`rounds` changes, with everyone's snapshots behind each."""
    runs, chosen = Runs(), random.Random(2)
    source, mountpoint, store = directory / "source", directory / "mnt", directory / "store"
    source.mkdir(parents=True)
    mountpoint.mkdir()
    volume = source / "data"
    write_stretches(volume, shape)
    if peers.borg_runs > 1:
        peers.borg.backup("first", volume)
    if peers.restic_runs:
        peers.restic.backup(volume)
    with btrfs(directory, volume, 4 * shape.data_bytes + (1 << 30)) as subvolumes:
        rewindfs("mount", source, mountpoint, "--store", store, "--mode", "sync", "--wait-base")
        try:
            for number in range(rounds):
                places = shape.places(chosen)
                snapshots_in_turns(runs, number, places, store, mountpoint, subvolumes)
                changed = len(places) * BLOCK_BYTES
                if number < peers.borg_runs:
                    before = stored_bytes(peers.borg.path)
                    runs.taken(BORG, partial(peers.borg.backup, f"{shape.text} {number}".replace(" ", "-"), volume))
                    runs.grown("borg", peers.borg.path, before, changed)
                if number < peers.restic_runs:
                    before = stored_bytes(peers.restic.path)
                    runs.taken(RESTIC, partial(peers.restic.backup, volume))
                    runs.grown("restic", peers.restic.path, before, changed)
        finally:
            rewindfs("unmount", mountpoint)
    shutil.rmtree(directory)
    return runs


def measure(report: Report, quick: bool) -> None:
    rounds, divisor = (3, 8) if quick else (5, 1)
    full = Shape((2 << 30) // divisor, (2 << 30) // divisor)
    sparse = Shape((64 << 30) // divisor, (2 << 30) // divisor)
    with workplace() as directory:
        borg, restic = BorgRepository.create(directory / "borg"), ResticRepository.create(directory / "restic")
        of_full = measured(directory / "full", full, rounds, Peers(borg, restic, rounds, 1))
        shutil.rmtree(directory / "restic")
        of_sparse = measured(directory / "sparse", sparse, 3, Peers(borg, restic, 1, 0))
    for shape, runs in ((full, of_full), (sparse, of_sparse)):
        in_ms = {name: [value * 1e3 for value in values] for name, values in runs.seconds.items()}
        report.table(f"snapshot after 1 % random 4 KiB changes, {shape.text}", "ms", in_ms, COMMAND)
        floor = f"{FLOOR} takes {statistics.median(in_ms[FLOOR]):.0f} ms, with its libraries"
        report.note(
            f"{floor} {statistics.median(in_ms[LIBRARIES]):.0f} ms: what remains of the command is its own and the "
            f"second appliance's; borg / 200 is {statistics.median(in_ms[BORG]) / 200:.0f} ms, "
            f"5 × btrfs {statistics.median(in_ms[BTRFS]) * 5:.0f} ms"
        )
        for name in (COMMAND, OPERATION):
            bound = LIBRARIES if name == COMMAND else None
            faster, slower = (None if bound is None else ratio(runs.seconds, bound, peer) for peer in (BORG, BTRFS))
            report.at_least(
                f"{name}, {shape.text}: times faster",
                BORG,
                1 / ratio(runs.seconds, name, BORG),
                200,
                floor=faster and 1 / faster,
            )
            report.at_most(f"{name}, {shape.text}: time", BTRFS, ratio(runs.seconds, name, BTRFS), 5, floor=slower)
        report.table(f"growth for that, of the bytes that changed, {shape.text}", "×", runs.growth, "rewindfs")
        grown = statistics.median(runs.growth["rewindfs"])
        report.at_most(f"store growth for 1 % random changes, {shape.text}", "bytes changed", grown, 1.10)
        report.at_most(
            f"store growth for 1 % random changes, {shape.text}", "borg", ratio(runs.growth, "rewindfs", "borg"), 1 / 30
        )
    for name in (COMMAND, OPERATION):
        of_both = statistics.median(of_sparse.seconds[name]) / statistics.median(of_full.seconds[name])
        report.at_most(f"{name}, {sparse.text}", f"the same, {full.text}", of_both, 1.5)


def main() -> None:
    run_subject(measure, __doc__)


if __name__ == "__main__":
    main()
