"""Runs of fingerprints on a disk that is full, that fails, or that has rotted."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dedup import fingerprint_merge
from dedup.errors import Damaged, StoreFailed, StoreFull, Unreadable
from dedup.fingerprint_run import FingerprintRun
from dedup.fingerprint_runs import FAN, FingerprintRuns, run_name
from dedup.fingerprint_table import Rows
from dedup.storage import Buffer, Storage
from dedup.types import Address
from tests.dedup.crash_storage import unsynced
from tests.dedup.faults import open_descriptors
from tests.dedup.test_fingerprint_runs import found_in, settled, spread


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
