"""The index and the journal that so much history leaves, made in seconds: its blocks have addresses and no bytes.

For each MiB one journal entry (a write behind the one before it), 256 pointers in checkpoints as due, and 256 random
fingerprints in the index, put in sorted order by slices; the last ones, as many as stay out of LMDB, are noted and
taken in by checkpoints, so that each further checkpoint has to put older ones there. The containers are sparse files of
their true length, whose blocks nothing reads: a random fingerprint is never found again.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from dedup import layout
from dedup.fingerprint_index import UNMERGED_MAX
from dedup.fingerprint_table import SLICES
from dedup.metadata_journal import EntryKind, Logged, LoggedExtent
from dedup.store import Store
from dedup.types import BLOCK_BYTES, FINE_JOURNAL, ContainerForm, ContainerId, TimeNs
from tests.benchmarks.recorded_stream import VOLUME, stamp

MIB: Final = 1 << 20
BLOCKS_PER_MIB: Final = MIB // BLOCK_BYTES


def write_history(store: Store, group_name: str, mib: int) -> None:
    """Adds history of `mib` MiB, at most 65536 GiB, to the store, which goes on behind it."""
    containers = -(-mib * BLOCKS_PER_MIB // layout.SLOTS_MAX)
    first = store.settle().next_container
    store.spent(ContainerId(first + containers - 1))
    _containers(store, first, containers)
    _entries(store, group_name, mib, first)
    store.settle()
    blocks = mib * BLOCKS_PER_MIB
    unmerged = min(blocks // 2, UNMERGED_MAX)
    _stored_fingerprints(store, blocks - unmerged, first)
    _unmerged_fingerprints(store, blocks - unmerged, unmerged, first)


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


def _stored_fingerprints(store: Store, count: int, first: int) -> None:
    random = np.random.default_rng(count)
    database = store.index.db["fingerprints"]
    done = 0
    for number in range(SLICES):
        take = count * (number + 1) // SLICES - done
        marks = random.integers(0, (1 << 64) // SLICES, (take, 2), dtype=np.uint64)
        marks[:, 0] += np.uint64(number * ((1 << 64) // SLICES))
        marks = marks[np.argsort(marks[:, 0])].astype(">u8")
        keys = marks.tobytes()
        places = np.arange(done, done + take, dtype=np.uint64)
        where = (np.uint64(first) + places // layout.SLOTS_MAX) << np.uint64(layout.SLOT_BITS)
        values = (where | places % layout.SLOTS_MAX).astype("<u8").tobytes()
        with store.index.write() as txn:
            store.fingerprints.announce(txn, number, keys)
            txn.cursor(database).putmulti(
                [(keys[at * 16 : at * 16 + 16], values[at * 8 : at * 8 + 8]) for at in range(take)], append=True
            )
        done += take
    store.fingerprints.reread()


def _unmerged_fingerprints(store: Store, done: int, count: int, first: int) -> None:
    random = np.random.default_rng(count)
    for start in range(done, done + count, layout.SLOTS_MAX):
        take = min(layout.SLOTS_MAX, done + count - start)
        marks = random.bytes(take * layout.FINGERPRINT_BYTES)
        places = np.arange(start, start + take, dtype=np.uint64)
        where = (np.uint64(first) + places // layout.SLOTS_MAX) << np.uint64(layout.SLOT_BITS)
        store.fingerprints.note_each(
            [marks[at : at + 16] for at in range(0, len(marks), 16)], (where | places % layout.SLOTS_MAX).tolist()
        )
        store.checkpoint()
