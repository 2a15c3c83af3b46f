"""`rewindfs snapshot`: create, list, delete, map.

What changes the store goes through its second appliance where one runs, and takes the store's lock itself otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from dedup.ids import TimeNs
from dedup.moment import duration_ns, rfc3339
from dedup.terminal import (
    group_option,
    json_option,
    print_json,
    print_json_list,
    print_json_ranges,
    print_table,
    shown,
    size_text,
)
from replication.errors import ProtocolError
from replication.route import Route, route_options
from replication.store_command import on_group

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from replication.reports import Report


@click.group()
def snapshot() -> None:
    """Create, list and delete snapshots."""


@snapshot.command()
@click.argument("store", metavar="STORE")
@click.option("--at", "at", default="latest", metavar="TIME", help="The recovery point to keep; by default the latest.")
@click.option("--name", metavar="NAME", help="By default the moment's time.")
@click.option("--volume", metavar="VOLUME", help="Keep this one volume, not the whole group.")
@click.option("--keep", metavar="DURATION", help="Retention forgets it after so long, e.g. 90d; by default never.")
@group_option
@json_option
@route_options
def create(
    store: str,
    at: str,
    name: str | None,
    volume: str | None,
    keep: str | None,
    group: str | None,
    as_json: bool,
    route: Route,
) -> None:
    """Keep a recovery point of STORE as a snapshot. Copies nothing; durable when it returns."""
    kept_ns = 0 if keep is None else duration_ns(keep)
    body: dict[str, object] = {"at": at, "name": name or "", "volume": volume or "", "keep_ns": kept_ns}
    if name == "":
        raise click.UsageError("--name must not be empty")
    if kept_ns is None or (keep is not None and not kept_ns):
        raise click.UsageError(f"--keep {keep} is no duration; write it like 90d or 12h")

    def here(writer: GroupWriter) -> dict[str, object]:
        made = writer.create_snapshot(name, at, volume, kept_ns)
        return {"group": writer.name, "name": made.name, "seq": made.seq, "time": made.time, "kind": made.kind}

    made = on_group(store, group, "snapshot.create", body, here, route)
    time = made.get("time")
    if not isinstance(time, int):
        raise ProtocolError(f"the appliance's reply to snapshot.create has no time: {made}")
    document = {
        "name": made.get("name"),
        "seq": made.get("seq"),
        "time": rfc3339(TimeNs(time)),
        "kind": made.get("kind"),
        "group": made.get("group"),
        "volume": volume,
    }
    if as_json:
        print_json(document)
    else:
        click.echo(f"{shown(str(document['name']))}  seq={document['seq']}  {document['time']}")


@snapshot.command()
@click.argument("store", metavar="STORE")
@click.argument("name", metavar="NAME")
@group_option
@route_options
def delete(store: str, name: str, group: str | None, route: Route) -> None:
    """Forget the snapshot or bookmark NAME; the recovery point itself stays as long as its data journal keeps it."""
    on_group(store, group, "snapshot.delete", {"name": name}, lambda writer: _delete(writer, name), route)


def _delete(writer: GroupWriter, name: str) -> dict[str, object]:
    writer.delete_snapshot(name)
    return {}


@snapshot.command("list")
@click.argument("store", metavar="STORE")
@group_option
@json_option
@route_options
def list_(store: str, group: str | None, as_json: bool, route: Route) -> None:
    """List the snapshots of STORE: the base, bookmarks and snapshots, and what changed from one to the next."""
    from replication.reports import Subject, open_report, whole_snapshots

    with open_report(store, Subject("snapshots", group), route) as report:
        listed = whole_snapshots(report)
        if as_json:
            print_json_list(listed)
        else:
            _print_list(listed)


def _print_list(listed: Iterable[dict[str, object]]) -> None:
    rows = []
    for row in listed:
        volumes = row["volumes"]
        head = [str(row[key]) for key in ("name", "time", "seq", "kind", "group")]
        if not isinstance(volumes, list) or not volumes:
            rows.append([*head, "", "", ""])
            continue
        for volume in volumes:
            sizes = [size_text(volume["size"]), size_text(volume["changed_bytes"])]
            rows.append([*head, *sizes, volume["volume"]])
            head = [""] * len(head)
    if not rows:
        click.echo("no snapshots yet")
        return
    print_table(["name", "time", "seq", "kind", "group", "size", "changed", "volume"], rows)


@snapshot.command("map")
@click.argument("store", metavar="STORE")
@click.argument("volume", metavar="VOLUME")
@click.option("--at", "at", required=True, metavar="TIME", help="The moment.")
@group_option
@json_option
@route_options
def map_(store: str, volume: str, at: str, group: str | None, as_json: bool, route: Route) -> None:
    """Show where each range of VOLUME lies at TIME: a hole, the base, or which data journal."""
    from replication.reports import Subject, open_report

    with open_report(store, Subject("map", group, volume, at), route) as report:
        _print_map(report, as_json)


def _print_map(report: Report, as_json: bool) -> None:
    """Range by range, as they are found: a large volume may have millions."""
    head = report.head
    ranges = (one for _, one in report.rows)
    if not as_json:
        click.echo(f"{shown(head['volume'])}  seq={head['seq']}  {head['time']}  {size_text(head['size'])}")
        for one in ranges:
            assert isinstance(one, dict)
            kind = one["kind"]
            where = "" if kind == "hole" else f"  {one['journal']}  container {one['container']} slot {one['slot']}"
            click.echo(f"{one['offset']:>16}  {one['length']:>14}  {kind:<7}{where}")
        return
    print_json_ranges({key: head[key] for key in ("volume", "seq", "time")}, ranges)
