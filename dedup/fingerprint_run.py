"""A run of fingerprints: a file of sorted fingerprints and their addresses that is written once, front to back.

It is looked up through maps: the filter says of nearly all that are not there that they are not, with a look at one
word; the fences, the first of each page, say in which page the others would be. The two are in memory as long as the
run is open. A page has all three columns of its rows, so one that is found costs the disk one read.

Invariants:
- rows ascend by their first halves, and no fingerprint is there twice; the file is DURABLE before anything names it;
- a row is taken out by a zero (HOLE) in the place of its address, and that is the only thing that ever changes;
- the file is looked up through maps and written by calls: a full disk is an error then, and not a signal.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dedup.errors import Damaged, StoreFull
from dedup.fingerprint_filter import bits_of, pair_count, pair_of
from dedup.fingerprint_table import U64, Rows, halves_of_one
from dedup.layout import FORMAT_VERSION, Fields, checked, checksum, know_version
from dedup.storage import Storage
from dedup.types import HOLE, Address

RUN_MAGIC: Final = b"rwFPRUN\n"
RUN_HEADER: Final = Fields(
    "run header",
    ("magic", "8s"),
    ("version", "H"),
    ("reserved", "6s"),
    ("most", "Q"),
    ("pages", "Q"),
    ("rows", "Q"),
    ("checksum", "Q"),
)
RUN_PAGE_BYTES: Final = 4096
RUN_PAGE_ROWS: Final = 170
_WORD_BYTES: Final = 8
_PAIR_BYTES: Final = 2 * _WORD_BYTES
_PAGE_WORDS: Final = RUN_PAGE_BYTES // _WORD_BYTES
_LOW: Final = RUN_PAGE_ROWS
_WHERE: Final = 2 * RUN_PAGE_ROWS
"""Where in a page the columns of second halves and of addresses begin; that of first halves is before them."""
_CHECKED_BYTES: Final = RUN_HEADER.size - _WORD_BYTES
_STEPS: Final = tuple(np.uint64(1 << bit) for bit in range(RUN_PAGE_ROWS.bit_length() - 1, -1, -1))
_NOTHING: Final = np.uint64((1 << 64) - 1)
"""Fills up the last page; its address is HOLE."""
_FEW: Final = 12
"""Up to so many are sought one by one: numpy costs some microseconds before it begins."""
_NO_ROWS: Final = np.zeros(0, np.uint64)


def _parts(most: int) -> tuple[int, int, int]:
    """Of a run of at most so many rows: pairs of its filter, where its fences begin, and where its pages do."""
    pairs = pair_count(most)
    fences = RUN_PAGE_BYTES + _whole_pages(pairs * _PAIR_BYTES)
    return pairs, fences, fences + _whole_pages(-(-most // RUN_PAGE_ROWS) * _WORD_BYTES)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // RUN_PAGE_BYTES) * RUN_PAGE_BYTES


class FingerprintRun:
    """An open run. `find` may be called beside `drop` and `rows`, which one thread at a time calls."""

    def __init__(self, storage: Storage, path: Path, fd: int, most: int, pages: int, rows: int) -> None:
        """Use `open`."""
        self._storage = storage
        self._fd = fd
        self.path = path
        self.row_count = rows
        """Those that were written; some may have been taken out."""
        self.page_count = pages
        pairs, fences, self._start = _parts(most)
        self._front = storage.map_to_read(fd, self._start - RUN_PAGE_BYTES, RUN_PAGE_BYTES, read_now=True)
        self._pages = storage.map_to_read(fd, pages * RUN_PAGE_BYTES, self._start, read_now=False)
        self.filter = np.frombuffer(self._front, np.uint64, 2 * pairs)
        """See `fingerprint_filter.may_have`: whoever asks it first need not `find` most of what is not there."""
        self.fences = np.frombuffer(self._front, np.uint64, pages, fences - RUN_PAGE_BYTES)
        self._flat = np.frombuffer(self._pages, np.uint64)
        self._quick = self.fences.data, self._flat.data
        self.quick_filter = self.filter.data
        """Memoryviews give ints, and quicker than the arrays do."""

    @classmethod
    def open(cls, storage: Storage, path: Path) -> FingerprintRun:
        """Damaged, UnknownFormat, FileNotFoundError, StoreFailed."""
        fd = storage.open(path, os.O_RDWR)
        try:
            header = storage.pread(fd, RUN_HEADER.size, 0).ljust(RUN_HEADER.size, b"\0")
            magic, version, _, most, pages, rows, stored = RUN_HEADER.struct.unpack(header)
            if magic != RUN_MAGIC:
                raise Damaged(f"{path}: is no run of fingerprints")
            know_version(version, path)
            if stored != checksum(header[:_CHECKED_BYTES]) or not 0 < rows <= min(most, pages * RUN_PAGE_ROWS):
                raise Damaged(f"{path}: the header is damaged")
            if storage.size(fd) < _parts(most)[2] + pages * RUN_PAGE_BYTES:
                raise Damaged(f"{path}: is cut short")
            return cls(storage, path, fd, most, pages, rows)
        except BaseException:
            storage.close(fd)
            raise

    def close(self) -> None:
        for view in (*self._quick, self.quick_filter):
            view.release()
        self.filter = self.fences = self._flat = np.zeros(0, np.uint64)
        self._front.close()
        self._pages.close()
        self._storage.close(self._fd)

    def find(self, high: U64, low: U64) -> U64:
        """The address of each fingerprint (see `fingerprint_table.halves`), HOLE where it is not there."""
        if len(high) <= _FEW:
            each = zip(high.tolist(), low.tolist(), strict=True)
            return np.array([self.find_one(*mark) for mark in each], np.uint64)
        places = self._places(high, low)
        return np.where(places < 0, np.uint64(HOLE), self._flat[places + _WHERE])

    def find_one(self, high: int, low: int) -> Address:
        """`find` of one, quicker."""
        place = self._place_of(high, low)
        return HOLE if place < 0 else Address(self._quick[1][place + _WHERE])

    def _place_of(self, high: int, low: int) -> int:
        """Where the row begins among the words of all pages; -1: it is not there."""
        fences, flat = self._quick
        page = bisect_right(fences, high) - 1
        while page >= 0:
            start = page * _PAGE_WORDS
            at = bisect_left(flat, high, start, start + RUN_PAGE_ROWS)
            while at < start + RUN_PAGE_ROWS and flat[at] == high:
                if flat[at + _LOW] == low:
                    return at
                at += 1
            if fences[page] != high:
                break
            page -= 1  # the page before may end with the same first half
        return -1

    def _places(self, high: U64, low: U64) -> NDArray[np.int64]:
        """`_place_of` of each."""
        pages = np.searchsorted(self.fences, high, "right") - 1
        start = (np.maximum(pages, 0) * _PAGE_WORDS).astype(np.uint64)
        before = np.zeros(len(high), np.uint64)
        for step in _STEPS:  # how many rows of its page are less
            probe = before + step
            inside = np.minimum(probe, np.uint64(RUN_PAGE_ROWS)) - np.uint64(1)
            before[(probe <= RUN_PAGE_ROWS) & (self._flat[start + inside] < high)] += step
        at = start + np.minimum(before, np.uint64(RUN_PAGE_ROWS - 1))
        alike = (self._flat[at] == high) & (before < RUN_PAGE_ROWS) & (pages >= 0)
        same = alike & (self._flat[at + np.uint64(_LOW)] == low)
        places: NDArray[np.int64] = np.where(same, at.astype(np.int64), -1)
        for other in np.flatnonzero(alike & ~same).tolist():  # half of it is the same, which hardly happens
            places[other] = self._place_of(int(high[other]), int(low[other]))
        return places

    def rows(self, first: int, end: int) -> Rows:
        """Those of pages `first` to `end` that were not taken out, ascending. They are read, not mapped: whoever wants
        them wants all, and the kernel reads ahead. Unreadable."""
        offset = self._start + first * RUN_PAGE_BYTES
        content = self._storage.pread(self._fd, (end - first) * RUN_PAGE_BYTES, offset)
        pages = np.frombuffer(content, np.uint64).reshape(-1, _PAGE_WORDS)
        where = pages[:, _WHERE : _WHERE + RUN_PAGE_ROWS].ravel()
        kept = where != HOLE
        high, low = pages[:, :_LOW].ravel(), pages[:, _LOW:_WHERE].ravel()
        return (high, low, where) if kept.all() else (high[kept], low[kept], where[kept])

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> None:
        """Takes out each fingerprint that has that address. DURABLE when it returns. StoreFull, StoreFailed."""
        taken = [place for entry in entries if (place := self._place_if(entry)) >= 0]
        for place in taken:
            offset = self._start + (place + _WHERE) * _WORD_BYTES
            self._storage.pwritev(self._fd, [bytes(_WORD_BYTES)], offset)
        if taken:
            self._storage.datasync(self._fd)

    def _place_if(self, entry: tuple[bytes, Address]) -> int:
        """Where the row of that fingerprint is, if it has that address; -1: it has not."""
        mark, where = entry
        place = self._place_of(*halves_of_one(mark))
        return place if place >= 0 and self._quick[1][place + _WHERE] == where else -1


class RunWriter:
    """Writes one run: `append` as often as wanted, then `finish`; or `abandon`."""

    def __init__(self, storage: Storage, path: Path, most: int) -> None:
        """Of `most` rows at most, at least 1; in the place of what is at `path`. StoreFull, StoreFailed."""
        self._storage = storage
        self.path = path
        self._most = most
        self._pairs, self._fences, self._pages = _parts(most)
        self._page_count = 0
        self.row_count = 0
        self._rest: Rows = (_NO_ROWS, _NO_ROWS, _NO_ROWS)
        """Less than a page of them."""
        self._last_pair = 0, np.zeros(2, np.uint64)
        """Of the filter: its number, and what it has so far."""
        self._fd = storage.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            storage.truncate(self._fd, self._pages)
        except BaseException:
            self.abandon()
            raise

    def append(self, rows: Rows) -> None:
        """These come behind those so far, ascending by their first halves, none twice. Not durable. StoreFull, ..."""
        if not len(rows[0]):
            return
        self.row_count += len(rows[0])
        assert self.row_count <= self._most, "more rows than the file has room for"
        self._filter(rows[0], rows[1])
        high, low, where = (np.concatenate(both) for both in zip(self._rest, rows, strict=True))
        whole = len(high) // RUN_PAGE_ROWS * RUN_PAGE_ROWS
        self._write_pages(high[:whole], low[:whole], where[:whole])
        self._rest = high[whole:], low[whole:], where[whole:]

    def _filter(self, high: U64, low: U64) -> None:
        pairs = pair_of(high, self._pairs)
        starts = np.flatnonzero(np.diff(pairs, prepend=pairs[:1] ^ np.uint64(1)))
        first, end = int(pairs[0]), int(pairs[-1]) + 1
        part = np.zeros((end - first, 2), np.uint64)
        for word in range(2):
            part[pairs[starts] - pairs[0], word] = np.bitwise_or.reduceat(bits_of(low, word), starts)
        if first == self._last_pair[0]:
            part[0] |= self._last_pair[1]
        self._last_pair = end - 1, part[-1]
        self._write(part, RUN_PAGE_BYTES + first * _PAIR_BYTES)

    def _write_pages(self, high: U64, low: U64, where: U64) -> None:
        count = len(high) // RUN_PAGE_ROWS
        if count:
            pages = np.zeros((count, _PAGE_WORDS), np.uint64)
            for start, column in ((0, high), (_LOW, low), (_WHERE, where)):
                pages[:, start : start + RUN_PAGE_ROWS] = column.reshape(count, RUN_PAGE_ROWS)
            self._write(pages, self._pages + self._page_count * RUN_PAGE_BYTES)
            self._write(pages[:, 0].copy(), self._fences + self._page_count * _WORD_BYTES)
            self._page_count += count

    def _write(self, numbers: NDArray[np.uint64], offset: int) -> None:
        self._storage.pwritev(self._fd, [numbers.data.cast("B")], offset)

    def finish(self) -> FingerprintRun:
        """Ends the file, which must have a row, and gives it as a run. DURABLE when it returns, its name aside.
        StoreFull, StoreFailed."""
        missing = -len(self._rest[0]) % RUN_PAGE_ROWS
        if missing:
            fill = np.full(missing, _NOTHING), np.full(missing, _NOTHING), np.full(missing, np.uint64(HOLE))
            self._write_pages(*(np.concatenate(both) for both in zip(self._rest, fill, strict=True)))
        counts = self._most, self._page_count, self.row_count
        header = checked(RUN_HEADER.struct.pack(RUN_MAGIC, FORMAT_VERSION, b"", *counts, 0))
        self._storage.pwritev(self._fd, [header], 0)
        self.sync()
        run = FingerprintRun(self._storage, self.path, self._fd, *counts)
        self._fd = -1
        return run

    def sync(self) -> None:
        """What was written so far is on the disk: less is left for `finish`. StoreFailed."""
        self._storage.datasync(self._fd)

    def close(self) -> None:
        """Leaves the file as it is; once more does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._storage.close(fd)

    def abandon(self) -> None:
        """Removes the file. StoreFailed."""
        self.close()
        self._storage.unlink(self.path)


def write_run(storage: Storage, path: Path, most: int, pieces: Iterable[Rows]) -> FingerprintRun | None:
    """A run of these rows, `most` at most (see `RunWriter.append`), DURABLE with its name; None if there is not one.
    StoreFull, StoreFailed."""
    writer = RunWriter(storage, path, most)
    try:
        for rows in pieces:
            writer.append(rows)
        if not writer.row_count:
            writer.abandon()
            return None
        run = writer.finish()
    except StoreFull:
        writer.abandon()
        raise
    except BaseException:
        writer.close()
        raise
    try:
        storage.sync_directory(path.parent)
    except BaseException:
        run.close()
        raise
    return run
