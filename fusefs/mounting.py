"""What it takes to mount: whether a directory may be mounted on, with which options, and what is set once it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dedup.errors import RewindError
from fusefs.mountpoint import FSTYPE, SUBTYPE, absolute, is_dead, mount_at, unmount

log = logging.getLogger("rewindfs.mounting")

READ_AHEAD_KIB: Final = 2048
"""What the kernel may read ahead of a sequential reader: two of its largest requests, instead of an eighth of one."""


class MountpointRefused(RewindError):
    """The path cannot be mounted on. The message says why and what to do."""


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
