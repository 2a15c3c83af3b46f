"""The volumes of a source directory: which regular file is which volume, and where it lies now.

Invariants:
- each volume has one path and one file; a path, and a file that is open or listed, belongs to one volume at most;
- an id is never given twice: ids go on from the highest that the store has ever seen.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dedup.errors import RewindError
from dedup.types import PATH_BYTES_MAX, Seq, VolumeId
from fusefs.inode_map import FileKey

STATE_DIRECTORY = ".rewindfs"
"""Directory in the source for the agent's own files; hidden from the mount."""


@dataclass(slots=True)
class Volume:
    """A volume as the agent knows it. `size` is what the mount made of it; `mode`, `uid`, `gid` as last recorded.

    `known`: the store has its Create record. `moved`: its path changed unrecorded; `restyled`: its mode or owner did.
    `growing`: the ends of recorded writes past `size` that the source has not taken yet, by seq.
    """

    id: VolumeId
    path: str
    key: FileKey
    size: int
    mode: int
    uid: int
    gid: int
    known: bool = True
    moved: bool = False
    restyled: bool = False
    growing: dict[Seq, int] = field(default_factory=dict)

    @property
    def size_to_be(self) -> int:
        """The size once the source has taken every write that is recorded."""
        return max(self.size, *self.growing.values()) if self.growing else self.size


class VolumeTable:
    """Volumes by id, path and file."""

    def __init__(self, next_id: VolumeId) -> None:
        self._next = next_id
        self._by_id: dict[VolumeId, Volume] = {}
        self._by_key: dict[FileKey, Volume] = {}
        self._by_path: dict[str, Volume] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Volume]:
        return iter(list(self._by_id.values()))

    def get(self, volume: VolumeId) -> Volume | None:
        return self._by_id.get(volume)

    def by_key(self, key: FileKey) -> Volume | None:
        return self._by_key.get(key)

    def by_path(self, path: str) -> Volume | None:
        return self._by_path.get(path)

    def add(self, path: str, status: os.stat_result, volume: VolumeId | None = None) -> Volume:
        """A file that is a volume from now on; `volume` if the store knows it already."""
        if volume is None:
            volume = self._next
            self._next = VolumeId(volume + 1)
        added = Volume(
            volume, path, key_of(status), status.st_size, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        )
        self._by_id[volume] = self._by_key[added.key] = self._by_path[path] = added
        return added

    def remove(self, volume: Volume) -> None:
        """The volume is retired."""
        del self._by_id[volume.id]
        # A successor may have taken the path, or the inode number, before the volume was retired here.
        if self._by_key.get(volume.key) is volume:
            del self._by_key[volume.key]
        if self._by_path.get(volume.path) is volume:
            del self._by_path[volume.path]

    def move(self, moves: list[tuple[Volume, str]]) -> None:
        """Gives volumes new paths, all at once (an exchange swaps two)."""
        for volume, _ in moves:
            if self._by_path.get(volume.path) is volume:
                del self._by_path[volume.path]
        for volume, path in moves:
            volume.path = path
            self._by_path[path] = volume

    def below(self, directory: str) -> list[Volume]:
        """The volumes under a directory, at any depth."""
        prefix = directory + "/"
        return [volume for volume in self._by_id.values() if volume.path.startswith(prefix)]


def key_of(status: os.stat_result) -> FileKey:
    return status.st_dev, status.st_ino


def check_path(path: str) -> None:
    """OSError for a path that a record cannot carry: EILSEQ unless it is UTF-8, ENAMETOOLONG past PATH_BYTES_MAX."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, "the name of a volume must be UTF-8", path) from None
    if len(encoded) > PATH_BYTES_MAX:
        raise OSError(errno.ENAMETOOLONG, f"the path of a volume has at most {PATH_BYTES_MAX} bytes", path)


def list_volumes(source: Path) -> dict[str, os.stat_result]:
    """Every regular file under `source` that can be a volume, by relative path. Blocks: call it in a thread.

    RewindError for what cannot be protected: names that are not UTF-8, files with several links.
    """
    found: dict[str, os.stat_result] = {}

    def refuse(error: OSError) -> None:
        raise error

    for directory, names, files in os.walk(source, onerror=refuse):
        if directory == str(source) and STATE_DIRECTORY in names:
            names.remove(STATE_DIRECTORY)
        for name in files:
            full = os.path.join(directory, name)
            try:
                status = os.lstat(full)
            except FileNotFoundError:
                continue  # unlinked while we walk: a namespace change that the caller compares for, or has locked out
            if not stat.S_ISREG(status.st_mode):
                continue
            path = os.path.relpath(full, source)
            try:
                check_path(path)
            except OSError as error:
                raise RewindError(f"{os.fsencode(full)!r}: {error.strerror}; rename it") from error
            if status.st_nlink > 1:
                raise RewindError(
                    f"{full} has {status.st_nlink} hard links; a volume has one name: copy it, or unlink the others"
                )
            found[path] = status
    return found
