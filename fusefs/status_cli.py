"""`rewindfs status`: how a mount, or a store, is doing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from dedup.errors import RewindError
from dedup.terminal import json_option, shown, size_text
from fusefs.command_values import Duration, print_json
from fusefs.mount_control import tell
from fusefs.mountpoint import clone_document, mount_at
from replication.address import store_path
from replication.route import Route, route_options

NOTHING_KNOWN: dict[str, Any] = {"oldest": None, "newest": None, "covered_until": None, "gaps": None}
"""What is said of a group's points where its store cannot be asked."""
NO_MOUNT: dict[str, Any] = dict.fromkeys(
    ("mode", "state", "link", "lag", "intent_bytes", "reconcile", "seq", "durable_seq")
)
"""What is said of a source mount where there is none."""


@click.command()
@click.argument("place", metavar="MOUNTPOINT|STORE")
@json_option
@click.option("--fail-on-lag", type=Duration(), help="Exit 1 when the store is behind by more than this.")
@click.option("--watch", is_flag=True, help="Again each second, until interrupted.")
@route_options
def status(place: str, as_json: bool, fail_on_lag: float | None, watch: bool, route: Route) -> None:
    """How a mount or a store is doing."""
    while True:
        report = store_status(place, route) if is_store(place) else mount_status(Path(place))
        print_json(report) if as_json else click.echo(describe(report))
        lag: Any = report["lag"]
        if fail_on_lag is not None and lag is not None and lag["seconds"] > fail_on_lag:
            raise RewindError(f"{place}: the store is {lag['seconds']:.1f} s behind")
        if not watch:
            return
        time.sleep(1)


def is_store(place: str) -> bool:
    """Whether that is a store, or an appliance's address, and no mountpoint."""
    path = store_path(place)
    # The mount table first: a mount whose process has died answers no other question.
    return path is None or (mount_at(path) is None and (path / "STORE").exists())


def mount_status(mountpoint: Path) -> dict[str, Any]:
    """The report on a source mount, or on a clone. Its keys are a contract: more may come, none goes."""
    clone = clone_document(mountpoint)
    if clone is not None:
        return {**NO_MOUNT, "group": clone["group"], **NOTHING_KNOWN, "store": None, "space": None, "clone": clone}
    report: dict[str, Any] = tell(mountpoint, "status", {"store": True})
    oldest = report.pop("oldest_queued")
    report["lag"]["seconds"] = 0.0 if oldest is None else max(0.0, (time.time_ns() - oldest) / 1e9)
    path = report.pop("store_path")
    store = report.pop("store_report", None)
    if path is not None:
        from replication.reports import Subject, open_report  # here: a mount whose store is elsewhere reads none

        with open_report(path, Subject("store", report["group"])) as made:
            store = made.document()
    if store is None:
        # Of a store elsewhere nothing is known while the link is down.
        return {**report, **NOTHING_KNOWN, "store": None, "space": None}
    (points,) = store["groups"]
    return {**report, **points, "store": store["store"], "space": store["space"]}


def store_status(address: str, route: Route) -> dict[str, Any]:
    """The report on a store alone."""
    from replication.reports import Subject, open_report

    with open_report(address, Subject("store"), route) as made:
        store = made.document()
    several: dict[str, Any] = {"group": None, "oldest": None, "newest": None, "gaps": 0}
    only = store["groups"][0] if len(store["groups"]) == 1 else several
    return {**NO_MOUNT, **only, **store}


def describe(report: dict[str, Any]) -> str:
    """The report for a person."""
    if "clone" in report:
        return _clone_text(report["clone"])
    lines = _mount_lines(report) if report["state"] else []
    if not lines and report["group"]:
        lines.append(f"{report['group']}: not mounted through here")
    if report["store"] is None:
        lines.append("  the store cannot be asked now")
    else:
        lines += _store_lines(report)
    return "\n".join(lines)


def _clone_text(clone: dict[str, Any]) -> str:
    overlay = clone["overlay"]
    limit = f" of at most {size_text(overlay['limit'])}" if overlay["limit"] else ""
    return (
        f"{clone['group']}: a clone of {shown(clone['volume'])} at seq={clone['seq']}, {clone['time']} "
        f"({clone['kind']}), from {clone['store']}\n"
        f"  {size_text(overlay['bytes'])}{limit} written, in {overlay['path']}, until it is unmounted"
    )


def _mount_lines(report: dict[str, Any]) -> list[str]:
    mode = report["mode"]
    if mode == "auto":
        mode += " (sync now)" if report["waits_for"] == "received" else " (async now)"
    lines = [f"{report['group']}: {report['state']}, {mode}, link {report['link']}"]
    if report["error"] and report["link"] != "connected":
        lines.append(f"  {report['error']}")
    beyond = report.get("second")
    if beyond:
        why = f": {beyond['error']}" if beyond["error"] else ""
        lines.append(f"  first appliance: its link to the second one is {beyond['link']}{why}")
        if beyond["queued_records"] or beyond["spool_bytes"]:
            spooled = size_text(beyond["spool_bytes"])
            lines.append(f"  first appliance: keeps {beyond['queued_records']} records, {spooled} spooled")
    lag, wire = report["lag"], report["wire"]
    lines.append(f"  behind by {lag['seconds']:.1f} s, {lag['records']} records, {lag['bytes']} bytes")
    lines.append(f"  seq {report['seq']}, durable {report['durable_seq']}")
    spool = report["spool"]
    if spool["error"]:
        lines.append(f"  spool: {spool['error']}")
    elif spool["bytes"]:
        lines.append(f"  spool: {size_text(spool['bytes'])} of at most {size_text(spool['limit'])}")
    if wire["saved_bytes"] > 0:
        sent, saved = size_text(wire["sent_bytes"]), size_text(wire["saved_bytes"])
        lines.append(f"  {sent} sent; {saved} more but for what the second appliance held already")
    for half in report.get("half_restored", []):
        undo = half["bookmark"] or "the moment before it"
        lines.append(f"  {half['place']} is half restored: restore it to seq={half['seq']} again, or back to {undo}")
    if report["reconcile"]:
        lines.append(f"  reconcile: {report['reconcile']['done']} of {report['reconcile']['total']} bytes")
    return lines


def _store_lines(report: dict[str, Any]) -> list[str]:
    store, space = report["store"], report["space"]
    lines = [
        f"  recovery points from {report['oldest'] or '-'} to {report['newest'] or '-'}, {report['gaps']} gaps",
        f"  store {store['path']}: {store['bytes']} bytes for {store['logical_bytes']} written "
        f"(deduplication {store['dedup_ratio']:.2f}), {store['snapshots']} snapshots",
    ]
    if space["state"] != "ok":
        where = "above its soft" if space["state"] == "soft" else "at its hard"
        lines.append(f"  the store is {where} limit of {space[space['state'] + '_limit']} bytes")
    if "error" in space:
        lines.append(f"  {space['error']}")
    return lines
