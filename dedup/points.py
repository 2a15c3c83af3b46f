"""What can be restored of a group: ranges of recovery points, each with its granularity, and the gaps between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dedup.granularity import granularity_text
from dedup.group_state import FINE
from dedup.layout import RAW_GENERATION
from dedup.types import Gap, JournalId, JournalSpec, Moment, Route, Seq, Snapshot, TimeNs

if TYPE_CHECKING:
    from dedup.manifest import Manifest
    from dedup.reader import GroupReader
    from dedup.stamps import Stamp, Stamps


@dataclass(frozen=True, slots=True)
class PointRange:
    """Recovery points first..last at one granularity: what their data journal promises, or retention has left.

    Both can be restored, and between them at least that. Where a window has not been thinned yet, there are more.
    """

    first: Seq
    first_time: TimeNs
    last: Seq
    last_time: TimeNs
    granularity: str
    journal: str


@dataclass(frozen=True, slots=True)
class Points:
    """What can be restored of a group."""

    group: str
    oldest: Moment | None
    newest: Moment | None
    covered_until: TimeNs
    ranges: tuple[PointRange, ...]
    gaps: tuple[Gap, ...]
    flushes: int
    bookmarks: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Records up to `last` that were routed to one data journal, and have one granularity (0: every write)."""

    last: Seq
    granularity_ns: int
    journal: JournalId


def points_of(group: GroupReader) -> Points:
    """All of it, as of the group's last refresh."""
    gaps = group.gaps()
    ranges = group.stamped(lambda stamps: list(_ranges(group, gaps, stamps)))
    return Points(
        group.name,
        group.moment(group.view(ranges[0].first)) if ranges else None,
        group.moment(group.view(ranges[-1].last)) if ranges else None,
        group.covered_until,
        tuple(ranges),
        tuple(gaps),
        group.state.flushes,
        tuple(group.bookmarks()),
    )


def _ranges(group: GroupReader, gaps: list[Gap], stamps: Stamps) -> Iterator[PointRange]:
    """From the base on, cut at gaps and where the granularity changes."""
    if not group.state.base:
        return
    found = group.stretches()
    starts = [group.state.base, *(Seq(gap.last + 1) for gap in gaps if gap.last is not None)]
    ends = [*(Seq(gap.first - 1) for gap in gaps), *([] if group.state.gap else [group.held])]
    for first, last in zip(starts, ends, strict=True):
        at = bisect_left(found, first, key=lambda stretch: stretch.last)
        while first <= last:
            start, end = stamps.first(first), stamps.last(min(last, found[at].last))
            if start is not None and start.seq <= end.seq:
                yield _range(group, start, end, found[at])
            first = Seq(found[at].last + 1)
            at += 1


def _range(group: GroupReader, start: Stamp, end: Stamp, stretch: Stretch) -> PointRange:
    spec = group.state.journal_spec(stretch.journal)
    return PointRange(
        start.seq,
        start.time,
        end.seq,
        end.time,
        granularity_text(stretch.granularity_ns),
        str(stretch.journal) if spec is None else spec.name,
    )


def routes_needed_since(manifest: Manifest) -> Seq:
    """From where on `stretches` has to know the routes: where the first segment lies that does not say it itself."""
    raw = next((row for row in manifest.rows if row.generation == RAW_GENERATION), None)
    return manifest.last if raw is None else Seq(raw.first - 1)


def stretches(
    manifest: Manifest, routes: Iterable[Route], journals: Iterable[JournalSpec], held: Seq
) -> Iterator[Stretch]:
    """The history up to `held`, cut where its granularity or its data journal changes.

    Of what is consolidated the manifest tells the window and the data journal; where that is not thinned, or not yet,
    the granularity is what the data journal promises. Of the rest the routes tell, of which those are needed that
    `routes_needed_since` says.
    """
    promised = {spec.journal: spec.granularity_ns for spec in journals}
    before: Stretch | None = None
    for last, window_ns, journal in _pieces(manifest, routes, held):
        one = Stretch(last, max(window_ns, promised.get(journal, 0)), journal)
        if before is not None and (before.granularity_ns, before.journal) != (one.granularity_ns, one.journal):
            yield before
        before = one
    if before is not None:
        yield before


def _pieces(manifest: Manifest, routes: Iterable[Route], held: Seq) -> Iterator[tuple[Seq, int, JournalId]]:
    """(last seq, window, data journal), in order, none empty."""
    ordered = sorted({route.after: route for route in routes}.values(), key=lambda route: route.after)
    journal, at = FINE.journal, 0
    for row in [*manifest.rows, None]:
        if row is not None and row.generation != RAW_GENERATION:
            yield row.last, row.window_ns, row.journal
            continue
        first, last = (manifest.last + 1, held) if row is None else (row.first, row.last)
        while at < len(ordered) and ordered[at].after < last:
            if ordered[at].after >= first:
                yield ordered[at].after, 0, journal
            journal = ordered[at].journal
            at += 1
        if last >= first:
            yield last, 0, journal
