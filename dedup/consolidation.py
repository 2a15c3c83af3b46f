"""Consolidation: history thinned as the retention policy says, as a plan and its execution.

A piece is a stretch of neighbouring segments that is due at one window. It is folded (`fold`) into new files, which
anyone may do who can read the store; the writer commits them: manifest, index, and only then the old files go.

Invariants:
- nothing is deleted before what replaces it is durable and read back; the manifest's rename is the sole commit;
- every point that the policy keeps, and every named one, stays what it was; a segment's end always stays too;
- a piece that a reader has pinned a moment in is left for the next time;
- age is counted from the older of this host's clock and the group's last record: one clock that leaps deletes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup.catalog import Catalog, Txn
from dedup.fold import Fold, KeptPoint, Label, Stretch, write_rows
from dedup.granularity import FOREVER
from dedup.group_state import BASE_NAME, GroupState
from dedup.journal_reader import JournalPosition, SegmentFile, chain, scan
from dedup.layout import RAW_GENERATION
from dedup.manifest import Manifest, SegmentRow, read_manifest
from dedup.metadata_journal import EntryKind, Scanned, decode
from dedup.retention import Point, Policy, kept, segment_window
from dedup.storage import Storage
from dedup.synthesis import state_before
from dedup.types import (
    Consolidated,
    Gap,
    JournalId,
    JournalSpec,
    JournalUse,
    PointKind,
    Seq,
    Snapshot,
    TimeNs,
)

PIECE_BYTES_MAX: Final = 4 << 20
"""Segments are joined into pieces of this size at most: what one commit has to index."""
BASE_SHARE: Final = 4
"""What has expired is merged into the base once it is more than a fourth of it: a byte is written a few times only."""
BASE_SEGMENTS_MAX: Final = 64
"""Or once it is this many segments."""


@dataclass(frozen=True, slots=True)
class SegmentAges:
    """What the plan has to know of one segment. `newest` is the time of its last record of each granularity."""

    segment: SegmentFile
    last: Seq
    bytes: int
    window_ns: int
    newest: tuple[tuple[int, TimeNs], ...]

    @property
    def end(self) -> JournalPosition:
        return JournalPosition(self.segment.first, self.bytes, self.segment.generation)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch that is due to be thinned to one point per `window_ns`."""

    stretch: Stretch
    window_ns: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Folded:
    """A piece, and the new files that may take its place in manifest `number` + 1."""

    piece: Piece
    number: int
    rows: tuple[SegmentRow, ...]
    raw: tuple[SegmentAges, ...] = ()
    """The raw segments between the manifest's last row and the piece, which the next manifest names as they are."""
    base: tuple[Seq, TimeNs] | None = None
    """The new base snapshot, where everything before it goes."""
    named: tuple[Seq, ...] = ()
    """The moments of the piece that had a name when it was folded."""

    @property
    def freed_bytes(self) -> int:
        """Bytes of journal that it saves."""
        return max(0, self.piece.bytes - sum(row.bytes for row in self.rows))


class GroupHistory:
    """A group's journal and catalog as the plan sees them, within one read transaction of the caller."""

    def __init__(self, storage: Storage, directory: Path, catalog: Catalog, txn: Txn, head: GroupState) -> None:
        """`head` is the group's state now; it is not changed."""
        self.storage = storage
        self.directory = directory
        self.manifest = read_manifest(storage, directory)
        self._catalog = catalog
        self._txn = txn
        self._head = head

    @property
    def journals(self) -> Sequence[JournalSpec]:
        return self._head.journals

    def now(self, host: TimeNs) -> TimeNs:
        """What ages are counted from."""
        return min(host, self._head.time)

    def names(self) -> dict[str, Snapshot]:
        """Every bookmark and snapshot, the base too."""
        named: dict[str, Snapshot | None] = dict(self._catalog.snapshots(self._txn))
        named.update(self._head.new_snapshots)
        return {name: snapshot for name, snapshot in named.items() if snapshot is not None}

    def named_in(self, stretch: Stretch) -> set[Seq]:
        """The moments of the stretch that have a name."""
        return {one.seq for one in self.names().values() if stretch.after < one.seq <= stretch.last}

    def gaps(self) -> list[Gap]:
        """Every gap, an open one too."""
        found = [*self._catalog.gaps(self._txn), *self._head.new_gaps]
        return found if self._head.gap is None else [*found, self._head.gap]

    @property
    def base(self) -> Seq:
        return self._head.base

    def state_before(self, segment: SegmentFile) -> GroupState:
        """The group's state where the segment begins."""
        return state_before(self.storage, self.directory, self._catalog, self._txn, segment)

    def granularity(self, journal: JournalId) -> int:
        """The window of a data journal; 0 for every write."""
        spec = self._head.journal_spec(journal)
        return 0 if spec is None else spec.granularity_ns

    def segments(self, known: dict[SegmentFile, SegmentAges]) -> list[SegmentAges]:
        """All complete segments in order: every one but the last raw one, which is still appended to.

        `known` saves reading raw segments again; what is read is added to it. Damaged.
        """
        rows = {SegmentFile(row.first, row.generation): row for row in self.manifest.rows}
        files = chain(self.storage, self.directory)
        found = []
        for index, file in enumerate(files[:-1] if files else []):
            row = rows.get(file)
            if row is not None and row.generation != RAW_GENERATION:
                newest = ((self.granularity(row.journal), row.newest),)
                found.append(SegmentAges(file, row.last, row.bytes, row.window_ns, newest))
                continue
            if file not in known:
                known[file] = self._read(file, Seq(files[index + 1].first - 1))
            found.append(known[file])
        return found

    def _read(self, file: SegmentFile, last: Seq) -> SegmentAges:
        fd = self.storage.open(file.path(self.directory), os.O_RDONLY)
        try:
            size = self.storage.size(fd)
        finally:
            self.storage.close(fd)
        stretch = Stretch((file,), last, JournalPosition(file.first, size, file.generation))
        newest: dict[int, TimeNs] = {}
        for point in self.points(stretch, ()):
            newest[point.granularity_ns] = max(point.time, newest.get(point.granularity_ns, TimeNs(0)))
        return SegmentAges(file, last, size, 0, tuple(sorted(newest.items())))

    def points(self, stretch: Stretch, gaps: Sequence[Gap]) -> Iterator[Point]:
        """The recovery points of a stretch but those in `gaps`, in order. Damaged."""
        journal = self.state_before(stretch.segments[0]).journal
        held: Point | None = None
        for scanned in scan(self.storage, self.directory, stretch.start, limit=stretch.end):
            if not scanned.kind.consumes_seq:
                if scanned.kind is EntryKind.JOURNAL_USE:
                    use = decode(scanned.raw).body
                    if isinstance(use, JournalUse):
                        journal = use.journal
                    held = None if held is None else held._replace(closes=True)
                continue
            if held is not None:
                yield held
            flushed = scanned.kind in _FLUSHED
            if scanned.kind is EntryKind.CONSOLIDATED:
                body = decode(scanned.raw).body
                if isinstance(body, Consolidated):
                    journal, flushed = body.journal, body.point is not PointKind.CRASH
            held = None if _inside(scanned.seq, gaps) else self._point(scanned, journal, flushed)
        if held is not None:
            yield held

    def _point(self, scanned: Scanned, journal: JournalId, flushed: bool) -> Point:
        closes = scanned.kind is EntryKind.BOOKMARK
        return Point(scanned.seq, scanned.time, scanned.run, flushed, self.granularity(journal), closes)


_FLUSHED: Final = frozenset({EntryKind.FLUSH, EntryKind.BOOKMARK})


def _inside(seq: Seq, gaps: Sequence[Gap]) -> bool:
    return any(gap.first <= seq and (gap.last is None or seq <= gap.last) for gap in gaps)


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan(
    history: GroupHistory, policy: Policy, now: TimeNs, known: dict[SegmentFile, SegmentAges] | None = None
) -> list[Piece]:
    """The pieces that are due at `now`, in order. Reads raw segments that `known` does not have. Damaged."""
    segments = history.segments({} if known is None else known)
    due = [_due_window(one, policy, now) for one in segments]
    expired = next((index for index, window in enumerate(due) if window != FOREVER), len(due))
    gaps = history.gaps()
    while expired and _inside(segments[expired - 1].last, gaps):
        expired -= 1  # the base is a recovery point: the gap waits for what comes behind it
    named = {snapshot.seq for name, snapshot in history.names().items() if name != BASE_NAME}
    pieces = list(_expired_pieces(segments[:expired], named))
    pieces += _thinned_pieces(segments[expired:], [window if window != FOREVER else 0 for window in due[expired:]])
    return pieces


def _due_window(one: SegmentAges, policy: Policy, now: TimeNs) -> int:
    return max((segment_window(policy, now, newest, granularity) for granularity, newest in one.newest), default=0)


def _thinned_pieces(segments: Sequence[SegmentAges], due: Sequence[int]) -> Iterator[Piece]:
    """Neighbours that are due at the same window, as long as they are small."""
    group: list[SegmentAges] = []
    window = 0
    for one, target in zip(segments, due, strict=True):
        is_due = target > one.window_ns
        fits = sum(member.bytes for member in group) + one.bytes <= PIECE_BYTES_MAX
        if group and not (is_due and target == window and fits):
            yield _piece(group, window)
            group = []
        if is_due:
            group.append(one)
            window = target
    if group:
        yield _piece(group, window)


def _expired_pieces(segments: Sequence[SegmentAges], named: Collection[Seq]) -> Iterator[Piece]:
    """What is older than all tiers: one file from each named point to the next, the last one grown now and then."""
    run: list[SegmentAges] = []
    for one in segments:
        run.append(one)
        if one.window_ns == FOREVER and one.last in named:
            yield from _expired_run(run)
            run = []
    yield from _expired_run(run)


def _expired_run(run: Sequence[SegmentAges]) -> Iterator[Piece]:
    if not run or (len(run) == 1 and run[0].window_ns == FOREVER):
        return
    grown = sum(one.bytes for one in run[1:])
    if run[0].window_ns != FOREVER or grown * BASE_SHARE >= run[0].bytes or len(run) >= BASE_SEGMENTS_MAX:
        yield _piece(run, FOREVER)


def _piece(group: Sequence[SegmentAges], window: int) -> Piece:
    stretch = Stretch(tuple(one.segment for one in group), group[-1].last, group[-1].end)
    return Piece(stretch, window, sum(one.bytes for one in group))


# ---- execution -------------------------------------------------------------------------------------------------------


def folding(
    history: GroupHistory, piece: Piece, policy: Policy, now: TimeNs
) -> tuple[Fold, Callable[[KeptPoint], Label]]:
    """The fold of a piece, and the labels of its rows; nothing is written yet. Damaged."""
    keep = _kept(history, piece, policy, now)
    state = history.state_before(piece.stretch.segments[0])
    fold = Fold(history.storage, history.directory, piece.stretch, state, keep)

    def label(point: KeptPoint) -> Label:
        if piece.window_ns == FOREVER:
            return Label(FOREVER, point.journal, single=True)
        window = segment_window(policy, now, point.entry.time, history.granularity(point.journal))
        return Label(window, point.journal)

    return fold, label


def _kept(history: GroupHistory, piece: Piece, policy: Policy, now: TimeNs) -> set[Seq]:
    """The recovery points of the piece that stay. What is before the base is none."""
    names = history.names()
    if piece.window_ns == FOREVER:
        # Its end is a point, and the only one that has no name: another would be merged away the next time.
        named = {snapshot.seq for name, snapshot in names.items() if name != BASE_NAME}
        inside = {seq for seq in named if piece.stretch.after < seq <= piece.stretch.last}
        return {seq for seq in {*inside, piece.stretch.last} if seq >= history.base}
    named = {snapshot.seq for snapshot in names.values()}
    points = history.points(piece.stretch, history.gaps())
    return set(kept((point for point in points if point.seq >= history.base), policy, now, named))


def fold_next(
    history: GroupHistory,
    policy: Policy,
    now: TimeNs,
    known: dict[SegmentFile, SegmentAges],
    skip: Collection[Seq] = (),
    *,
    breathe: Callable[[], None] = lambda: None,
) -> Folded | None:
    """Folds the first piece that is due, by this host's clock `now`, but those that end at a seq in `skip`. None: there
    is none.

    Writes the files that may replace it; durable and read back, named by nothing. `known`: see
    `GroupHistory.segments`. Damaged, StoreFull, …
    """
    age = history.now(now)
    due = (piece for piece in plan(history, policy, age, known) if piece.stretch.last not in skip)
    piece = next(due, None)
    if piece is None:
        return None
    first = piece.stretch.segments[0].first
    raw = tuple(one for one in history.segments(known) if history.manifest.last < one.segment.first < first)
    return _fold_piece(history, piece, policy, age, raw, breathe)


def _fold_piece(
    history: GroupHistory,
    piece: Piece,
    policy: Policy,
    now: TimeNs,
    raw: tuple[SegmentAges, ...],
    breathe: Callable[[], None],
) -> Folded:
    fold, label = folding(history, piece, policy, now)
    number = history.manifest.number
    rows = write_rows(history.storage, history.directory, fold, label, number + 1, breathe)
    oldest = rows[0]
    advances = piece.window_ns == FOREVER and not piece.stretch.after and oldest.last in fold.keep
    is_new = advances and oldest.last > history.base
    base = (oldest.last, oldest.newest) if is_new else None
    return Folded(piece, number, tuple(rows), raw, base, tuple(sorted(history.named_in(piece.stretch))))


def replaced(manifest: Manifest, folded: Folded) -> Manifest:
    """The manifest with the piece's new rows in the place of its old ones. ValueError when it is another one's."""
    first, last = folded.rows[0].first, folded.rows[-1].last
    if manifest.number != folded.number or last != folded.piece.stretch.last:
        raise ValueError(f"the piece {first}..{last} was folded for manifest {folded.number}")
    before = [row for row in manifest.rows if row.last < first]
    behind = [row for row in manifest.rows if row.first > last]
    between = [_row_of(one) for one in folded.raw]
    return Manifest(manifest.number + 1, (*before, *between, *folded.rows, *behind))


def _row_of(one: SegmentAges) -> SegmentRow:
    newest = max((time for _, time in one.newest), default=TimeNs(0))
    return SegmentRow(one.segment.first, one.last, RAW_GENERATION, 0, newest, one.bytes, JournalId(0))
