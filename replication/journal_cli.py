"""`rewindfs journal`: create, list and use the data journals of a group.

What changes the store goes through its second appliance where one runs, and takes the store's lock itself otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dedup.granularity import EVERY_WRITE, granularity_ns, journal_fields
from dedup.terminal import group_option, json_option, print_json, print_table, shown
from replication.address import store_path
from replication.control_messages import Role
from replication.errors import ProtocolError
from replication.route import Route, route_options
from replication.store_command import ask, on_group

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from dedup.types import JournalSpec


@click.group()
def journal() -> None:
    """Create, list and use data journals: each keeps recovery points at its own granularity."""


@journal.command()
@click.argument("store", metavar="STORE")
@click.argument("name", metavar="NAME")
@click.option(
    "--granularity",
    default=EVERY_WRITE,
    metavar="every-write|DURATION",
    help="Keep every write (the default), or one point per DURATION, from 1s to 1d.",
)
@group_option
@json_option
@route_options
def create(store: str, name: str, granularity: str, group: str | None, as_json: bool, route: Route) -> None:
    """Give a group of STORE the further data journal NAME, which receives once it is used. Durable when it returns."""
    width = granularity_ns(granularity)
    body: dict[str, object] = {"name": name, "granularity_ns": width}
    made = on_group(
        store, group, "journal.create", body, lambda writer: _fields(writer, writer.create_journal(name, width)), route
    )
    _print_one(made, as_json)


@journal.command()
@click.argument("store", metavar="STORE")
@click.argument("name", metavar="NAME")
@group_option
@json_option
@route_options
def use(store: str, name: str, group: str | None, as_json: bool, route: Route) -> None:
    """Route what a group of STORE receives from now on to its data journal NAME.

    The others stay able to receive: switching back and forth needs no pause. Durable when it returns.
    """
    used = on_group(
        store, group, "journal.use", {"name": name}, lambda writer: _fields(writer, writer.use_journal(name)), route
    )
    _print_one(used, as_json)


@journal.command("list")
@click.argument("store", metavar="STORE")
@group_option
@json_option
@route_options
def list_(store: str, group: str | None, as_json: bool, route: Route) -> None:
    """List the data journals of STORE: how fine each is, and which one receives."""
    path = store_path(store)
    listed = _listed_by_appliance(store, group, route) if path is None else _listed(path, group)
    if as_json:
        print_json(listed)
        return
    rows = [
        [str(row["group"]), shown(str(row["name"])), str(row["granularity"]), "in use" if row["in_use"] else ""]
        for row in listed
    ]
    print_table(["group", "journal", "granularity", ""], rows)


def _listed(store: Path, group: str | None) -> list[dict[str, object]]:
    from dedup.reader import StoreReader

    reader = StoreReader.open(store)
    try:
        names = reader.groups() if group is None else [group]
        states = [(name, reader.group(name).state) for name in names]
    finally:
        reader.close()
    return [{"group": name, **journal_fields(spec, state.journal)} for name, state in states for spec in state.journals]


def _listed_by_appliance(address: str, group: str | None, route: Route) -> list[dict[str, object]]:
    reply = ask(address, group, "journal.list", {}, route, role=Role.READER)
    listed = reply.get("journals")
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise ProtocolError(f"the appliance's reply to journal.list has no journals: {reply}")
    return [{"group": reply.get("group"), **row} for row in listed]


def _fields(writer: GroupWriter, spec: JournalSpec) -> dict[str, object]:
    return {"group": writer.name, **journal_fields(spec, writer.state.journal)}


def _print_one(fields: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(fields)
        return
    state = "  in use" if fields.get("in_use") else ""
    click.echo(f"{shown(str(fields.get('name')))}  {fields.get('granularity')}{state}")
