"""Makes `v1-plain`: one group of format version 1 with every kind of record, as a killed writer left it.

Run at commit 48cb251; see README.md of this directory.
"""

from __future__ import annotations

import random

from dedup import layout
from dedup.container import RawContainerWriter
from dedup.journal_reader import first_position, scan
from dedup.metadata_journal import extents_of
from dedup.moment import rfc3339
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import BLOCK_BYTES, ContainerId, JournalId, TimeNs
from tests.golden.history import History, block, noise
from tests.golden.workshop import bench, half_an_entry, keep

GROUP = "main"
LONG = "deep/" + "x" * 250 + "/" + "y" * 250 + "/disk.img"
"""Longer than a key of LMDB may be."""
MIB = 1 << 20


def first_life(store: Store, history: History) -> None:
    """Initial sync with an application writing, then every kind of record; several checkpoints."""
    group = store.group(GROUP)
    history.refuse("seq=1", "before the first recovery point")
    history.refuse("2001-01-01T00:00:00Z", "before the first recovery point")
    history.agent_starts()
    history.reconcile_begins("initial")
    history.create("disk.img", 2 * MIB + 5 * BLOCK_BYTES, 0o600, 1000, 1000)
    history.create("db/table.ibd", 3000)
    history.create("empty")
    history.reconcile("disk.img", 0, b"".join(block(n) for n in range(32)) + noise(1, 8))
    history.write("disk.img", 10_000, b"while it is being synced")
    history.reconcile("db/table.ibd", 0, noise(9)[:3000])
    history.reconcile_ends()
    history.ask("base", history.seq)
    group.ingest(history.take())
    store.checkpoint()

    history.flush("disk.img")
    history.write("disk.img", 2 * MIB, block(100) + block(101))
    history.write("disk.img", 5 * BLOCK_BYTES, block(7))  # a duplicate
    history.write("disk.img", 6 * BLOCK_BYTES + 100, b"partial" * 10)
    history.write("disk.img", 8 * BLOCK_BYTES - 3, b"crosses")
    history.write("db/table.ibd", 2998, b"grows past its end")
    history.write_zeros("disk.img", 20 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    history.write_zeros("disk.img", 30 * BLOCK_BYTES + 7, 2 * BLOCK_BYTES)
    history.write("disk.img", 2 * BLOCK_BYTES, bytes(BLOCK_BYTES))
    last = history.heartbeat()
    history.wait(2)
    group.ingest(history.take())
    history.heartbeat()
    history.ask_time(last, 1_000_000_000)
    history.aggregate(("disk.img", 50 * BLOCK_BYTES, block(50) + b"tail"), ("empty", 10, b"not any more"), seqs=3)
    history.aggregate(("db/table.ibd", 0, b"A ROW\n"), seqs=2)
    history.resize("disk.img", 2 * MIB + 100)
    history.resize("disk.img", MIB + 1)
    history.resize("disk.img", 2 * MIB + BLOCK_BYTES)
    history.resize("empty", 0)
    history.attributes("disk.img", 0o640, 1000, 33)
    history.ask("bookmark=before the upgrade", history.bookmark("before the upgrade"))
    history.bookmark("forgotten")
    group.ingest(history.take())
    store.checkpoint()
    group.delete_snapshot("forgotten")
    history.forget("forgotten")
    history.refuse("forgotten", "has no bookmark or snapshot")
    names(store, history)
    deltas(store, history)


def names(store: Store, history: History) -> None:
    """Namespace changes, snapshots of them, and writes that the source refused."""
    group = store.group(GROUP)
    at = history.seq
    group.create_snapshot("monday", f"seq={at}")
    history.snapshot("monday", at)
    group.create_snapshot("only the table", f"seq={at - 3}", "db/table.ibd")
    history.snapshot("only the table", at - 3, "db/table.ibd")
    history.ask("monday", at)
    history.create("disk.img.new", 4 * BLOCK_BYTES)
    history.write("disk.img.new", 0, noise(2, 2))
    history.rename(("disk.img.new", "Übersicht/größe.img"))
    history.create("a", 100)
    history.create("b", 200)
    history.write("a", 0, b"a" * 100)
    history.write("b", 0, b"b" * 5000)
    history.rename(("a", "b"), ("b", "a"))
    history.rename(("a", "empty"))
    history.create(LONG, 5)
    history.write(LONG, 3, b"long")
    history.retire("b")
    history.create("b", 8)
    history.write("b", 0, b"another b")
    group.ingest(history.take())
    store.checkpoint()
    refused = history.write("disk.img", 3 * BLOCK_BYTES, noise(3))
    before = refused - 1
    history.write("b", 0, b"meanwhile")
    history.correct("disk.img", refused, 2 * MIB + BLOCK_BYTES, 3 * BLOCK_BYTES, block(3))
    history.ask_time(before)
    history.refuse(f"seq={refused}", "in a gap")
    short = history.write("b", 20, b"would have made it longer")
    history.correct("b", short, 9, 9, b"")
    group.ingest(history.take())
    history.rename((LONG, "short"))
    group.ingest(history.take())
    store.sync()


def deltas(store: Store, history: History) -> None:
    """More versions of a leaf than lie on a whole one as deltas, and a change too large for one."""
    group = store.group(GROUP)
    for number in range(10):
        history.write("disk.img", number * BLOCK_BYTES, block(200 + number))
        history.write("disk.img", 400 * BLOCK_BYTES + number, bytes([65 + number]))
        group.ingest(history.take())
        store.checkpoint()
    history.write("disk.img", 100 * BLOCK_BYTES, b"".join(block(n % 7) for n in range(150)))
    history.flush("disk.img")
    group.ingest(history.take())
    store.fine_journal.append([block(900), block(901)], [layout.fingerprint(block(n)) for n in (900, 901)])
    store.checkpoint()
    for number in range(5):  # past the last checkpoint of this life
        history.write("db/table.ibd", number * 1000, b"%d more\n" % number)
    group.ingest(history.take())


def seal_some(store: Store) -> None:
    """Of the containers of the life before: the base sealed whole, the other without the slots that nothing names.

    The last group of the base does not compress, and is stored as it is.
    """
    directory = store.path / layout.CONTAINERS_NAME
    named: dict[int, set[int]] = {}
    journal = store.path / layout.GROUPS_NAME / GROUP / layout.JOURNAL_NAME
    for entry in scan(store.storage, journal, first_position(store.storage, journal)):
        for extent in extents_of(entry.raw):
            for address in extent.addresses.tolist():
                if address:
                    named.setdefault(address >> layout.SLOT_BITS, set()).add(address & layout.SLOT_MASK)
    first, second = sorted(named)[:2]
    seal(store.storage, directory, ContainerId(first), None)
    seal(store.storage, directory, ContainerId(second), named[second])


def busy(store: Store, history: History) -> None:
    """Many small writes all over, as applications make them."""
    group = store.group(GROUP)
    chance = random.Random(20)
    for number in range(120):
        path = chance.choice(["disk.img", "disk.img", "db/table.ibd", "short"])
        size = len(history.held[history.volume(path)].content)
        offset = chance.randrange(size + 1)
        history.wait(chance.random())
        match chance.randrange(8):
            case 0:
                history.flush(path)
            case 1:
                history.write(path, offset // BLOCK_BYTES * BLOCK_BYTES, block(chance.randrange(60)))
            case 2:
                history.write_zeros(path, offset, chance.randrange(1, 9000))
            case 3:
                history.aggregate((path, offset, b"%d" % number), ("b", number, b"*"), seqs=chance.randrange(2, 6))
            case 4:
                history.heartbeat()
            case _:
                history.write(path, offset, b"%d " % number * chance.randrange(1, 900))
        if number % 7 == 0:
            group.ingest(history.take())
        if number % 40 == 39:
            group.ingest(history.take())
            store.checkpoint()
    history.bookmark("a busy day")
    group.ingest(history.take())


def second_life(store: Store, history: History) -> None:
    """After a kill: a gap until the resync has ended, and a clock that steps back."""
    group = store.group(GROUP)
    before = history.seq
    history.wait(30)
    gap = history.agent_starts()
    history.reconcile("disk.img", 11 * BLOCK_BYTES, block(300) + block(7))
    history.write("disk.img", 12 * BLOCK_BYTES + 1, b"in the gap")
    history.wait(5)
    end = history.reconcile_ends()
    history.ask_time(before)
    history.ask_time(end)
    history.refuse(f"seq={gap}", "in a gap")
    history.refuse("2023-11-14T22:13:52Z", "in a gap")
    group.ingest(history.take())
    store.checkpoint()
    busy(store, history)
    history.wait(10)
    stepped = history.write("disk.img", 0, b"before the clock stepped back")
    history.clock_steps_back(8)
    history.write("disk.img", 0, b"after it")
    history.wait(20)
    history.ask_time(history.write("disk.img", 0, b"long after it"))
    history.refuse(_time(history, stepped), "the agent's clock stepped back")
    history.ask(f"seq={stepped}", stepped)
    group.ingest(history.take())
    store.checkpoint()
    history.agent_starts(clean=True)
    history.write("short", 0, b"after a clean start")
    history.reconcile_begins("the queue overflowed")
    history.reconcile("b", 0, b"B")
    history.reconcile_ends()
    group.ingest(history.take())
    store.checkpoint()
    group.create_snapshot("tuesday")
    history.snapshot("tuesday", history.seq)


def third_life(store: Store, history: History) -> None:
    """Past the last checkpoint: a tail in the journal, of every sort, that only a replay finds."""
    group = store.group(GROUP)
    history.write("disk.img", 60 * BLOCK_BYTES, block(400) + noise(4))
    history.create("new/in the tail", 10)
    history.aggregate(("new/in the tail", 2, b"tail"), ("b", 4096, block(401)), seqs=4)
    history.resize("disk.img", MIB + 7)
    history.rename(("new/in the tail", "short"))
    flushed = history.flush("short")
    history.ask("latest~flush", flushed)
    history.write("disk.img", MIB, b"the last write")
    history.heartbeat()
    history.ask("latest", history.seq)
    history.refuse("seq=9999", "after the last recovery point")
    history.refuse("2099-01-01T00:00:00Z", "after the last recovery point")
    group.ingest(history.take())


def _time(history: History, seq: int) -> str:
    return rfc3339(TimeNs(history.moments[seq][0]))


def main() -> None:
    history = History()
    with bench() as path:
        Store.create(path)
        store = Store.open(path)
        first_life(store, history)
        store.abandon()
        store = Store.open(path)
        seal_some(store)
        second_life(store, history)
        store.close()
        store = Store.open(path)
        third_life(store, history)
        store.fine_journal.append([block(902)], [layout.fingerprint(block(902))])
        store.abandon()
        half_an_entry(path, GROUP, history)
        (path / layout.CONTAINERS_NAME / (layout.container_name(ContainerId(3)) + layout.TEMPORARY_SUFFIX)).write_bytes(
            b"what a crash left of sealing"
        )
        spent = store._allocate()  # made, and then the writer was killed
        RawContainerWriter.create(Storage(), path / layout.CONTAINERS_NAME, spent, JournalId(1)).close()
        keep(path, "v1-plain", {GROUP: history})


if __name__ == "__main__":
    main()
