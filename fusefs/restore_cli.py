"""`rewindfs restore`: a past moment as a file of its own, or in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

import click

from dedup.errors import RewindError
from dedup.history import History
from dedup.moment import rfc3339
from dedup.pins import Pinning
from dedup.terminal import (
    group_option,
    json_option,
    print_json,
    print_json_ranges,
    shown,
    size_text,
    terminal_progress,
)
from dedup.types import Moment
from fusefs.in_place_session import InPlaceReport, InPlaceRequest, in_place_session
from fusefs.restore_claim import WHOLE_GROUP
from fusefs.restore_plan import RestorePlan, volumes_at
from fusefs.restored_file import Restored, RestoredFile
from fusefs.restored_tree import RestoredTree
from replication.history import held_moments, open_history
from replication.route import Route, route_options

RANGES_SHOWN: Final = 40
"""Ranges, of each sort, that a person is shown."""


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", metavar="VOLUME")
@click.option("--at", "at", required=True, metavar="TIME", help="The moment.")
@click.option("--to", "to", type=click.Path(path_type=Path), metavar="FILE", help="Make this file of it.")
@click.option(
    "--in-place",
    "mountpoint",
    type=click.Path(path_type=Path),
    metavar="MOUNTPOINT",
    help="Bring it back where it was, through the source mount; can be undone.",
)
@click.option("--dry-run", is_flag=True, help="With --in-place: only show what would be done.")
@click.option("--force", is_flag=True, help="Replace FILE; with --in-place, although others have the volume open.")
@click.option("--no-check", is_flag=True, help="Do not read back what was written; in place, nor all of it before.")
@click.option("--no-bookmark", is_flag=True, help="With --in-place: do not name the moment before it.")
@click.option("--skip-damaged", is_flag=True, help="With --to: leave damaged blocks out, restore the rest, and exit 1.")
@group_option
@json_option
@route_options
@click.pass_context
def restore(
    context: click.Context,
    store: str,
    volume: str,
    at: str,
    to: Path | None,
    mountpoint: Path | None,
    dry_run: bool,
    force: bool,
    no_check: bool,
    no_bookmark: bool,
    skip_damaged: bool,
    group: str | None,
    as_json: bool,
    route: Route,
) -> None:
    """Bring VOLUME back as it was at TIME. VOLUME may be a directory of the source, or `.` for the whole group.

    \b
    --to FILE              a sparse copy, checked; interrupted, the same command goes on. With a directory or `.`
                           FILE is a directory that is made.
    --in-place MOUNTPOINT  writes what differs, and only that, through the mount; the moment before it has a name.
    """
    if (to is None) == (mountpoint is None):
        raise click.UsageError("name one of --to and --in-place: where the volume goes")
    if to is not None and (dry_run or no_bookmark):
        raise click.UsageError("--dry-run and --no-bookmark are for --in-place")
    if mountpoint is not None and skip_damaged:
        raise click.UsageError("--skip-damaged is for --to: in place, a damaged block would be neither old nor new")
    place = place_of(volume)
    if mountpoint is not None:
        request = InPlaceRequest(store, group, place, at, mountpoint, route, force, not no_bookmark, not no_check)
        _in_place(request, dry_run, as_json)
        return
    assert to is not None, "one of the two is there"
    with (
        open_history(store, group, route, pinning=Pinning.MOMENTS) as history,
        held_moments(history, at) as (moment,),
    ):
        damaged = _to_file(history, moment, place, to, force, not no_check, skip_damaged, as_json)
    if damaged:
        context.exit(1)


def place_of(volume: str) -> str:
    """A volume's or a directory's path within the source, as the store spells it. UsageError for one outside of it."""
    path = PurePosixPath(os.path.normpath(volume)) if volume else PurePosixPath(WHOLE_GROUP)
    if path.is_absolute() or ".." in path.parts:
        raise click.UsageError(f"{volume}: VOLUME is a path below the source directory, or `.` for all of it")
    return str(path)


# -- into a file -------------------------------------------------------------------------------------------------------


def _to_file(
    history: History, moment: Moment, place: str, to: Path, force: bool, check: bool, skip_damaged: bool, as_json: bool
) -> bool:
    """Whether anything was damaged."""
    volumes = volumes_at(history.group_at(moment.seq), place)
    path = Path(os.path.realpath(to))
    single = volumes.get(place)
    if single is not None and path.is_dir():
        path /= PurePosixPath(place).name  # as cp does
    _check_target(path, to, force=force, is_volume=single is not None)
    restored: list[Restored]
    try:
        with terminal_progress() as progress:
            if single is not None:
                file = RestoredFile(
                    history, moment, single, path,
                    replace=force, check=check, skip_damaged=skip_damaged, progress=progress,
                )  # fmt: skip
                restored = [file.restore()]
            else:
                prefix = "" if place == WHOLE_GROUP else place + "/"
                inside = {name.removeprefix(prefix): volume for name, volume in volumes.items()}
                tree = RestoredTree(
                    history, moment, place, inside, path, check=check, skip_damaged=skip_damaged, progress=progress
                )
                restored = tree.restore()
    except KeyboardInterrupt:
        click.echo(
            f"rewindfs: warning: the same command goes on where this one was interrupted, with --at seq={moment.seq}",
            err=True,
        )
        raise
    total = sum(volume.size for volume in volumes.values())
    _tell_restored(restored, moment, place, path, total, as_json)
    return any(one.damaged for one in restored)


def _check_target(path: Path, to: Path, *, force: bool, is_volume: bool) -> None:
    """RewindError unless `path` can become what is restored."""
    if not path.parent.is_dir():
        raise RewindError(f"{path.parent}: there is no such directory; make it first")
    if not path.exists():
        return
    if is_volume and not path.is_file():
        raise RewindError(f"{path} is there and is no regular file; name another")
    if is_volume and not force:
        raise RewindError(f"{path} is there already; name another file, or replace it with --force")
    if not is_volume and not path.is_dir():
        raise RewindError(f"{to} is there and is no directory; name a directory, it is made")


def _tell_restored(restored: list[Restored], moment: Moment, place: str, path: Path, total: int, as_json: bool) -> None:
    damaged = [
        {"file": str(one.path), "offset": found.offset, "length": found.length}
        for one in restored
        for found in one.damaged
    ]
    written = sum(one.bytes for one in restored)
    for one in restored:
        if not one.has_owner:
            click.echo(f"rewindfs: warning: {one.path}: only root can give it the owner that it had", err=True)
    for found in damaged:
        click.echo(
            f"rewindfs: warning: {found['file']}: bytes {found['offset']}..+{found['length']} are damaged in the "
            "store and were left out: they are zeros",
            err=True,
        )
    if as_json:
        document = {
            "volume": place, "file": str(path), "bytes_written": written, "bytes_total": total,
            "ranges": sum(one.ranges for one in restored), "seq": moment.seq, "time": rfc3339(moment.time),
            "group": moment.group, "volumes": len(restored), "resumed_at": sum(one.resumed_at for one in restored),
            "damaged": damaged,
        }  # fmt: skip
        print_json(document)
        return
    what = f"{len(restored)} volumes, " if len(restored) != 1 else ""
    click.echo(
        f"{shown(str(path))}: {shown(place)} at seq={moment.seq}  {rfc3339(moment.time)}, {what}{size_text(total)}, of "
        f"which {size_text(written)} written"
    )


# -- in place ----------------------------------------------------------------------------------------------------------


def _in_place(request: InPlaceRequest, dry_run: bool, as_json: bool) -> None:
    with in_place_session(request) as session:
        if not dry_run:
            report = session.restore()
            print_json(_done_document(report)) if as_json else _describe(report, request)
            return
        with session.plan() as plan:
            _DryRun(session.history, plan).tell(as_json)


def _done_document(report: InPlaceReport) -> dict[str, Any]:
    return {
        **_document(report.plan, report.written.bytes, report.written.ranges),
        "bookmark": report.bookmark or None,
        "after": {"seq": report.after.seq, "time": rfc3339(report.after.time)},
        "undo": report.undo or None,
        "dry_run": False,
    }


def _document(plan: RestorePlan, written: int, ranges: int) -> dict[str, Any]:
    return {
        "volume": plan.place,
        "group": plan.then.group,
        "bytes_written": written,
        "bytes_total": plan.total_bytes,
        "ranges": ranges,
        "seq": plan.then.seq,
        "time": rfc3339(plan.then.time),
        "before": {"seq": plan.now.seq, "time": rfc3339(plan.now.time)},
        **_changes(plan),
    }


def _changes(plan: RestorePlan) -> dict[str, Any]:
    """What happens besides writing."""
    resized = [
        {"volume": one.path, "from": one.now.size, "to": one.then.size} for one in plan.resized if one.now and one.then
    ]
    return {
        "made": [one.path for one in plan.made],
        "removed": [one.path for one in plan.removed],
        "resized": resized,
        "restyled": [one.path for one in plan.restyled],
    }


def _describe(report: InPlaceReport, request: InPlaceRequest) -> None:
    plan = report.plan
    _warn(report.warnings)
    if not report.undo:
        click.echo(f"{shown(plan.place)} is as it was at seq={plan.then.seq}  {rfc3339(plan.then.time)} already")
        return
    _echo_changes(plan)
    click.echo(
        f"{shown(plan.place)} is as it was at seq={plan.then.seq}  {rfc3339(plan.then.time)}: "
        f"{size_text(report.written.bytes)} of {size_text(plan.total_bytes)} written, in {report.written.ranges} ranges"
    )
    click.echo(f"undo it with: {report.undo}")
    if request.force:
        click.echo("--force was given: what had it open must be restarted, it may have old contents in its memory")


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        click.echo(f"rewindfs: warning: {warning}", err=True)


def _echo_changes(plan: RestorePlan, tense: str = "") -> None:
    for one in plan.made:
        click.echo(f"{tense}made     {shown(one.path)}")
    for one in plan.removed:
        click.echo(f"{tense}removed  {shown(one.path)}")
    for one in plan.resized:
        if one.now and one.then:
            click.echo(f"{tense}resized  {shown(one.path)}: from {one.now.size} to {one.then.size} bytes")


class _DryRun:
    """What a plan would do, range by range as they are found: there may be many."""

    def __init__(self, history: History, plan: RestorePlan) -> None:
        self._history = history
        self._plan = plan
        self._bytes = 0
        self._count = 0

    def tell(self, as_json: bool) -> None:
        if as_json:
            head = {key: value for key, value in _document(self._plan, 0, 0).items()
                    if key not in ("bytes_written", "ranges")}  # fmt: skip
            print_json_ranges(
                head,
                self._ranges(),
                lambda: {"bytes_written": self._bytes, "ranges": self._count, "dry_run": True},
                name="differing",
            )
            return
        _echo_changes(self._plan, "would be ")
        for one in self._ranges():
            if self._count <= RANGES_SHOWN:
                click.echo(f"{one['offset']:>16}  {one['length']:>14}  {shown(str(one['volume']))}")
        if self._count > RANGES_SHOWN:
            click.echo(f"and {self._count - RANGES_SHOWN} ranges more; --json lists them")
        then = self._plan.then
        click.echo(
            f"to have {shown(self._plan.place)} as it was at seq={then.seq}  {rfc3339(then.time)}, "
            f"{size_text(self._bytes)} of {size_text(self._plan.total_bytes)} would be written, in {self._count} ranges"
        )

    def _ranges(self) -> Iterator[dict[str, object]]:
        for change in self._plan.kept:
            for found in self._plan.ranges(self._history, change):
                self._bytes += found.length
                self._count += 1
                yield {"volume": change.path, "offset": found.offset, "length": found.length}
