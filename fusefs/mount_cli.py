"""The commands about a source mount: mount, unmount, bookmark, status."""

from __future__ import annotations

import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import trio

from dedup.errors import RewindError
from dedup.moment import check_name, rfc3339
from dedup.reader import StoreReader
from dedup.space import space_of
from dedup.storage import Storage
from dedup.terminal import json_option
from dedup.types import TimeNs
from fusefs.agent_control import Body, ask
from fusefs.mount_process import DRAIN_SECONDS, MountSettings, run_mount
from fusefs.mountpoint import NotMounted, absolute, check_mountpoint, control_socket, is_dead, mount_at
from fusefs.mountpoint import unmount as leave
from replication.background import Ready, run
from replication.modes import Mode, Outage

_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
BUSY_SECONDS: Final = 5.0
"""How long `unmount` tries again while the mount is busy: a loop device lets go of its file a moment after umount."""


class Duration(click.ParamType[float]):
    """`10s`, `2m`, `1h30m`: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = _DURATION.fullmatch(value)
        if not value or match is None:
            self.fail(f"{value!r} is no duration; write 10s, 2m or 1h30m", param, ctx)
        days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()


DIRECTORY: Final = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=DIRECTORY)
@click.argument("mountpoint", type=DIRECTORY)
@click.option("--store", required=True, metavar="STORE", help="Directory of the store; made if absent.")
@click.option("--mode", type=click.Choice([mode.value for mode in Mode]), default=Mode.ASYNC.value, show_default=True)
@click.option("--name", "group", metavar="GROUP", help="Name of the group in the store [default: the source's name].")
@click.option("--on-outage", type=click.Choice([outage.value for outage in Outage]), help="[default: sync blocks]")
@click.option("--outage-after", type=Duration(), default="10s", show_default=True)
@click.option("--writeback", is_flag=True, help="Kernel write-back caching: faster, recovery points at flushes only.")
@click.option("--allow-other", is_flag=True, help="Let other users use the mount.")
@click.option("-o", "options", multiple=True, metavar="FUSE_OPTION")
@click.option("--wait-base", is_flag=True, help="Return after the base snapshot is made.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there.")
@click.pass_context
def mount(
    context: click.Context,
    source: Path,
    mountpoint: Path,
    store: str,
    mode: str,
    group: str | None,
    on_outage: str | None,
    outage_after: float,
    writeback: bool,
    allow_other: bool,
    options: tuple[str, ...],
    wait_base: bool,
    foreground: bool,
    log_file: Path | None,
) -> None:
    """Mount SOURCE at MOUNTPOINT: every change made there is recorded in STORE, and any moment can be had back."""
    if store.startswith("unix:") or "://" in store:
        raise click.UsageError(f"--store {store}: name a directory; stores on other hosts are not supported yet")
    source, mountpoint, place = absolute(source), absolute(mountpoint), Path(os.path.realpath(store))
    check_places(source, mountpoint, place)
    check_mountpoint(mountpoint)
    settings = MountSettings(
        source,
        mountpoint,
        place,
        group or default_group(source),
        Mode(mode),
        Outage(on_outage) if on_outage else None,
        outage_after,
        writeback,
        allow_other,
        options,
        wait_base,
        log_file.absolute() if log_file else None,
        foreground,
        bool((context.obj or {}).get("debug")),
    )
    warn_about_places(source, place)

    async def main(ready: Ready) -> None:
        await run_mount(settings, ready)

    run(main, foreground=foreground, log_file=log_file, debug=settings.debug)


def check_places(source: Path, mountpoint: Path, store: Path) -> None:
    """RewindError unless the three directories can serve together."""
    if not source.is_dir():
        raise RewindError(f"{source}: the source is not a directory; name the directory that holds the volumes")
    if store == source or source in store.parents:
        raise RewindError(f"{store}: the store lies inside its own source {source}; put it outside")
    if store in source.parents:
        raise RewindError(f"{source}: the source lies inside the store {store}; put it outside")
    if mountpoint == source or source in mountpoint.parents or mountpoint in source.parents:
        raise RewindError(f"{mountpoint}: the mountpoint and the source {source} lie inside one another; use another")
    if store == mountpoint or mountpoint in store.parents or store in mountpoint.parents:
        raise RewindError(f"{store}: the store and the mountpoint {mountpoint} lie inside one another; use another")
    mounted = mount_at(source)
    if mounted is not None and mounted.fstype == "fuse.rewindfs":
        raise RewindError(f"{source} is a mountpoint of rewindfs itself; name the directory under it")


def warn_about_places(source: Path, store: Path) -> None:
    """What a person should know and may want: said, not refused."""
    nearest = store
    while not nearest.exists():
        nearest = nearest.parent
    if os.stat(source).st_dev == os.stat(nearest).st_dev:
        click.echo(
            f"rewindfs: warning: {store} shares a file system with {source}: its loss takes both; "
            "keep the store on another disk",
            err=True,
        )


def default_group(source: Path) -> str:
    """The source directory's name, with what a group's name may not hold replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", source.name).lstrip(".")[:64] or "default"


@click.command()
@click.argument("mountpoint", type=DIRECTORY)
@click.option("--drain-timeout", type=Duration(), default=f"{DRAIN_SECONDS:g}s", show_default=True)
def unmount(mountpoint: Path, drain_timeout: float) -> None:
    """Drain to durable, then unmount. Returns when the mount's processes have ended."""
    mountpoint = absolute(mountpoint)
    try:
        socket = control_socket(mountpoint)
    except NotMounted:
        found = mount_at(mountpoint)
        if found is None or found.fstype != "fuse.rewindfs" or is_dead(mountpoint):
            raise
        leave(mountpoint)  # a snapshot mount: nothing to drain
        return
    trio.run(_drain_and_leave, mountpoint, socket, drain_timeout)


def tell(mountpoint: Path, command: str, body: Body) -> Body:
    """The reply of the process behind a source mount to one command."""
    return trio.run(ask, control_socket(absolute(mountpoint)), command, body)


async def _drain_and_leave(mountpoint: Path, socket: Path, drain_timeout: float) -> None:
    answer = await ask(socket, "unmount", {"drain_timeout": drain_timeout})
    with trio.move_on_after(drain_timeout) as patience:
        await ask(socket, "durable", {})
    if patience.cancelled_caught:
        raise RewindError(
            f"{mountpoint}: not durable at the store within {drain_timeout:g} s and still mounted; "
            "see `rewindfs status`, then try again with a longer --drain-timeout, or fusermount3 -u it"
        )
    with trio.move_on_after(BUSY_SECONDS):
        while mount_at(mountpoint) is not None:
            try:
                await trio.to_thread.run_sync(leave, mountpoint)
            except RewindError:
                await trio.sleep(0.1)
    if mount_at(mountpoint) is not None:
        await trio.to_thread.run_sync(leave, mountpoint)
    pid = answer["pid"]
    if isinstance(pid, int):
        await _wait_for_end(pid, drain_timeout + BUSY_SECONDS)


async def _wait_for_end(pid: int, seconds: float) -> None:
    """Until the process has ended; it is not our child, so its pidfd is what tells."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.move_on_after(seconds) as patience:
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    if patience.cancelled_caught:
        raise RewindError(f"unmounted, but process {pid} is still draining; its log says why")


@click.command()
@click.argument("mountpoint", type=DIRECTORY)
@click.argument("name")
@json_option
def bookmark(mountpoint: Path, name: str, as_json: bool) -> None:
    """Give this moment a NAME, across all volumes of the mount, after a flush."""
    check_name(name)
    answer = tell(mountpoint, "bookmark", {"name": name})
    print_json(answer) if as_json else click.echo(f"bookmark {name} at seq={answer['seq']}")


@click.command()
@click.argument("mountpoint", type=DIRECTORY)
@click.argument("mode", type=click.Choice([mode.value for mode in Mode]))
def mode(mountpoint: Path, mode: str) -> None:
    """Change the MODE of a running mount; nothing is lost or reordered."""
    tell(mountpoint, "mode", {"mode": mode})


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
    sys.stdout.flush()


@click.command()
@click.argument("place", metavar="MOUNTPOINT|STORE", type=DIRECTORY)
@json_option
@click.option("--fail-on-lag", type=Duration(), help="Exit 1 when the store is behind by more than this.")
@click.option("--watch", is_flag=True, help="Again each second, until interrupted.")
def status(place: Path, as_json: bool, fail_on_lag: float | None, watch: bool) -> None:
    """How a mount or a store is doing."""
    while True:
        # The mount table first: a mount whose process has died answers no other question.
        is_store = mount_at(place) is None and (place / "STORE").exists()
        report = store_status(place) if is_store else mount_status(place)
        print_json(report) if as_json else click.echo(describe(report))
        lag: Any = report["lag"]
        if fail_on_lag is not None and lag is not None and lag["seconds"] > fail_on_lag:
            raise RewindError(f"{place}: the store is {lag['seconds']:.1f} s behind")
        if not watch:
            return
        time.sleep(1)


def mount_status(mountpoint: Path) -> dict[str, Any]:
    """The report on a source mount. Its keys are a contract: more may come, none goes."""
    report: dict[str, Any] = tell(mountpoint, "status", {})
    oldest = report.pop("oldest_queued")
    report["lag"]["seconds"] = 0.0 if oldest is None else max(0.0, (time.time_ns() - oldest) / 1e9)
    store = Path(report.pop("store_path"))
    return {**report, **points_of(store, report["group"]), **usage_of(store)}


def store_status(store: Path) -> dict[str, Any]:
    """The report on a store alone."""
    reader = StoreReader.open(store)
    try:
        groups = reader.groups()
    finally:
        reader.close()
    reports = [{"group": group, **points_of(store, group)} for group in groups]
    several: dict[str, Any] = {"group": None, "oldest": None, "newest": None, "gaps": 0}
    only = reports[0] if len(reports) == 1 else several
    unknown = {"mode": None, "state": None, "link": None, "lag": None, "intent_bytes": None, "reconcile": None}
    return {**unknown, "seq": None, "durable_seq": None, **only, "groups": reports, **usage_of(store)}


def points_of(store: Path, group: str) -> dict[str, Any]:
    """Oldest and newest recovery point, gaps, and seqs, as the store itself says."""
    reader = StoreReader.open(store)
    try:
        points = reader.group(group).points()
        return {
            "oldest": None if points.oldest is None else rfc3339(points.oldest.time),
            "newest": None if points.newest is None else rfc3339(points.newest.time),
            "covered_until": rfc3339(TimeNs(points.covered_until)),
            "gaps": len(points.gaps),
        }
    finally:
        reader.close()


def usage_of(store: Path) -> dict[str, Any]:
    """Sizes of the store and what its caps say of them, read beside whoever writes it."""
    reader = StoreReader.open(store)
    try:
        usage = reader.usage()
    finally:
        reader.close()
    return {
        "store": {"path": str(store), **msgspec.to_builtins(usage)},
        "space": space_of(Storage(), store, usage.bytes),
    }


def describe(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = []
    if report["state"]:
        lines.append(f"{report['group']}: {report['state']}, {report['mode']}, link {report['link']}")
        if report["error"] and report["link"] != "connected":
            lines.append(f"  {report['error']}")
        lag = report["lag"]
        lines.append(f"  behind by {lag['seconds']:.1f} s, {lag['records']} records, {lag['bytes']} bytes")
        lines.append(f"  seq {report['seq']}, durable {report['durable_seq']}")
        if report["reconcile"]:
            lines.append(f"  reconcile: {report['reconcile']['done']} of {report['reconcile']['total']} bytes")
    elif report["group"]:
        lines.append(f"{report['group']}: not mounted through here")
    lines.append(
        f"  recovery points from {report['oldest'] or '-'} to {report['newest'] or '-'}, {report['gaps']} gaps"
    )
    store = report["store"]
    lines.append(
        f"  store {store['path']}: {store['bytes']} bytes for {store['logical_bytes']} written "
        f"(deduplication {store['dedup_ratio']:.2f}), {store['snapshots']} snapshots"
    )
    space = report["space"]
    if space["state"] != "ok":
        where = "above its soft" if space["state"] == "soft" else "at its hard"
        lines.append(f"  the store is {where} limit of {space[space['state'] + '_limit']} bytes")
    if "error" in space:
        lines.append(f"  {space['error']}")
    return "\n".join(lines)
