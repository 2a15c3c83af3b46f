"""A group's state at one moment after another: what a listing asks for, which goes through them in order.

Invariants:
- moments that ascend are reached by going on from the one before, or from a checkpoint between the two: no entry of the
  journal is read twice, where to synthesize each by itself would replay up to a checkpoint's entries for each;
- all of it is of one state of the index and of the journal, which the caller vouches for; for another one it begins
  anew;
- bounded: of what the entries said, the group's volumes stay, and nothing of their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from dedup.catalog import Catalog, Txn
from dedup.group_state import ONLY_BLOCKS, Checkpoint, GroupState
from dedup.journal_reader import JournalPosition, Scanned, decoded
from dedup.types import Seq

ENTRIES_PER_VOLUME: Final = 4
"""So many entries take as long to go through as it takes to look up the state of one volume at a checkpoint."""
FORGET_RECORDS: Final = 4096
"""After which what a checkpoint would write is dropped."""


class GroupWalk:
    """Over the journal whose manifest has that number. Keeps one state; for one thread."""

    def __init__(
        self,
        number: int,
        catalog: Catalog,
        directory: Path,
        entries_from: Callable[[JournalPosition | None], Iterator[Scanned]],
    ) -> None:
        """`entries_from` scans the journal, at `directory`, from a position on; from its begin for None."""
        self.number = number
        self._catalog = catalog
        self._directory = directory
        self._entries_from = entries_from
        self._state: GroupState | None = None
        self._start: JournalPosition | None = None
        self._entries: Iterator[Scanned] | None = None
        self._ahead: Scanned | None = None

    def state_at(self, txn: Txn, seq: Seq, anchor: Checkpoint | None) -> GroupState:
        """The group at the last record at or before `seq`, without an overlay; `anchor` is the last checkpoint there.

        Not to be changed, and only until the next call what it says. Damaged.
        """
        state = self._state
        if state is None or state.held > seq or self._is_far(state, anchor):
            state = self._begin(txn, anchor)
        if state.held == seq:
            return state
        if self._entries is None:
            self._entries = self._entries_from(self._start)
            self._ahead = next(self._entries, None)
        while self._ahead is not None and self._ahead.seq <= seq:
            if self._ahead.kind in ONLY_BLOCKS:
                state.pass_over(self._ahead)
            else:
                state.apply(decoded(self._ahead, self._directory))
            self._ahead = next(self._entries, None)
            if state.records >= FORGET_RECORDS:
                state.checkpointed()
        if self._ahead is None:  # more may be journalled by the next time
            self._state = None
        return state

    def _is_far(self, state: GroupState, anchor: Checkpoint | None) -> bool:
        """Whether it is quicker to begin anew at the anchor than to go on to it."""
        return anchor is not None and anchor.held - state.held > ENTRIES_PER_VOLUME * (1 + len(state.volumes))

    def _begin(self, txn: Txn, anchor: Checkpoint | None) -> GroupState:
        self._state = GroupState() if anchor is None else self._catalog.state(txn, anchor)
        self._start = None if anchor is None else anchor.position
        self._entries = self._ahead = None
        return self._state
