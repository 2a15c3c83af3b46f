"""Runs of fingerprints becoming one, a piece at a time.

Invariants:
- the runs are only read; each piece has all rows of a range of first halves, so the pieces follow each other;
- of a fingerprint that is in two runs the older address stays, and what was taken out of a run is not in the merged
  one, whether that was before or after its piece was done;
- each piece ends at a fence of one of the runs, behind that of the piece before: there are no more of them than pages;
- a page that is not right, or cannot be read, is left out: what it has costs deduplication;
- a piece is a few MB of memory, and few of them are written before they are synced: whoever syncs another file waits
  for no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from dedup.errors import Damaged
from dedup.fingerprint_run import FingerprintRun, RunWriter
from dedup.fingerprint_table import Rows, ascending
from dedup.storage import Storage
from dedup.types import Address

_PAGES_PER_PIECE: Final = 384
"""Of all runs together: 65,000 rows, 1.5 MB."""
_PIECES_PER_SYNC: Final = 8
DROPPED_MAX: Final = 1 << 16
"""So many fingerprints may be dropped while it is under way."""


class FingerprintMerge:
    """Of neighbours, the oldest first. Not thread-safe."""

    def __init__(self, storage: Storage, path: Path, runs: Sequence[FingerprintRun]) -> None:
        """StoreFull, StoreFailed."""
        self.runs = tuple(runs)
        self._storage = storage
        self._writer = RunWriter(storage, path, sum(run.row_count for run in runs))
        self._pages = [0] * len(runs)
        """Of each run the first page that has rows from `_from` on."""
        self._from = 0
        self._pieces = 0
        self._dropped: list[tuple[bytes, Address]] = []
        self.is_done = False
        self.merged: FingerprintRun | None = None
        """The one that they became, DURABLE; None while it is not done, and where no row is left."""

    def step(self) -> int:
        """The next piece; how many rows it has. Damaged: the runs are not what they are said to be, and the merge has
        to be given up. StoreFull, StoreFailed."""
        end = self._next_end()
        rows = self._piece(end)
        self._writer.append(rows)
        self._pieces += 1
        if end is None:
            self._finish()
        else:
            self._from = end
            if self._pieces % _PIECES_PER_SYNC == 0:
                self._writer.sync()
        return len(rows[0])

    def _next_end(self) -> int | None:
        """The first half before which the next piece ends; None: it is the last one. Damaged."""
        share = max(1, _PAGES_PER_PIECE // len(self.runs))
        ends: list[int] = []
        for run, page in zip(self.runs, self._pages, strict=True):
            later = int(np.searchsorted(run.fences, np.uint64(self._from), "right"))
            if (fence := max(page + share, later)) < run.page_count:
                ends.append(int(run.fences[fence]))
        end = min(ends, default=None)
        if end is not None and end <= self._from:
            raise Damaged(f"{self._writer.path}: the fences of what is merged into it do not ascend")
        return end

    def _piece(self, end: int | None) -> Rows:
        """All rows whose first half is from `_from` up to `end`, of which the pages are left behind. Damaged."""
        parts: list[Rows] = []
        for number, run in enumerate(self.runs):
            first = self._pages[number]
            behind = run.page_count if end is None else int(np.searchsorted(run.fences, np.uint64(end)))
            high, low, where = run.rows(first, max(first, behind))
            start, stop = np.searchsorted(high, np.uint64(self._from)), len(high)
            if end is not None:
                stop = int(np.searchsorted(high, np.uint64(end)))
                self._pages[number] = max(first, behind - 1)  # its last rows may be of the next piece
            parts.append((high[start:stop], low[start:stop], where[start:stop]))
        rows = ascending(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if len(rows[0]) and not (self._from <= int(rows[0][0]) and (end is None or int(rows[0][-1]) < end)):
            raise Damaged(f"{self._writer.path}: rows of what is merged into it do not ascend")
        return rows

    def _finish(self) -> None:
        if self._writer.row_count:
            self.merged = self._writer.finish()
            self._storage.sync_directory(self.merged.path.parent)
            self.merged.drop(self._dropped)
        else:
            self._writer.abandon()
        self._dropped = []
        self.is_done = True

    def drop(self, entries: Sequence[tuple[bytes, Address]]) -> bool:
        """What was dropped of the runs; DURABLE when the merged one is. False: it is more than can be remembered, and
        the merge has to be given up. StoreFull, StoreFailed."""
        if self.merged is not None:
            self.merged.drop(entries)
        elif not self.is_done:
            self._dropped += entries
        return len(self._dropped) <= DROPPED_MAX

    def abandon(self) -> None:
        """Gives up what it has so far. StoreFailed."""
        if self.merged is not None:
            self.merged.close()
        self._writer.abandon()

    def close(self) -> None:
        """Leaves the file to whoever opens the store next. The runs stay open."""
        if self.merged is not None:
            self.merged.close()
        self._writer.close()
