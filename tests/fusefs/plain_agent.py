"""An agent that records nothing but what it was asked, and a source mount with it.

    python -m tests.fusefs.plain_agent SOURCE MOUNTPOINT [--writeback]

prints `ready` and serves in the foreground until the mountpoint is unmounted, the passthrough alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import trio

from dedup.types import VolumeId
from fusefs.inode_map import FileKey
from fusefs.intercept import CreateFile, NamespaceChange, RemoveFile, RenamePath
from fusefs.source_mount import SourceMount


def key_of(status: os.stat_result) -> FileKey:
    return status.st_dev, status.st_ino


def regular_files(source: Path) -> Iterator[os.stat_result]:
    for directory, _, names in os.walk(source):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                yield status


class PlainAgent:
    """Performs every change at once. `calls` lists what was asked, data aside; `refusal` is raised instead."""

    def __init__(self, source: Path, *, keep_calls: bool = True) -> None:
        self.volumes = {key_of(status): VolumeId(n) for n, status in enumerate(regular_files(source), 1)}
        self.next_volume = len(self.volumes) + 1
        self.calls: list[tuple[object, ...]] = []
        self.open_handles: dict[int, VolumeId | None] = {}
        self.refusal: Exception | None = None
        self._keep_calls = keep_calls

    def _note(self, *call: object) -> None:
        if self._keep_calls:
            self.calls.append(call)
        if self.refusal is not None:
            raise self.refusal

    def volume_of(self, key: FileKey) -> VolumeId | None:
        return self.volumes.get(key)

    def opened(self, volume: VolumeId | None, fd: int) -> None:
        assert fd not in self.open_handles
        self.open_handles[fd] = volume

    def released(self, volume: VolumeId | None, fd: int) -> None:
        assert self.open_handles.pop(fd) == volume
        os.fstat(fd)  # still open

    async def write(self, volume: VolumeId | None, fd: int, offset: int, data: bytes, append: bool) -> int:
        if self._keep_calls:
            self._note("write", volume, offset, len(data), append)
        if append:
            offset = os.fstat(fd).st_size
        return os.pwrite(fd, data, offset)

    async def resize(self, volume: VolumeId | None, fd: int, size: int) -> None:
        self._note("resize", volume, size)
        await trio.to_thread.run_sync(os.ftruncate, fd, size)

    async def fsync(self, volume: VolumeId | None, fd: int, datasync: bool) -> None:
        self._note("fsync", volume, datasync)
        await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fd)

    async def attributes(self, volume: VolumeId, change: Callable[[], os.stat_result]) -> os.stat_result:
        status = await trio.to_thread.run_sync(change)
        self._note("attributes", volume, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        return status

    async def namespace(self, change: NamespaceChange) -> os.stat_result | None:
        result = await trio.to_thread.run_sync(change.perform)
        match change:
            case CreateFile(path):
                assert result is not None
                self.volumes[key_of(result)] = VolumeId(self.next_volume)
                self.next_volume += 1
                self._note("create", path, self.next_volume - 1)
            case RemoveFile(path, key):
                self._note("remove", path, self._retire(key))
            case RenamePath(old, new, key, replaced, exchange):
                moved = None if key is None else self.volumes[key]
                other = self.volumes[replaced] if exchange and replaced else self._retire(replaced)
                self._note("exchange" if exchange else "rename", old, new, moved, other)
        return result

    def _retire(self, key: FileKey | None) -> VolumeId | None:
        return None if key is None else self.volumes.pop(key)


async def serve(source: Path, mountpoint: str, writeback: bool) -> None:
    control = source / "no-control-socket"
    operations = SourceMount(source, PlainAgent(source, keep_calls=False), control=control, writeback=writeback)
    options = {"fsname=plain-agent", "default_permissions", "allow_other"}
    pyfuse3.init(operations, mountpoint, options)
    print("ready", flush=True)
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close()
        operations.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("mountpoint")
    parser.add_argument("--writeback", action="store_true", help="let the kernel collect writes in its page cache")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    trio.run(serve, options.source, options.mountpoint, options.writeback)


if __name__ == "__main__":
    main()
