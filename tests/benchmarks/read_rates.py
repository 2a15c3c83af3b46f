"""Reading a snapshot file in the snapshot mount, against the source file itself, a bare passthrough, borg and restic.

    python -m tests.benchmarks.read_rates [--quick]

Two volumes: `random`, bytes of /dev/urandom, which nothing compresses; and `linux`, the files of /usr one after the
other, each from a block boundary on as in a file system: programs, libraries, documents. The snapshot is the base of a
store that a mount made. It is read from two copies of that store: as it was written (raw containers), and after every
container was sealed as the second appliance does in time (groups of 64 KiB, zstd; `random` is stored in them as it
is). borg and restic have one archive of the same files, made with their usual options.

Cold: the page cache is dropped before each run, for everyone; borg's and restic's mounts are made anew for each run, so
that their own caches of chunks are empty, too; ours stays mounted, which leaves it its open files and at most 32 MiB of
decoded groups, dropped by what it reads in between (what it fetches ahead is gone when it was read). Making the mounts
is not in the time taken. Sequential: the whole file, in read(2)s of 1 MiB. Random: 4 KiB at a time, at depth 1, over
the whole file.

"zstd alone" is no mount but a floor, `decoding_floor`: the compressed groups of the sealed store read and decoded, by
one thread and by as many as there are cores, and no byte handed over. A mount needs those cores for the rest, too. It
is the floor of reading sealed containers of `linux` in a row. The floor of the others is the bare passthrough, the
mount that does least; of compressed groups that says nothing: it reads the source file, as that happens to lie on the
disk, and two and a half times as many bytes as they have.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from dedup.layout import CONTAINERS_NAME, container_named
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES
from tests.benchmarks.borg import BorgRepository
from tests.benchmarks.decoding_floor import Group, compressed_groups, decoding_rate
from tests.benchmarks.mounts import BARE, drop_caches, fio, rewindfs, rss_anon, workplace
from tests.benchmarks.report import Report, ratio, run_subject
from tests.benchmarks.restic import ResticRepository
from tests.benchmarks.served import browsed, served

SOURCE: Final = "the source file"
RAW: Final = "snapshot, raw containers"
SEALED: Final = "snapshot, sealed containers"
BORG: Final = "borg mount"
RESTIC: Final = "restic mount"
RANDOM: Final = "random"
LINUX: Final = "linux"
LINUX_FILES: Final = Path("/usr")
ALL_CORES: Final = "zstd alone, a thread a core"
FLOORS: Final = {"zstd alone, one thread": 1, ALL_CORES: os.cpu_count() or 1}
NO_FLOORS: Final[Mapping[str, int]] = {}

Reader = Callable[[str], AbstractContextManager[Path]]
"""Gives the file of a volume, for as long as it is read."""


def write_random(path: Path, size: int) -> None:
    """A file of random bytes."""
    with open(path, "wb") as data, open("/dev/urandom", "rb") as random:
        for _ in range(size >> 20):
            data.write(random.read(1 << 20))


def write_linux(path: Path, size: int) -> None:
    """A file of the files of /usr, in the order of their names, each from a block boundary on."""
    with open(path, "wb") as data:
        for place, directories, names in os.walk(LINUX_FILES):
            directories.sort()
            for name in sorted(names):
                found = os.path.join(place, name)
                if os.path.islink(found) or not os.path.isfile(found):
                    continue
                with open(found, "rb") as file:
                    shutil.copyfileobj(file, data, 1 << 20)
                data.seek(-(-data.tell() // BLOCK_BYTES) * BLOCK_BYTES)
                if data.tell() >= size:
                    data.truncate(size)
                    return
    raise RuntimeError(f"{LINUX_FILES} holds less than {size} bytes")


def make_store(source: Path, mountpoint: Path, store: Path) -> None:
    """A store whose base snapshot the source is, at rest."""
    mountpoint.mkdir()
    rewindfs("mount", source, mountpoint, "--store", store, "--wait-base")
    rewindfs("unmount", mountpoint)


def seal_all(store: Path) -> None:
    """Every container of a store that nobody has open."""
    storage, directory = Storage(), store / CONTAINERS_NAME
    for name in storage.listdir(directory):
        container = container_named(name)
        if container is not None:
            seal(storage, directory, container, None)


@contextmanager
def borg_reader(repository: BorgRepository, mountpoint: Path, volume: str) -> Iterator[Path]:
    with repository.mounted("base", mountpoint) as archive:
        yield archive / "source" / volume
    mountpoint.rmdir()


@contextmanager
def restic_reader(repository: ResticRepository, mountpoint: Path, volume: str) -> Iterator[Path]:
    with repository.mounted(mountpoint) as latest:
        yield latest / "source" / volume
    mountpoint.rmdir()


@dataclass(frozen=True, slots=True)
class Compared:
    """Who reads, by name, and the pids of those that are mounts of ours."""

    readers: dict[str, Reader]
    pids: dict[str, int]
    compressed: list[Group]
    """Of the store whose containers are sealed."""


@contextmanager
def compared(directory: Path, size: int) -> Iterator[Compared]:
    """Makes the volumes, the stores and the repositories, and mounts what stays mounted."""
    source, store, sealed = (directory / name for name in ("source", "store", "sealed"))
    source.mkdir()
    write_random(source / RANDOM, size)
    write_linux(source / LINUX, size)
    borg, restic = BorgRepository.create(directory / "borg"), ResticRepository.create(directory / "restic")
    borg.backup("base", source)
    restic.backup(source)
    make_store(source, directory / "mnt", store)
    shutil.copytree(store, sealed)
    seal_all(sealed)
    bare, raw_mount, sealed_mount = (directory / f"mnt-{name}" for name in ("bare", "raw", "sealed"))
    with (
        served(bare, "tests.benchmarks.bare_passthrough", source),
        browsed(store, raw_mount) as raw_pid,
        browsed(sealed, sealed_mount) as sealed_pid,
    ):
        yield Compared(
            {
                SOURCE: lambda volume: nullcontext(source / volume),
                BARE: lambda volume: nullcontext(bare / volume),
                RAW: lambda volume: nullcontext(raw_mount / "volumes" / volume / "base"),
                SEALED: lambda volume: nullcontext(sealed_mount / "volumes" / volume / "base"),
                BORG: partial(borg_reader, borg, directory / "mnt-borg"),
                RESTIC: partial(restic_reader, restic, directory / "mnt-restic"),
            },
            {RAW: raw_pid, SEALED: sealed_pid},
            compressed_groups(sealed),
        )


def sequential(file: Path) -> float:
    """Bytes a second."""
    return fio(file, "--rw=read", "--bs=1m", "--readonly")


def random_4k(milliseconds: int, file: Path) -> float:
    """Reads a second."""
    return (
        fio(file, "--rw=randread", "--bs=4k", "--readonly", "--time_based", f"--runtime={milliseconds}ms") / BLOCK_BYTES
    )


def measure(report: Report, quick: bool) -> None:
    rounds, milliseconds, size = (3, 500, 64 << 20) if quick else (5, 1500, 512 << 20)
    rss: dict[str, int] = {}
    with workplace() as directory, compared(directory, size) as found:

        def interleaved(
            volume: str, names: Sequence[str], rate: Callable[[Path], float], floors: Mapping[str, int] = NO_FLOORS
        ) -> dict[str, list[float]]:
            runs: dict[str, list[float]] = {name: [] for name in (*names, *floors)}
            for _ in range(rounds):
                for name in names:
                    with found.readers[name](volume) as file:
                        drop_caches()
                        runs[name].append(rate(file))
                    if name in found.pids:
                        rss[name] = max(rss.get(name, 0), rss_anon(found.pids[name]))
                for name, threads in floors.items():
                    drop_caches()
                    runs[name].append(decoding_rate(found.compressed, threads))
            return runs

        for volume in (RANDOM, LINUX):
            # restic is no target, and slow.
            peers = (BORG, RESTIC) if volume == LINUX else (BORG,)
            floors = FLOORS if volume == LINUX else NO_FLOORS
            runs = interleaved(volume, (SOURCE, BARE, RAW, SEALED, *peers), sequential, floors)
            scaled = {name: [value / 1e6 for value in values] for name, values in runs.items()}
            report.table(f"sequential read, cold, 1 MiB: {volume}", "MB/s", scaled, SOURCE)
            for name in (RAW, SEALED):
                subject = f"sequential read of a {name}, {volume}"
                least = ALL_CORES if name == SEALED and floors else BARE
                report.at_least(subject, BORG, ratio(runs, name, BORG), 3, floor=ratio(runs, least, BORG))
                report.at_least(subject, SOURCE, ratio(runs, name, SOURCE), 0.6)
        for volume in (RANDOM, LINUX):
            runs = interleaved(volume, (BARE, RAW, SEALED, BORG), partial(random_4k, milliseconds))
            report.table(f"random 4 KiB reads, cold: {volume}", "reads/s", runs, BARE)
            for name in (RAW, SEALED):
                subject = f"random 4 KiB reads of a {name}, {volume}"
                report.at_least(subject, BORG, ratio(runs, name, BORG), 30)
                report.at_least(subject, BARE, ratio(runs, name, BARE), 0.6)
    for name, value in rss.items():
        report.at_most(f"RssAnon of the snapshot mount, {name.partition(', ')[2]}", "", value / (1 << 20), 150, "MiB")


def main() -> None:
    run_subject(measure, __doc__)


if __name__ == "__main__":
    main()
