"""Makes `v1-kept`: a store of format version 1 whose history was thinned and whose containers were collected.

Five weeks of one group, in bursts; a windowed data journal; a policy; three consolidations with a collection after the
second, so that there are segments of several generations, raw ones behind them, and a base that has moved.
The commit is in the store's JSON; see README.md of this directory.
"""

from __future__ import annotations

import random
import time

from dedup.consolidator import consolidate
from dedup.gc import collect
from dedup.group_writer import GroupWriter
from dedup.retention import AtLimit, Policy, save_policy
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import BLOCK_BYTES, TimeNs
from tests.golden.history import History, block
from tests.golden.workshop import bench, half_an_entry, keep, thinned

GROUP = "main"
HOUR_NS = 3600 * 10**9
POLICY = Policy(HOUR_NS, 6 * HOUR_NS, 48 * HOUR_NS, 20 * 24 * HOUR_NS, 1 << 40, 1 << 41, AtLimit.THIN)
VOLUMES = ("disk.img", "db/table.ibd")


def begin(group: GroupWriter, history: History) -> None:
    history.agent_starts()
    history.create("disk.img", 100 * BLOCK_BYTES, 0o600, 1000, 1000)
    history.create("db/table.ibd", 3000)
    history.reconcile("disk.img", 0, b"".join(block(n) for n in range(30)))
    history.reconcile_ends()
    group.ingest(history.take())
    group.store.checkpoint()


def burst(group: GroupWriter, history: History, chance: random.Random, writes: int, pause: float) -> None:
    """Some minutes of work: every few writes a flush, now and then another sort of record."""
    for number in range(writes):
        history.wait(chance.random() * pause)
        path = chance.choice(VOLUMES)
        size = len(history.held[history.volume(path)].content)
        match chance.randrange(9):
            case 0 | 1:
                history.flush(path)
            case 2:
                history.resize(path, chance.randrange(BLOCK_BYTES, size + BLOCK_BYTES))
            case 3:
                first, second = chance.randrange(8), chance.randrange(8)
                history.aggregate(
                    (path, first * BLOCK_BYTES, b"%d" % number), (path, (second + 8) * BLOCK_BYTES, b"+"), seqs=3
                )
            case 4:
                history.write_zeros(path, chance.randrange(size // BLOCK_BYTES + 1) * BLOCK_BYTES, 2 * BLOCK_BYTES)
            case _:
                at = chance.randrange(size // BLOCK_BYTES + 1) * BLOCK_BYTES
                history.write(path, at, block(chance.randrange(10_000)))
                history.write(path, at + 5, b"%d " % number * 30)
        group.ingest(history.take())


def weeks(group: GroupWriter, history: History, chance: random.Random) -> None:
    """History to be thinned: expired, daily, hourly, and by the minute."""
    for day in range(33):
        history.wait(chance.randrange(60_000, 110_000))
        burst(group, history, chance, 4, 400.0)
        if day == 3:
            history.bookmark("before the upgrade")
            group.ingest(history.take())
        if day == 20:
            at = history.seq
            group.create_snapshot("monday", f"seq={at}")
            history.snapshot("monday", at)
        if day == 22:
            at = history.write("disk.img", 0, b"this name expires")
            group.ingest(history.take())
            group.create_snapshot("for a week", f"seq={at}", keep_ns=7 * 24 * HOUR_NS)
        if day == 24:
            history.rename(("db/table.ibd", "moved"), ("disk.img", "db/table.ibd"))
            history.rename(("moved", "disk.img"))
            history.create("gone again", 5)
            history.retire("gone again")
            group.ingest(history.take())
        if day == 26:
            refused = history.write("disk.img", 4096, b"refused")
            size = len(history.held[history.volume("disk.img")].content)
            history.correct("disk.img", refused, size, 4096, b"the truth")
            group.ingest(history.take())
        if day == 28:
            history.clock_steps_back(2 * 3600)
        if day == 30:
            history.wait(600)
            history.agent_starts()
            history.reconcile("disk.img", 0, block(3))
            history.wait(60)
            history.reconcile_ends()
            group.ingest(history.take())
        if day % 5 == 0:
            group.store.checkpoint()


def last_days(group: GroupWriter, history: History, chance: random.Random) -> None:
    """Hours of work, part of it routed to a journal with one point a minute."""
    group.create_journal("minutes", 60 * 10**9)
    for hour in range(12):
        history.wait(1800)
        group.use_journal("minutes" if hour % 3 else "fine")
        burst(group, history, chance, 10, 90.0)
    group.use_journal("fine")
    group.store.checkpoint()


def main() -> None:
    history, chance = History(), random.Random(33)
    # Ages count from the group's last record; what expires by the host's clock is past its time.
    now = TimeNs(time.time_ns() + 30 * 24 * HOUR_NS)
    with bench() as path:
        Store.create(path)
        save_policy(Storage(), path, POLICY)
        store = Store.open(path)
        group = store.group(GROUP)
        begin(group, history)
        weeks(group, history, chance)
        store.close()
        store = Store.open(path)
        group = store.group(GROUP)
        print(consolidate(group, POLICY, now))
        last_days(group, history, chance)
        print(consolidate(group, POLICY, now))
        print(collect(store))
        history.wait(3 * 3600)
        burst(group, history, chance, 20, 60.0)
        print(consolidate(group, POLICY, now))
        burst(group, history, chance, 12, 1.0)
        store.checkpoint()
        group.use_journal("minutes")  # whose window is still open at the end
        burst(group, history, chance, 6, 1.0)
        thinned(history, group.reader())
        store.abandon()
        half_an_entry(path, GROUP, history)
        keep(path, "v1-kept", {GROUP: history})


if __name__ == "__main__":
    main()
