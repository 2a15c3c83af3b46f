"""Runs of fingerprints are made, merged and emptied; a crash comes at every file operation of that."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dedup import fingerprint_index
from dedup.catalog import Index
from dedup.fingerprint_index import FingerprintIndex
from dedup.fingerprint_runs import run_named
from dedup.layout import address, fingerprint
from dedup.storage import Storage
from dedup.types import Address, ContainerId
from dedup.watermark import Watermark
from tests.dedup.crash_disk import ALL, CORNERS, Disk, some
from tests.dedup.crash_storage import Event, Recorder, recording, unsynced

CONTAINER = ContainerId(7)


@dataclass(frozen=True, slots=True)
class Promise:
    """Of the numbers of slots: `held` are in a checkpoint, `removed` are removed."""

    held: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()


@dataclass
class Work:
    """The index of one container, whose slots are filled with the fingerprints of their numbers."""

    directory: Path
    mark: Callable[[Promise], None] = lambda promise: None
    promise: Promise = field(default_factory=Promise)
    used: int = 0

    def open(self) -> None:
        self.index = Index(self.directory, writer=True)
        Storage().sync_directory(self.directory)  # as the store does
        self.fingerprints = FingerprintIndex(self.index, Storage())
        numbers = range(self.used)
        places = np.array([place(number) for number in numbers], np.uint64)
        self.fingerprints.load([(b"".join(map(mark_of, numbers)), places)])

    def close(self) -> None:
        self.fingerprints.close()
        self.index.close()

    def store(self, count: int) -> None:
        numbers = range(self.used, self.used + count)
        for number in numbers:
            self.fingerprints.note(mark_of(number), place(number))
        self.used += count
        self.fingerprints.freeze()
        watermark = Watermark(ContainerId(CONTAINER + 1), {CONTAINER: self.used})
        with self.index.write() as txn:
            self.fingerprints.commit(txn, watermark)
            self.index.put_watermark(txn, watermark)
        self._promise(Promise(self.promise.held | set(numbers), self.promise.removed))
        self.fingerprints.committed()

    def remove(self, numbers: set[int]) -> None:
        with self.index.write() as txn:
            self.fingerprints.remove(txn, [(mark_of(number), place(number)) for number in sorted(numbers)])
        self._promise(Promise(self.promise.held, self.promise.removed | numbers))

    def _promise(self, promise: Promise) -> None:
        self.promise = promise
        self.mark(promise)

    def found(self) -> set[int]:
        """The numbers that the index knows; each at its place."""
        marks = [mark_of(number) for number in range(self.used)]
        addresses = self.fingerprints.lookup(marks)
        assert addresses == [self.fingerprints.lookup([mark])[0] for mark in marks]
        assert all(where in (None, place(number)) for number, where in enumerate(addresses))
        return {number for number, where in enumerate(addresses) if where is not None}

    def go_on(self, rng: random.Random, steps: int) -> None:
        for _ in range(steps):
            choice = rng.random()
            if choice < 0.5:
                self.store(rng.randrange(1, 7))
            elif choice < 0.8:
                self.fingerprints.merge()
            elif self.used:
                self.remove(set(rng.sample(range(self.used), min(4, self.used))))


def mark_of(number: int) -> bytes:
    return fingerprint(number.to_bytes(4, "big"))


def place(number: int) -> Address:
    return address(CONTAINER, number)


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 8)


def states(events: list[Event], marks: list[tuple[int, Promise]]) -> Iterator[tuple[int, Disk, Promise, Promise]]:
    """After each event: the disk, what was promised, and what will be next."""
    disk, kept = Disk(), Promise()
    for number in range(len(events) + 1):
        if number:
            events[number - 1].play(disk)
        kept = next((promise for at, promise in reversed(marks) if at <= number), kept)
        yield number, disk, kept, next((promise for at, promise in marks if at > number), kept)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_runs_are_made_and_merged(tmp_path: Path, every: int) -> None:
    """What a checkpoint held is found again, what was removed is not, and no file is left over."""
    root = tmp_path / "index"
    root.mkdir()
    recorder = Recorder(root)
    marks: list[tuple[int, Promise]] = []
    with recording(recorder):
        work = Work(root, lambda promise: marks.append((len(recorder.events), promise)))
        work.open()
        work.go_on(random.Random(5), 70)
        work.close()
    kinds = {event.what.split()[0] for event in recorder.events}
    assert {"create", "write", "sync", "commit", "remove"} <= kinds
    tried = 0
    with unsynced():
        for number, disk, kept, following in states(recorder.events, marks):
            rng = random.Random(number)
            for survival in (ALL, rng.choice(CORNERS), some(number)) if number % every == 0 else ():
                target = tmp_path / "crashed"
                target.mkdir()
                disk.after(survival).write(target)
                again = Work(target, promise=kept, used=work.used)
                again.open()
                found = again.found()
                assert kept.held - kept.removed - following.removed <= found, (number, survival)
                assert not found & kept.removed, (number, survival)
                names = {run_named(path.name) for path in target.glob("*.rwf")}
                assert names == set(again.index.fingerprint_runs()), (number, survival)
                again.go_on(rng, 8)
                assert again.promise.held - again.promise.removed - following.removed <= again.found(), (
                    number,
                    survival,
                )
                again.close()
                again.open()
                assert not again.found() & again.promise.removed, (number, survival)
                again.close()
                shutil.rmtree(target)
                tried += 1
    print(f"{len(recorder.events)} crash points, {tried} states opened and gone on with")


def test_an_older_store_that_is_killed_on_its_way(tmp_path: Path) -> None:
    """The run is made again, or was made; nothing is lost."""
    rows = {mark_of(number): place(number) for number in range(500)}
    root = tmp_path / "index"
    root.mkdir()
    recorder = Recorder(root)
    with recording(recorder):
        index = Index(root, writer=True)
        Storage().sync_directory(root)
        with index.write() as txn:
            for mark, where in rows.items():
                txn.put(mark, where.to_bytes(8, "little"), db=index.db["fingerprints"])
            index.put_watermark(txn, Watermark(ContainerId(CONTAINER + 1), {CONTAINER: len(rows)}))
        begun = len(recorder.events)
        fingerprints = FingerprintIndex(index, Storage())
        fingerprints.close()
        index.close()
    assert len(recorder.events) > begun + 4
    with unsynced():
        for number, disk, _, _ in states(recorder.events, []):
            for survival in (ALL, random.Random(number).choice(CORNERS), some(number)) if number >= begun else ():
                target = tmp_path / "crashed"
                target.mkdir()
                disk.after(survival).write(target)
                again = Work(target, used=len(rows))
                again.open()
                assert again.found() == set(range(len(rows))), (number, survival)
                again.close()
                shutil.rmtree(target)
