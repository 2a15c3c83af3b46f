"""What grows with a store, and what does not: time and memory of each operation, on a small store and on large ones.

    python -m tests.benchmarks.scale [--quick] [--records N] [--snapshots N] [--gone N] [--stores DIR] [--only TEXT]

`large` differs from `small` in the volume's size, the records and the snapshots; `many gone` in the volumes that came
and went and in the gaps. `synthetic_store` says what is in them. Each row is measured in processes of its own: the time
is the median of several calls, after one that is not counted; `× CPU` compares the work of the processor alone, which a
busy machine or a slow disk does not change; the memory is the highest RssAnon of the process, less what one has that
has only imported the package. Rows with something in the last column stand for all of that, and are linear in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from tests.benchmarks.mounts import ENVIRONMENT, ROOT, workplace
from tests.benchmarks.synthetic_store import FIRST_TIME, GROUP, PATH, SECOND, VOLUME, Shape, leave_tail, make_store

if TYPE_CHECKING:
    from dedup.reader import GroupReader
    from dedup.types import Snapshot

GIB: Final = 1 << 30
SMALL: Final = Shape(volume_bytes=GIB, records=10_000, snapshots=10, volumes_gone=10, gaps=10)
LARGE: Final = replace(SMALL, volume_bytes=1024 * GIB, records=10_000_000, snapshots=10_000)
GONE: Final = replace(SMALL, volumes_gone=100_000, gaps=1_000)
TAIL_RECORDS: Final = 4_000
"""Left behind the last checkpoint by a killed writer: half of what makes one due."""
CALLS: Final = 15
SECONDS_MAX: Final = 900.0
"""After which a row is given up."""

LONG_SECONDS: Final = 5.0
"""A call that took so long is not made again."""

Timed = Iterator[tuple[float, float]]
"""Seconds of each call: that passed, and that processors worked."""


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _timed(call: Callable[[], object], calls: int = CALLS) -> Timed:
    for _ in range(calls):
        start = _now()
        call()
        seconds = _since(start)
        yield seconds
        if seconds[0] > LONG_SECONDS:
            return


def _open_writer(path: Path) -> Timed:
    from dedup.store import Store

    for _ in range(5):
        start = _now()
        store = Store.open(path)
        yield _since(start)
        store.close()


def _open_after_kill(path: Path) -> Timed:
    from dedup.store import Store

    # Each process opens once: the tail is gone then. `_measured` leaves a new one before the next.
    start = _now()
    store = Store.open(path)
    yield _since(start)
    store.close()


def _open_reader(path: Path) -> Timed:
    from dedup.reader import StoreReader

    for _ in range(5):
        start = _now()
        reader = StoreReader.open(path)
        reader.group(GROUP)
        yield _since(start)
        reader.close()


def _create_snapshot(path: Path) -> Timed:
    from dedup.store import Store

    store = Store.open(path)
    group = store.group(GROUP)
    yield from _timed(lambda: group.create_snapshot(f"new-{time.time_ns()}"))
    for found in group.reader().snapshots():
        if found.name.startswith("new-"):
            group.delete_snapshot(found.name)
    store.close()


def _snapshots(group: GroupReader) -> list[Snapshot]:
    """Those that the store was made with."""
    return [found for found in group.snapshots() if found.name.startswith("snapshot-")]


def _seqs(group: GroupReader, seed: int) -> Iterator[int]:
    """Random seqs without end, between the first snapshot and the last."""
    found = _snapshots(group)
    chosen = random.Random(seed)
    while True:
        yield chosen.randrange(found[0].seq, found[-1].seq)


def _resolve(path: Path, text_of: Callable[[int], str]) -> Timed:
    """The TIMEs of random seqs that are in no gap."""
    from dedup.errors import MomentRefused
    from dedup.reader import StoreReader

    group = StoreReader.open(path).group(GROUP)
    seqs = _seqs(group, 3)
    done = 0
    while done < CALLS:
        text = text_of(next(seqs))
        start = _now()
        try:
            group.resolve(text)
        except MomentRefused:
            continue
        yield _since(start)
        done += 1


def _find_seq(path: Path) -> Timed:
    return _resolve(path, "seq={}".format)


def _find_time(path: Path) -> Timed:
    from dedup.moment import rfc3339
    from dedup.types import TimeNs

    return _resolve(path, lambda seq: rfc3339(TimeNs(FIRST_TIME + seq * SECOND + SECOND // 2)))


def _find_flush(path: Path) -> Timed:
    return _resolve(path, "seq={}~flush".format)


def _find_name(path: Path) -> Timed:
    from dedup.reader import StoreReader

    group = StoreReader.open(path).group(GROUP)
    names = [found.name for found in _snapshots(group)]
    chosen = random.Random(4)
    return _timed(lambda: group.resolve(chosen.choice(names)))


def _read_block(path: Path) -> Timed:
    from dedup.reader import StoreReader
    from dedup.types import BLOCK_BYTES, Seq

    group = StoreReader.open(path).group(GROUP)
    chosen, seqs = random.Random(5), _seqs(group, 5)

    def read() -> None:
        image = group.image(VOLUME, Seq(next(seqs)))
        image.read(chosen.randrange(image.size // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES)

    return _timed(read)


def _look_up_version(path: Path) -> Timed:
    from dedup.reader import StoreReader
    from fusefs.snapshot_tree import SnapshotTree, VersionsDirectory

    group = StoreReader.open(path).group(GROUP)
    names = [found.name for found in _snapshots(group)]
    tree = SnapshotTree(group, clock=time.monotonic)
    chosen = random.Random(6)
    return _timed(lambda: tree.lookup(VersionsDirectory(PATH), chosen.choice(names)))


def _list_versions(path: Path) -> Timed:
    from dedup.reader import StoreReader
    from fusefs.snapshot_tree import SnapshotTree, VersionsDirectory

    tree = SnapshotTree(StoreReader.open(path).group(GROUP), clock=time.monotonic)
    # Only the first listing: what a later one costs is what the tree's cache has left of it.
    return _timed(lambda: sum(found is not None for found in tree.listing(VersionsDirectory(PATH))), 1)


def _command(*args: str) -> Timed:
    import replication.points_cli
    import replication.snapshot_cli  # noqa: F401 - what a command loads when it is first used
    from fusefs.command_group import rewindfs

    def run() -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            rewindfs.main(list(args), standalone_mode=False)

    return _timed(run, 3)


def _usage(path: Path) -> Timed:
    from dedup.reader import StoreReader

    return _timed(StoreReader.open(path).usage, 5)


def _verify(path: Path) -> Timed:
    from dedup.verify import verify

    def check() -> None:
        report = verify(path)
        assert report.ok, report

    return _timed(check, 1)


def _nothing(path: Path) -> Timed:
    import fusefs.command_group
    import fusefs.snapshot_tree  # noqa: F401

    # Long enough to be seen.
    return _timed(lambda: time.sleep(0.2), 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One operation. `grows_with` says what it lists or checks all of; the others may grow by a logarithm."""

    title: str
    measure: Callable[[Path], Timed]
    grows_with: str = ""


NOTHING: Final = Row("nothing", _nothing)
AFTER_KILL: Final = Row(f"open to write, {TAIL_RECORDS} records behind", _open_after_kill)
ROWS: Final = (
    Row("open to write, closed before", _open_writer),
    AFTER_KILL,
    Row("open to read", _open_reader),
    Row("create a snapshot", _create_snapshot),
    Row("find seq=N", _find_seq),
    Row("find a time", _find_time),
    Row("find the last flush before seq=N", _find_flush),
    Row("find a snapshot by name", _find_name),
    Row("read 4 KiB at a new moment", _read_block),
    Row("look up volumes/VOLUME/NAME", _look_up_version),
    Row("usage", _usage, "containers"),
    Row("points", lambda path: _command("points", str(path), "--json"), "gaps"),
    Row("points --timeline", lambda path: _command("points", str(path), "--timeline", "--json"), "records"),
    Row("list volumes/VOLUME", _list_versions, "snapshots"),
    Row("snapshot list", lambda path: _command("snapshot", "list", str(path), "--json"), "snapshots, changes"),
    Row("verify", _verify, "records"),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one operation on one store: seconds that passed, of them processors worked; None: more than SECONDS_MAX."""

    seconds: float | None
    worked: float | None
    anon_bytes: int


def _child(index: int, path: Path) -> tuple[list[tuple[float, float]] | None, int]:
    """Runs a row's measure in a process of its own: seconds of each call, and the highest RssAnon."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.scale", "--measure", str(index), "--stores", str(path)],
        env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    highest = 0
    end = time.monotonic() + SECONDS_MAX
    while process.poll() is None:
        highest = max(highest, _rss_anon(process.pid))
        if time.monotonic() > end:
            process.kill()
            process.communicate()
            return None, highest
        time.sleep(0.005)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"measuring {ROWS[index].title} failed")
    return json.loads(text), highest


def _rss_anon(pid: int) -> int:
    """0 when the process has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def _measured(row: Row, path: Path) -> Cost:
    index = ROWS.index(row) if row in ROWS else -1
    seconds: list[tuple[float, float]] = []
    highest = 0
    for _ in range(4 if row is AFTER_KILL else 1):
        if row is AFTER_KILL:
            command = [sys.executable, "-m", "tests.benchmarks.scale", "--tail", "--stores", str(path)]
            subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True)
        found, anon = _child(index, path)
        highest = max(highest, anon)
        if found is None:
            return Cost(None, None, highest)
        seconds += found
    counted = seconds[1:] if len(seconds) > 1 else seconds
    passed, worked = (statistics.median(one[part] for one in counted) for part in (0, 1))
    return Cost(passed, worked, highest)


def _seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return f"> {SECONDS_MAX:.0f} s"
    return f"{seconds * 1000:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.1f}" if one and other else ""


def _print(shapes: dict[str, Shape], costs: dict[str, dict[str, Cost]], idle: int) -> None:
    for name, shape in shapes.items():
        print(
            f"{name}: a volume of {shape.volume_bytes // GIB} GiB, {shape.records:,} records, {shape.snapshots:,} "
            f"snapshots, {shape.volumes_gone:,} volumes gone, {shape.gaps:,} gaps"
        )
    table = Table(title="Scale: time of one call, and memory over what an idle process has")
    table.add_column("operation")
    for name in shapes:
        table.add_column(name, justify="right")
        if name != "small":
            table.add_column("×", justify="right")
            table.add_column("× CPU", justify="right")
    for name in shapes:
        table.add_column(f"MiB {name}", justify="right")
    table.add_column("grows with")
    for row in ROWS:
        found = costs.get(row.title)
        if found is None:
            continue
        cells = [row.title]
        small = found["small"]
        for name in shapes:
            cost = found[name]
            cells.append(_seconds_text(cost.seconds))
            if name != "small":
                cells += [_ratio(cost.seconds, small.seconds), _ratio(cost.worked, small.worked)]
        cells += [f"{max(0, found[name].anon_bytes - idle) / (1 << 20):.0f}" for name in shapes]
        table.add_row(*cells, row.grows_with)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a large store that is not that large")
    parser.add_argument("--records", type=int, help="of the large store")
    parser.add_argument("--snapshots", type=int, help="of the large store")
    parser.add_argument("--gone", type=int, help="volumes that came and went, of the third store")
    parser.add_argument("--stores", type=Path, help="a directory to keep the stores in, and to find them in")
    parser.add_argument("--only", default="", help="rows whose title has this")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tail", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tail:
        leave_tail(options.stores, TAIL_RECORDS)
        os._exit(0)
    if options.measure is not None:
        row = ROWS[options.measure] if options.measure >= 0 else NOTHING
        print(json.dumps(list(row.measure(options.stores))), flush=True)
        os._exit(0)  # as a killed process ends: nothing that is freed now is of interest
    divisor = 50 if options.quick else 1
    shapes = {
        "small": SMALL,
        "large": replace(
            LARGE,
            records=options.records or LARGE.records // divisor,
            snapshots=options.snapshots or LARGE.snapshots // divisor,
        ),
        "many gone": replace(GONE, volumes_gone=options.gone or GONE.volumes_gone // divisor),
    }
    with workplace() as directory:
        _compare(options.stores or directory, shapes, options.only)


def _compare(directory: Path, shapes: dict[str, Shape], only: str) -> None:
    for name, shape in shapes.items():
        path = directory / name.replace(" ", "-")
        if not path.exists():
            start = time.monotonic()
            make_store(path, shape)
            print(f"{name} made in {time.monotonic() - start:.0f} s", file=sys.stderr)
    _, idle = _child(-1, directory)
    costs: dict[str, dict[str, Cost]] = {}
    for row in ROWS:
        if only in row.title:
            costs[row.title] = {name: _measured(row, directory / name.replace(" ", "-")) for name in shapes}
            found = ", ".join(f"{name} {_seconds_text(cost.seconds)}" for name, cost in costs[row.title].items())
            print(f"{row.title}: {found}", file=sys.stderr)
    _print(shapes, costs, idle)


if __name__ == "__main__":
    main()
