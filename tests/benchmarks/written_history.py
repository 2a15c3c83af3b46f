"""The index and the journal that so much history leaves, made in seconds: its blocks have addresses and no bytes.

For each MiB one journal entry (a write behind the one before it), 256 pointers in checkpoints as due, and 256 random
fingerprints in the index, in runs as they come to be; the last ones, as many as stay in memory, are noted and taken in
by checkpoints, so that the next checkpoint has to make a run of them, and that one makes a merge due. The containers
are sparse files of their true length, whose blocks nothing reads: a random fingerprint is never found again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup import layout
from dedup.fingerprint_index import UNMERGED_MAX
from dedup.fingerprint_run import write_run
from dedup.fingerprint_runs import FAN, run_name
from dedup.fingerprint_table import Rows
from dedup.metadata_journal import EntryKind, Logged, LoggedExtent
from dedup.store import Store
from dedup.types import BLOCK_BYTES, FINE_JOURNAL, ContainerForm, ContainerId, TimeNs
from tests.benchmarks.recorded_stream import VOLUME, stamp

MIB: Final = 1 << 20
BLOCKS_PER_MIB: Final = MIB // BLOCK_BYTES
PIECES: Final = 64
"""In which a run is written: no more than one of them is in memory."""


def write_history(store: Store, group_name: str, mib: int) -> Store:
    """Adds history of `mib` MiB, at most 65536 GiB, to the store, and gives it back opened anew; it goes on behind
    it."""
    containers = -(-mib * BLOCKS_PER_MIB // layout.SLOTS_MAX)
    first = store.settle().next_container
    store.spent(ContainerId(first + containers - 1))
    _containers(store, first, containers)
    _entries(store, group_name, mib, first)
    store.settle()
    blocks = mib * BLOCKS_PER_MIB
    unmerged = min(blocks // 2, UNMERGED_MAX)
    _runs(store, blocks - unmerged, first)
    path = store.path
    store.close()
    store = Store.open(path)
    _unmerged_fingerprints(store, blocks - unmerged, unmerged, first)
    return store


def _containers(store: Store, first: int, count: int) -> None:
    for number in range(first, first + count):
        container = ContainerId(number)
        header = layout.ContainerHeader(container, FINE_JOURNAL, ContainerForm.RAW, TimeNs(0))
        path = layout.container_path(store.path / layout.CONTAINERS_NAME, container)
        with open(path, "xb") as file:
            file.write(layout.pack_container_header(header))
            file.truncate(layout.RAW_SLOTS_OFFSET + layout.SLOTS_MAX * BLOCK_BYTES)


def _entries(store: Store, group_name: str, mib: int, first: int) -> None:
    group = store.group(group_name)
    random = np.random.default_rng(mib)
    for start in range(0, mib, 64):
        entries = []
        for number in range(start, min(start + 64, mib)):
            container, slot = divmod(number * BLOCKS_PER_MIB, layout.SLOTS_MAX)
            where = layout.address(ContainerId(first + container), slot)
            addresses = np.arange(where, where + BLOCKS_PER_MIB, dtype=np.uint64)
            marks = random.bytes(BLOCKS_PER_MIB * layout.FINGERPRINT_BYTES)
            seq, time, run = stamp(group.held + 1 + number - start)
            extent = LoggedExtent(VOLUME, number * MIB, MIB, addresses, marks)
            entries.append(Logged(EntryKind.WRITE, seq, seq, time, run, FINE_JOURNAL, (extent,), None))
        group.append(entries)
        if store.checkpoint_due():
            store.checkpoint()


def _runs(store: Store, count: int, first: int) -> None:
    random = np.random.default_rng(count)
    numbers = [*store.index.fingerprint_runs()]
    done = 0
    for rows in _run_sizes(count):
        number = max(numbers, default=0) + 1
        path = store.path / layout.INDEX_NAME / run_name(number)
        run = write_run(store.storage, path, rows, _pieces(random, rows, first, done))
        if run is not None:
            run.close()
            numbers.append(number)
        done += rows
    with store.index.write() as txn:
        store.index.put_fingerprint_runs(txn, numbers)


def _pieces(random: np.random.Generator, rows: int, first: int, done: int) -> Iterator[Rows]:
    for piece in range(PIECES):
        start, end = rows * piece // PIECES, rows * (piece + 1) // PIECES
        high = np.sort(random.integers(0, (1 << 64) // PIECES, end - start, dtype=np.uint64))
        high += np.uint64(piece * ((1 << 64) // PIECES))
        low = random.integers(0, 1 << 64, end - start, dtype=np.uint64)
        yield high, low, _addresses(first, done + start, end - start)


def _run_sizes(count: int) -> list[int]:
    """Of so many fingerprints, the largest first, when the next run is the one that makes a merge due."""
    newest = FAN - 1
    older, rest = divmod(count - newest * UNMERGED_MAX, UNMERGED_MAX)
    if older < FAN:
        return [count]
    sizes = [FAN**power * UNMERGED_MAX for power in range(12, 0, -1) for _ in range(older // FAN**power % FAN)]
    sizes[0] += older % FAN * UNMERGED_MAX + rest
    return sizes + [UNMERGED_MAX] * newest


def _addresses(first: int, start: int, count: int) -> NDArray[np.uint64]:
    places = np.arange(start, start + count, dtype=np.uint64)
    where = (np.uint64(first) + places // layout.SLOTS_MAX) << np.uint64(layout.SLOT_BITS)
    return where | places % layout.SLOTS_MAX


def _unmerged_fingerprints(store: Store, done: int, count: int, first: int) -> None:
    random = np.random.default_rng(count)
    for start in range(done, done + count, layout.SLOTS_MAX):
        take = min(layout.SLOTS_MAX, done + count - start)
        marks = random.bytes(take * layout.FINGERPRINT_BYTES)
        store.fingerprints.note_each(
            [marks[at : at + 16] for at in range(0, len(marks), 16)], _addresses(first, start, take).tolist()
        )
        store.checkpoint()
