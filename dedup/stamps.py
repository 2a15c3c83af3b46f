"""Seq and time of the records next to a seq, without synthesizing a moment: from the headers of the journal alone.

Invariants:
- for seqs that ascend, no entry is read twice, and between two checkpoints that lie far apart nothing is read;
- nothing behind `held` is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from dedup.group_state import Checkpoint
from dedup.journal_reader import Scanned
from dedup.types import Seq, TimeNs


class Stamp(NamedTuple):
    """Where a record ends."""

    seq: Seq
    time: TimeNs


_BEGINNING = Stamp(Seq(0), TimeNs(0))


class Stamps:
    """Those of one group. For one thread, and while no history is rewritten."""

    def __init__(
        self,
        anchor_at: Callable[[Seq], Checkpoint | None],
        entries_after: Callable[[Checkpoint | None], Iterator[Scanned]],
        held: Seq,
    ) -> None:
        """`anchor_at` gives the last checkpoint at or before a seq, `entries_after` the journal behind one."""
        self._anchor_at = anchor_at
        self._entries_after = entries_after
        self._held = held
        self._entries: Iterator[Scanned] | None = None
        self._at = _BEGINNING
        self._ahead: Stamp | None = None

    def last(self, seq: Seq) -> Stamp:
        """The last record that ends at or before `seq`. Damaged."""
        self._seek(min(seq, self._held))
        return self._at

    def first(self, seq: Seq) -> Stamp | None:
        """The first record that ends at or after `seq`; None when there is none yet. Damaged."""
        if seq > self._held:
            return None
        self._seek(seq)
        return self._at if self._at.seq == seq else self._ahead

    def _seek(self, seq: Seq) -> None:
        anchor = self._anchor_at(seq)
        near = _BEGINNING if anchor is None else Stamp(anchor.held, anchor.time)
        if self._entries is None or not near.seq <= self._at.seq <= seq:
            self._at = near
            self._entries = self._entries_after(anchor)
            self._ahead = self._next()
        while self._ahead is not None and self._ahead.seq <= seq:
            self._at = self._ahead
            self._ahead = self._next()

    def _next(self) -> Stamp | None:
        assert self._entries is not None
        scanned = next(self._entries, None)
        return None if scanned is None or scanned.seq > self._held else Stamp(scanned.seq, scanned.time)
