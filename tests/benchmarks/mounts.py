"""What the FUSE benchmarks measure: mounts of each kind side by side, fio on them, and medians of interleaved runs."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
MODES = ("sync", "async", "batch")
BARE = "bare passthrough"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


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


def new_source(directory: Path, size: int) -> tuple[Path, Path]:
    """A source with one volume, `data`, of `size` random bytes, and a mountpoint."""
    source, mountpoint = directory / "source", directory / "mnt"
    source.mkdir(parents=True)
    mountpoint.mkdir()
    with open(source / "data", "wb") as data, open("/dev/urandom", "rb") as random:
        for _ in range(size >> 20):
            data.write(random.read(1 << 20))
        data.flush()
        os.fsync(data.fileno())
    return source, mountpoint


@contextmanager
def bare_mount(directory: Path, size: int) -> Iterator[Path]:
    """A bare passthrough; gives its mountpoint."""
    source, mountpoint = new_source(directory, size)
    command = [sys.executable, "-m", "tests.benchmarks.bare_passthrough", str(source), str(mountpoint)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT)
    try:
        while not os.path.ismount(mountpoint):
            if process.poll() is not None:
                raise RuntimeError("the bare passthrough did not start")
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
        process.wait()


@contextmanager
def protected_mount(directory: Path, size: int, mode: str) -> Iterator[Path]:
    """A rewindfs mount with its base snapshot made; gives its mountpoint. The store is beside it, `store`."""
    source, mountpoint = new_source(directory, size)
    rewindfs("mount", source, mountpoint, "--store", directory / "store", "--mode", mode, "--wait-base")
    try:
        yield mountpoint
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


def fio(file: Path, *options: str) -> float:
    """Bytes a second of one fio job on a file that exists."""
    command = ["fio", "--name=job", f"--filename={file}", "--output-format=json", "--ioengine=psync", *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["write"]["bw_bytes"] + job["read"]["bw_bytes"])


def settled(mountpoint: Path) -> None:
    """Waits until nothing is queued and the disk has what was written, so that the next run starts from rest."""
    os.sync()
    if os.path.exists(mountpoint.parent / "store"):
        while json.loads(rewindfs("status", mountpoint, "--json"))["lag"]["records"] > 3:
            os.sync()


def interleaved(rounds: int, subjects: Mapping[str, Path], measure: Callable[[Path], float]) -> dict[str, list[float]]:
    """`measure` of each subject in turn, `rounds` times."""
    results: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, place in subjects.items():
            results[name].append(measure(place))
            settled(place)
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
