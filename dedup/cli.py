"""The commands of this package: `points`; and what `verify` prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from dedup import layout
from dedup.damage import Check, Damage, Report
from dedup.errors import StoreError, UnknownName
from dedup.moment import rfc3339
from dedup.points import PointRange, Points
from dedup.reader import GroupReader, StoreReader
from dedup.terminal import group_option, json_option, print_json, print_table, shown
from dedup.types import Gap, Moment, Seq, TimeNs
from dedup.volume_history import path_history

SHOWN_MAX = 50
"""Damage that `verify` prints for a person, per check; --json has more."""


def store_path(address: str) -> Path:
    """The store's path. StoreError for an appliance's address: this command reads the store's own files."""
    scheme, separator, _ = address.partition(":")
    if separator and (scheme == "unix" or address[len(scheme) :].startswith("://")):
        raise StoreError(f"{address}: this command reads the store itself, which an address cannot give it yet; "
                         "run it on the store's host, with the store's path")  # fmt: skip
    return Path(address)


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", required=False)
@group_option
@json_option
def points(store: str, volume: str | None, group: str | None, as_json: bool) -> None:
    """Show what can be restored of STORE, or of the one VOLUME: ranges, gaps, flushes, bookmarks."""
    reader = StoreReader.open(store_path(store))
    try:
        chosen = reader.group(group)
        found = chosen.points()
        if volume is not None:
            found = points_of_volume(reader, chosen, found, volume)
    finally:
        reader.close()
    if as_json:
        print_json(points_json(found, volume))
    else:
        _print_points(found)


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


def _print_points(found: Points) -> None:
    click.echo(f"group {found.group}: ", nl=False)
    if found.oldest is None or found.newest is None:
        click.echo("nothing can be restored yet" if not found.ranges else "")
    else:
        click.echo(
            f"seq={found.oldest.seq} at {rfc3339(found.oldest.time)} to seq={found.newest.seq} at "
            f"{rfc3339(found.newest.time)}; {found.flushes} flushed; covered until {rfc3339(found.covered_until)}"
        )
    rows: list[tuple[Seq, list[str]]] = []
    for one in found.ranges:
        ends = [f"{one.first}..{one.last}", rfc3339(one.first_time), rfc3339(one.last_time)]
        rows.append((one.first, ["points", *ends, f"{one.granularity}, in {one.journal}"]))
    for gap in found.gaps:
        last, until = ("", "") if gap.last is None or gap.to_time is None else (str(gap.last), rfc3339(gap.to_time))
        rows.append((gap.first, ["gap", f"{gap.first}..{last}", rfc3339(gap.from_time), until, gap.reason]))
    for mark in found.bookmarks:
        rows.append((mark.seq, ["bookmark", str(mark.seq), rfc3339(mark.time), "", mark.name]))
    if rows:
        print_table(["what", "seq", "from", "to", ""], [row for _, row in sorted(rows, key=lambda item: item[0])])


def show_report(context: click.Context, report: Report, path: Path, *, as_json: bool) -> None:
    """Prints what a verification found; ends the command with status 1 when that is damage."""
    if as_json:
        print_json(report_json(report))
    else:
        _print_report(report, path)
    if not report.ok:
        context.exit(1)


def report_json(report: Report) -> dict[str, object]:
    """The contract's shape, and `group` with each damage, `omitted` with each check, `repairs` with what was done."""
    checks = [
        {
            "name": check.name,
            "ok": check.ok,
            "items": check.items,
            "damage": [_damage_json(damage) for damage in check.damage],
            "omitted": check.omitted,
        }
        for check in report.checks
    ]
    repairs = [{"what": one.what, "file": one.file} for one in report.repairs]
    return {"ok": report.ok, "checks": checks, "repaired": report.repaired, "repairs": repairs}


def _damage_json(damage: Damage) -> dict[str, object]:
    return {
        "snapshot": damage.snapshot,
        "volume": damage.volume,
        "offset": damage.offset,
        "length": damage.length,
        "file": damage.file,
        "what": damage.what,
        "group": damage.group,
    }


def _print_report(report: Report, path: Path) -> None:
    for repair in report.repairs:
        where = "" if repair.file is None else f"{repair.file}: "
        click.echo(f"repaired: {shown(where)}{shown(repair.what)}")
    rows = [[check.name, _verdict(check), str(check.items)] for check in report.checks]
    print_table(["check", "", "items"], rows)
    for check in report.checks:
        for damage in check.damage[:SHOWN_MAX]:
            click.echo(f"{check.name}: {shown(_where(damage))}{shown(damage.what)}")
        more = len(check.damage) - SHOWN_MAX
        if more > 0 or check.omitted:
            click.echo(f"{check.name}: {max(0, more) + check.omitted} more; --json names up to {len(check.damage)}")
    click.echo(f"{shown(str(path))} is {'sound' if report.ok else 'damaged'}")


def _verdict(check: Check) -> str:
    return "ok" if check.ok else f"{len(check.damage) + check.omitted} damaged"


def _where(damage: Damage) -> str:
    parts = []
    if damage.volume is not None:
        parts.append(damage.volume if damage.group is None else f"{damage.group}: {damage.volume}")
    if damage.snapshot is not None:
        parts.append(f"in {damage.snapshot}")
    if damage.offset is not None and damage.length is not None:
        parts.append(f"bytes {damage.offset}..{damage.offset + damage.length}")
    return f"{' '.join(parts)}: " if parts else ""
