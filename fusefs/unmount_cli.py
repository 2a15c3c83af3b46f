"""`rewindfs unmount`: leaves a mount of any kind, once all that it took is durable."""

from __future__ import annotations

import os
import select
from pathlib import Path

import click

from dedup.errors import RewindError
from fusefs.command_values import DIRECTORY, Duration
from fusefs.mount_control import DRAIN_SECONDS, Unanswered, ask_mount
from fusefs.mountpoint import (
    BUSY_SECONDS,
    FSTYPE,
    NotMounted,
    absolute,
    clone_document,
    control_socket,
    is_dead,
    leave_when_free,
    mount_at,
)


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
        if found is None or found.fstype != FSTYPE or is_dead(mountpoint):
            raise
        clone = clone_document(mountpoint)
        pid = None if clone is None else clone["pid"]
    else:
        pid = _drained(mountpoint, socket, drain_timeout)
    leave_when_free(mountpoint)
    if isinstance(pid, int):
        _wait_for_end(pid, drain_timeout + BUSY_SECONDS)


def _drained(mountpoint: Path, socket: Path, drain_timeout: float) -> object:
    """The pid of the mount's process, once all is durable at the store."""
    answer = ask_mount(socket, "unmount", {"drain_timeout": drain_timeout})
    try:
        ask_mount(socket, "durable", {}, timeout=drain_timeout)
    except Unanswered:
        raise RewindError(
            f"{mountpoint}: not durable at the store within {drain_timeout:g} s and still mounted; "
            "see `rewindfs status`, then try again with a longer --drain-timeout, or fusermount3 -u it"
        ) from None
    return answer["pid"]


def _wait_for_end(pid: int, seconds: float) -> None:
    """Until the process has ended; it is not our child, so its pidfd is what tells."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([fd], [], [], seconds)
    finally:
        os.close(fd)
    if not ended:
        raise RewindError(f"unmounted, but process {pid} is still draining; its log says why")
