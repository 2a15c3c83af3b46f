"""Mountpoints as the kernel sees them: what is mounted where, who serves it, how one is left.

Short commands about a mount need this much; what it takes to mount is in mounting.py.
"""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from dedup.errors import RewindError

SUBTYPE: Final = "rewindfs"
FSTYPE: Final = f"fuse.{SUBTYPE}"
CONTROL_XATTR: Final = "user.rewindfs.control"
"""Extended attribute of a source mount's root: the path of its control socket."""
CLONE_XATTR: Final = "user.rewindfs.clone"
"""Extended attribute of a clone mount's root: a JSON document about it."""
MOUNTINFO: Final = Path("/proc/self/mountinfo")
BUSY_SECONDS: Final = 5.0
"""How long a mount that is to be left may stay busy."""


class NotMounted(RewindError):
    """No rewindfs is mounted at the path."""


class MountBusy(RewindError):
    """The mount has open files, or something is mounted inside it."""


class Mount(Struct, frozen=True):
    """One line of the kernel's mount table."""

    path: Path
    fstype: str
    source: str
    device: str
    """MAJOR:MINOR, as in /sys/class/bdi."""


def mounts() -> list[Mount]:
    """What is mounted in this process's view, in the order of mounting."""
    found = []
    for line in MOUNTINFO.read_bytes().splitlines():
        # Optional fields of any number end with a lone "-"; fstype and source follow it.
        left, _, right = line.partition(b" - ")
        fstype, source = right.split(b" ")[:2]
        fields = left.split(b" ")
        path, device = Path(_unescape(fields[4])), os.fsdecode(fields[2])
        found.append(Mount(path, os.fsdecode(fstype), _unescape(source), device))
    return found


def _unescape(field: bytes) -> str:
    """The kernel writes space, tab, newline, backslash as octal escapes."""
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), field))


def absolute(path: Path) -> Path:
    """`path` as the mount table spells it. Works on a dead mount, too."""
    return Path(os.path.realpath(path))


def mount_at(path: Path) -> Mount | None:
    """The topmost mount at `path`, if there is one."""
    path = absolute(path)
    return next((mount for mount in reversed(mounts()) if mount.path == path), None)


def is_dead(path: Path) -> bool:
    """Whether the process that served the mount at `path` has died."""
    try:
        # Not stat: the kernel answers that from its cache for a second after the process has died.
        os.statvfs(path)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return False  # somebody is there to say so
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        return True
    return False


def unmount(path: Path, *, lazy: bool = False) -> None:
    """Unmounts the FUSE file system at `path`; `lazy` detaches it also where files are open.

    Blocks while the kernel writes back, so call it in a thread if this process serves the mount. MountBusy, NotMounted.
    """
    path = absolute(path)
    if mount_at(path) is None:
        raise NotMounted(f"{path}: nothing is mounted there")
    import subprocess

    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise RewindError("fusermount3: not found; install the package fuse3") from None
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.decode(errors="replace").split())
    if "busy" in said:
        raise MountBusy(f"{path}: files are still open there, or something is mounted inside; close them first")
    if mount_at(path) is None:
        return
    raise RewindError(f"{path}: could not be unmounted: {said}")


def leave_when_free(path: Path) -> None:
    """Unmounts as soon as nothing uses the mount any more: a loop device lets go of its file a moment after umount.

    Where that takes longer than BUSY_SECONDS: MountBusy, or whatever the reason is. Returns when nothing is mounted.
    Blocks, as `unmount`.
    """
    end = time.monotonic() + BUSY_SECONDS
    while mount_at(path) is not None:
        try:
            unmount(path)
        except RewindError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.1)


def control_socket(mountpoint: Path) -> Path:
    """The control socket of the source mount at `mountpoint`. NotMounted where there is none."""
    try:
        value = os.getxattr(mountpoint, CONTROL_XATTR)
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise NotMounted(
                f"{mountpoint}: the process of this mount has died; mount it again, or fusermount3 -u -z it"
            ) from error
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            raise NotMounted(f"{mountpoint}: this is not the mountpoint of a source mount") from error
        raise
    return Path(os.fsdecode(value))


def clone_document(mountpoint: Path) -> dict[str, Any] | None:
    """What the clone mounted at `mountpoint` says of itself; None where no living clone is."""
    import json  # here, and subprocess above: the short commands about a mount need neither

    try:
        document: dict[str, Any] = json.loads(os.getxattr(mountpoint, CLONE_XATTR))
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODATA, errno.ENOTSUP, errno.ENOENT):
            return None
        raise
    return document
