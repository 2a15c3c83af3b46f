"""`rewindfs snapshot`: create, list, delete, map.

What changes the store goes through its second appliance where one runs, and takes the store's lock itself otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import click

from dedup.cli import store_path
from dedup.errors import UnknownName
from dedup.group_writer import GroupWriter
from dedup.moment import duration_ns, rfc3339
from dedup.reader import GroupReader, StoreReader
from dedup.snapshot_map import snapshot_map
from dedup.terminal import group_option, json_option, print_json, print_json_list, print_table, shown, size_text
from dedup.types import Moment, Snapshot, TimeNs, VolumeId, VolumeState
from replication.errors import ProtocolError
from replication.store_command import on_group


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
def create(
    store: str, at: str, name: str | None, volume: str | None, keep: str | None, group: str | None, as_json: bool
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

    made = on_group(store, group, "snapshot.create", body, here)
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
def delete(store: str, name: str, group: str | None) -> None:
    """Forget the snapshot or bookmark NAME; the recovery point itself stays as long as its data journal keeps it."""
    on_group(store, group, "snapshot.delete", {"name": name}, lambda writer: _delete(writer, name))


def _delete(writer: GroupWriter, name: str) -> dict[str, object]:
    writer.delete_snapshot(name)
    return {}


@snapshot.command("list")
@click.argument("store", metavar="STORE")
@group_option
@json_option
def list_(store: str, group: str | None, as_json: bool) -> None:
    """List the snapshots of STORE: the base, bookmarks and snapshots, and what changed from one to the next."""
    reader = StoreReader.open(store_path(store))
    try:
        names = reader.groups() if group is None else [group]
        listed = (row for name in names for row in _listed(reader.group(name)))
        if as_json:
            print_json_list(listed)
        else:
            _print_list(listed)
    finally:
        reader.close()


def _listed(group: GroupReader) -> Iterator[dict[str, object]]:
    before: Snapshot | None = None
    for found in group.snapshots():
        volumes = [
            {"volume": path, "size": volume.size, "changed_bytes": _changed(group, volume.volume, before, found)}
            for path, volume in sorted(group.volumes_at(found.seq).items())
            if found.volume in (None, volume.volume)
        ]
        yield {
            "name": found.name,
            "time": rfc3339(found.time),
            "seq": found.seq,
            "kind": found.kind,
            "group": group.name,
            "volumes": volumes,
            "keep_until": None if found.keep_until is None else rfc3339(found.keep_until),
        }
        before = found


def _changed(group: GroupReader, volume: VolumeId, before: Snapshot | None, now: Snapshot) -> int:
    """Bytes of blocks that changed since the snapshot before, or all that are no holes where it had no such volume."""
    if before is None or group.view(before.seq).volume(volume) is None:
        return group.changed_bytes(volume, None, now.seq)
    return group.changed_bytes(volume, before.seq, now.seq)


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
def map_(store: str, volume: str, at: str, group: str | None, as_json: bool) -> None:
    """Show where each range of VOLUME lies at TIME: a hole, the base, or which data journal."""
    reader = StoreReader.open(store_path(store))
    try:
        chosen = reader.group(group)
        moment = chosen.resolve(at)
        volumes = chosen.volumes_at(moment.seq)
        if volume not in volumes:
            known = ", ".join(sorted(volumes)) or "none"
            raise UnknownName(f"group {chosen.name} had no volume {volume!r} at seq={moment.seq}; it had: {known}")
        _print_map(reader, chosen, volumes[volume], moment, as_json)
    finally:
        reader.close()


def _print_map(reader: StoreReader, group: GroupReader, volume: VolumeState, moment: Moment, as_json: bool) -> None:
    """Range by range, as they are found: a large volume may have millions."""
    found = snapshot_map(reader, group, volume, moment.seq)
    if not as_json:
        click.echo(f"{shown(volume.path)}  seq={moment.seq}  {rfc3339(moment.time)}  {size_text(volume.size)}")
        for one in found:
            where = "" if one.kind == "hole" else f"  {one.journal}  container {one.container} slot {one.slot}"
            click.echo(f"{one.offset:>16}  {one.length:>14}  {one.kind:<7}{where}")
        return
    head = {"volume": volume.path, "seq": moment.seq, "time": rfc3339(moment.time)}
    click.echo(json.dumps(head)[:-1] + ', "ranges": [', nl=False)
    separator = "\n"
    for one in found:
        click.echo(separator + json.dumps(asdict(one)), nl=False)
        separator = ",\n"
    click.echo("]}")
