"""Runs of fingerprints on a disk that is full, that fails, or that has rotted."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedup import fingerprint_index, fingerprint_merge, fingerprint_runs
from dedup.catalog import Index
from dedup.errors import Damaged, StoreFailed, StoreFull, Unreadable
from dedup.fingerprint_index import FingerprintIndex
from dedup.fingerprint_merge import FingerprintMerge
from dedup.fingerprint_run import FingerprintRun
from dedup.fingerprint_runs import FAN, RUN_SUFFIX, FingerprintRuns, run_name
from dedup.fingerprint_table import Rows
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.types import Address, ContainerId
from dedup.watermark import Watermark
from tests.dedup.crash_storage import unsynced
from tests.dedup.faults import open_descriptors
from tests.dedup.test_fingerprint_index import fp
from tests.dedup.test_fingerprint_runs import Marks, dense, found_in, settled, spread
from tests.dedup.test_store import check_moment, filled


@pytest.fixture(autouse=True)
def _unsynced() -> Iterator[None]:
    with unsynced():
        yield


class NewRunsFail(Storage):
    """What begins to be made from now on may meet an error, at the call that is chosen."""

    error: Exception | None = None
    at = ""
    named: frozenset[Path] = frozenset()

    def fail(self, at: str, error: Exception, runs: FingerprintRuns, directory: Path) -> None:
        self.at, self.error = at, error
        self.named = frozenset(directory / run_name(number) for number in runs.numbers)

    def _maybe(self, at: str, path: Path) -> None:
        if self.error is not None and at == self.at and path not in self.named:
            raise self.error

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        self._maybe("open", path)
        return super().open(path, flags, mode)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._maybe("write", self.path_of(fd))
        super().pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        self._maybe("truncate", self.path_of(fd))
        super().truncate(fd, size)

    def datasync(self, fd: int) -> None:
        self._maybe("sync", self.path_of(fd))
        super().datasync(fd)


def runs_due(
    storage: Storage, directory: Path, count: int = FAN, rows: int = 400
) -> tuple[FingerprintRuns, dict[bytes, int]]:
    """So many runs of one size, and what is in them."""
    rng = random.Random(count)
    runs, model = FingerprintRuns(storage, directory, []), dict[bytes, int]()
    for number in range(count):
        some = {mark: number * rows + at for at, mark in enumerate(spread(rng, rows), 1)}
        settled(runs, some)
        model |= some
    return runs, model


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def merged_whole(runs: FingerprintRuns) -> int:
    """How many runs there are when all is merged that may be."""
    while runs.merge():
        pass
    settled(runs)
    return len(runs)


FAILED = StoreFailed(f"made to fail: {os.strerror(errno.EIO)}")
TOO_MANY = StoreFailed(f"made to fail: {os.strerror(errno.EMFILE)}")
FULL = StoreFull(f"made to fail: {os.strerror(errno.ENOSPC)}")


@pytest.mark.parametrize(
    ("at", "error"),
    [("open", TOO_MANY), ("truncate", FULL), ("write", FULL), ("write", FAILED), ("sync", FAILED)],
)
def test_what_the_file_of_a_merge_meets_is_a_merge_less(tmp_path: Path, at: str, error: Exception) -> None:
    storage, known = NewRunsFail(), open_descriptors()
    runs, model = runs_due(storage, tmp_path)
    storage.fail(at, error, runs, tmp_path)
    assert not runs.merge() and not runs.merge()
    assert files(tmp_path) == set(map(run_name, runs.numbers)) and len(runs) == FAN
    assert found_in(runs, [*model]) == model
    storage.error = None
    settled(runs)  # one commit is let pass
    assert merged_whole(runs) == 1
    assert found_in(runs, [*model]) == model
    runs.close()
    assert open_descriptors() == known


def test_after_merges_that_were_given_up_ever_more_commits_pass(tmp_path: Path) -> None:
    storage = NewRunsFail()
    runs, _ = runs_due(storage, tmp_path)
    storage.fail("open", TOO_MANY, runs, tmp_path)
    opened = []
    for number in range(260):
        before = runs._last_number
        assert not runs.merge()
        if runs._last_number > before:
            opened.append(number)
        settled(runs)
    assert opened == [0, 1, 3, 7, 15, 31, 63, 127, 191, 255]
    runs.close()


def spoiled(monkeypatch: pytest.MonkeyPatch, path: Path, error: Exception) -> None:
    """The rows of that run cannot be had."""
    rows = FingerprintRun.rows

    def spoiled_rows(run: FingerprintRun, first: int, end: int) -> Rows:
        if run.path == path:
            raise error
        return rows(run, first, end)

    monkeypatch.setattr(FingerprintRun, "rows", spoiled_rows)


@pytest.mark.parametrize("error", [Damaged("rotten"), Unreadable("the disk refuses")])
def test_a_damaged_run_is_left_out_of_merges_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    storage = Storage()
    runs, model = runs_due(storage, tmp_path)
    damaged = runs.numbers
    with monkeypatch.context() as patch:
        spoiled(patch, tmp_path / run_name(damaged[1]), error)
        assert not runs.merge()
        assert files(tmp_path) == set(map(run_name, damaged))
        rng = random.Random(9)
        for number in range(FAN):
            some = {mark: 10_000 + 400 * number + at for at, mark in enumerate(spread(rng, 400))}
            settled(runs, some)
            model |= some
        assert merged_whole(runs) == FAN + 1
        assert set(damaged) < set(runs.numbers)
        assert found_in(runs, [*model]) == model
    named = runs.numbers
    runs.close()
    runs = FingerprintRuns(storage, tmp_path, named)
    assert merged_whole(runs) <= 2
    assert found_in(runs, [*model]) == model
    runs.close()


def test_what_nobody_foresaw_is_told_once_and_ends_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = runs_due(Storage(), tmp_path)
    with monkeypatch.context() as patch:
        spoiled(patch, tmp_path / run_name(runs.numbers[0]), AssertionError("cannot be"))
        with pytest.raises(AssertionError, match="cannot be"):
            runs.merge()
        assert not runs.merge()
        some = dict.fromkeys(spread(random.Random(5), 400), 99_999)
        settled(runs, some)
    assert found_in(runs, [*model, *some]) == model | some
    runs.close()


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_removal_that_the_merged_run_refuses_costs_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    """Also when a commit that was to name it has failed."""
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 1)
    storage, known = NewRunsFail(), open_descriptors()
    runs, model = runs_due(storage, tmp_path)
    while runs.merge():
        pass
    if is_prepared:
        assert len(runs.prepare(None)) == 1  # and its commit fails
    storage.fail("write", FULL, runs, tmp_path)
    gone = dict(list(model.items())[::7])
    runs.drop([(mark, Address(where)) for mark, where in gone.items()])
    storage.error = None
    left = {mark: where for mark, where in model.items() if mark not in gone}
    assert found_in(runs, [*model]) == left
    for _ in range(2):
        settled(runs)
        assert len(runs) == FAN and files(tmp_path) == set(map(run_name, runs.numbers))
    assert merged_whole(runs) == 1
    assert found_in(runs, [*model]) == left
    runs.close()
    assert open_descriptors() == known


def test_a_merge_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = runs_due(Storage(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FingerprintMerge, "step", lambda merge: 0)
        settled(runs, dict.fromkeys(spread(random.Random(5), 400), 99_999))  # what is owed
        settled(runs, dict.fromkeys(spread(random.Random(6), 400), 99_999))
        while runs.merge():
            pass
    assert not runs.merge() and files(tmp_path) == set(map(run_name, runs.numbers))
    assert found_in(runs, [*model]) == model
    runs.close()


@pytest.mark.parametrize("marks", [dense, spread])
def test_no_merge_has_more_pieces_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: Marks, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 1)
    rng = random.Random(8)
    runs = FingerprintRuns(Storage(), tmp_path, [])
    for _ in range(FAN):
        settled(runs, dict.fromkeys(marks(rng, 2000), 1))
    assert merged_whole(runs) == 1 and not caplog.text
    runs.close()


def test_however_many_runs_are_made_few_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a rebuild, where nothing is merged beside. A run is of one row here, and stands for a million."""
    monkeypatch.setattr(fingerprint_runs, "_ROWS_PER_PIECE_MIN", 0)
    monkeypatch.setattr(fingerprint_runs, "write_run", lambda storage, path, most, pieces: PretendedRun(most))
    monkeypatch.setattr(fingerprint_runs, "FingerprintMerge", PretendedMerge)
    runs, most = FingerprintRuns(Storage(), tmp_path, []), 0
    for _ in range(1 << 10):  # of 4 GiB of blocks each: 4 TiB
        runs.prepare(PretendedTable(1 << 20))  # type: ignore[arg-type]
        runs.settle()
        most = max(most, len(runs))
    assert runs.row_count == 1 << 30 and most <= 64


@dataclass(frozen=True, slots=True)
class PretendedTable:
    row_count: int

    def __len__(self) -> int:
        return self.row_count

    def pieces(self) -> None: ...


@dataclass(eq=False, slots=True)
class PretendedRun:
    row_count: int
    path = Path("is not there")

    @property
    def page_count(self) -> int:
        return self.row_count

    def close(self) -> None: ...


class PretendedMerge:
    def __init__(self, storage: Storage, path: Path, runs: Sequence[PretendedRun]) -> None:
        self.runs = tuple(runs)
        self.is_done = False
        self.merged: PretendedRun | None = None
        self._left = sum(run.row_count for run in runs)

    def step(self) -> int:
        rows = min(65_000, self._left)
        self._left -= rows
        if not self._left:
            self.is_done = True
            self.merged = PretendedRun(sum(run.row_count for run in self.runs))
        return rows


class NoDescriptors(Storage):
    """Files of runs are refused."""

    error: Exception | None = None

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        if self.error is not None and path.suffix == RUN_SUFFIX:
            raise self.error
        return super().open(path, flags, mode)


def index_with_runs(directory: Path, storage: Storage, *, is_first: bool = False) -> tuple[Index, FingerprintIndex]:
    env = Index(directory, writer=True)
    index = FingerprintIndex(env, storage)
    if is_first:
        for number in (1, 2):
            index.note(fp(number), Address(number))
            committed(env, index)
    return env, index


def committed(env: Index, index: FingerprintIndex) -> None:
    index.freeze()
    watermark = Watermark(ContainerId(2), {})
    with env.write() as txn:
        index.commit(txn, watermark)
        env.put_watermark(txn, watermark)
    index.committed()


@pytest.mark.parametrize("error", [TOO_MANY, Unreadable("the disk refuses")])
def test_a_run_that_cannot_be_opened_now_is_there_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)
    storage = NoDescriptors()
    env, index = index_with_runs(tmp_path, storage, is_first=True)
    named = set(env.fingerprint_runs())
    index.close()
    env.close()
    storage.error = error
    env, index = index_with_runs(tmp_path, storage)
    assert index.lookup([fp(1)]) == [None] and set(env.fingerprint_runs()) == named
    storage.error = None
    index.note(fp(3), Address(3))
    for _ in range(2):
        committed(env, index)
    assert named < set(env.fingerprint_runs())
    index.close()
    env.close()
    env, index = index_with_runs(tmp_path, storage)
    assert index.lookup([fp(1), fp(2), fp(3)])[0::2] == [1, 3]
    index.close()
    env.close()


@pytest.mark.parametrize("fails_first", [False, True])
def test_what_was_removed_meanwhile_does_not_come_back_with_a_run_that_could_not_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_first: bool
) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)
    storage = NoDescriptors()
    env, index = index_with_runs(tmp_path, storage, is_first=True)
    index.close()
    env.close()
    storage.error = TOO_MANY
    env, index = index_with_runs(tmp_path, storage)
    storage.error = None
    entries = [(fp(1), Address(1))]
    if fails_first:
        with env.env.begin(write=True) as txn:
            index.remove(txn, entries)
            txn.abort()
        assert env.fingerprint_runs()
    with env.write() as txn:
        index.remove(txn, entries)
    assert env.fingerprint_runs() == ()
    index.close()
    env.close()
    env, index = index_with_runs(tmp_path, storage)
    assert index.lookup([fp(1)]) == [None]
    assert not list(tmp_path.glob(f"*{RUN_SUFFIX}"))
    index.close()
    env.close()


def test_a_lost_run_on_a_full_disk_keeps_no_store_from_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = open_descriptors()
    env, index = index_with_runs(tmp_path, Storage(), is_first=True)
    (number,) = env.fingerprint_runs()
    index.close()
    env.close()
    (tmp_path / run_name(number)).write_bytes(b"torn")
    with monkeypatch.context() as patch:

        def refused(env: Index, txn: object, numbers: object) -> None:
            raise FULL

        patch.setattr(Index, "put_fingerprint_runs", refused)
        env, index = index_with_runs(tmp_path, Storage())
    assert env.fingerprint_runs() == (number,)
    with env.write() as txn:
        index.remove(txn, [(fp(1), Address(1))])
    assert env.fingerprint_runs() == ()
    index.close()
    env.close()
    assert open_descriptors() == known


class Cramped(Storage):
    """A disk with so much room for what is written to files from now on; what is removed gives its room back."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._limit: int | None = None

    def _used(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self._directory.rglob("*") if path.is_file())

    def leave(self, room: int | None) -> None:
        self._limit = None if room is None else self._used() + room

    def free_bytes(self, path: Path) -> int:
        return 1 << 62 if self._limit is None else max(0, self._limit - self._used())

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        if self._limit is not None and self._used() + sum(map(len, buffers)) > self._limit:
            raise FULL
        super().pwritev(fd, buffers, offset)


def test_no_merge_begins_without_room_for_all_of_it_and_more(tmp_path: Path) -> None:
    storage = Cramped(tmp_path)
    runs, model = runs_due(storage, tmp_path)
    storage.leave(fingerprint_runs.RESERVE_BYTES + len(model) * 24)
    assert not runs.merge() and files(tmp_path) == set(map(run_name, runs.numbers))
    settled(runs)
    storage.leave(fingerprint_runs.RESERVE_BYTES + len(model) * 32)
    assert runs.merge()
    made = files(tmp_path) - set(map(run_name, runs.numbers))
    assert merged_whole(runs) == 1 and made == files(tmp_path)
    assert os.stat(tmp_path / made.pop()).st_blocks * 512 < len(model) * 32 + 3 * 4096
    assert found_in(runs, [*model]) == model
    runs.close()


@pytest.mark.parametrize("is_done", [False, True])
def test_a_merge_gives_its_room_to_ingest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 1500)
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 8)
    path = tmp_path / "store"
    Store.create(path)
    store, model, volume = filled(path)
    store.close()
    storage = Cramped(path)
    store = Store.open(path, storage)
    group = store.group("g")
    while len(store.index.fingerprint_runs()) < FAN:
        group.ingest([model.write(volume, 0, os.urandom(1 << 20))])
        store.checkpoint()
    named = set(map(run_name, store.index.fingerprint_runs()))
    while store.merge() and (is_done or len(files(path / "index") - {"data.mdb", "lock.mdb"}) == len(named)):
        pass
    (made,) = files(path / "index") - named - {"data.mdb", "lock.mdb"}
    storage.leave(os.stat(path / "index" / made).st_size // 8 - 4096)
    data = os.urandom(os.stat(path / "index" / made).st_size // 4096 // 6 * 4096)
    record = model.write(volume, 0, data)
    with pytest.raises(StoreFull):
        group.ingest([record])
    assert files(path / "index") == {*named, "data.mdb", "lock.mdb"}
    assert not store.merge()
    group.ingest([record])
    storage.leave(None)
    store.checkpoint()
    check_moment(group.reader(), model, model.seq)
    store.close()


def test_a_full_disk_waits_for_no_piece_of_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 1)
    runs, model = runs_due(Storage(), tmp_path)
    assert runs.merge()
    with runs._lock:  # as a piece has it
        runs.give_room()
        assert len(files(tmp_path)) == FAN + 1
    assert not runs.merge() and len(files(tmp_path)) == FAN
    settled(runs)
    assert merged_whole(runs) == 1 and found_in(runs, [*model]) == model
    runs.close()
