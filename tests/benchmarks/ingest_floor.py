"""The second appliance alone: a recorded stream of writes, decoded, deduplicated, journalled and made durable.

    python -m tests.benchmarks.ingest_floor [--quick] [--history GIB] [--json FILE]

A session of the second appliance is fed with the bytes that an agent sends (`recorded_stream`), from memory: everything
the appliance does for a session is in the time, from the first byte until the last record is durable, and the last
checkpoint with it, so that nothing is left for later; the kernel's sockets are not. Three kinds of 4 KiB blocks, each
written 4 KiB at random places and 1 MiB at a time: `new` (random bytes), `duplicate` (blocks that the store holds, in
another order), `zero`.

The floor does for the same bytes what cannot be left out: xxh3_128 of each block in a Python loop, and one write of
each record to a file, appended, with fdatasync in a thread beside it each 64 MiB and at the end, as the appliance has
it. Both are on the same disk, go through the page cache in the same way, and start after a sync of the whole system.
That the store reads and compares the old block of each duplicate, that each record is a journal entry and each block an
index entry is what the appliance adds, and is in its time.

`history`: the same ingest into a store that has an index, pointer maps and journal as of so many GiB written before:
the runs hold a random fingerprint for each block, as many are in memory as can be, so that the next run and a merge are
due, the journal has an entry for each MiB, the pointer maps its checkpoints; the containers are sparse files of the
true length. What is duplicated lies in blocks that were truly written.

`run`: processor time of the appliance for a 4 KiB record, new, when records arrive 1, 4, 16 or 64 at a time.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import xxhash

from dedup.store import Store
from dedup.types import BLOCK_BYTES, Record
from replication.store_writer import SYNC_BYTES
from tests.benchmarks.mounts import workplace
from tests.benchmarks.plain_log import PlainLog
from tests.benchmarks.recorded_stream import GROUP, beginning, play, record, writes
from tests.benchmarks.report import Report, ratio, run_subject
from tests.benchmarks.written_history import write_history

MIB: Final = 1 << 20
VOLUME_BYTES: Final = 128 << 30
KINDS: Final = ("new", "duplicate", "zero")
SIZES: Final = {"4 KiB": BLOCK_BYTES, "1 MiB": MIB}
FLOOR: Final = "xxh3 and a write"
EMPTY: Final = "ingest"
RUNS: Final = (1, 4, 16, 64)


class Source:
    """Makes what is written: blocks of each kind, as records that follow what the store holds."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._known = self._random.randbytes(32 * MIB)

    @property
    def known(self) -> bytes:
        """What each store is given first: duplicates are of these blocks."""
        return self._known

    def data(self, kind: str, nbytes: int) -> bytes:
        if kind == "new":
            return self._random.randbytes(nbytes)
        if kind == "zero":
            return bytes(nbytes)
        blocks = [self._known[at : at + BLOCK_BYTES] for at in range(0, len(self._known), BLOCK_BYTES)]
        return b"".join(self._random.choices(blocks, k=nbytes // BLOCK_BYTES))

    def records(self, store: Store, data: bytes, piece: int) -> list[Record]:
        """Writes of `piece` bytes each: the small ones anywhere, the large ones one behind the other."""
        whole = memoryview(data)
        start = self._random.randrange(VOLUME_BYTES // MIB - len(data) // MIB) * MIB
        return writes(
            store.group(GROUP).held,
            (
                (start + at if piece == MIB else self._random.randrange(VOLUME_BYTES // piece) * piece, part)
                for at in range(0, len(data), piece)
                for part in [whole[at : at + piece]]
            ),
        )


class _Syncs:
    """fdatasync in a thread, one at a time, as the appliance has it."""

    def __init__(self, log: PlainLog) -> None:
        self._log = log
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._log.sync)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()


def floor_seconds(file: Path, data: bytes, piece: int) -> float:
    """The least that could be done for these bytes."""
    digest = xxhash.xxh3_128_digest
    whole = memoryview(data)
    with PlainLog(file) as log:
        syncs = _Syncs(log)
        began = time.perf_counter()
        for at in range(0, len(data), piece):
            for block in range(at, at + piece, BLOCK_BYTES):
                digest(whole[block : block + BLOCK_BYTES])
            log.append(whole[at : at + piece])
            if not (at + piece) % SYNC_BYTES:
                syncs.begin()
        syncs.wait()
        log.sync()
        return time.perf_counter() - began


@contextmanager
def opened(path: Path, source: Source, history_gib: float) -> Iterator[Store]:
    """A store with so much history, and the known blocks."""
    Store.create(path)
    store = Store.open(path)
    try:
        store.group(GROUP).ingest(beginning(VOLUME_BYTES))
        if history_gib:
            store = write_history(store, GROUP, round(history_gib * 1024))
        play(store, record(source.records(store, source.known, MIB)))
        yield store
    finally:
        store.close()


def _rates(report: Report, stores: dict[str, Store], source: Source, file: Path, rounds: int, mib: int) -> None:
    fallen: dict[str, float] = {}
    for size, piece in SIZES.items():
        nbytes = (mib if piece == BLOCK_BYTES else 2 * mib) * MIB
        for kind in KINDS:
            rates: dict[str, list[float]] = {FLOOR: [], **{name: [] for name in stores}}
            for _ in range(rounds):
                data = source.data(kind, nbytes)
                os.sync()
                rates[FLOOR].append(nbytes / MIB / floor_seconds(file, data, piece))
                for name, store in stores.items():
                    own = source.data(kind, nbytes)
                    recording = record(source.records(store, own, piece))
                    os.sync()
                    rates[name].append(nbytes / MIB / play(store, recording).seconds)
            report.table(f"Ingest of {kind} blocks, {size} writes", "MiB/s", rates, FLOOR)
            report.at_least(f"ingest, {kind} blocks, {size} writes", FLOOR, ratio(rates, EMPTY, FLOOR), 0.5)
            for name in stores:
                if name != EMPTY:
                    fallen[f"{kind} blocks, {size} writes"] = ratio(rates, name, EMPTY)
                    against = name
    for what, value in fallen.items():
        report.at_least(f"ingest with {against}, {what}", "an empty store", value, 0.9)


def _runs(report: Report, store: Store, source: Source, rounds: int, records: int) -> None:
    costs: dict[str, list[float]] = {f"run of {run}": [] for run in RUNS}
    for _ in range(rounds):
        for run in RUNS:
            data = source.data("new", records * BLOCK_BYTES)
            recording = record(source.records(store, data, BLOCK_BYTES), run)
            os.sync()
            costs[f"run of {run}"].append(play(store, recording).processor_seconds / records * 1e6)
    report.table("Processor time of a new 4 KiB record", "µs", costs, "run of 64")


def measure(report: Report, quick: bool, history_gib: float | None = None) -> None:
    rounds = 3 if quick else 5
    mib = 32 if quick else 64
    if history_gib is None:
        history_gib = 4 if quick else 100
    source = Source(1)
    with workplace() as directory:
        began = time.monotonic()
        with (
            opened(directory / "empty", source, 0) as empty,
            opened(directory / "history", source, history_gib) as old,
        ):
            report.note(f"the store with {history_gib:g} GiB of history was made in {time.monotonic() - began:.0f} s")
            stores = {EMPTY: empty, f"{history_gib:g} GiB of history": old}
            _rates(report, stores, source, directory / "floor", rounds, mib)
            _runs(report, empty, source, rounds, 2048 if quick else 4096)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--history", type=float, metavar="GIB")
    found, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    run_subject(lambda report, quick: measure(report, quick, found.history), __doc__)


if __name__ == "__main__":
    main()
