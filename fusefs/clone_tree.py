"""Volumes of one past moment as files of a clone: which ones a path means, and their empty files in the overlay."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from dedup.errors import UnknownName
from dedup.history import GroupMoment
from dedup.terminal import size_text
from dedup.types import VolumeState
from fusefs.clone_file import CloneFile
from fusefs.inode_map import FileKey
from fusefs.overlay_directory import OverlayRefused, make_directory
from fusefs.overlay_room import OverlayRoom
from fusefs.past_images import PastImages


def normal(path: str) -> str:
    """`path` as volumes' paths are written; empty for the whole group. UnknownName for one that leaves the source."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise UnknownName(f"{path!r}: a VOLUME is a path relative to the source directory, as `rewindfs points` has it")
    return "/".join(parts)


def volumes_of(group: GroupMoment, path: str) -> dict[str, VolumeState]:
    """The volume that had this (normal) path, or all below the directory of that path, by path; there may be none."""
    if path in group.volumes:
        return {path: group.volumes[path]}
    below = path + "/" if path else ""
    return {name: volume for name, volume in sorted(group.volumes.items()) if name.startswith(below)}


def chosen(group: GroupMoment, path: str) -> list[VolumeState]:
    """The same, at least one. UnknownName lists what there was."""
    found = volumes_of(group, path)
    if not found:
        group.volume(path or ".")  # raises, with the names that there were
    return list(found.values())


def lay_out(
    directory: Path, group: GroupMoment, volumes: Iterable[VolumeState], images: PastImages, room: OverlayRoom
) -> dict[FileKey, CloneFile]:
    """Makes a sparse file for each volume below `directory`, with its owner and mode as they were.

    Without root everything belongs to who runs this. The moment must be held for as long as the files are read.
    OverlayRefused when the disk has no room for them.
    """
    files: dict[FileKey, CloneFile] = {}
    for volume in volumes:
        path = directory / volume.path
        try:
            make_directory(path.parent)
            status = _sparse_file(path, volume, group.moment.time)
        except OSError as error:
            if error.errno == errno.EFBIG:
                size = size_text(volume.size)
                raise OverlayRefused(
                    f"{directory}: its file system holds no file of {size}, as {volume.path!r} is; use another "
                    "--overlay"
                ) from error
            raise OverlayRefused(f"{directory}: cannot make {volume.path!r} there: {error.strerror}") from error
        image = partial(images.image, volume.volume, group.moment.seq)
        files[status.st_dev, status.st_ino] = CloneFile(room, image, volume.size, group.moment)
    return files


def _sparse_file(path: Path, volume: VolumeState, time_ns: int) -> os.stat_result:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, volume.size)
        if os.geteuid() == 0:
            os.fchown(fd, volume.uid, volume.gid)
        os.fchmod(fd, stat.S_IMODE(volume.mode))
        os.utime(fd, ns=(time_ns, time_ns))
        return os.fstat(fd)
    finally:
        os.close(fd)
