"""The command `browse`: the process of a snapshot mount."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import trio

from dedup.errors import RewindError
from dedup.pins import Pinning
from fusefs.daemon import TASKS_MAX, serve
from fusefs.inside.image_process import check_libraries
from fusefs.inside_files import WAITING_MAX
from fusefs.mounting import check_mountpoint, mount_options, raise_read_ahead
from fusefs.mountpoint import absolute
from fusefs.opened_history import close_idle, opened_history
from fusefs.snapshot_mount import SnapshotMount
from replication.address import absolute_address, store_path
from replication.background import Ready, run
from replication.cache_options import CachePlace, cache_options
from replication.route import Route, route_options


class OptionRefused(RewindError):
    """A mount option that must not be given with another. The message says why."""


@dataclass(frozen=True, slots=True)
class BrowseSettings:
    """One snapshot mount, every path absolute. `disk` is the one that `df` shows."""

    store: str
    group: str | None
    route: Route
    cache: CachePlace
    mountpoint: Path
    options: set[str]
    disk: Path
    files: bool


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--group", metavar="G", help="Which group, where the store holds several.")
@click.option("--files", is_flag=True, help="Show the files inside the images, too (needs rewindfs[files]).")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there instead of to stderr.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as far as owner and mode of each volume say.")
@route_options
@cache_options
@click.option("-o", "options", multiple=True, metavar="OPT", help="A FUSE mount option, passed on as it is.")
@click.option("--debug", is_flag=True, help="Log more, and show the traceback of an error.")
@click.pass_context
def browse(
    context: click.Context,
    store: str,
    mountpoint: Path,
    group: str | None,
    files: bool,
    foreground: bool,
    log_file: Path | None,
    allow_other: bool,
    options: tuple[str, ...],
    debug: bool,
    route: Route,
    cache: CachePlace,
) -> None:
    """Mount the snapshots and every recovery point of STORE at MOUNTPOINT, read-only.

    \b
    MOUNTPOINT/volumes/VOLUME/NAME    a snapshot
    MOUNTPOINT/volumes/VOLUME/@TIME   any moment: @latest, @5m, @2026-11-22T10:15:30Z, @seq=41
    MOUNTPOINT/points/NAME/VOLUME     the whole group at one moment; points/@TIME too
    MOUNTPOINT/files/VOLUME/NAME/…    with --files: what is inside the image; files/VOLUME/@TIME/… too

    STORE may be the address of a second appliance, or of a first one before it. Then reads wait up to half a minute
    while it does not answer, and `df` shows the disk of the cache.
    """
    debug = debug or bool((context.obj or {}).get("debug"))
    path = store_path(store)
    source = absolute_address(store)
    mountpoint = absolute(mountpoint)
    check_mountpoint(mountpoint)
    extra = [option for given in options for option in given.split(",") if option]
    if files:
        check_libraries()
        _refuse_unsafe(extra)
    # Whoever may read an image may read all that is in it; only other users are held to the modes in there.
    check_modes = allow_other or not files
    mount = mount_options(source, allow_other=allow_other, read_only=True, check_modes=check_modes, extra=extra)
    disk = cache.path if path is None else path.absolute()
    settings = BrowseSettings(source, group, route, cache, mountpoint, mount, disk, files)
    run(partial(_serve, settings), foreground=foreground, log_file=log_file, debug=debug)


def _refuse_unsafe(options: list[str]) -> None:
    """Images hold programs that are setuid for root; FUSE mounts are nosuid unless somebody asks otherwise."""
    for option in options:
        if option in ("suid", "dev"):
            raise OptionRefused(
                f"-o {option}: not with --files, since anybody may have written what is inside an image"
            )


async def _serve(settings: BrowseSettings, ready: Ready) -> None:
    """The process of the mount: is ready once it is there, and returns once it is unmounted."""
    opened = opened_history(settings.store, settings.group, settings.route, settings.cache, pinning=Pinning.MOMENTS)
    async with opened as (history, _):
        operations = SnapshotMount(history, partial(os.statvfs, settings.disk), files=settings.files)
        async with trio.open_nursery() as background:
            background.start_soon(close_idle, history)
            background.start_soon(operations.inside.close_idle_ones)
            await _mounted(operations, settings, ready)
            background.cancel_scope.cancel()


async def _mounted(operations: SnapshotMount, settings: BrowseSettings, ready: Ready) -> None:
    tasks = TASKS_MAX + (WAITING_MAX if settings.files else 0)
    serving = partial(serve, operations, drain=operations.inside.close, max_tasks=tasks)
    async with trio.open_nursery() as nursery:
        await nursery.start(serving, settings.mountpoint, settings.options)
        # In a thread, like all that may look at the mount: its requests are answered by this one.
        await trio.to_thread.run_sync(raise_read_ahead, settings.mountpoint)
        ready.ready()
