"""What a store owes after a crash: promises noted while it works, and the check that they are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dedup.damage import Report
from dedup.errors import Damaged, NotAStore
from dedup.image import Image
from dedup.repair import repair
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    Attributes,
    Bookmark,
    Epoch,
    EpochStart,
    ReconcileBegin,
    ReconcileEnd,
    Record,
    Seq,
    VolumeId,
)
from dedup.verify import verify
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment

LOST_TEXT: Final = "a lost block"


@dataclass(frozen=True, slots=True)
class Owed:
    """What the store owes of one group: the seqs that it was given, has taken, and has called durable; the names that
    it must have, and those that it is just making or forgetting."""

    issued: int = 0
    received: int = 0
    durable: int = 0
    names: frozenset[str] = frozenset()
    unsettled: frozenset[str] = frozenset()
    thinned: frozenset[int] = frozenset()
    """Moments that a consolidation may have thinned out."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What holds from some moment of a run on: whether there is a store, and what it owes of each group."""

    created: bool = False
    groups: tuple[tuple[str, Owed], ...] = ()
    damaged: bool = False
    """Whether the store may need a repair before it opens."""


class GroupModel(Model):
    """With the records that the store's own model has no use for."""

    def copy(self) -> GroupModel:
        """One that goes its own way from here."""
        return replace(
            self, content=dict(self.content), paths=dict(self.paths), history=dict(self.history), times=dict(self.times)
        )

    def attributes(self, volume: VolumeId, mode: int) -> Attributes:
        record = Attributes(*self._next(), volume, mode, 1, 2)
        self._keep()
        return record

    def bookmark(self, name: str) -> Bookmark:
        record = Bookmark(*self._next(), name)
        self._keep()
        return record

    def start(self, epoch: int) -> EpochStart:
        record = EpochStart(*self._next(), Epoch(epoch), clean=False)
        self._keep()
        return record

    def outage(self, reason: str) -> ReconcileBegin:
        record = ReconcileBegin(*self._next(), reason)
        self._keep()
        return record

    def reconciled(self) -> ReconcileEnd:
        record = ReconcileEnd(*self._next())
        self._keep()
        return record


def check_after_crash(
    path: Path,
    promise: Promise,
    models: dict[str, GroupModel],
    *,
    killed: bool,
    moments: int = 1 << 30,
    may_be_lost: bool = False,
) -> None:
    """The store at `path` opens, owes what was promised and pays it, goes on, and is whole when it is closed.

    `killed`: what was received is owed too. `moments`: how many of each group's are compared, the last ones always.
    `may_be_lost`: a block that could not be read when a part of it was written to is lost, and said to be.
    """
    check = _Moments(may_be_lost)
    try:
        store = opened(path, promise)
    except NotAStore:
        assert not promise.created
        return
    going = {}
    for name, owed in promise.groups:
        group = store.group(name)
        least = owed.received if killed else owed.durable
        assert least <= group.held <= owed.issued, f"{name}: {least} <= held {group.held} <= {owed.issued}"
        assert group.durable == group.held
        model = models[name]
        assert group.held == 0 or group.held in model.history, f"{name}: only a part of seq {group.held} is held"
        kept = sorted(seq for seq in model.history if seq <= group.held)
        for seq in _some_of(kept, moments):
            check(store, name, model, seq, owed.thinned)
        _check_names(store, name, owed, model)
        going[name] = _go_on(store, name, model, group.held)
    store.sync()
    for name, model in going.items():
        check(store, name, model, model.seq)
    store.close()
    report = verify(path, read_data=True)
    assert report.ok or (may_be_lost and _only_lost(report)), report
    store = Store.open(path)
    for name, model in going.items():
        assert store.group(name).held == model.seq
        check(store, name, model, model.seq)
    store.close()


def opened(path: Path, promise: Promise) -> Store:
    """The store, repaired first if it was damaged and says so."""
    try:
        return Store.open(path)
    except Damaged:
        if not promise.damaged:
            raise
        assert repair(path).ok
        return Store.open(path)


def _some_of(seqs: list[int], most: int) -> list[int]:
    return seqs if len(seqs) <= most else seqs[:: -(-2 * len(seqs) // most)] + seqs[-most // 2 :]


class _Moments:
    """Compares moments with the model, block by block where one may be lost."""

    def __init__(self, may_be_lost: bool) -> None:
        self._may_be_lost = may_be_lost

    def __call__(
        self, store: Store, name: str, model: GroupModel, seq: int, thinned: frozenset[int] = frozenset()
    ) -> None:
        reader = store.group(name).reader()
        found = reader.view(Seq(seq)).state.held
        if seq in thinned and found != seq:
            # Then the last moment before it that was kept stands for it.
            assert found < seq and (not found or found in model.history)
            return
        assert found == seq
        try:
            check_moment(reader, model, seq)
        except Damaged:
            if not self._may_be_lost:
                raise
            for volume, data in model.history[seq][0].items():
                image = reader.image(volume, Seq(seq))
                for at in range(0, len(data), BLOCK_BYTES):
                    self._check_block(image, at, data[at : at + BLOCK_BYTES])

    def _check_block(self, image: Image, at: int, data: bytes) -> None:
        try:
            found = image.read(at, len(data))
        except Damaged as damage:
            assert LOST_TEXT in str(damage)
        else:
            assert found == data


def _only_lost(report: Report) -> bool:
    found = [damage.what for check in report.checks for damage in check.damage]
    return all(LOST_TEXT in what for what in found)


def _check_names(store: Store, name: str, owed: Owed, model: GroupModel) -> None:
    found = {snapshot.name for snapshot in store.group(name).reader().snapshots() if snapshot.kind == "snapshot"}
    assert owed.names <= found <= owed.names | owed.unsettled
    store.group(name).reader().points()


def _go_on(store: Store, name: str, model: GroupModel, held: Seq) -> GroupModel:
    """A few more records of every way that a block can come; the model with them, as it was at `held` before."""
    content, paths = model.history.get(held, ({}, {}))
    going = GroupModel(held, next_volume=store.group(name).next_volume, content=dict(content), paths=dict(paths))
    made = going.create("made-after.img", 5000)
    records: list[Record] = [made, going.write(made.volume, 3000, b"after the crash" * 300)]
    for volume, data in content.items():
        records.append(going.write(volume, max(0, len(data) - 100), b"goes on" * 20))
        if data:
            records.append(going.write(volume, 4096, data[:4096].ljust(4096, b"\0")))
    store.group(name).ingest(records)
    return going
