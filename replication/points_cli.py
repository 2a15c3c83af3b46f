"""`rewindfs points`: what can be restored."""

from __future__ import annotations

import click

from dedup.points_report import print_points
from dedup.terminal import group_option, json_option, print_json
from replication.reports import Subject, open_report
from replication.route import Route, route_options


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", required=False)
@group_option
@json_option
@route_options
def points(store: str, volume: str | None, group: str | None, as_json: bool, route: Route) -> None:
    """Show what can be restored of STORE, or of the one VOLUME: ranges, gaps, flushes, bookmarks."""
    with open_report(store, Subject("points", group, volume), route) as report:
        found = report.document()
    if as_json:
        print_json(found)
    else:
        print_points(found)
