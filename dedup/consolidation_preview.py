"""What a consolidation and the collection after it would free, without writing anything.

The journal is read as it would be after the consolidation: the pieces that are due through their folds, the rest as it
is; what only the dropped points name is what a collection would find dead.
"""

from __future__ import annotations

from dataclasses import dataclass

from dedup.consolidation import GroupHistory, Piece, folding, plan
from dedup.gc import Collector, Plan
from dedup.journal_reader import JournalPosition, SegmentFile, chain, scan
from dedup.metadata_journal import encode, extents_of
from dedup.retention import Policy
from dedup.types import TimeNs


@dataclass(frozen=True, slots=True)
class Preview:
    """What is due: pieces, the recovery points in them and those that would stay, the journal's bytes and what they
    would become; `collection` is what could be collected then, what is dead already included."""

    pieces: int
    points: int
    kept: int
    journal_bytes: int
    kept_bytes: int
    collection: Plan

    @property
    def free_bytes(self) -> int:
        return max(0, self.journal_bytes - self.kept_bytes) + self.collection.free_bytes


@dataclass(slots=True)
class _Counts:
    pieces: int = 0
    points: int = 0
    kept: int = 0
    journal_bytes: int = 0
    kept_bytes: int = 0


def preview(
    histories: list[tuple[GroupHistory, JournalPosition]], collector: Collector, policy: Policy, now: TimeNs
) -> Preview:
    """Of all groups, each with where its journal ended when `collector`'s boundary was drawn. Damaged."""
    counts = _Counts()
    for history, end in histories:
        _mark(history, end, collector, policy, history.now(now), counts)
    return Preview(counts.pieces, counts.points, counts.kept, counts.journal_bytes, counts.kept_bytes, collector.plan())


def _mark(
    history: GroupHistory, end: JournalPosition, collector: Collector, policy: Policy, now: TimeNs, counts: _Counts
) -> None:
    due = plan(history, policy, now)
    folded: set[SegmentFile] = set()
    for piece in due:
        folded.update(piece.stretch.segments)
        _mark_folded(history, piece, collector, policy, now, counts)
    files = chain(history.storage, history.directory)
    for file, behind in zip(files, [*files[1:], None], strict=True):
        if file not in folded:
            limit = end if behind is None else behind.start
            for scanned in scan(history.storage, history.directory, file.start, limit=limit):
                collector.mark_extents(extents_of(scanned.raw))


def _mark_folded(
    history: GroupHistory, piece: Piece, collector: Collector, policy: Policy, now: TimeNs, counts: _Counts
) -> None:
    counts.pieces += 1
    counts.journal_bytes += piece.bytes
    counts.points += sum(1 for _ in history.points(piece.stretch, history.gaps()))
    fold, _ = folding(history, piece, policy, now)
    for point, entries in fold.points():
        counts.kept += point.entry.kind.consumes_seq
        for entry in entries:
            counts.kept_bytes += len(encode(entry, 0))
            collector.mark_extents(entry.extents)
