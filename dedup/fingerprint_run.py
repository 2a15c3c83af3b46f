"""A run of fingerprints: a file of sorted fingerprints and their addresses that is written once, front to back.

It is looked up through maps: the filter says of nearly all that are not there that they are not, with a look at one
word; the fences, the first of each page, say in which page the others would be. A page has all three columns of its
rows, so one that is found costs the disk one read.

Invariants:
- rows ascend by their first halves, and no fingerprint is there twice; the file is DURABLE before anything names it;
- a row is taken out by a zero (HOLE) in the place of its address; where it cannot be found since its page or the fences
  are not right, by zeros over that page, or over the header. That is all that ever changes;
- nobody looks at a row of a page that does not match its checksum and its fence, and whoever takes out has checked the
  fences, too: what is not found by it is not found by anybody;
- what the disk refuses or gives back wrong costs the rows of that page; it is no error of a look-up.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from dedup.errors import Damaged, StoreFull, Unreadable
from dedup.fingerprint_filter import bits_of, pair_count, pair_of
from dedup.fingerprint_table import U64, Rows, halves_of_one
from dedup.layout import FORMAT_VERSION, Fields, checked, checksum, know_version
from dedup.storage import Storage
from dedup.types import HOLE, Address

log = logging.getLogger(__name__)

RUN_MAGIC: Final = b"rwFPRUN\n"
RUN_HEADER: Final = Fields(
    "run header",
    ("magic", "8s"),
    ("version", "H"),
    ("reserved", "6s"),
    ("most", "Q"),
    ("pages", "Q"),
    ("rows", "Q"),
    ("fences", "Q"),
    ("checksum", "Q"),
)
RUN_PAGE_BYTES: Final = 4096
RUN_PAGE_ROWS: Final = 170
_WORD_BYTES: Final = 8
_PAIR_BYTES: Final = 2 * _WORD_BYTES
_PAGE_WORDS: Final = RUN_PAGE_BYTES // _WORD_BYTES
_LOW: Final = RUN_PAGE_ROWS
_WHERE: Final = 2 * RUN_PAGE_ROWS
_CHECKSUM: Final = 3 * RUN_PAGE_ROWS
"""Where in a page the columns of second halves and of addresses begin, and what is behind them; that of first halves is
before them."""
_HALVES_BYTES: Final = _WHERE * _WORD_BYTES
"""What a page's checksum is of: it does not change when a row is taken out."""
_CHECKED_BYTES: Final = RUN_HEADER.size - _WORD_BYTES
_NOTHING: Final = np.uint64((1 << 64) - 1)
"""Fills up the last page; its address is HOLE."""
_READ_AT_ONCE: Final = 1 << 22
"""Of the filter and the fences, when the file is opened."""
_FEW: Final = 10
"""Up to so many are sought one by one: numpy costs some tens of microseconds before it begins."""
_TOGETHER_MAX: Final = 256
"""So many are sought at once: up to 1 MiB of pages."""
_NO_ROWS: Final = np.zeros(0, np.uint64)
_PageOf = Callable[[int], memoryview | None]
"""Gives the words of the page of that number; None: they are not to be looked at."""


def _parts(most: int) -> tuple[int, int, int]:
    """Of a run of at most so many rows: pairs of its filter, where its fences begin, and where its pages do."""
    pairs = pair_count(most)
    fences = RUN_PAGE_BYTES + _whole_pages(pairs * _PAIR_BYTES)
    return pairs, fences, fences + _whole_pages(_page_count(most) * _WORD_BYTES)


def _page_count(rows: int) -> int:
    """All pages but the last one are full."""
    return -(-rows // RUN_PAGE_ROWS)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // RUN_PAGE_BYTES) * RUN_PAGE_BYTES


class FingerprintRun:
    """An open run. `find` may be called beside `drop` and `rows`, which one thread at a time calls."""

    def __init__(self, storage: Storage, path: Path, fd: int, most: int, rows: int, fences_sum: int) -> None:
        """Use `open`."""
        self._storage = storage
        self._fd = fd
        self.path = path
        self.row_count = rows
        """Those that were written; some may have been taken out."""
        self.page_count = _page_count(rows)
        pairs, fences, self._start = _parts(most)
        self._map = storage.map_to_read(fd, self._start - RUN_PAGE_BYTES, RUN_PAGE_BYTES)
        self.filter = np.frombuffer(self._map, np.uint64, 2 * pairs)
        """See `fingerprint_filter.may_have`: whoever asks it first need not `find` most of what is not there."""
        self.fences = np.frombuffer(self._map, np.uint64, self.page_count, fences - RUN_PAGE_BYTES)
        self._fences_sum = fences_sum
        self.quick_filter, self._quick_fences = self.filter.data, self.fences.data
        """Memoryviews give ints, and quicker than the arrays do."""
        self._is_lost = False
        """Its fences are not right any more: it has no rows."""
        self._is_changed = False
        """Something was taken out, and is not DURABLE yet."""
        self._is_told = False
        """That it has a page that is not right."""

    @classmethod
    def open(cls, storage: Storage, path: Path) -> FingerprintRun:
        """Damaged, Unreadable, UnknownFormat, FileNotFoundError, StoreFailed."""
        fd = storage.open(path, os.O_RDWR)
        try:
            header = storage.pread(fd, RUN_HEADER.size, 0).ljust(RUN_HEADER.size, b"\0")
            magic, version, _, most, pages, rows, fences_sum, stored = RUN_HEADER.struct.unpack(header)
            if magic != RUN_MAGIC:
                raise Damaged(f"{path}: is no run of fingerprints")
            know_version(version, path)
            if stored != checksum(header[:_CHECKED_BYTES]) or not 0 < rows <= most or pages != _page_count(rows):
                raise Damaged(f"{path}: the header is damaged")
            _, fences, start = _parts(most)
            if storage.size(fd) < start + pages * RUN_PAGE_BYTES:
                raise Damaged(f"{path}: is cut short")
            # Read by calls: what the disk refuses is an error then, and other threads run meanwhile.
            for offset in range(RUN_PAGE_BYTES, start, _READ_AT_ONCE):
                storage.pread(fd, min(_READ_AT_ONCE, start - offset), offset)
            run = cls(storage, path, fd, most, rows, fences_sum)
        except BaseException:
            storage.close(fd)
            raise
        if not run._has_right_fences() or (run.fences[1:] < run.fences[:-1]).any():
            run.close()
            raise Damaged(f"{path}: offset {fences}: the fences are damaged")
        return run

    def close(self) -> None:
        for view in (self.quick_filter, self._quick_fences):
            view.release()
        self.filter = self.fences = _NO_ROWS
        self._map.close()
        self._storage.close(self._fd)

    def _has_right_fences(self) -> bool:
        return checksum(self.fences.data.cast("B")) == self._fences_sum

    def find(self, high: U64, low: U64) -> U64:
        """The address of each fingerprint (see `fingerprint_table.halves`), HOLE where it is not there."""
        found = np.empty(len(high), np.uint64)
        order = np.argsort(high)
        high, low = high[order], low[order]
        found[order] = self._find_all(high, low) if len(high) > _FEW else self._find_each(high, low)
        return found

    def _find_each(self, high: U64, low: U64) -> list[Address]:
        page_of = lru_cache(maxsize=2)(self._page)
        return [self._row_of(one, other, page_of)[1] for one, other in zip(high.tolist(), low.tolist(), strict=True)]

    def _find_all(self, high: U64, low: U64) -> U64 | list[Address]:
        pieces = []
        for start in range(0, len(high), _TOGETHER_MAX):
            some = slice(start, start + _TOGETHER_MAX)
            piece = None if self._is_lost else self._find_together(high[some], low[some])
            if piece is None:
                return self._find_each(high, low)
            pieces.append(piece)
        return np.concatenate(pieces)

    def _find_together(self, high: U64, low: U64) -> U64 | None:
        """The address of each, if each is found by the first look, as nearly always: the filter has let them all
        through. None: one is not there, or has its first half in common with another, or a page is not right; they are
        to be sought one by one."""
        pages = np.searchsorted(self.fences, high, "right") - 1
        numbers = pages[np.flatnonzero(np.diff(pages, prepend=-1))]
        if not numbers.size or pages[0] < 0:
            return None
        try:
            offsets = (self._start + numbers * RUN_PAGE_BYTES).tolist()
            contents = self._storage.pread_each(self._fd, RUN_PAGE_BYTES, offsets)
        except Unreadable:
            return None
        content = b"".join(contents)
        if len(content) != len(numbers) * RUN_PAGE_BYTES:
            return None
        words = np.frombuffer(content, np.uint64)
        each = words.reshape(-1, _PAGE_WORDS)
        sums = [checksum(one[:_HALVES_BYTES]) for one in contents]
        if each[:, _CHECKSUM].tolist() != sums or each[:, 0].tolist() != self.fences[numbers].tolist():
            return None
        rows = np.searchsorted(each[:, :_LOW].ravel(), high)
        rows += rows // RUN_PAGE_ROWS * (_PAGE_WORDS - RUN_PAGE_ROWS)
        if np.count_nonzero((words.take(rows, mode="clip") != high) | (words.take(rows + _LOW, mode="clip") != low)):
            return None
        return words[rows + _WHERE]

    def find_one(self, high: int, low: int) -> Address:
        """`find` of one, quicker."""
        return self._row_of(high, low, self._page)[1]

    def _row_of(self, high: int, low: int, page_of: _PageOf) -> tuple[int, Address]:
        """At which offset of the file the row's address is, and the address; (0, HOLE): it is not there."""
        fences = self._quick_fences
        page = -1 if self._is_lost else bisect_right(fences, high) - 1
        while page >= 0:
            words = page_of(page)
            if words is not None:
                at = bisect_left(words, high, 0, RUN_PAGE_ROWS)
                while at < RUN_PAGE_ROWS and words[at] == high:
                    if words[at + _LOW] == low:
                        word = at + _WHERE
                        return self._start + page * RUN_PAGE_BYTES + word * _WORD_BYTES, Address(words[word])
                    at += 1
            if fences[page] != high:
                break
            page -= 1  # the page before may end with the same first half
        return 0, HOLE

    def _page(self, number: int) -> memoryview | None:
        """The words of a page; None: it is not right, or cannot be read."""
        try:
            content = self._storage.pread(self._fd, RUN_PAGE_BYTES, self._start + number * RUN_PAGE_BYTES)
        except Unreadable as error:
            self._tell(str(error))
            return None
        return self._checked(number, content)

    def _checked(self, number: int, content: bytes) -> memoryview | None:
        """The words of what was read as a page; None: it is not right. The addresses may be any."""
        if len(content) == RUN_PAGE_BYTES:
            words = memoryview(content).cast("Q")
            if words[_CHECKSUM] == checksum(content[:_HALVES_BYTES]) and words[0] == self._quick_fences[number]:
                return words
        self._tell(f"{self.path}: offset {self._start + number * RUN_PAGE_BYTES}: a page of fingerprints is damaged")
        return None

    def _tell(self, what: str) -> None:
        """Once: a look-up may come by as often as it likes."""
        if not self._is_told:
            self._is_told = True
            log.warning("blocks of a page of fingerprints are stored once more when they come again: %s", what)

    def rows(self, first: int, end: int) -> Rows:
        """Those of pages `first` to `end` that were not taken out, ascending, without those of pages that are not right
        or cannot be read. Read at once: whoever wants them wants all, and the kernel reads ahead."""
        if self._is_lost or first == end:
            return _NO_ROWS, _NO_ROWS, _NO_ROWS
        numbers, size = range(first, end), (end - first) * RUN_PAGE_BYTES
        try:
            content = self._storage.pread(self._fd, size, self._start + first * RUN_PAGE_BYTES).ljust(size, b"\0")
        except Unreadable:
            content = b"".join([self._page(number) or bytes(RUN_PAGE_BYTES) for number in numbers])
        each = (content[at : at + RUN_PAGE_BYTES] for at in range(0, size, RUN_PAGE_BYTES))
        right = np.array([page is not None for page in map(self._checked, numbers, each)])
        pages = np.frombuffer(content, np.uint64).reshape(-1, _PAGE_WORDS)
        where = pages[:, _WHERE:_CHECKSUM].ravel()
        kept = (where != HOLE) & np.repeat(right, RUN_PAGE_ROWS)
        kept[self.row_count - first * RUN_PAGE_ROWS :] = False
        high, low = pages[:, :_LOW].ravel(), pages[:, _LOW:_WHERE].ravel()
        return (high, low, where) if kept.all() else (high[kept], low[kept], where[kept])

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> None:
        """Takes out each fingerprint that has that address, and all of a page that would have it and is not right, or
        cannot be read: it might be right another time. DURABLE when it returns. StoreFull, StoreFailed."""
        if not self._is_lost and not self._has_right_fences():
            self._is_lost = True
            log.warning(
                "blocks of a run of fingerprints are stored once more when they come again: %s: the fences are damaged",
                self.path,
            )
        if self._is_lost:
            self._change(0, bytes(RUN_HEADER.size))
        page_of = lru_cache(maxsize=2)(self._page_or_emptied)
        for mark, where in sorted(entries):
            offset, found = self._row_of(*halves_of_one(mark), page_of)
            if found == where != HOLE:
                self._change(offset, bytes(_WORD_BYTES))
        if self._is_changed:
            self._storage.datasync(self._fd)
            self._is_changed = False

    def _page_or_emptied(self, number: int) -> memoryview | None:
        """`_page`, which is None for good then. StoreFull, StoreFailed."""
        words = self._page(number)
        if words is None:
            self._change(self._start + number * RUN_PAGE_BYTES, bytes(RUN_PAGE_BYTES))
        return words

    def _change(self, offset: int, content: bytes) -> None:
        self._is_changed = True
        self._storage.pwritev(self._fd, [content], offset)


class RunWriter:
    """Writes one run: `append` as often as wanted, then `finish`; or `abandon`."""

    def __init__(self, storage: Storage, path: Path, most: int) -> None:
        """Of `most` rows at most, at least 1; in the place of what is at `path`. StoreFull, StoreFailed."""
        self._storage = storage
        self.path = path
        self._most = most
        self._pairs, self._fences_at, self._pages = _parts(most)
        self._page_count = 0
        self._fences_sum = xxhash.xxh3_64()
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
        """These come behind those so far, ascending by their first halves, none twice. Not durable. Damaged: they are
        more than there is room for. StoreFull, StoreFailed."""
        if not len(rows[0]):
            return
        self.row_count += len(rows[0])
        if self.row_count > self._most:
            raise Damaged(f"{self.path}: more fingerprints come than there were said to be")
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
            pages[:, _CHECKSUM] = [checksum(page) for page in np.ascontiguousarray(pages[:, :_WHERE])]
            self._write(pages, self._pages + self._page_count * RUN_PAGE_BYTES)
            fences = pages[:, 0].copy()
            self._write(fences, self._fences_at + self._page_count * _WORD_BYTES)
            self._fences_sum.update(fences.data.cast("B"))
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
        fences_sum = self._fences_sum.intdigest()
        numbers = self._most, self._page_count, self.row_count, fences_sum
        header = checked(RUN_HEADER.struct.pack(RUN_MAGIC, FORMAT_VERSION, b"", *numbers, 0))
        self._storage.pwritev(self._fd, [header], 0)
        self.sync()
        run = FingerprintRun(self._storage, self.path, self._fd, self._most, self.row_count, fences_sum)
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
        """Removes the file, if it is there. StoreFailed."""
        self.close()
        with suppress(FileNotFoundError):
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
