"""What the FUSE benchmarks measure: mounts of each kind side by side, fio on them, and medians of interleaved runs."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusefs.mount_control import tell

ROOT = Path(__file__).resolve().parent.parent.parent
MODES = ("sync", "async", "batch")
BARE = "bare passthrough"
FLOOR_ROUNDS = 3
LEAST = {mode: f"least replication, {mode}" for mode in ("sync", "async")}
NEW_DATA = ("--refill_buffers", "--randrepeat=0")
"""For fio: bytes that no other run wrote, and that nothing compresses. Without them each run writes the same again."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
    "PYTHONPATH": str(ROOT)
}
"""Of the commands that are measured. An installed package has its bytecode beside it: where that were not written, each
command would compile its modules anew (measured: 20 of 120 ms)."""


def rewindfs(*args: str | Path) -> str:
    """Runs the command; its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "fusefs", *map(str, args)],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return done.stdout


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory for one benchmark, removed at its end."""
    directory = Path(tempfile.mkdtemp(prefix="rewindfs-bench-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def new_volume(file: Path, size: int, *, sparse: bool = False) -> None:
    """A file of `size` random bytes, on the disk; or a hole of that size."""
    with open(file, "xb") as data, open("/dev/urandom", "rb") as random:
        if sparse:
            data.truncate(size)
        else:
            for _ in range(size >> 20):
                data.write(random.read(1 << 20))
        data.flush()
        os.fsync(data.fileno())


def new_source(directory: Path, size: int, *, sparse: bool = False) -> tuple[Path, Path]:
    """A source with one volume, `data`, and a mountpoint."""
    source, mountpoint = directory / "source", directory / "mnt"
    source.mkdir(parents=True)
    mountpoint.mkdir()
    new_volume(source / "data", size, sparse=sparse)
    return source, mountpoint


@contextmanager
def bare_mount(directory: Path, size: int, *, sparse: bool = False, writeback: bool = False) -> Iterator[Path]:
    """A bare passthrough; gives its mountpoint."""
    with _yardstick("bare_passthrough", directory, size, sparse, writeback, []) as mountpoint:
        yield mountpoint


@contextmanager
def least_mount(
    directory: Path, size: int, mode: str, *, sparse: bool = False, writeback: bool = False
) -> Iterator[Path]:
    """The least replication; gives its mountpoint. `mode`: sync or async."""
    log = [str(directory / "log"), *(["--sync"] if mode == "sync" else [])]
    with _yardstick("least_replication", directory, size, sparse, writeback, log) as mountpoint:
        yield mountpoint


@contextmanager
def _yardstick(
    module: str, directory: Path, size: int, sparse: bool, writeback: bool, more: Sequence[str]
) -> Iterator[Path]:
    source, mountpoint = new_source(directory, size, sparse=sparse)
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", str(source), str(mountpoint), *more]
    if writeback:
        command.append("--writeback")
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT)
    try:
        while not os.path.ismount(mountpoint):
            if process.poll() is not None:
                raise RuntimeError(f"{module} did not start")
            time.sleep(0.02)
        yield mountpoint
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
        if process.wait():
            raise RuntimeError(f"{module} failed")
    finally:
        if process.poll() is None:
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False)
            process.wait()


@contextmanager
def protected_mount(
    directory: Path, size: int, mode: str, *, sparse: bool = False, writeback: bool = False
) -> Iterator[Path]:
    """A rewindfs mount with its base snapshot made; gives its mountpoint. The store is beside it, `store`. RuntimeError
    when not everything done there was recorded: it would have been fast for that."""
    source, mountpoint = new_source(directory, size, sparse=sparse)
    options = ["--writeback"] if writeback else []
    rewindfs("mount", source, mountpoint, "--store", directory / "store", "--mode", mode, "--wait-base", *options)
    try:
        yield mountpoint
        tell(mountpoint, "durable", {})
        status = json.loads(rewindfs("status", mountpoint, "--json"))
        if status["state"] != "protected" or status["gaps"]:
            raise RuntimeError(f"{mode}: {status['state']}, {status['gaps']} gaps: what was measured was not recorded")
    finally:
        rewindfs("unmount", mountpoint)


@contextmanager
def all_mounts(directory: Path, size: int) -> Iterator[dict[str, Path]]:
    """A bare mount and one of each mode, at the same time."""
    with ExitStack() as stack:
        found = {BARE: stack.enter_context(bare_mount(directory / "bare", size))}
        for mode in MODES:
            found[mode] = stack.enter_context(protected_mount(directory / mode, size, mode))
        yield found


def processes(mountpoint: Path) -> dict[str, int]:
    """The pids behind a source mount: `mount` and `second`."""
    pids: dict[str, int] = tell(mountpoint, "status", {})["pids"]
    return pids


def fio(file: Path, *options: str) -> float:
    """Bytes a second of one fio job on a file that exists, or on files in a directory, which options then name."""
    where = "directory" if file.is_dir() else "filename"
    command = [
        "fio",
        "--name=job",
        f"--{where}={file}",
        "--allow_file_create=0",
        "--output-format=json",
        "--ioengine=psync",
        *options,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["write"]["bw_bytes"] + job["read"]["bw_bytes"])


def settled(mountpoint: Path) -> None:
    """Waits until all that was written is durable at the store and on the disk, so that the next run starts from
    rest."""
    if os.path.exists(mountpoint.parent / "store"):
        tell(mountpoint, "durable", {})
    os.sync()


def interleaved(rounds: int, subjects: Mapping[str, Path], measure: Callable[[Path], float]) -> dict[str, list[float]]:
    """`measure` of each subject in turn, `rounds` times."""
    results: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, place in subjects.items():
            results[name].append(measure(place))
            settled(place)
    return results


def interleaved_anew(
    rounds: int,
    directory: Path,
    subjects: Mapping[str, Callable[[Path], AbstractContextManager[Path]]],
    measure: Callable[[Path], float],
) -> dict[str, list[float]]:
    """`interleaved` for runs of gigabytes: each on a mount of its own, made in a directory that is then removed. Floors
    are in the first FLOOR_ROUNDS of them only.

    Every other round goes backwards: how much memory the run before gave back decides how quickly the next one gets its
    page cache, so none has always the same one before it.
    """
    results: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        in_turn = list(subjects.items())
        for name, mounted in in_turn if number % 2 == 0 else reversed(in_turn):
            if number >= FLOOR_ROUNDS and name in LEAST.values():
                continue
            place = directory / "run"
            with mounted(place) as mountpoint:
                os.sync()
                results[name].append(measure(mountpoint))
            shutil.rmtree(place)
    return results


def print_table(title: str, results: Mapping[str, Sequence[float]], unit: str, scale: float, against: str) -> None:
    """Median, spread, and the ratio of medians to `against`."""
    table = Table(title=title)
    for column in ("subject", f"median {unit}", "min–max", f"of {against}"):
        table.add_column(column, justify="left" if column == "subject" else "right")
    floor = statistics.median(results[against])
    for name, values in results.items():
        median = statistics.median(values)
        spread = f"{min(values) / scale:,.0f}–{max(values) / scale:,.0f}"
        table.add_row(name, f"{median / scale:,.0f}", spread, f"{median / floor:.2f}")
    Console(width=100).print(table)


def rss_anon(pid: int) -> int:
    """Anonymous resident memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} has no RssAnon")


def drop_caches() -> None:
    """The page cache forgets what is clean, and everything is."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
