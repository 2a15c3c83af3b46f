"""The yardstick of the FUSE benchmarks: the least a pyfuse3 passthrough can do, one pwrite or pread per request.

    python -m tests.benchmarks.bare_passthrough SOURCE MOUNTPOINT [--writeback]

Runs in the foreground until the mountpoint is unmounted. A flat directory of regular files only, no error handling,
no permissions, no metadata cache of its own: not for data that matters.
"""

from __future__ import annotations

import argparse
import os

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields

TIMEOUT_SECONDS = 1


class BarePassthrough(pyfuse3.Operations):
    """Inode numbers index a list of paths; file handles are descriptors of the source."""

    supports_dot_lookup = False

    def __init__(self, source: str, writeback: bool) -> None:
        super().__init__()
        self.enable_writeback_cache = writeback
        self._paths: list[str] = ["", source]
        self._numbers: dict[str, int] = {source: pyfuse3.ROOT_INODE}

    def _entry(self, path: str) -> EntryAttributes:
        try:
            status = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or 0) from None
        if path not in self._numbers:
            self._numbers[path] = len(self._paths)
            self._paths.append(path)
        entry = EntryAttributes()
        entry.st_ino = self._numbers[path]
        entry.entry_timeout = entry.attr_timeout = TIMEOUT_SECONDS
        entry.st_mode, entry.st_nlink = status.st_mode, status.st_nlink
        entry.st_uid, entry.st_gid = status.st_uid, status.st_gid
        entry.st_size, entry.st_blocks = status.st_size, status.st_blocks
        entry.st_mtime_ns, entry.st_ctime_ns = status.st_mtime_ns, status.st_ctime_ns
        entry.st_atime_ns = status.st_atime_ns
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._entry(os.path.join(self._paths[parent_inode], os.fsdecode(name)))

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._paths[inode])

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if fields.update_size:
            os.truncate(self._paths[inode], attr.st_size)
        return self._entry(self._paths[inode])

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        path = os.path.join(self._paths[parent_inode], os.fsdecode(name))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        return FileInfo(fh=fd), self._entry(path)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=os.open(self._paths[inode], os.O_RDWR | os.O_CLOEXEC))

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        path = os.path.join(self._paths[parent_inode], os.fsdecode(name))
        os.unlink(path)
        self._numbers.pop(path, None)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        # An fsync must not become an fdatasync: the loop device asks for one, whatever its file system was asked for.
        (os.fdatasync if datasync else os.fsync)(fh)

    async def release(self, fh: int) -> None:
        os.close(fh)


async def serve(operations: BarePassthrough, mountpoint: str) -> None:
    """Until it is unmounted."""
    pyfuse3.init(operations, mountpoint, {"fsname=bare-passthrough"})
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("mountpoint")
    parser.add_argument("--writeback", action="store_true", help="let the kernel collect writes in its page cache")
    options = parser.parse_args()
    trio.run(serve, BarePassthrough(options.source, options.writeback), options.mountpoint)


if __name__ == "__main__":
    main()
