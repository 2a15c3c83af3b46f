"""The source mount: a passthrough of the source directory that lets the agent see every change first.

Invariants:
- `no-way-around`: bytes, sizes, names, modes and owners of regular files change only through `Intercept`. What cannot
  be recorded faithfully is refused with EPERM and a line in the log: hard links, and writing to what is no volume.
- `own-descriptor`: each open handle has a descriptor of the source of its own, opened O_RDWR if it may write: the
  kernel reads pages through handles that applications opened write-only. A handle's number is its descriptor.
- `paths-hold-still`: `names_inpace` is held from resolving a path until the change it names has been made.
- `no-waiting-on-the-loop`: calls that may wait for a disk run in threads. What runs inline finds its inode in memory.

Permissions are the kernel's to check: mount with `default_permissions`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from dedup.types import VolumeId
from fusefs import system_calls
from fusefs.errors import fuse_error, handler, refused
from fusefs.inode_map import FileKey, InodeMap, Node
from fusefs.intercept import CreateFile, Intercept, RemoveFile, RenamePath
from fusefs.kernel_init import answer_init
from fusefs.mountpoint import CONTROL_XATTR
from fusefs.names import check_new_name, check_rename, check_visible
from fusefs.restore_claim import RestoreClaims
from fusefs.source_calls import (
    PATH_FLAGS,
    Handle,
    Listing,
    Made,
    close_duplicate,
    entry_of,
    make_entry,
    make_file,
    names_in,
    open_entries,
    room_of,
    set_mode_and_owner,
    status_if_any,
    status_of,
    without_privileges,
)

THREADS_MAX: Final = 32
"""Calls of this mount that wait for disks at one time."""
READ_BYTES_MAX: Final = 1 << 20
"""Largest read request of the kernel: 256 pages."""
READDIR_BATCH: Final = 32
"""Entries looked up per thread hop: about what fits into one page of a readdir reply."""

_T = TypeVar("_T")


class SourceMount(pyfuse3.Operations):
    """The handlers of the source mount. Call `close` when pyfuse3's main loop has returned."""

    supports_dot_lookup = False

    def __init__(self, source: Path, intercept: Intercept, *, control: Path, writeback: bool = False) -> None:
        """Opens the source directory, before anything is mounted over it. `control`: see mountpoint.CONTROL_XATTR."""
        super().__init__()
        self.enable_writeback_cache = writeback
        self._intercept = intercept
        self.claims = RestoreClaims()
        self._control = os.fsencode(control)
        self._inodes = InodeMap(source)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._namespace = trio.Lock()
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self._read_buffer = memoryview(bytearray(READ_BYTES_MAX))

    def init(self) -> None:
        answer_init(writeback=self.enable_writeback_cache)

    def close(self) -> None:
        """Closes every descriptor that the kernel did not release. No handler may run any more."""
        for fd, handle in self._handles.items():
            self._intercept.released(handle.volume, fd)
            os.close(fd)
        for fd in self._listings:
            os.close(fd)
        self._handles.clear()
        self._listings.clear()
        self._inodes.close()

    def open_volumes(self) -> set[VolumeId]:
        """Those that anybody has open through this mount. The kernel says a moment late that a file was closed."""
        return {handle.volume for handle in self._handles.values() if handle.volume is not None}

    # The two hot paths: no wrapper, no thread when the page cache has the bytes, nothing between request and agent.

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            handle = self._handles[fh]
            if handle.privileged:
                await self._drop_privileges(handle.node, fh)
            # The kernel may write a page dirtied through mmap by any handle it finds, an appending one included: such
            # a write lies within the file, and an append does not.
            append = handle.append and off >= os.fstat(fh).st_size
            return await self._intercept.write(handle.volume, fh, off, buf, append)
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

    # Files

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return await self._open(self._inodes.node(inode), flags, ctx.pid)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        directory = self._inodes.node(parent_inode)
        made = Made()
        try:
            await self._create(directory, name, mode, ctx, made)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            # Made behind the mount, or by a racing create that the kernel had not seen: open what is there.
            entry = await self._look_up(directory, name)
            node = self._inodes.node(entry.st_ino)
            try:
                return await self._open(node, flags, ctx.pid), entry
            except BaseException:
                await self._forget(node.number, 1)
                raise
        fd, made.fd = made.fd, None
        entry, node = self._adopt(made.take_path_fd())
        if fd is None:
            raise RuntimeError("a file was made without a descriptor")
        return self._register(fd, node, flags, writable=True), entry

    @handler
    async def flush(self, fh: int) -> None:
        if self._handles[fh].writable:
            # Network file systems report failed writes when a descriptor closes, and release has nobody to tell.
            await self._in_thread(close_duplicate, fh)

    @handler
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        self._intercept.released(handle.volume, fh)
        await self._close(fh)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._intercept.fsync(self._handles[fh].volume, fh, datasync)

    # Attributes

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        node = self._inodes.node(inode)
        return entry_of(node, os.fstat(node.fd))

    @handler
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._inodes.node(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else None
            uid, gid = attr.st_uid if fields.update_uid else -1, attr.st_gid if fields.update_gid else -1
            await self._set_mode_and_owner(node, mode, uid, gid)
        if fields.update_size:
            self._refuse_claimed(node, ctx.pid)
            await self._resize(node, fh, attr.st_size)
        if fields.update_atime or fields.update_mtime:
            await self._in_thread(
                system_calls.set_times,
                node.proc_path,
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
            )
        return entry_of(node, os.fstat(node.fd))

    @handler
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._in_thread(os.setxattr, self._inodes.node(inode).proc_path, name, value)

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if inode == pyfuse3.ROOT_INODE and name == CONTROL_XATTR.encode():
            return self._control
        path = self._inodes.node(inode).proc_path
        if name == b"security.capability":
            return os.getxattr(path, name)  # the kernel asks before each write, and keeps it with the inode
        return await self._in_thread(os.getxattr, path, name)

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        path = self._inodes.node(inode).proc_path
        return [os.fsencode(name) for name in await self._in_thread(os.listxattr, path)]

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._in_thread(os.removexattr, self._inodes.node(inode).proc_path, name)

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        return room_of(await self._in_thread(os.statvfs, self._inodes.root.fd))

    # Names

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return await self._look_up(self._inodes.node(parent_inode), name)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            await self._forget(number, lookups)

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._in_thread(partial(os.readlink, b"", dir_fd=self._inodes.node(inode).fd))

    @handler
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        directory = self._inodes.node(parent_inode)
        if not stat.S_ISREG(mode):
            return await self._make(directory, name, mode, ctx, partial(os.mknod, name, mode, rdev))
        made = Made()
        await self._create(directory, name, mode, ctx, made)
        path_fd = made.take_path_fd()
        made.close()
        return self._adopt(path_fd)[0]

    @handler
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        directory = self._inodes.node(parent_inode)
        return await self._make(directory, name, mode, ctx, partial(os.mkdir, name, stat.S_IMODE(mode)))

    @handler
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        directory = self._inodes.node(parent_inode)
        return await self._make(directory, name, stat.S_IFLNK, ctx, partial(os.symlink, target, name))

    @handler
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise refused(f"hard link {os.fsdecode(new_name)!r}: a volume has one name; copy the file or use a symlink")

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
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        directory = self._inodes.node(parent_inode)
        check_visible(directory, name)
        await self._in_thread(partial(os.rmdir, name, dir_fd=directory.fd))

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

    # Directories

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        node = self._inodes.node(inode)
        fd = await self._in_thread(os.open, node.proc_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listings[fd] = Listing(node)
        return fd

    @handler
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0:
            listing.names = await self._in_thread(names_in, fh, listing.node is self._inodes.root)
        while batch := listing.names[start_id : start_id + READDIR_BATCH]:
            found = await self._in_thread(open_entries, listing.node.fd, batch)
            for index, (name, fd) in enumerate(found):
                start_id += 1
                if fd is None:
                    continue  # removed since
                entry, node = self._adopt(fd)
                if not pyfuse3.readdir_reply(token, name, entry, start_id):
                    await self._forget(node.number, 1)
                    for _, unused in found[index + 1 :]:
                        if unused is not None:
                            os.close(unused)
                    return

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._in_thread(os.fsync, fh)

    @handler
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]
        os.close(fh)

    # Steps of several handlers

    async def _in_thread(self, function: Callable[..., _T], *args: object) -> _T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    async def _look_up(self, directory: Node, name: bytes) -> EntryAttributes:
        check_visible(directory, name)
        fd = system_calls.open_cached(directory.fd, name)
        if fd is None:
            fd = await self._in_thread(partial(os.open, name, PATH_FLAGS, dir_fd=directory.fd))
        return self._adopt(fd)[0]

    def _adopt(self, path_fd: int) -> tuple[EntryAttributes, Node]:
        status = os.fstat(path_fd)
        node = self._inodes.adopt(path_fd, status)
        return entry_of(node, status), node

    async def _forget(self, number: int, lookups: int) -> None:
        fd = self._inodes.forget(number, lookups)
        if fd is not None:
            await self._close(fd)

    async def _close(self, fd: int) -> None:
        """Closes a descriptor, in a thread where it may be the last of an unlinked file: its blocks are freed then."""
        if os.fstat(fd).st_nlink:
            os.close(fd)
        else:
            await self._in_thread(os.close, fd)

    def _refuse_claimed(self, node: Node, pid: int) -> None:
        if self.claims.concern(pid) and os.fstat(node.fd).st_nlink:
            self.claims.check(pid, self._inodes.path(node))

    async def _open(self, node: Node, flags: int, pid: int) -> FileInfo:
        truncate = bool(flags & os.O_TRUNC)
        writable = truncate or flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self._refuse_claimed(node, pid)
        fd = await self._open_source(node, writable)
        info = self._register(fd, node, flags, writable)
        if truncate:
            try:
                await self._drop_privileges(node, fd)
                await self._intercept.resize(self._handles[fd].volume, fd, 0)
            except BaseException:
                self._intercept.released(self._handles.pop(fd).volume, fd)
                os.close(fd)
                raise
        return info

    async def _open_source(self, node: Node, writable: bool) -> int:
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

    def _register(self, fd: int, node: Node, flags: int, writable: bool) -> FileInfo:
        # With the writeback cache the kernel resolves O_APPEND itself and writes pages back at their own offsets.
        append = bool(flags & os.O_APPEND) and not self.enable_writeback_cache
        volume = self._intercept.volume_of(node.key)
        privileged = writable and without_privileges(os.fstat(fd).st_mode) is not None
        self._handles[fd] = Handle(node, volume, writable, append, privileged)
        self._intercept.opened(volume, fd)
        return FileInfo(fh=fd, keep_cache=False, direct_io=False)

    async def _resize(self, node: Node, fh: int | None, size: int) -> None:
        handle = None if fh is None else self._handles[fh]
        if handle is not None and fh is not None and handle.writable:
            await self._drop_privileges(node, fh)
            await self._intercept.resize(handle.volume, fh, size)
            return
        fd = await self._open_source(node, writable=True)
        try:
            await self._drop_privileges(node, fd)
            await self._intercept.resize(self._intercept.volume_of(node.key), fd, size)
        finally:
            os.close(fd)

    async def _set_mode_and_owner(self, node: Node, mode: int | None, uid: int, gid: int) -> None:
        change = partial(set_mode_and_owner, node, mode, uid, gid)
        volume = self._intercept.volume_of(node.key) if node.is_regular else None
        status = await (self._in_thread(change) if volume is None else self._intercept.attributes(volume, change))
        for handle in self._handles.values():
            if handle.node is node:
                handle.privileged = without_privileges(status.st_mode) is not None

    async def _drop_privileges(self, node: Node, fd: int) -> None:
        """Clears set-user-id and set-group-id before a change of content: `kernel_init` promised it to the kernel.

        For root too, which it would have spared: requests do not say who writes.
        """
        mode = without_privileges(os.fstat(fd).st_mode)
        if mode is not None:
            await self._set_mode_and_owner(node, mode, -1, -1)

    async def _create(self, directory: Node, name: bytes, mode: int, ctx: RequestContext, made: Made) -> None:
        """Makes a regular file through the agent. Its descriptors are in `made`, or closed when this raises."""
        check_new_name(directory, name)
        perform = partial(make_file, directory, name, mode, ctx, made)
        try:
            async with self._namespace:
                self.claims.check(ctx.pid, path := self._inodes.path(directory, name))
                await self._intercept.namespace(CreateFile(path, perform))
        except BaseException:
            made.close()
            raise

    async def _make(
        self, directory: Node, name: bytes, mode: int, ctx: RequestContext, perform: Callable[..., None]
    ) -> EntryAttributes:
        """Makes what is no volume: passed through. `perform` takes `dir_fd`."""
        check_new_name(directory, name)
        return self._adopt(await self._in_thread(make_entry, directory, name, mode, ctx, perform))[0]

    def _recorded_key(self, status: os.stat_result, name: bytes) -> FileKey | None:
        """The key of a volume about to lose its name. EPERM when the file would live on under another name."""
        key = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode) or self._intercept.volume_of(key) is None:
            return None
        if status.st_nlink > 1:
            raise refused(f"changing the name {os.fsdecode(name)!r}: the file has {status.st_nlink} hard links")
        return key
