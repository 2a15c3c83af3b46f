"""`rewindfs consolidate` and `rewindfs gc`: what keeps a store in order, by command.

Goes through the store's second appliance where one runs, and takes the store's lock itself otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from dedup.terminal import json_option, print_json, shown, size_text
from replication.route import Route, route_options
from replication.store_command import on_store

if TYPE_CHECKING:
    from dedup.store import Store

LONG_SECONDS: Final = 7 * 24 * 3600.0
"""How long the appliance may take: as long as the history of a large store."""


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--dry-run", is_flag=True, help="Only say what would be thinned and freed.")
@json_option
@route_options
def consolidate(store: str, dry_run: bool, as_json: bool, route: Route) -> None:
    """Thin the history of STORE as `rewindfs retention show` says, in use or not, and free what that leaves.

    An appliance does so by itself as history grows older. Safe to interrupt.
    """
    document = on_store(
        store,
        "consolidate",
        {"dry_run": dry_run},
        lambda opened: _consolidate(opened, dry_run),
        timeout=LONG_SECONDS,
        route=route,
    )
    if as_json:
        print_json(document)
        return
    planned = document["planned"]
    if dry_run:
        click.echo(
            f"{size_text(document['freed_bytes'])} would be freed: {planned['points']} recovery points in "
            f"{planned['pieces']} pieces of history are due, {planned['kept_points']} of them stay"
        )
    else:
        click.echo(f"{size_text(document['freed_bytes'])} freed: {planned['pieces']} pieces of history thinned")
    if document["postponed"]:
        click.echo(f"{document['postponed']} pieces are left for later: a reader needs a moment in each")


def _consolidate(store: Store, dry_run: bool) -> dict[str, object]:
    # Here, and below: an appliance that is asked has it imported already.
    from dedup.consolidation_report import consolidate_here, foresee_here

    return foresee_here(store) if dry_run else consolidate_here(store)


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@json_option
@route_options
def gc(store: str, dry_run: bool, as_json: bool, route: Route) -> None:
    """Free what no recovery point of STORE needs any more, in use or not. Safe to interrupt."""
    document = on_store(
        store,
        "gc",
        {"dry_run": dry_run},
        lambda opened: _collect(opened, dry_run),
        timeout=LONG_SECONDS,
        route=route,
    )
    if as_json:
        print_json(document)
        return
    planned = document["planned"]
    click.echo(
        f"{size_text(document['freed_bytes'])} {'would be ' if dry_run else ''}freed: of {planned['containers']} "
        f"containers {planned['removed']} hold nothing that is needed, {planned['rewritten']} in part; "
        f"{planned['dead_blocks']} of {planned['dead_blocks'] + planned['live_blocks']} blocks are dead"
    )
    for skipped in document["skipped"]:
        click.echo(f"left as it is: {shown(skipped)}")
    if document["postponed"]:
        readers = ", ".join(holder.partition("-")[0] for holder in document["postponed"])
        click.echo(f"not done to the end, for a command reads the store (process {shown(readers)}); run it again after")


def _collect(store: Store, dry_run: bool) -> dict[str, object]:
    from dedup.gc import collect, collected_fields

    return collected_fields(collect(store, dry_run=dry_run), dry_run=dry_run)
