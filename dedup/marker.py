"""The STORE file: what makes a directory a store, and which format version it has."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from dedup import layout
from dedup.errors import NotAStore, StoreError
from dedup.storage import Storage
from dedup.types import TimeNs

_TEMPORARY_NAME: Final = layout.STORE_MARKER_NAME + layout.TEMPORARY_SUFFIX
DIRECTORIES: Final = (layout.INDEX_NAME, layout.CONTAINERS_NAME, layout.GROUPS_NAME, layout.READERS_NAME)
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs"}
)
"""Where mmap and flock between hosts are not what LMDB and the writer's lock need."""


def create_marker(storage: Storage, path: Path) -> None:
    """Makes an empty store at `path`: its directories, then the marker, which is the commit. NotAStore if in use.

    Goes on with one that a crash or a full disk left half made."""
    refuse_network(path)
    if not storage.exists(path):
        storage.mkdir(path)
        storage.sync_directory(path.parent)
    elif storage.exists(path / layout.STORE_MARKER_NAME):
        raise NotAStore(f"{path} already holds a store")
    elif not _is_left_half_made(storage, path):
        raise NotAStore(f"{path} is neither empty nor a store: name an empty or a new directory for the store")
    for name in DIRECTORIES:
        if not storage.exists(path / name):
            storage.mkdir(path / name)
    # Before the marker: with it the directory is a store, and must be a whole one.
    storage.sync_directory(path)
    write_marker(storage, path)


def _is_left_half_made(storage: Storage, path: Path) -> bool:
    """Whether nothing is there but what an earlier try at a new store may have made: empty directories, no marker."""
    names = set(storage.listdir(path)) - {_TEMPORARY_NAME}
    return names <= set(DIRECTORIES) and not any(storage.listdir(path / name) for name in names)


def write_marker(storage: Storage, path: Path) -> None:
    """Writes the marker of a store that is new, or whose marker was lost: a name of its own. Durable on return."""
    temporary = path / _TEMPORARY_NAME
    fd = storage.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        marker = layout.StoreMarker(os.urandom(16), TimeNs(time.time_ns()))
        storage.pwritev(fd, [layout.pack_store_marker(marker)], 0)
        storage.datasync(fd)
    finally:
        storage.close(fd)
    storage.replace(temporary, path / layout.STORE_MARKER_NAME)


def read_marker(storage: Storage, path: Path) -> layout.StoreMarker:
    """Checks that `path` holds a store of a known format. NotAStore, UnknownFormat, Damaged."""
    marker = path / layout.STORE_MARKER_NAME
    if not storage.exists(marker):
        raise NotAStore(f"{path} is not a rewindfs store: it has no {layout.STORE_MARKER_NAME} file")
    fd = storage.open(marker, os.O_RDONLY)
    try:
        return layout.unpack_store_marker(storage.pread(fd, layout.STORE_MARKER.size, 0), marker)
    finally:
        storage.close(fd)


def refuse_network(path: Path) -> None:
    """StoreError if `path` lies on a network file system."""
    nearest = path.resolve()
    while not nearest.exists():
        nearest = nearest.parent
    device = os.stat(nearest).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split()
            kind = fields[fields.index("-") + 1]
            if fields[2] == wanted and kind in _NETWORK_FILE_SYSTEMS:
                raise StoreError(f"{path} lies on {kind}, a network file system; put the store on a local disk")
