"""Mountpoints as the kernel sees them: what is mounted where, whether one may be used, how one is left."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dedup.errors import RewindError

log = logging.getLogger("rewindfs.mountpoint")

SUBTYPE: Final = "rewindfs"
FSTYPE: Final = f"fuse.{SUBTYPE}"
CONTROL_XATTR: Final = "user.rewindfs.control"
"""Extended attribute of a source mount's root: the path of its control socket."""
CLONE_XATTR: Final = "user.rewindfs.clone"
"""Extended attribute of a clone mount's root: a JSON document about it."""
MOUNTINFO: Final = Path("/proc/self/mountinfo")
READ_AHEAD_KIB: Final = 2048
"""What the kernel may read ahead of a sequential reader: two of its largest requests, instead of an eighth of one."""


class MountpointRefused(RewindError):
    """The path cannot be mounted on. The message says why and what to do."""


class NotMounted(RewindError):
    """No rewindfs is mounted at the path."""


class MountBusy(RewindError):
    """The mount has open files, or something is mounted inside it."""


@dataclass(frozen=True, slots=True)
class Mount:
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


def check_mountpoint(path: Path) -> None:
    """Returns when `path` is an empty directory and nothing is mounted there; MountpointRefused otherwise.

    A rewindfs mount whose process has died is unmounted first, with a warning that says so.
    """
    path = absolute(path)
    while mount := mount_at(path):
        if is_dead(path):
            if mount.fstype != FSTYPE:
                raise MountpointRefused(
                    f"{path}: a dead {mount.fstype} mount is there: its process has died. Remove it with "
                    f"fusermount3 -u -z {path}, then try again"
                )
            unmount(path, lazy=True)
            log.warning(
                "%s: cleaned a stale mount of %s: the rewindfs process that served it had died", path, mount.source
            )
        else:
            what = "rewindfs" if mount.fstype == FSTYPE else mount.fstype
            command = "rewindfs unmount" if mount.fstype == FSTYPE else "umount"
            raise MountpointRefused(
                f"{path}: {what} of {mount.source} is already mounted there; use another directory, or {command} it"
            )
    try:
        with os.scandir(path) as entries:
            entry = next(entries, None)
    except FileNotFoundError:
        raise MountpointRefused(f"{path}: the mountpoint does not exist; make an empty directory there") from None
    except NotADirectoryError:
        raise MountpointRefused(f"{path}: the mountpoint is not a directory") from None
    except PermissionError:
        raise MountpointRefused(f"{path}: the mountpoint cannot be read by this user") from None
    if entry is not None:
        raise MountpointRefused(
            f"{path}: the mountpoint is not empty (it holds {entry.name!r}); use an empty directory"
        )


def mount_options(
    source: str,
    *,
    allow_other: bool = False,
    read_only: bool = False,
    check_modes: bool = True,
    max_read_bytes: int | None = None,
    extra: Iterable[str] = (),
) -> set[str]:
    """Options for `pyfuse3.init`. `source` is what the mount table shows; `extra` are the user's `-o`, as given.

    `allow_other` lets other users in (without it FUSE refuses everyone but who mounted, root too). A loop device of
    who mounted needs it not: it holds the open file. `check_modes` has the kernel hold everyone to owner and mode;
    without it whoever is let in may read everything.
    """
    options = {f"fsname={_escape(source)}", f"subtype={SUBTYPE}"}
    if check_modes:
        options.add("default_permissions")
    if allow_other:
        options.add("allow_other")
    if read_only:
        options.add("ro")
    if max_read_bytes is not None:
        options.add(f"max_read={max_read_bytes}")
    for option in extra:
        if not option.isascii():
            raise MountpointRefused(f"-o {option}: FUSE options are plain ASCII")
        options.add(option)
    return options


def _escape(text: str) -> str:
    """`text` as the value of a libfuse option: a comma would end it, and pyfuse3 takes ASCII only."""
    return "".join(
        chr(byte) if 0x20 < byte < 0x7F and byte not in b",\\" else f"\\{byte:03o}" for byte in os.fsencode(text)
    )


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


def raise_read_ahead(mountpoint: Path) -> None:
    """Lets the kernel ask for more at once; without the right to it (not root), sequential reads are slower.

    Looks at the mount, so call it in a thread if this process serves it.
    """
    mount = mount_at(mountpoint)
    if mount is None:
        return  # unmounted already
    try:
        Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        log.info("%s: the read-ahead stays at the kernel's default: %s", mountpoint, error)


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
