"""The command `browse`: the process of a snapshot mount."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click
import trio

from dedup.container import IDLE_SECONDS, ContainerPool
from dedup.errors import RewindError
from dedup.history import History
from dedup.pins import Pinning
from dedup.reader import StoreReader
from fusefs.daemon import TASKS_MAX, serve
from fusefs.inside.image_process import check_libraries
from fusefs.inside_files import WAITING_MAX
from fusefs.mountpoint import absolute, check_mountpoint, mount_options, raise_read_ahead
from fusefs.opened_history import opened_history
from fusefs.snapshot_mount import SnapshotMount
from replication.address import absolute_address, store_path
from replication.background import Ready, run
from replication.cache_options import CachePlace, cache_options
from replication.route import Route, route_options


class OptionRefused(RewindError):
    """A mount option that must not be given with another. The message says why."""


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
    if path is None:
        main = partial(_serve_address, source, group, route, cache, mountpoint, mount, files)
    else:
        main = partial(_serve_path, path.absolute(), group, mountpoint, mount, files)
    run(main, foreground=foreground, log_file=log_file, debug=debug)


def _refuse_unsafe(options: list[str]) -> None:
    """Images hold programs that are setuid for root; FUSE mounts are nosuid unless somebody asks otherwise."""
    for option in options:
        if option in ("suid", "dev"):
            raise OptionRefused(
                f"-o {option}: not with --files, since anybody may have written what is inside an image"
            )


async def _serve_path(
    path: Path, group: str | None, mountpoint: Path, options: set[str], files: bool, ready: Ready
) -> None:
    """The process of the mount of a store on this machine."""
    store = await trio.to_thread.run_sync(partial(StoreReader.open, path, pinning=Pinning.MOMENTS))
    try:
        reader = await trio.to_thread.run_sync(store.group, group)
        async with trio.open_nursery() as background:
            background.start_soon(_close_idle, store.pool)
            await _serve(reader, path, mountpoint, options, files, ready)
            background.cancel_scope.cancel()
    finally:
        # No handler runs any more. What a cancelled one left in a thread has ended, too: threads are waited for.
        store.close()


async def _serve_address(
    address: str,
    group: str | None,
    route: Route,
    cache: CachePlace,
    mountpoint: Path,
    options: set[str],
    files: bool,
    ready: Ready,
) -> None:
    """The process of the mount of a store behind an appliance."""
    async with opened_history(address, group, route, cache, pinning=Pinning.MOMENTS) as (history, _):
        await _serve(history, cache.path, mountpoint, options, files, ready)


async def _serve(history: History, disk: Path, mountpoint: Path, options: set[str], files: bool, ready: Ready) -> None:
    """Mounts, is ready, and returns once it is unmounted. `df` shows the `disk`."""
    operations = SnapshotMount(history, partial(os.statvfs, disk), files=files)
    tasks = TASKS_MAX + (WAITING_MAX if files else 0)
    serving = partial(serve, operations, mountpoint, options, drain=operations.inside.close, max_tasks=tasks)
    async with trio.open_nursery() as background:
        background.start_soon(operations.inside.close_idle_ones)
        async with trio.open_nursery() as nursery:
            await nursery.start(serving)
            # In a thread, like all that may look at the mount: its requests are answered by this one.
            await trio.to_thread.run_sync(raise_read_ahead, mountpoint)
            ready.ready()
        background.cancel_scope.cancel()


async def _close_idle(pool: ContainerPool) -> None:
    """Containers that are replaced or removed under a mount at rest give their room back all the same."""
    while True:
        await trio.sleep(IDLE_SECONDS)
        await trio.to_thread.run_sync(pool.close_idle)
