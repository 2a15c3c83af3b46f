"""`rewindfs points`: what can be restored, as a table or as a picture of the timeline."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, Final

import click

from dedup.points_report import print_points
from dedup.terminal import group_option, json_option, print_json
from dedup.timeline import BUCKETS_MAX
from dedup.timeline_picture import ASCII, UNICODE, Charset, buckets_in, picture
from replication.reports import Subject, open_report
from replication.route import Route, route_options

_JSON_BUCKETS: Final = 100


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", required=False)
@click.option("--timeline", is_flag=True, help="A picture over time: write rate, flushes, bookmarks, snapshots, gaps.")
@click.option("--since", metavar="TIME", help="Where the timeline begins [default: the oldest point].")
@click.option("--until", metavar="TIME", help="Where it ends [default: until when history is covered].")
@click.option(
    "--buckets",
    type=click.IntRange(2, BUCKETS_MAX),
    help=f"At most so many bars [default: as there is room; {_JSON_BUCKETS} with --json].",
)
@group_option
@json_option
@route_options
def points(
    store: str,
    volume: str | None,
    timeline: bool,
    since: str | None,
    until: str | None,
    buckets: int | None,
    group: str | None,
    as_json: bool,
    route: Route,
) -> None:
    """Show what can be restored of STORE, or of the one VOLUME: ranges, gaps, flushes, bookmarks.

    --timeline draws it over time, in the local time zone. Of history that was thinned out only what is left is counted.
    With --json the document gets `timeline`: {"since", "until", "bucket_seconds", "buckets": [{"from", "bytes",
    "records", "flushes", "resent_bytes", "thinned"}]}, null when there is no point yet, and `snapshots`: [{"name",
    "seq", "time", "kind"}] of that time. `bytes` and `records` are what applications wrote, `resent_bytes` what a
    reconcile sent, and `thinned` how many kept points stand for thinned history.
    """
    if not timeline and (since or until or buckets):
        raise click.UsageError("--since, --until and --buckets are for --timeline")
    with open_report(store, Subject("points", group, volume), route) as report:
        found = report.document()
    if timeline:
        most = buckets or (_JSON_BUCKETS if as_json else buckets_in(_columns()))
        subject = Subject("timeline", group, volume, since=since, until=until, buckets=most)
        with open_report(store, subject, route) as report:
            found |= report.document()
    if as_json:
        print_json(found)
    elif timeline and found["timeline"] is not None:
        _print_picture(found)
    else:
        print_points(found)


def _columns() -> int:
    """Of the terminal, or what COLUMNS says; 80 where there is none."""
    return shutil.get_terminal_size().columns


def _print_picture(found: dict[str, Any]) -> None:
    """In colour on a terminal that has it; ASCII where the output is none, or a dumb one."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    charset = _charset() if is_terminal else ASCII
    lines = picture(found, _columns(), charset)
    if not is_terminal:
        for line in lines:
            click.echo("".join(piece.text for piece in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        console.print(Text.assemble(*((piece.text, piece.style) for piece in line)), soft_wrap=True)


def _charset() -> Charset:
    try:
        "".join((UNICODE.bars, *UNICODE.many, UNICODE.mark)).encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return ASCII
    return UNICODE
