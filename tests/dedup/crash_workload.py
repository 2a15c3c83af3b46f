"""What a store is put through while it is crashed.

The work is a list of `SCENES`, each a function of a `Run`; a new part of the store gets its scene added here. A scene
calls the store through the run, which keeps the models and notes before and after each call what the store owes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

import pytest

from dedup.consolidator import consolidate
from dedup.errors import Damaged, StoreFull
from dedup.gc import collect
from dedup.layout import fingerprint
from dedup.repair import repair
from dedup.retention import Policy
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import (
    Address,
    ContainerId,
    Record,
    VolumeId,
)
from tests.dedup.crash_checks import GroupModel, Owed, Promise, opened

_Result = TypeVar("_Result")

SLOTS: Final = 12
SEGMENT_BYTES: Final = 1500
UNMERGED: Final = 8
"""Small enough that the workload fills several containers and segments."""
LOG_BYTES: Final = 40 << 10
LOG_ENTRY_BYTES: Final = 11 << 10
"""So that some syncs are entries of the sync log, and others, for too much or a full log, of the files."""


def small_files(patch: pytest.MonkeyPatch) -> None:
    """Containers, segments and the sync log are full after a few records, and what memory takes of fingerprints."""
    patch.setattr("dedup.container.SLOTS_MAX", SLOTS)
    patch.setattr("dedup.metadata_journal.SEGMENT_BYTES_MAX", SEGMENT_BYTES)
    patch.setattr("dedup.fingerprint_index.UNMERGED_MAX", UNMERGED)
    patch.setattr("dedup.sync_log.SYNC_LOG_BYTES", LOG_BYTES)
    patch.setattr("dedup.sync_log.SYNC_LOG_ENTRY_BYTES_MAX", LOG_ENTRY_BYTES)


@dataclass
class Run:
    """One run of the workload. `mark` is told each new promise, in the order of the calls that it made."""

    path: Path
    mark: Callable[[Promise], None] = lambda promise: None
    models: dict[str, GroupModel] = field(default_factory=dict)
    owed: dict[str, Owed] = field(default_factory=dict)
    created: bool = False
    damaged: bool = False
    seed: int = 0
    opened: Store | None = None
    make_room: Callable[[], None] | None = None
    """Called when the store says that its disk is full; then it is asked again."""

    @property
    def promise(self) -> Promise:
        return Promise(self.created, tuple(self.owed.items()), self.damaged)

    @property
    def store(self) -> Store:
        assert self.opened is not None
        return self.opened

    def model(self, group: str = "g") -> GroupModel:
        return self.models[group]

    def block(self) -> bytes:
        """A block that there has not been before."""
        self.seed += 1
        return random.Random(self.seed).randbytes(4096)

    def copy(self, path: Path) -> Run:
        """The same in another place, with no store open."""
        models = {name: model.copy() for name, model in self.models.items()}
        return Run(path, lambda promise: None, models, dict(self.owed), self.created, self.damaged, self.seed)

    def _owe(self, group: str, **changes: object) -> None:
        self.owed[group] = replace(self.owed[group], **changes)  # type: ignore[arg-type]
        self.mark(self.promise)

    def _ask(self, call: Callable[[], _Result]) -> _Result:
        """StoreFull means that nothing was kept, and that it may be asked again."""
        try:
            return call()
        except StoreFull:
            if self.make_room is None:
                raise
            self.make_room()
            return call()

    # -- calls of the store ----------------------------------------------------------------------------------------

    def create(self) -> None:
        self._ask(lambda: Store.create(self.path))
        self.created = True
        self.mark(self.promise)

    def open(self) -> None:
        self.opened = self._ask(lambda: Store.open(self.path))
        for group in self.owed:
            self._owe(group, durable=self.store.group(group).durable)

    def close(self) -> None:
        """Durable is what a close that comes back leaves."""
        store, self.opened = self.store, None
        try:
            store.close()
        except StoreFull:
            if self.make_room is None:
                raise
            self.make_room()
            Store.open(self.path).close()
        for group, owed in self.owed.items():
            self._owe(group, durable=owed.received)

    def kill(self) -> None:
        """The process ends here; what was not synced stays where the kernel has it."""
        store, self.opened = self.opened, None
        if store is not None:
            store.abandon()

    def recover(self) -> None:
        """After a crash: opens the store, and adds to what it holds. The models forget what it does not hold."""
        store = self.opened = opened(self.path, self.promise)
        self.damaged = False
        for name in self.owed:
            group, model = store.group(name), self.models[name]
            held = group.held
            history = {seq: state for seq, state in model.history.items() if seq <= held}
            content, paths = history.get(held, ({}, {}))
            self.models[name] = GroupModel(
                held, next_volume=group.next_volume, content=dict(content), paths=dict(paths), history=history
            )
            names = {found.name for found in group.reader().snapshots() if found.kind == "snapshot"}
            self.owed[name] = Owed(held, held, held, frozenset(names), thinned=self.owed[name].thinned)
            self.mark(self.promise)
            made = self.model(name).create("made-after-recovery.img", 5000)
            self.ingest([made, self.model(name).write(made.volume, 0, self.block())], name)
        self.sync()

    def group(self, name: str) -> None:
        """A group is made."""
        self.models[name] = GroupModel()
        self.owed[name] = Owed()
        self._ask(lambda: self.store.group(name))

    def ingest(self, records: Sequence[Record], group: str = "g") -> None:
        self._owe(group, issued=records[-1].seq)
        self._ask(lambda: self.store.group(group).ingest(records))
        self._owe(group, received=self.store.group(group).held)

    def seal(self, container: ContainerId) -> None:
        store = self.store
        self._ask(lambda: seal(store.storage, self.path / "containers", container, None))
        store.pool.forget(container)

    def place(self, blocks: Sequence[bytes]) -> None:
        """Blocks that no record will name."""
        store, marks = self.store, [fingerprint(block) for block in blocks]
        addresses = self._ask(lambda: store.fine_journal.append(blocks, marks))
        for mark, where in zip(marks, addresses.tolist(), strict=True):
            store.fingerprints.note(mark, Address(where))

    def collect(self) -> None:
        self._ask(lambda: collect(self.store))

    def consolidate(self, group: str = "g") -> None:
        """By the default policy, at the time of the last record."""
        writer, model, policy = self.store.group(group), self.models[group], Policy()
        named = {snapshot.seq for snapshot in writer.reader().snapshots()}
        old = {seq for seq in model.history if writer.time - model.times[seq] > policy.every_write_ns}
        thinned = self.owed[group].thinned | (old - named - {model.seq})
        self._owe(group, thinned=frozenset(thinned))
        self._ask(lambda: consolidate(writer, policy, writer.time))
        self.settle()

    def use_journal(self, name: str, granularity_ns: int = -1, group: str = "g") -> None:
        """What follows goes to that data journal, a new one if there is a granularity."""
        writer = self.store.group(group)
        if granularity_ns >= 0:
            self._ask(lambda: writer.create_journal(name, granularity_ns))
        self._ask(lambda: writer.use_journal(name))
        self.settle()

    def break_index(self) -> None:
        """LMDB's file is overwritten, after a clean close."""
        self.close()
        self.damaged = True
        self.mark(self.promise)
        storage = Storage()
        fd = storage.open(self.path / "index" / "data.mdb", os.O_RDWR)
        try:
            self._ask(lambda: storage.pwritev(fd, [b"broken" * 2000], 0))
            storage.datasync(fd)
        finally:
            storage.close(fd)

    def repair(self) -> None:
        report = self._ask(lambda: repair(self.path))
        if not report.ok:
            raise Damaged("the repair says that the store is still damaged")
        self.damaged = False
        self.mark(self.promise)

    def settle(self) -> None:
        """Notes what the store calls durable by now."""
        for group in self.owed:
            self._owe(group, durable=self.store.group(group).durable)

    def sync(self) -> None:
        self.store.sync()
        self.settle()

    def checkpoint(self) -> None:
        self._ask(self.store.checkpoint)
        self.settle()

    def name(self, name: str, at: str = "latest", group: str = "g") -> None:
        """A snapshot is made."""
        owed = self.owed[group]
        self._owe(group, unsettled=owed.unsettled | {name})
        self._ask(lambda: self.store.group(group).create_snapshot(name, at))
        self._owe(group, unsettled=owed.unsettled, names=owed.names | {name})
        self.settle()

    def forget(self, name: str, group: str = "g") -> None:
        """A snapshot is deleted."""
        owed = self.owed[group]
        self._owe(group, unsettled=owed.unsettled | {name}, names=owed.names - {name})
        self._ask(lambda: self.store.group(group).delete_snapshot(name))
        self._owe(group, unsettled=owed.unsettled)
        self.settle()


# -- the scenes --------------------------------------------------------------------------------------------------------

A, B, B2 = VolumeId(1), VolumeId(2), VolumeId(4)


def birth(run: Run) -> None:
    run.create()
    run.open()
    run.group("g")


def first_reconcile(run: Run) -> None:
    model = run.model()
    run.ingest([model.start(1)])
    run.ingest([model.create("a.img", 40_000), model.create("b.img", 9_000)])
    same = run.block()
    run.ingest([model.reconcile(A, block * 4096, run.block()) for block in range(3)])
    run.ingest([model.reconcile(A, 16384, same + same), model.reconcile(B, 0, same), model.reconciled()])
    run.sync()


def writes(run: Run) -> None:
    model = run.model()
    run.ingest([model.write(A, 0, run.block()), model.write(B, 4096, run.block())])
    run.ingest([model.write(A, 5000, b"in part" * 99)])
    run.sync()
    twin = run.block()
    run.ingest([model.write(A, 8192, twin), model.write(B, 0, twin + bytes(4096)), model.flush(A)])
    run.ingest([model.write(A, 12_000, run.block() + run.block()[:3000])])
    run.ingest([model.write(B, 0, run.block())])
    run.sync()


def a_snapshot(run: Run) -> None:
    model = run.model()
    run.ingest([model.write(A, 0, run.block())])
    run.name("monday")
    run.ingest([model.write(A, 0, run.block())])


def every_kind(run: Run) -> None:
    model = run.model()
    run.ingest([model.resize(A, 10_001), model.write(A, 20_000, b"after the cut"), model.attributes(A, 0o600)])
    refused = model.write(B, 4096, run.block())
    run.ingest([refused])
    run.ingest([model.correct(B, refused.seq, 9_000, 4096, b"the truth" * 50), model.heartbeat()])
    run.ingest([model.aggregate(A, [(0, run.block()), (4096 + 100, b"x" * 500), (32_768, run.block())])])
    run.ingest([model.bookmark("a-bookmark")])
    run.sync()
    run.ingest([model.flush(B), model.heartbeat(), model.resize(B, 30_000)])


def another_group(run: Run) -> None:
    run.group("h")
    model = run.model("h")
    run.ingest([model.start(1), model.create("c.img", 5000), model.write(VolumeId(1), 100, run.block())], "h")
    run.ingest([model.reconciled(), model.write(VolumeId(1), 0, run.block())], "h")
    run.sync()


def a_kill(run: Run) -> None:
    model = run.model()
    run.ingest([model.write(A, 4096, run.block()), model.write(B, 8192, run.block())])
    run.ingest([run.model("h").write(VolumeId(1), 4096, run.block())], "h")
    run.kill()
    run.open()


def full_containers_and_segments(run: Run) -> None:
    model = run.model()
    for number in range(5):
        run.ingest([model.write(A, block * 4096, run.block()) for block in range(number, number + 5)])
        run.ingest([model.write(A, number * 3000, b"part" * 100 * number + b"!")])
        if number % 2:
            run.sync()
    run.checkpoint()
    run.ingest([model.write(B, 0, b"".join(run.block() for _ in range(SLOTS + 3)))])


def names_of_volumes(run: Run) -> None:
    model = run.model()
    made = model.create("new.img")
    run.ingest([made, model.write(made.volume, 0, run.block()), model.rename(made.volume, "b.img")])
    run.ingest([model.create("b2.img", 100), model.rename(A, "moved.img")])
    run.checkpoint()
    run.ingest([model.retire(made.volume), model.write(A, 0, run.block())])
    run.sync()


def sealing(run: Run) -> None:
    run.checkpoint()
    store = run.store
    taking = {store.base_journal.container, store.fine_journal.container}
    for number in range(1, 4):
        if number not in taking:
            run.seal(ContainerId(number))
    run.ingest([run.model().write(A, 100, b"completed from a sealed block")])
    run.sync()


def garbage(run: Run) -> None:
    """Blocks that were placed for records which never got into the journal are collected, and come again."""
    model, store = run.model(), run.store
    blocks = [run.block() for _ in range(SLOTS + 5)]
    run.place(blocks)
    run.ingest([model.write(A, 0, run.block())])
    store.fine_journal.rotate()
    run.checkpoint()
    run.collect()
    run.ingest([model.write(A, 4096, blocks[0] + blocks[-1])])
    run.sync()


def names_of_points(run: Run) -> None:
    model = run.model()
    run.name("early", "seq=9")
    run.ingest([model.write(A, 0, run.block()), model.bookmark("another")])
    run.forget("monday")
    run.name("late")


def two_journals(run: Run) -> None:
    """One that keeps every write, and one that keeps a point a minute."""
    model = run.model()
    run.use_journal("minutes", 60 * 10**9)
    for _ in range(2):
        model.elapsed_ns += 40 * 10**9
        run.ingest([model.write(A, 0, run.block()), model.flush(A), model.write(A, 5000, run.block())])
    run.use_journal("fine")
    run.ingest([model.write(A, 0, run.block())])
    run.use_journal("minutes")
    run.ingest([model.write(B2, 100, run.block())])
    run.sync()
    run.use_journal("fine")


def thinning(run: Run) -> None:
    """Hours go by, and days: history is consolidated, and what was is consolidated again."""
    model = run.model()
    for hours in (3, 72):
        for minute in range(3):
            model.elapsed_ns += 20 * 10**9
            run.ingest([model.write(A, minute * 4096, run.block()), model.write(A, 6000, run.block())])
            run.ingest([model.flush(A), model.write(B2, 0, run.block())])
        model.elapsed_ns += hours * 3600 * 10**9
        run.ingest([model.heartbeat()])
        run.consolidate()
        run.ingest([model.write(A, 0, run.block())])
        run.collect()
    run.sync()


def a_clean_end(run: Run) -> None:
    run.ingest([run.model().write(A, 0, run.block())])
    run.close()
    run.open()


def an_outage(run: Run) -> None:
    model = run.model()
    run.ingest([model.outage("an outage"), model.reconcile(A, 0, run.block()), model.write(A, 9000, run.block())])
    run.sync()
    run.ingest([model.reconcile(A, 4096, run.block() + run.block()), model.reconciled()])
    run.ingest([model.write(A, 4096, run.block())])
    run.sync()


def a_long_tail(run: Run) -> None:
    """Much that is not synced, over several segments and containers, then a kill."""
    model = run.model()
    for number in range(6):
        run.ingest([model.write(A, (number + at) * 4096, run.block()) for at in range(4)])
        run.ingest([run.model("h").write(VolumeId(1), number * 1000, run.block()[:2000])], "h")
    run.kill()
    run.open()
    run.ingest([model.write(A, 0, run.block())])


def a_broken_index(run: Run) -> None:
    run.ingest([run.model().write(A, 4096, run.block())])
    run.break_index()
    run.repair()
    run.open()


def the_end(run: Run) -> None:
    run.ingest([run.model().write(A, 0, run.block())])
    run.close()


Scene = Callable[[Run], None]
SCENES: Final[tuple[Scene, ...]] = (
    birth,
    first_reconcile,
    writes,
    a_snapshot,
    every_kind,
    another_group,
    a_kill,
    full_containers_and_segments,
    names_of_volumes,
    sealing,
    garbage,
    names_of_points,
    two_journals,
    thinning,
    a_clean_end,
    an_outage,
    a_long_tail,
    a_broken_index,
    the_end,
)
