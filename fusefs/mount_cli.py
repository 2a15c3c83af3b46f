"""The commands about a source mount: mount, unmount, mode."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import trio

from dedup.errors import RewindError
from fusefs.agent_control import ask
from fusefs.command_values import DIRECTORY, Duration
from fusefs.daemon import BUSY_SECONDS, leave_when_free
from fusefs.mount_process import DRAIN_SECONDS, MountSettings, run_mount
from fusefs.mountpoint import (
    NotMounted,
    absolute,
    check_mountpoint,
    clone_document,
    control_socket,
    is_dead,
    mount_at,
)
from replication.address import store_path
from replication.background import Ready, run
from replication.forwarding import Forwarding
from replication.forwarding_options import forwarding_options
from replication.modes import Mode, Outage
from replication.route import Route, route_options
from replication.target import Target


@click.command()
@click.argument("source", type=DIRECTORY)
@click.argument("mountpoint", type=DIRECTORY)
@click.option("--store", metavar="STORE", help="Directory of the store, made if absent; or a second appliance.")
@click.option("--appliance", metavar="ADDR", help="Instead of a store: a first appliance, which forwards to one.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    help="[default: async; with --appliance what that one does]",
)
@click.option("--name", "group", metavar="GROUP", help="Name of the group in the store [default: the source's name].")
@click.option("--on-outage", type=click.Choice([outage.value for outage in Outage]), help="[default: sync blocks]")
@click.option("--outage-after", type=Duration(), default="10s", show_default=True)
@click.option("--writeback", is_flag=True, help="Kernel write-back caching: faster, recovery points at flushes only.")
@click.option("--allow-other", is_flag=True, help="Let other users use the mount.")
@click.option("-o", "options", multiple=True, metavar="FUSE_OPTION")
@click.option("--wait-base", is_flag=True, help="Return after the base snapshot is made.")
@click.option("--take-over", is_flag=True, help="Make SOURCE the agent of a group that another source has fed.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there.")
@forwarding_options
@route_options
@click.pass_context
def mount(
    context: click.Context,
    source: Path,
    mountpoint: Path,
    store: str | None,
    appliance: str | None,
    mode: str | None,
    group: str | None,
    on_outage: str | None,
    outage_after: float,
    writeback: bool,
    allow_other: bool,
    options: tuple[str, ...],
    wait_base: bool,
    take_over: bool,
    foreground: bool,
    log_file: Path | None,
    forwarding: Forwarding,
    route: Route,
) -> None:
    """Mount SOURCE at MOUNTPOINT: every change made there is recorded in STORE, and any moment can be had back."""
    source, mountpoint = absolute(source), absolute(mountpoint)
    target = target_of(store, appliance, route)
    check_places(source, mountpoint, target.store)
    check_mountpoint(mountpoint)
    settings = MountSettings(
        source,
        mountpoint,
        target,
        group or default_group(source),
        Mode(mode) if mode else None,
        Outage(on_outage) if on_outage else None,
        outage_after,
        writeback,
        allow_other,
        options,
        wait_base,
        log_file.absolute() if log_file else None,
        foreground,
        bool((context.obj or {}).get("debug")),
        take_over=take_over,
        forwarding=forwarding,
    )
    if target.store is not None:
        warn_about_places(source, target.store)

    async def main(ready: Ready) -> None:
        await run_mount(settings, ready)

    run(main, foreground=foreground, log_file=log_file, debug=settings.debug)


def target_of(store: str | None, appliance: str | None, route: Route) -> Target:
    """Where the records go: to exactly one of the two."""
    if (store is None) == (appliance is None):
        raise click.UsageError("name one of --store and --appliance: where the records go")
    if appliance is not None:
        return Target.elsewhere(appliance, route, through=True)
    assert store is not None, "one of the two is there"
    if store_path(store) is None:
        return Target.elsewhere(store, route, through=False)
    return Target.embedded(Path(os.path.realpath(store)))


def check_places(source: Path, mountpoint: Path, store: Path | None) -> None:
    """RewindError unless the directories can serve together. `store` None: it is elsewhere."""
    if not source.is_dir():
        raise RewindError(f"{source}: the source is not a directory; name the directory that holds the volumes")
    if mountpoint == source or source in mountpoint.parents or mountpoint in source.parents:
        raise RewindError(f"{mountpoint}: the mountpoint and the source {source} lie inside one another; use another")
    mounted = mount_at(source)
    if mounted is not None and mounted.fstype == "fuse.rewindfs":
        raise RewindError(f"{source} is a mountpoint of rewindfs itself; name the directory under it")
    if store is not None:
        _check_store(source, mountpoint, store)


def _check_store(source: Path, mountpoint: Path, store: Path) -> None:
    if store == source or source in store.parents:
        raise RewindError(f"{store}: the store lies inside its own source {source}; put it outside")
    if store in source.parents:
        raise RewindError(f"{source}: the source lies inside the store {store}; put it outside")
    if store == mountpoint or mountpoint in store.parents or store in mountpoint.parents:
        raise RewindError(f"{store}: the store and the mountpoint {mountpoint} lie inside one another; use another")


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
    """Drain to durable, then unmount. Returns when the mount's processes have ended.

    Snapshot mounts and clones are unmounted as well; a clone's overlay is removed.
    """
    mountpoint = absolute(mountpoint)
    try:
        socket = control_socket(mountpoint)
    except NotMounted:
        found = mount_at(mountpoint)
        if found is None or found.fstype != "fuse.rewindfs" or is_dead(mountpoint):
            raise
        clone = clone_document(mountpoint)
        trio.run(_leave_and_wait, mountpoint, None if clone is None else clone["pid"], drain_timeout)
        return
    trio.run(_drain_and_leave, mountpoint, socket, drain_timeout)


async def _drain_and_leave(mountpoint: Path, socket: Path, drain_timeout: float) -> None:
    answer = await ask(socket, "unmount", {"drain_timeout": drain_timeout})
    with trio.move_on_after(drain_timeout) as patience:
        await ask(socket, "durable", {})
    if patience.cancelled_caught:
        raise RewindError(
            f"{mountpoint}: not durable at the store within {drain_timeout:g} s and still mounted; "
            "see `rewindfs status`, then try again with a longer --drain-timeout, or fusermount3 -u it"
        )
    await _leave_and_wait(mountpoint, answer["pid"], drain_timeout)


async def _leave_and_wait(mountpoint: Path, pid: object, drain_timeout: float) -> None:
    """Unmounts as soon as it is not busy any more, and waits for the end of the process behind it, if that is known."""
    await leave_when_free(mountpoint)
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
