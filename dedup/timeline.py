"""How much was written when: a group's history, or that of one volume of it, in buckets of one width.

From the headers of the journal, gone through once: a million records take seconds. Of what is consolidated only what is
left is counted: the bytes that its kept points brought, at the time of each; how many writes and flushes there had been
between two of them is no longer known, and `Bucket.thinned` says that it is so.

Invariants:
- memory does not grow with history: BUCKETS_MAX buckets, and one path's holder;
- what lies outside of the time asked for is in no bucket, and each record in it is in exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.errors import BadTime
from dedup.journal_entry import EntryKind, decode
from dedup.journal_reader import Scanned
from dedup.moment import AtTime, Latest, parse_time, rfc3339
from dedup.types import ClockRun, TimeNs, VolumeId
from dedup.volume_history import PATH_KINDS, PathHolder

if TYPE_CHECKING:
    from dedup.group_state import GroupState
    from dedup.reader import GroupReader

BUCKETS_MAX: Final = 500
_SECOND: Final = 1_000_000_000
_WIDTHS: Final = (
    *(step * 10**power for power in range(9) for step in (1, 2, 5)),
    *(step * _SECOND for step in (1, 2, 5, 10, 15, 30)),
    *(step * 60 * _SECOND for step in (1, 2, 5, 10, 15, 30)),
    *(step * 3600 * _SECOND for step in (1, 2, 3, 6, 12)),
    *(step * 86_400 * _SECOND for step in (1, 2, 7, 14, 28)),
)
"""Widths that a person can count in."""
_WRITES: Final = frozenset({EntryKind.WRITE, EntryKind.AGGREGATE})


@dataclass(frozen=True, slots=True)
class Grid:
    """`count` buckets of `width_ns`, the first from `start` on; whole multiples of their width since 1970."""

    start: TimeNs
    width_ns: int
    count: int


@dataclass(slots=True)
class Bucket:
    """What lies in one: bytes that were written, in how many writes, and flushed points.

    An aggregate counts as the writes it combines; of one volume, as one.
    """

    written_bytes: int = 0
    records: int = 0
    flushes: int = 0
    resent_bytes: int = 0
    """What a reconcile sent, the base snapshot's included: not written then by an application."""
    thinned: int = 0
    """Kept points that stand for a stretch of thinned history."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bucket i of `buckets` is that of the grid; what lies outside of since..until is in none."""

    since: TimeNs
    until: TimeNs
    grid: Grid
    buckets: tuple[Bucket, ...]


def grid_over(since: TimeNs, until: TimeNs, buckets: int) -> Grid:
    """The finest grid of at most `buckets` (at least 2) buckets in which both times lie."""
    buckets = min(max(buckets, 2), BUCKETS_MAX)
    for width in _widths():
        start = since - since % width
        count = (until - start) // width + 1
        if count <= buckets:
            return Grid(TimeNs(start), width, count)
    raise AssertionError("widths grow without end")


def _widths() -> Iterator[int]:
    yield from _WIDTHS
    width = _WIDTHS[-1]
    while True:
        width *= 2
        yield width


def span_of(group: GroupReader, since: str | None, until: str | None) -> tuple[TimeNs, TimeNs] | None:
    """The times of two TIMEs, within what can be restored; without them all of it. None: there is nothing yet.

    BadTime unless the first is before the second and something lies between; UnknownName, MomentRefused.
    """
    if not group.state.base:
        return None
    oldest = group.view(group.state.base).state.time
    newest = max(oldest, group.covered_until)
    start = oldest if since is None else _time_of(group, since)
    end = newest if until is None else _time_of(group, until)
    if start > end:
        raise BadTime(f"from {rfc3339(start)} until {rfc3339(end)} is no time at all: exchange the two")
    if start > newest or end < oldest:
        raise BadTime(
            f"nothing is known from {rfc3339(start)} until {rfc3339(end)}: "
            f"what can be restored lies between {rfc3339(oldest)} and {rfc3339(newest)}"
        )
    return max(start, oldest), min(end, newest)


def _time_of(group: GroupReader, text: str) -> TimeNs:
    """A time need not be that of a recovery point; a name, a seq or a flushed point is one's."""
    spec = parse_time(text)
    match spec.where:
        case AtTime(time) if not spec.flush:
            return time
        case Latest() if not spec.flush:
            return group.covered_until
        case _:
            return group.resolve(text).time


def timeline_of(group: GroupReader, since: TimeNs, until: TimeNs, buckets: int, path: str | None = None) -> Timeline:
    """What lies from the one time to the other, both included, in at most so many buckets, as of the last refresh.

    `path`: only what is of the volume that had this path then. Goes through the journal. Damaged.
    """
    grid = grid_over(since, until, buckets)
    last_run = group.runs()[-1].run

    def count(state: GroupState, entries: Iterator[Scanned]) -> Timeline:
        holder = None
        if path is not None:
            now = next((volume.volume for volume in state.volumes.values() if volume.path == path), None)
            holder = PathHolder(path, now)
        counting = _Counting(since, until, grid, holder)
        counting.take(entries, last_run)
        return Timeline(since, until, grid, tuple(counting.buckets))

    return group.scanned_since(since, count)


def timeline_json(timeline: Timeline) -> dict[str, object]:
    """As a document. A bucket is `bucket_seconds` long; the first may begin before `since`, the last end after `until`,
    and what lies outside is not counted."""
    grid = timeline.grid
    return {
        "since": rfc3339(timeline.since),
        "until": rfc3339(timeline.until),
        "bucket_seconds": grid.width_ns / _SECOND,
        "buckets": [
            {
                "from": rfc3339(TimeNs(grid.start + index * grid.width_ns)),
                "bytes": bucket.written_bytes,
                "records": bucket.records,
                "flushes": bucket.flushes,
                "resent_bytes": bucket.resent_bytes,
                "thinned": bucket.thinned,
            }
            for index, bucket in enumerate(timeline.buckets)
        ],
    }


class _Counting:
    """One pass over a journal."""

    def __init__(self, since: TimeNs, until: TimeNs, grid: Grid, holder: PathHolder | None) -> None:
        self._since, self._until = since, until
        self._grid = grid
        self._holder = holder
        self.buckets = [Bucket() for _ in range(grid.count)]

    def take(self, entries: Iterator[Scanned], last_run: ClockRun) -> None:
        start, width, since, until = self._grid.start, self._grid.width_ns, self._since, self._until
        buckets, holder = self.buckets, self._holder
        heartbeat, write = EntryKind.HEARTBEAT, EntryKind.WRITE
        for entry in entries:
            kind, time = entry.kind, entry.time
            if time > until and entry.run == last_run:
                return
            bucket = buckets[(time - start) // width] if since <= time <= until else None
            if holder is not None:
                self._take_of_path(entry, holder, bucket)
            elif bucket is None or kind is heartbeat:
                continue
            elif kind is write:  # nearly all there are
                bucket.records += 1
                bucket.written_bytes += _bytes_of(entry)
            else:
                _take_other(entry, bucket)

    def _take_of_path(self, entry: Scanned, holder: PathHolder, bucket: Bucket | None) -> None:
        if entry.kind in PATH_KINDS:
            body = decode(entry.raw).body
            assert body is not None
            holder.follow(body)
            if bucket is not None:
                bucket.flushes += holder.is_flushed_by(body)
        if bucket is None or holder.volume is None:
            return
        nbytes = _bytes_of(entry, holder.volume)
        if entry.kind in _WRITES:
            bucket.records += nbytes > 0
        if nbytes:
            _add(entry.kind, nbytes, bucket)


def _bytes_of(entry: Scanned, of: VolumeId | None = None) -> int:
    """All that it wrote, or what it wrote to one volume."""
    return sum(length for volume, _, length in entry.extents() if of is None or volume == of)


def _take_other(entry: Scanned, bucket: Bucket) -> None:
    kind = entry.kind
    if kind is EntryKind.FLUSH or kind is EntryKind.BOOKMARK:
        bucket.flushes += 1
        return
    if kind is EntryKind.AGGREGATE:
        bucket.records += entry.seq - entry.first_seq + 1
    elif kind is EntryKind.CONSOLIDATED:
        body = decode(entry.raw).body
        assert body is not None
        bucket.thinned += 1
        bucket.flushes += PathHolder.is_flush(body)
    _add(kind, _bytes_of(entry), bucket)


def _add(kind: EntryKind, nbytes: int, bucket: Bucket) -> None:
    if kind is EntryKind.RECONCILE:
        bucket.resent_bytes += nbytes
    elif kind is not EntryKind.RESIZE:  # whose block is the rest of one that was cut
        bucket.written_bytes += nbytes
