"""Folding: a stretch of the journal written anew with fewer recovery points.

Between two points that are kept, all records become one entry: the last version of each block, and what they changed of
the group. A record that is alone between two of them stays as it is.

Invariants:
- the state after every kept point is what it was, entry by entry applied or at once (`replica-equals-source`);
- memory is bounded: leaves that do not fit a pass are left to a further one;
- nothing that was there is touched: what is written are new files, which nothing names yet.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dedup.folded_blocks import LEAVES_MAX, FoldedBlocks
from dedup.group_state import GroupState
from dedup.journal_reader import JournalPosition, SegmentFile
from dedup.layout import ADDRESS_BYTES, FINGERPRINT_BYTES
from dedup.manifest import SegmentRow
from dedup.metadata_journal import EntryKind, Logged, LoggedExtent, read
from dedup.overlay import Overlay
from dedup.pointer_map import LeafKey
from dedup.segment_builder import SegmentBuilder
from dedup.storage import Storage
from dedup.types import Consolidated, JournalId, Seq, VolumeId, VolumeState

ENTRY_BLOCKS_MAX: Final = (1 << 20) // (ADDRESS_BYTES + FINGERPRINT_BYTES)
"""Blocks of one entry that is written: 1 MiB of pointers."""
FILE_BYTES_MAX: Final = 64 << 20
"""A file that has reached this takes no further kept point."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a row says of its file besides where it lies."""

    window_ns: int
    journal: JournalId
    single: bool = False
    """Each of its points ends a file."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring whole segments of a group's journal, in order: first.first .. last."""

    segments: tuple[SegmentFile, ...]
    last: Seq
    end: JournalPosition
    """Where the last of them ends."""

    @property
    def start(self) -> JournalPosition:
        return self.segments[0].start

    @property
    def after(self) -> Seq:
        """The seq before its first."""
        return Seq(self.segments[0].first - 1)


class _BlockSink(Overlay):
    """The overlay of a state that is only asked for cuts: blocks go elsewhere, with their fingerprints."""

    __slots__ = ("_blocks",)

    def __init__(self, blocks: FoldedBlocks) -> None:
        super().__init__()
        self._blocks = blocks

    def put(self, volume: VolumeId, first_block: int, addresses: object) -> None:
        self.count += 1

    def cut(self, volume: VolumeId, block: int) -> None:
        super().cut(volume, block)
        self._blocks.cut(volume, block)


@dataclass(slots=True)
class _Window:
    """What lies between two kept points, so far."""

    start: JournalPosition
    end: JournalPosition
    volumes: dict[VolumeId, VolumeState]
    """Those that existed at its start."""
    blocks: FoldedBlocks
    first: Seq | None = None
    records: int = 0
    """Entries that consume a seq; 2 stands for any more, and for one that is too large to be held."""
    blocks_named: int = 0
    alone: list[Logged] = field(default_factory=list)
    """Its entries, as long as there is one record among them at most."""


@dataclass(frozen=True, slots=True)
class KeptPoint:
    """A recovery point that stays: its own entry (or the last of those behind it that consume no seq) and the data
    journal that its records were routed to."""

    entry: Logged
    journal: JournalId


class Fold:
    """Rewrites one stretch. `keep` are the seqs of the points that stay; the stretch's last seq always does."""

    def __init__(
        self,
        storage: Storage,
        directory: Path,
        stretch: Stretch,
        state: GroupState,
        keep: Container[Seq],
        *,
        leaves_max: int = LEAVES_MAX,
    ) -> None:
        """`state` is the group's at the stretch's start; it is used up."""
        self._storage = storage
        self._directory = directory
        self._stretch = stretch
        self._state = state
        self.keep = keep
        self._leaves_max = leaves_max

    def points(self) -> Iterator[tuple[KeptPoint, Iterator[Logged]]]:
        """Each kept point with the entries that lead to it, which are to be used up before the next one. Damaged."""
        window = self._window(self._stretch.start)
        point: Logged | None = None
        for logged, after in read(self._storage, self._directory, window.start, limit=self._stretch.end):
            if point is not None and logged.kind is not EntryKind.CONSOLIDATED_MORE:
                yield KeptPoint(point, self._state.journal), self._entries(window)
                window, point = self._window(window.end), None
            self._take(window, logged, after)
            if logged.kind.consumes_seq and (logged.seq in self.keep or logged.seq == self._stretch.last):
                point = logged
        last = point or (window.alone[-1] if window.alone else None)
        if last is not None:
            yield KeptPoint(last, self._state.journal), self._entries(window)

    def _window(self, start: JournalPosition) -> _Window:
        blocks = FoldedBlocks(leaves_max=self._leaves_max)
        self._state.checkpointed()
        self._state.overlay = _BlockSink(blocks)
        return _Window(start, start, dict(self._state.volumes), blocks)

    def _take(self, window: _Window, logged: Logged, after: JournalPosition) -> None:
        self._state.apply(logged)
        window.end = after
        window.blocks_named += sum(len(extent.addresses) for extent in logged.extents)
        for extent in logged.extents:
            window.blocks.put(extent)
        if logged.kind.consumes_seq:
            window.records += 1
            window.first = window.first or logged.first_seq
        if window.records <= 1 and window.blocks_named <= ENTRY_BLOCKS_MAX:
            window.alone.append(logged)
        else:
            window.alone.clear()
            window.records = 2

    def _entries(self, window: _Window) -> Iterator[Logged]:
        if window.alone:
            return iter(window.alone)
        return self._folded(window, self._state.consolidated(), self._state.journal)

    def _folded(self, window: _Window, body: Consolidated, journal: JournalId) -> Iterator[Logged]:
        """The window as one record, in entries of a bounded size."""
        assert window.first is not None
        kind, first = EntryKind.CONSOLIDATED, window.first
        said: Consolidated | None = body
        batch: list[LoggedExtent] = []
        blocks = 0
        for extent in self._extents(window, body):
            if batch and blocks + len(extent.addresses) > ENTRY_BLOCKS_MAX:
                yield Logged(kind, first, body.seq, body.time, body.run, journal, tuple(batch), said)
                kind, first, said = EntryKind.CONSOLIDATED_MORE, body.seq, None
                batch, blocks = [], 0
            batch.append(extent)
            blocks += len(extent.addresses)
        if batch or said is not None:
            yield Logged(kind, first, body.seq, body.time, body.run, journal, tuple(batch), said)

    def _extents(self, window: _Window, body: Consolidated) -> Iterator[LoggedExtent]:
        gone = [state.volume for state in body.volumes if state.retired]
        blocks = window.blocks
        while True:
            for volume in gone:
                blocks.retire(volume)
            yield from blocks.extents()
            if blocks.end is None:
                return
            blocks = self._further_pass(window, blocks.end)

    def _further_pass(self, window: _Window, start: LeafKey) -> FoldedBlocks:
        blocks = FoldedBlocks(start, leaves_max=self._leaves_max)
        state = GroupState(volumes=dict(window.volumes), overlay=_BlockSink(blocks))
        for logged, _ in read(self._storage, self._directory, window.start, limit=window.end):
            state.apply(logged)
            for extent in logged.extents:
                blocks.put(extent)
        return blocks


def write_rows(
    storage: Storage,
    directory: Path,
    fold: Fold,
    label: Callable[[KeptPoint], Label],
    generation: int,
    breathe: Callable[[], None],
) -> list[SegmentRow]:
    """Writes the fold into new files and returns their rows, durable and read back; nothing names them yet.

    A file ends where the next point has another label, where it is large, and at each point whose label says `single`.
    `breathe` is called now and then.
    Damaged, StoreFull, StoreFailed: no file is left.
    """
    rows: list[SegmentRow] = []
    made: list[SegmentBuilder] = []
    builder: SegmentBuilder | None = None
    current: Label | None = None
    try:
        for point, entries in fold.points():
            wanted = label(point) if point.entry.kind.consumes_seq or current is None else current
            if builder is not None and current is not None and _ends(builder, current, wanted, point):
                rows.append(builder.finish(current.window_ns, current.journal))
                builder = None
            current = wanted
            for entry in entries:
                if builder is None:
                    first = entry.first_seq if entry.kind.consumes_seq else Seq(entry.seq + 1)
                    builder = SegmentBuilder(storage, directory, first, generation)
                    made.append(builder)
                builder.append([entry])
            breathe()
        if builder is not None and current is not None:
            rows.append(builder.finish(current.window_ns, current.journal))
    except BaseException:
        for unfinished in made:
            unfinished.close()
        for unfinished in made:
            unfinished.discard()
        raise
    return rows


def _ends(builder: SegmentBuilder, current: Label, wanted: Label, point: KeptPoint) -> bool:
    if not point.entry.kind.consumes_seq:
        return False
    return wanted != current or current.single or builder.bytes >= FILE_BYTES_MAX
