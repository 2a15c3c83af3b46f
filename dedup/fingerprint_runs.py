"""The runs of a store: files beside LMDB that together have the fingerprints that memory has not.

A table that is full becomes a run. Neighbours of about one size are merged, so there are at most a few of each size,
and a fingerprint is written once more for each fourfold growth of the store: front to back, some 100 bytes for a block
of 4096, where a tree that is changed in random places writes a page.

Merging has no end, so it goes in pieces. `merge` does the next one, beside look-ups and ingest; whoever never calls it
has what is owed done before the next run is made.

Invariants:
- runs stand in the order in which their fingerprints came, and of one that is in two the older address counts;
- `prepare` gives the number of a run only once it is DURABLE, and no file goes that the last commit names;
- what is dropped of a run is dropped of what it is becoming, before that is named;
- what cannot be read now, but may be another time, is done without and stays, name and file, as long as nothing is
  taken out of runs: then its name goes first, or it would bring back what it has of that;
- memory does not depend on how long the runs are;
- a merge is given up, and costs nothing, whatever its own file meets; so it is when a run that it reads is damaged, and
  those runs are left out of merges until the store is opened anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Final

import numpy as np

from dedup.errors import Damaged, StoreError, StoreFailed, StoreFull, UnknownFormat, Unreadable
from dedup.fingerprint_filter import bits_of_one, may_have, may_have_one
from dedup.fingerprint_merge import FingerprintMerge
from dedup.fingerprint_run import FingerprintRun, write_run
from dedup.fingerprint_table import U64, FingerprintTable
from dedup.layout import number_named
from dedup.storage import Storage
from dedup.types import HOLE, Address

log = logging.getLogger(__name__)

RUN_SUFFIX: Final = ".rwf"
_RUN_DIGITS: Final = 10
FAN: Final = 4
"""So many neighbours of one size are merged; a size is a fourfold range of rows."""
_MERGED_PER_NEW: Final = 5
"""Rows merged for each new one before the next run is made, at least: one for each size of a store of 4 TiB."""
_MANY: Final = 24
_MERGED_PER_MANY: Final = 4
"""So many more for each run there is beyond _MANY: runs gather while large ones are merged. Some 40 are open at most in
a store of 4 TiB, some 64 in one of 16 TiB; more only where merges are given up."""
_ROWS_PER_PIECE_MIN: Final = 256
"""What a piece counts for at least, so that those of which all was taken out have an end, too."""
_ROW_BYTES_MAX: Final = 32
"""Of a row of a merged run on the disk, with its share of the filter, of a fence and of what fills up pages."""
RESERVE_BYTES: Final = 64 << 20
"""What a merge leaves free for the store's other writing, at least when it begins."""
_WAIT_MAX: Final = 64
"""Commits that are let pass, at most, after merges that were given up one after the other: an hour of checkpoints."""


def run_name(number: int) -> str:
    return f"{number:0{_RUN_DIGITS}d}{RUN_SUFFIX}"


def run_named(name: str) -> int | None:
    """The number of the run that a file name stands for, None when it is no run's name."""
    return number_named(name, RUN_SUFFIX, _RUN_DIGITS)


class FingerprintRuns:
    """Called by one thread at a time, `merge` by any other."""

    def __init__(self, storage: Storage, directory: Path, numbers: Sequence[int]) -> None:
        """Opens those that LMDB names, oldest first; without one that cannot be read blocks are stored once more. Files
        of others are removed. StoreFailed when the directory cannot be read."""
        self._storage = storage
        self._directory = directory
        self._lock = threading.Lock()
        """Held by all that is not a look-up."""
        self._runs: dict[int, FingerprintRun] = {}
        """Those that the last commit names, oldest first."""
        self._prepared: dict[int, FingerprintRun] | None = None
        """What they are once the next commit is done."""
        self.unopened: list[int] = []
        """Those that the last commit names, too, and that cannot be read for now."""
        self._merge: FingerprintMerge | None = None
        self._merge_number = 0
        self._pieces_left = 0
        """More than there are of the merge, where its runs are whole: a page is two pieces at most."""
        self._left_out: set[int] = set()
        """Numbers of runs that are not merged any more: one of them is damaged."""
        self._is_cramped = False
        """A merge is to be given up: something else found the disk full."""
        self._wait = 0
        """How many commits were let pass the last time, if the last merge was given up."""
        self._wait_left = 0
        """And how many are to pass before the next merge begins."""
        self._owed = 0
        """Rows to be merged before the next run is made."""
        found = {number for name in storage.listdir(directory) if (number := run_named(name)) is not None}
        self._last_number = max([*found, *numbers], default=0)
        for number in found.difference(numbers):
            self._unlink(self._path(number))
        try:
            for number in numbers:
                self._open(number)
        except BaseException:
            self.close()
            raise

    def _open(self, number: int) -> None:
        try:
            self._runs[number] = FingerprintRun.open(self._storage, self._path(number))
        except (Unreadable, StoreFailed) as error:
            log.warning("a run of fingerprints is done without until the store is opened anew: %s", error)
            self.unopened.append(number)
        except (Damaged, UnknownFormat, FileNotFoundError) as error:
            log.warning("blocks of a run of fingerprints are stored once more when they come again: %s", error)

    def _unlink(self, path: Path) -> None:
        try:
            self._storage.unlink(path)
        except (FileNotFoundError, StoreFailed) as error:
            log.warning("left until the store is opened anew: %s", error)

    def _path(self, number: int) -> Path:
        return self._directory / run_name(number)

    def _new_path(self) -> tuple[int, Path]:
        self._last_number += 1
        return self._last_number, self._path(self._last_number)

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def numbers(self) -> list[int]:
        """Those that the last commit names and that are looked through, oldest first."""
        return list(self._runs)

    @property
    def row_count(self) -> int:
        """How many fingerprints were written into them."""
        return sum(run.row_count for run in self._runs.values())

    def find_one(self, high: int, low: int) -> Address:
        """The address of the fingerprint with these halves, HOLE if it is not there."""
        bits = bits_of_one(low)
        for run in self._runs.values():
            if may_have_one(run.quick_filter, high, bits) and (where := run.find_one(high, low)) != HOLE:
                return where
        return HOLE

    def find(self, high: U64, low: U64) -> U64:
        """`find_one` of each."""
        found = np.zeros(len(high), np.uint64)
        runs = list(self._runs.values())
        if runs:
            numbers, places = may_have([run.filter for run in runs], high, low)
            ends = np.searchsorted(numbers, np.arange(len(runs) + 1)).tolist() if len(numbers) else ()
            for run, (start, end) in zip(runs, pairwise(ends), strict=False):  # the oldest comes first, and counts
                if start < end:
                    there = places[start:end]
                    there = there[found[there] == HOLE]
                    found[there] = run.find(high[there], low[there])
        return found

    def prepare(self, table: FingerprintTable | None) -> list[int]:
        """Makes ready what the next commit names: a merge that is done, a run of the table.
        DURABLE when it returns the numbers. `settle` follows, or another `prepare`. StoreFull, StoreFailed."""
        while self._owed > 0 and table is not None and self.merge():
            pass
        with self._lock:
            failed, self._prepared = self._prepared, None
            if self._is_cramped:
                self._give_room()
            self._remove(failed or {})
            prepared = self._merged()
            if table is not None and len(table):
                number, path = self._new_path()
                run = write_run(self._storage, path, len(table), table.pieces())
                assert run is not None, "the table has rows"
                prepared[number] = run
                per_row = _MERGED_PER_NEW + _MERGED_PER_MANY * max(0, len(prepared) - _MANY)
                self._owed += per_row * run.row_count
            self._prepared = prepared
            return list(prepared)

    def _merged(self) -> dict[int, FingerprintRun]:
        """The runs, with one in the place of those that it was merged from."""
        if self._merge is None or not self._merge.is_done:
            return dict(self._runs)
        merged: dict[int, FingerprintRun] = {}
        for number, run in self._runs.items():
            if run not in self._merge.runs:
                merged[number] = run
            elif self._merge.merged is not None:
                merged[self._merge_number] = self._merge.merged
        return merged

    def settle(self) -> None:
        """What was prepared is committed."""
        with self._lock:
            assert self._prepared is not None, "prepare comes first"
            before, self._runs, self._prepared = self._runs, self._prepared, None
            # One that was done only after `prepare` is named by the next commit.
            if self._merge is not None and self._merge.runs[0] not in self._runs.values():
                self._merge = None
                self._wait = 0
            self._remove(before)
            self._wait_left = max(0, self._wait_left - 1)

    def _remove(self, runs: dict[int, FingerprintRun]) -> None:
        """Those of them that nothing names, nor will."""
        for number, run in runs.items():
            if number not in self._runs and (self._merge is None or run is not self._merge.merged):
                run.close()
                self._unlink(run.path)

    def merge(self) -> bool:
        """The next piece of what is to be merged, some ten milliseconds of work. False: there is nothing to be done
        until the next commit. What the disk refuses and what is damaged is logged, and gives the merge up."""
        with self._lock:
            if self._wait_left:
                self._owed = 0
                return False
            if self._is_cramped:
                self._give_room()
                return False
            try:
                if self._merge is None:
                    self._begin_merge()
                if self._merge is None:
                    self._owed = 0
                    return False
                if self._merge.is_done:
                    return False  # it waits to be named; what is owed beyond it stays owed
                if self._pieces_left == 0:
                    raise Damaged(f"{self._path(self._merge_number)}: to be merged from runs of which there is no end")
                self._pieces_left -= 1
                self._owed -= max(self._merge.step(), _ROWS_PER_PIECE_MIN)
            except Damaged as damage:
                log.warning("runs of fingerprints are not merged until the store is opened anew: %s", damage)
                self._leave_out()
                return False
            except (StoreError, FileNotFoundError) as error:
                log.warning("runs of fingerprints are not merged for now: %s", error)
                self._give_up_merge()
                self._back_off()
                return False
            except Exception:
                self._leave_out()
                raise
            return True

    def give_room(self) -> None:
        """The disk is full: gives up a merge that no commit names yet. Waits for nothing: a piece that is under way is
        the last one. Any thread."""
        self._is_cramped = True
        if self._lock.acquire(blocking=False):
            try:
                self._give_room()
            finally:
                self._lock.release()

    def _give_room(self) -> None:
        self._is_cramped = False
        if self._merge is not None:
            log.warning("runs of fingerprints are not merged for now: the disk is full")
            self._give_up_merge()
            self._back_off()

    def _begin_merge(self) -> None:
        due = _due(self._runs, self._left_out)
        if due:
            wanted = sum(self._runs[number].row_count for number in due) * _ROW_BYTES_MAX + RESERVE_BYTES
            if self._storage.free_bytes(self._directory) < wanted:
                raise StoreFull(f"{self._directory}: a merge needs {wanted} bytes free; free space on the store's disk")
            self._merge_number, path = self._new_path()
            runs = [self._runs[number] for number in due]
            self._merge = FingerprintMerge(self._storage, path, runs)
            self._pieces_left = 2 * sum(run.page_count + 1 for run in runs)

    def _leave_out(self) -> None:
        """Gives the merge up for good. Which of its runs it was is not looked for: the others stay as they are, too."""
        if self._merge is not None:
            self._left_out.update(number for number, run in self._runs.items() if run in self._merge.runs)
        self._give_up_merge()

    def _give_up_merge(self) -> None:
        merge, self._merge = self._merge, None
        if merge is None or (self._prepared is not None and merge.merged in self._prepared.values()):
            return  # what a commit may name is removed by the next `prepare`
        try:
            merge.abandon()
        except FileNotFoundError:
            pass  # nothing was left to be written
        except StoreError as error:
            log.warning("left until the store is opened anew: %s", error)

    def _back_off(self) -> None:
        self._wait = self._wait_left = min(max(1, 2 * self._wait), _WAIT_MAX)

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> None:
        """Takes out each fingerprint that has that address. DURABLE when it returns. StoreFull, StoreFailed.

        What is `unopened` has it yet: nothing may count on the removal before LMDB does not name those any more.
        """
        with self._lock:
            for run in self._runs.values():
                run.drop(entries)
            try:
                is_kept = self._merge is None or self._merge.drop(entries)
            except StoreError as error:
                log.warning("runs of fingerprints are not merged for now: %s", error)
                self._back_off()
                is_kept = False
            if not is_kept:
                self._give_up_merge()

    def close(self) -> None:
        """Without another write: files that nothing names are left to whoever opens the store next."""
        with self._lock:
            opened = self._runs | (self._prepared or {})
            if self._merge is not None:
                if self._merge.merged not in opened.values():
                    self._merge.close()
                self._merge = None
            for run in opened.values():
                run.close()
            self._runs, self._prepared = {}, None


def _due(runs: dict[int, FingerprintRun], left_out: Container[int] = ()) -> list[int]:
    """The smallest FAN neighbours or more of one size; a run counts as at least as large as those after it."""
    sizes = [run.row_count.bit_length() // 2 for run in runs.values()]
    grown = list(accumulate(reversed(sizes), max))[::-1]
    numbered = [(size, number in left_out, number) for size, number in zip(grown, runs, strict=True)]
    alike = [[*some] for _, some in groupby(numbered, key=lambda one: one[:2])]
    due = (some for some in reversed(alike) if len(some) >= FAN and not some[0][1])
    return [number for *_, number in next(due, [])]
