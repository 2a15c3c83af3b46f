"""What can be restored of a group, or of one volume of it, as a document; and that document for a person."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from dedup import layout
from dedup.errors import UnknownName
from dedup.moment import rfc3339
from dedup.points import PointRange, Points
from dedup.reader import GroupReader, StoreReader
from dedup.terminal import print_table
from dedup.types import Gap, Moment, Seq, TimeNs
from dedup.volume_history import path_history


def points_of_volume(store: StoreReader, group: GroupReader, found: Points, path: str) -> Points:
    """What of `found` a volume of that path had a part in. UnknownName for a path that none ever had."""
    if path not in group.paths():
        known = ", ".join(sorted(group.volumes_at(group.held))) or "none"
        raise UnknownName(f"group {group.name} never held a volume {path!r}; it holds now: {known}")
    directory = store.path / layout.GROUPS_NAME / group.name / layout.JOURNAL_NAME
    history = path_history(store.storage, directory, path, group.held)
    ranges = []
    for span_first, span_last in history.spans:
        for one in found.ranges:
            first = max(one.first, span_first)
            last = one.last if span_last is None else min(one.last, span_last)
            if first <= last:
                ranges.append(_narrowed(group, one, Seq(first), Seq(last)))
    ranges.sort(key=lambda one: one.first)
    marks = [mark for mark in found.bookmarks if any(one.first <= mark.seq <= one.last for one in ranges)]
    oldest = _moment(group, ranges[0].first) if ranges else None
    newest = _moment(group, ranges[-1].last) if ranges else None
    return replace(
        found,
        oldest=oldest,
        newest=newest,
        ranges=tuple(ranges),
        flushes=history.flushes,
        bookmarks=tuple(marks),
    )


def _narrowed(group: GroupReader, one: PointRange, first: Seq, last: Seq) -> PointRange:
    start, end = group.view(first).state, group.view(last).state
    return replace(one, first=first, first_time=start.time, last=end.held, last_time=end.time)


def _moment(group: GroupReader, seq: Seq) -> Moment:
    state = group.view(seq).state
    return Moment(group.name, state.held, state.time, state.point)


def points_json(found: Points, volume: str | None) -> dict[str, object]:
    """The contract's shape; `volume` is there when one was asked for."""
    document: dict[str, object] = {
        "group": found.group,
        "oldest": None if found.oldest is None else _place(found.oldest.seq, found.oldest.time),
        "newest": None if found.newest is None else _place(found.newest.seq, found.newest.time),
        "covered_until": rfc3339(found.covered_until) if found.covered_until else None,
        "ranges": [
            {
                "from": _place(one.first, one.first_time),
                "to": _place(one.last, one.last_time),
                "granularity": one.granularity,
                "journal": one.journal,
            }
            for one in found.ranges
        ],
        "gaps": [_gap_json(gap) for gap in found.gaps],
        "flushes": found.flushes,
        "bookmarks": [{"name": mark.name, **_place(mark.seq, mark.time)} for mark in found.bookmarks],
    }
    if volume is not None:
        document["volume"] = volume
    return document


def _place(seq: Seq, time: TimeNs) -> dict[str, object]:
    return {"seq": seq, "time": rfc3339(time)}


def _gap_json(gap: Gap) -> dict[str, object]:
    """From the first moment refused to the last; `to` is null while the gap is open."""
    to = None if gap.last is None or gap.to_time is None else _place(gap.last, gap.to_time)
    return {"from": _place(gap.first, gap.from_time), "to": to, "reason": gap.reason}


def print_points(found: dict[str, Any]) -> None:
    """The document of `points_json` for a person."""
    oldest, newest = found["oldest"], found["newest"]
    click.echo(f"group {found['group']}: ", nl=False)
    if oldest is None or newest is None:
        click.echo("nothing can be restored yet" if not found["ranges"] else "")
    else:
        click.echo(
            f"seq={oldest['seq']} at {oldest['time']} to seq={newest['seq']} at {newest['time']}; "
            f"{found['flushes']} flushed; covered until {found['covered_until']}"
        )
    rows: list[tuple[int, list[str]]] = []
    for one in found["ranges"]:
        rows.append((one["from"]["seq"], ["points", *_span(one), f"{one['granularity']}, in {one['journal']}"]))
    for gap in found["gaps"]:
        rows.append((gap["from"]["seq"], ["gap", *_span(gap), gap["reason"]]))
    for mark in found["bookmarks"]:
        rows.append((mark["seq"], ["bookmark", str(mark["seq"]), mark["time"], "", mark["name"]]))
    if rows:
        print_table(["what", "seq", "from", "to", ""], [row for _, row in sorted(rows, key=lambda item: item[0])])


def _span(one: dict[str, Any]) -> list[str]:
    start, end = one["from"], one["to"] or {"seq": "", "time": ""}
    return [f"{start['seq']}..{end['seq']}", start["time"], end["time"]]
