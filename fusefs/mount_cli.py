"""`rewindfs mount`: mounts a source, and records every change made there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from dedup.errors import RewindError
from fusefs.command_values import DIRECTORY, Duration
from fusefs.mount_process import MountSettings, run_mount
from fusefs.mounting import check_mountpoint
from fusefs.mountpoint import absolute, mount_at
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
