"""The source mount: a passthrough of the source directory that lets the agent see every change first.

Invariants:
- `no-way-around`: bytes, sizes, names, modes and owners of regular files change only through `Intercept`. What cannot
  be recorded faithfully is refused with EPERM and a line in the log: hard links, and writing to what is no volume.
- `paths-hold-still`: `_namespace` is held from resolving a path until the change it names has been made.

Those of `passthrough` hold as well.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import RequestContext

from dedup.types import VolumeId
from fusefs import system_calls
from fusefs.errors import fuse_error, handler, refused
from fusefs.inode_map import FileKey, Node
from fusefs.intercept import CreateFile, Intercept, RemoveFile, RenamePath
from fusefs.mountpoint import CONTROL_XATTR
from fusefs.names import check_new_name, check_rename, check_visible
from fusefs.passthrough import READ_BYTES_MAX, Passthrough
from fusefs.passthrough_calls import Made, close_duplicate, make_file, status_if_any, status_of
from fusefs.restore_claim import RestoreClaims


class SourceMount(Passthrough[VolumeId | None]):
    """The handlers of the source mount. Call `close` when pyfuse3's main loop has returned."""

    def __init__(self, source: Path, intercept: Intercept, *, control: Path, writeback: bool = False) -> None:
        """Opens the source directory, before anything is mounted over it. `control`: see mountpoint.CONTROL_XATTR."""
        super().__init__(source, writeback=writeback)
        self._intercept = intercept
        self.claims = RestoreClaims()
        self._control = os.fsencode(control)
        self._namespace = trio.Lock()
        self._read_buffer = memoryview(bytearray(READ_BYTES_MAX))

    def open_volumes(self) -> set[VolumeId]:
        """Those that anybody has open through this mount. The kernel says a moment late that a file was closed."""
        return {handle.file for handle in self._handles.values() if handle.file is not None}

    # The two hot paths: no wrapper, no thread when the page cache has the bytes, nothing between request and agent.

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            handle = self._handles[fh]
            if handle.privileged:
                await self._drop_privileges(handle.node, fh)
            # The kernel may write a page dirtied through mmap by any handle it finds, an appending one included: such
            # a write lies within the file, and an append does not.
            append = handle.append and off >= os.fstat(fh).st_size
            return await self._intercept.write(handle.file, fh, off, buf, append)
        except Exception as error:  # noqa: BLE001 - must become an errno
            raise fuse_error("write", error) from None

    async def read(self, fh: int, off: int, size: int) -> bytes:
        # One buffer for all: pyfuse3 hands the reply to the kernel before another task runs, so there must be no
        # await between filling the buffer and returning it.
        buffer = self._read_buffer[:size]
        try:
            count = os.preadv(fh, (buffer,), off, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise fuse_error("read", error) from None
            return await self._read_waiting(fh, off, size)
        if count == size:
            return buffer  # type: ignore[return-value]  # pyfuse3 takes any buffer
        if count == 0 or off + count >= os.fstat(fh).st_size:
            return buffer[:count]  # type: ignore[return-value]
        return await self._read_waiting(fh, off, size)

    @handler
    async def _read_waiting(self, fh: int, off: int, size: int) -> bytes:
        return await self._in_thread(os.pread, fh, size, off)

    @handler
    async def flush(self, fh: int) -> None:
        if self._handles[fh].writable:
            # Network file systems report failed writes when a descriptor closes, and release has nobody to tell.
            await self._in_thread(close_duplicate, fh)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._intercept.fsync(self._handles[fh].file, fh, datasync)

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if inode == pyfuse3.ROOT_INODE and name == CONTROL_XATTR.encode():
            return self._control
        return await super().getxattr(inode, name, ctx)

    # Names

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        directory = self._inodes.node(parent_inode)
        check_visible(directory, name)
        perform = partial(os.unlink, name, dir_fd=directory.fd)
        async with self._namespace:
            status = status_of(directory, name)
            if stat.S_ISREG(status.st_mode):
                self.claims.check(ctx.pid, path := self._inodes.path(directory, name))
                await self._intercept.namespace(RemoveFile(path, self._recorded_key(status, name), perform))
            else:
                await self._in_thread(perform)

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        old_dir, new_dir = self._inodes.node(parent_inode_old), self._inodes.node(parent_inode_new)
        check_visible(old_dir, name_old)
        check_new_name(new_dir, name_new)
        async with self._namespace:
            moved, target = status_of(old_dir, name_old), status_if_any(new_dir, name_new)
            check_rename(name_old, moved, target, flags)
            old, new = self._inodes.path(old_dir, name_old), self._inodes.path(new_dir, name_new)
            self.claims.check(ctx.pid, old, new)
            await self._intercept.namespace(
                RenamePath(
                    old=old,
                    new=new,
                    key=self._recorded_key(moved, name_old),
                    replaced=None if target is None else self._recorded_key(target, name_new),
                    exchange=flags == system_calls.RENAME_EXCHANGE,
                    is_directory=stat.S_ISDIR(moved.st_mode),
                    replaced_is_directory=target is not None and stat.S_ISDIR(target.st_mode),
                    perform=partial(system_calls.rename, old_dir.fd, name_old, new_dir.fd, name_new, flags),
                )
            )

    # As a passthrough

    def _file_of(self, node: Node) -> VolumeId | None:
        return self._intercept.volume_of(node.key)

    def _check_change(self, node: Node, pid: int) -> None:
        if self.claims.concern(pid) and os.fstat(node.fd).st_nlink:
            self.claims.check(pid, self._inodes.path(node))

    def _opened(self, file: VolumeId | None, fd: int) -> None:
        self._intercept.opened(file, fd)

    def _closed(self, file: VolumeId | None, fd: int) -> None:
        self._intercept.released(file, fd)

    async def _open_file(self, node: Node, writable: bool) -> int:
        """A descriptor of its own. EPERM where a write could not be recorded."""
        flags = os.O_RDWR if writable else os.O_RDONLY
        fd = await self._in_thread(os.open, node.proc_path, flags | os.O_CLOEXEC | os.O_NOCTTY)
        status = os.fstat(fd)
        if not writable or not status.st_nlink:
            return fd
        if status.st_nlink > 1:
            problem = f"it has {status.st_nlink} hard links"
        elif self._intercept.volume_of(node.key) is None:
            problem = "it was put into the source behind the mount and is not protected; mount again"
        else:
            return fd
        os.close(fd)
        raise refused(f"writing to {os.fsdecode(os.readlink(node.proc_path))!r}: {problem}")

    async def _make_file(self, directory: Node, name: bytes, mode: int, ctx: RequestContext, made: Made) -> None:
        perform = partial(make_file, directory, name, mode, ctx, made)
        async with self._namespace:
            self.claims.check(ctx.pid, path := self._inodes.path(directory, name))
            await self._intercept.namespace(CreateFile(path, perform))

    async def _change_size(self, file: VolumeId | None, fd: int, size: int) -> None:
        await self._intercept.resize(file, fd, size)

    async def _change_attributes(self, node: Node, change: Callable[[], os.stat_result]) -> os.stat_result:
        volume = self._intercept.volume_of(node.key) if node.is_regular else None
        return await (self._in_thread(change) if volume is None else self._intercept.attributes(volume, change))

    def _recorded_key(self, status: os.stat_result, name: bytes) -> FileKey | None:
        """The key of a volume about to lose its name. EPERM when the file would live on under another name."""
        key = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode) or self._intercept.volume_of(key) is None:
            return None
        if status.st_nlink > 1:
            raise refused(f"changing the name {os.fsdecode(name)!r}: the file has {status.st_nlink} hard links")
        return key
