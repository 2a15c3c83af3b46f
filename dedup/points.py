"""What can be restored of a group: ranges of recovery points, each with its granularity, and the gaps between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dedup.moment import duration_text
from dedup.types import Gap, JournalId, Moment, Route, Seq, Snapshot, TimeNs

if TYPE_CHECKING:
    from dedup.manifest import Manifest
    from dedup.reader import GroupReader

EVERY_WRITE = "every-write"


@dataclass(frozen=True, slots=True)
class PointRange:
    """Recovery points first..last, all of which can be restored, at one granularity."""

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
    """Records up to `last` that have one granularity (0: every write) and were routed to one data journal."""

    last: Seq
    window_ns: int
    journal: JournalId


def points_of(group: GroupReader) -> Points:
    """All of it, as of the group's last refresh."""
    gaps = group.gaps()
    ranges = list(_ranges(group, gaps))
    return Points(
        group.name,
        group.moment(group.view(ranges[0].first)) if ranges else None,
        group.moment(group.view(ranges[-1].last)) if ranges else None,
        group.covered_until,
        tuple(ranges),
        tuple(gaps),
        group.state.flushes,
        tuple(found for found in group.snapshots() if found.kind == "bookmark"),
    )


def _ranges(group: GroupReader, gaps: list[Gap]) -> Iterator[PointRange]:
    """From the base on, cut at gaps and where the granularity changes."""
    if not group.state.base:
        return
    stretches = list(group.stretches())
    starts = [group.state.base, *(Seq(gap.last + 1) for gap in gaps if gap.last is not None)]
    ends = [*(Seq(gap.first - 1) for gap in gaps), *([] if group.state.gap else [group.held])]
    for first, last in zip(starts, ends, strict=True):
        for stretch in stretches:
            if first > last:
                break
            if stretch.last >= first:
                yield from _range(group, first, min(last, stretch.last), stretch)
                first = Seq(stretch.last + 1)


def _range(group: GroupReader, first: Seq, last: Seq, stretch: Stretch) -> Iterator[PointRange]:
    """The range of what can still be told apart in first..last, if anything."""
    start, end = group.first_from(first), group.view(last)
    if start is None or start.state.held > end.state.held:
        return
    spec = group.state.journal_spec(stretch.journal)
    yield PointRange(
        start.state.held,
        start.state.time,
        end.state.held,
        end.state.time,
        duration_text(stretch.window_ns) if stretch.window_ns else EVERY_WRITE,
        str(stretch.journal) if spec is None else spec.name,
    )


def stretches(manifest: Manifest, routes: list[Route], first_journal: JournalId, held: Seq) -> Iterator[Stretch]:
    """The history up to `held`, cut where its granularity or its data journal changes.

    What is consolidated the manifest tells. Behind it every record is still there, whatever its data journal promises.
    """
    found: list[Stretch] = [Stretch(row.last, row.window_ns, row.journal) for row in manifest.rows]
    journal = first_journal
    for route in sorted(routes, key=lambda route: route.after):
        if route.after > manifest.last:
            found.append(Stretch(route.after, 0, journal))
        journal = route.journal
    found.append(Stretch(held, 0, journal))
    for index, one in enumerate(found):
        following = found[index + 1] if index + 1 < len(found) else None
        if following is None or (one.window_ns, one.journal) != (following.window_ns, following.journal):
            yield one
