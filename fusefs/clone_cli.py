"""The command `clone`: the process of a clone mount."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import trio

from dedup.history import GroupMoment
from dedup.moment import rfc3339
from dedup.pins import Pinning
from dedup.terminal import group_option
from fusefs.clone_mount import CloneMount
from fusefs.clone_tree import chosen, lay_out, normal
from fusefs.daemon import serve
from fusefs.mounting import check_mountpoint, mount_options, raise_read_ahead
from fusefs.mountpoint import absolute
from fusefs.opened_history import close_idle, opened_history
from fusefs.overlay_directory import OverlayDirectory, check_place, clear_dead, default_place
from fusefs.overlay_room import OverlayRoom
from fusefs.past_images import PastImages
from replication.address import absolute_address, store_path
from replication.background import Ready, run
from replication.cache_options import CachePlace, cache_options
from replication.retention_cli import Limit
from replication.route import Route, route_options

overlay_options: Final = (
    click.option(
        "--overlay", "place", type=click.Path(path_type=Path), metavar="DIR",
        help="Where it keeps what is written, in a directory of its own; by default $TMPDIR, or /var/tmp.",
    ),
    click.option(
        "--overlay-limit", type=Limit(), metavar="SIZE",
        help="How much may be written; by default half of what is free there. `none`: all of it.",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CloneSettings:
    """One clone, every path absolute. `limit_bytes` 0: none but the disk's."""

    store: str
    group: str | None
    route: Route
    cache: CachePlace
    volume: str
    at: str
    mountpoint: Path
    options: set[str]
    place: Path
    limit_bytes: int


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", metavar="VOLUME")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--at", "at", required=True, metavar="TIME", help="The moment.")
@group_option
@overlay_options[0]
@overlay_options[1]
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there instead of to stderr.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as far as owner and mode of each file say.")
@click.option("-o", "options", multiple=True, metavar="OPT", help="A FUSE mount option, passed on as it is.")
@click.option("--debug", is_flag=True, help="Log more, and show the traceback of an error.")
@route_options
@cache_options
@click.pass_context
def clone(
    context: click.Context,
    store: str,
    volume: str,
    at: str,
    mountpoint: Path,
    group: str | None,
    place: Path | None,
    overlay_limit: int | None,
    foreground: bool,
    log_file: Path | None,
    allow_other: bool,
    options: tuple[str, ...],
    debug: bool,
    route: Route,
    cache: CachePlace,
) -> None:
    """Mount VOLUME as it was at TIME, writable, for a test: MOUNTPOINT/VOLUME.

    VOLUME may be a directory of the source, or `.` for the whole group. What is written goes to an overlay, which is
    removed when MOUNTPOINT is unmounted; the store stays as it is. The moment is kept for as long as it is mounted.
    """
    debug = debug or bool((context.obj or {}).get("debug"))
    mountpoint = absolute(mountpoint)
    check_mountpoint(mountpoint)
    extra = [option for given in options for option in given.split(",") if option]
    place = checked_place(place, store, mountpoint)
    settings = CloneSettings(
        absolute_address(store),
        group,
        route,
        cache,
        normal(volume),
        at,
        mountpoint,
        mount_options(absolute_address(store), allow_other=allow_other, extra=extra),
        place,
        default_limit(place) if overlay_limit is None else overlay_limit,
    )
    run(partial(_serve, settings), foreground=foreground, log_file=log_file, debug=debug)


def checked_place(place: Path | None, store: str, mountpoint: Path | None) -> Path:
    """Where the overlay is to be, absolute. OverlayRefused."""
    place = (default_place() if place is None else place).absolute()
    path = store_path(store)
    check_place(place, None if path is None else absolute(path), mountpoint)
    return place


def default_limit(place: Path) -> int:
    """Half of what is free there."""
    status = os.statvfs(place)
    return max(1, status.f_bavail * status.f_frsize // 2)


async def _serve(settings: CloneSettings, ready: Ready) -> None:
    """The process of the mount. What can be refused is, before anything is mounted."""
    opened = opened_history(
        settings.store, settings.group, settings.route, settings.cache, settings.at, pinning=Pinning.MOMENTS
    )
    async with opened as (history, (moment,)):
        group = await trio.to_thread.run_sync(history.group_at, moment.seq)
        volumes = chosen(group, settings.volume)
        await trio.to_thread.run_sync(clear_dead, settings.place)
        with await trio.to_thread.run_sync(OverlayDirectory.create, settings.place) as overlay:
            room = OverlayRoom(settings.limit_bytes)
            files = await trio.to_thread.run_sync(lay_out, overlay.files, group, volumes, PastImages(history), room)
            operations = CloneMount(overlay.files, room, partial(_describe, settings, group, overlay, room))
            operations.add(files)
            try:
                async with trio.open_nursery() as background:
                    background.start_soon(close_idle, history)
                    await _mounted(operations, settings, ready)
                    background.cancel_scope.cancel()
            finally:
                operations.close()
                ready.stopping("unmounted; removing the overlay")


async def _mounted(operations: CloneMount, settings: CloneSettings, ready: Ready) -> None:
    """Mounts, is ready, and returns once it is unmounted."""
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, operations, settings.mountpoint, settings.options))
        # In a thread, like all that may look at the mount: its requests are answered by this one.
        await trio.to_thread.run_sync(raise_read_ahead, settings.mountpoint)
        ready.ready()


def _describe(settings: CloneSettings, group: GroupMoment, overlay: OverlayDirectory, room: OverlayRoom) -> bytes:
    """What CLONE_XATTR says."""
    moment = group.moment
    document: dict[str, Any] = {
        "pid": os.getpid(),
        "store": settings.store,
        "group": moment.group,
        "volume": settings.volume or ".",
        "seq": moment.seq,
        "time": rfc3339(moment.time),
        "kind": moment.kind.value,
        "overlay": {"path": str(overlay.path), "bytes": room.used_bytes, "limit": room.limit_bytes},
    }
    return json.dumps(document).encode()
