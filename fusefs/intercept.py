"""What the source mount asks of the data protection agent: every change passes through here before the source sees it.

The source mount knows FUSE and the source; the agent knows locks, seqs and appliances. Between them are descriptors of
the source, volume ids, and `perform` functions that make a change and may be called in any thread, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dedup.types import VolumeId
from fusefs.inode_map import FileKey


@dataclass(frozen=True, slots=True)
class CreateFile:
    """A regular file is to begin at `path`. `perform` makes it, exclusively: what it returns names its key.

    When `perform` raises, nothing was made.
    """

    path: str
    perform: Callable[[], os.stat_result]


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """The name `path` of a regular file is to go. `key` is None when the file is not a recorded volume."""

    path: str
    key: FileKey | None
    perform: Callable[[], None]


@dataclass(frozen=True, slots=True)
class RenamePath:
    """`old` is to become `new`; with `exchange` also `new` to become `old`.

    `key` is the volume at `old`, `replaced` the one at `new`: it is retired, or with `exchange` moved. None stands for
    what is not a recorded volume: a directory, a special file, nothing. Where `is_directory` (for `new`, and only with
    `exchange`, `replaced_is_directory`) all volumes below move along.
    """

    old: str
    new: str
    key: FileKey | None
    replaced: FileKey | None
    exchange: bool
    is_directory: bool
    replaced_is_directory: bool
    perform: Callable[[], None]


NamespaceChange = CreateFile | RemoveFile | RenamePath


class Intercept(Protocol):
    """The agent, as the source mount sees it.

    Volumes are looked up when a handle opens, so a call may name a volume that was retired since (its file unlinked or
    replaced while open): such a write is passed to the source and not recorded, as with None. All coroutines raise the
    source's OSError as it is, and RewindError when the change was refused before the source saw it.
    """

    def volume_of(self, key: FileKey) -> VolumeId | None:
        """The volume that a regular file is; None when it is not recorded (unlinked, several links)."""
        ...

    def opened(self, volume: VolumeId | None, fd: int) -> None:
        """A handle has opened: `fd` stays valid until `released`."""
        ...

    def released(self, volume: VolumeId | None, fd: int) -> None:
        """The last call that names `fd`: it is closed afterwards."""
        ...

    async def write(self, volume: VolumeId | None, fd: int, offset: int, data: bytes, append: bool) -> int:
        """Records and writes; with `append` at the end of the file as it is under the lock. Returns bytes written."""
        ...

    async def resize(self, volume: VolumeId | None, fd: int, size: int) -> None:
        """Records and sets the size."""
        ...

    async def fsync(self, volume: VolumeId | None, fd: int, datasync: bool) -> None:
        """The source is on disk when it returns; whatever else the mode promises, too."""
        ...

    async def attributes(self, volume: VolumeId, change: Callable[[], os.stat_result]) -> os.stat_result:
        """Runs a change of mode or owner and records what came of it. Returns what `change` returned."""
        ...

    async def namespace(self, change: NamespaceChange) -> os.stat_result | None:
        """Performs and records a namespace change under the group lock. Returns what `perform` returned.

        One at a time: the source mount begins the next when this one has returned.
        """
        ...
