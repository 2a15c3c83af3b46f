"""A mount that passes a directory through: names, attributes and open files, as far as all such mounts do it alike.

What becomes of the content of regular files, and who is told of changes, is the subclass's.

Invariants:
- `own-descriptor`: each open handle has a descriptor of its own, opened O_RDWR if it may write: the kernel reads pages
  through handles that applications opened write-only. A handle's number is its descriptor.
- `no-waiting-on-the-loop`: calls that may wait for a disk run in threads. What runs inline finds its inode in memory.

Permissions are the kernel's to check: mount with `default_permissions`.
"""

from __future__ import annotations

import os
import stat
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Generic, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from fusefs import system_calls
from fusefs.errors import handler, refused
from fusefs.inode_map import InodeMap, Node
from fusefs.kernel_init import answer_init
from fusefs.names import check_new_name, check_visible
from fusefs.passthrough_calls import (
    PATH_FLAGS,
    F,
    Handle,
    Listing,
    Made,
    entry_of,
    make_entry,
    names_in,
    open_entries,
    room_of,
    set_mode_and_owner,
    without_privileges,
)

THREADS_MAX: Final = 32
"""Calls of this mount that wait for disks at one time."""
READ_BYTES_MAX: Final = 1 << 20
"""Largest read request of the kernel: 256 pages."""
READDIR_BATCH: Final = 32
"""Entries looked up per thread hop: about what fits into one page of a readdir reply."""

_T = TypeVar("_T")


class Passthrough(pyfuse3.Operations, Generic[F]):
    """The handlers that all passthroughs have. Call `close` when pyfuse3's main loop has returned.

    `F` is what the mount knows of a regular file. Not here: read, write, flush, fsync, unlink and rename.
    """

    supports_dot_lookup = False

    def __init__(self, directory: Path, *, writeback: bool = False) -> None:
        """Opens the directory, before anything is mounted over it."""
        super().__init__()
        self.enable_writeback_cache = writeback
        self._inodes = InodeMap(directory)
        self._handles: dict[int, Handle[F]] = {}
        self._listings: dict[int, Listing] = {}
        self._threads = trio.CapacityLimiter(THREADS_MAX)

    def init(self) -> None:
        answer_init(writeback=self.enable_writeback_cache)

    def close(self) -> None:
        """Closes every descriptor that the kernel did not release. No handler may run any more."""
        for fd, handle in self._handles.items():
            self._closed(handle.file, fd)
            os.close(fd)
        for fd in self._listings:
            os.close(fd)
        self._handles.clear()
        self._listings.clear()
        self._inodes.close()

    # What a subclass adds

    @abstractmethod
    def _file_of(self, node: Node) -> F:
        """What the mount knows of a regular file, now."""

    @abstractmethod
    async def _open_file(self, node: Node, writable: bool) -> int:
        """A descriptor of its own, O_RDWR if `writable`. OSError where that is refused."""

    @abstractmethod
    async def _make_file(self, directory: Node, name: bytes, mode: int, ctx: RequestContext, made: Made) -> None:
        """Makes a regular file; its descriptors are put into `made`. FileExistsError."""

    @abstractmethod
    async def _change_size(self, file: F, fd: int, size: int) -> None:
        """Sets the size of a regular file, open at `fd`."""

    @abstractmethod
    async def _change_attributes(self, node: Node, change: Callable[[], os.stat_result]) -> os.stat_result:
        """Runs `change`, which sets mode and owner and may wait for a disk."""

    def _check_change(self, node: Node, pid: int) -> None:
        """OSError where thread `pid` may not open a regular file for writing now, nor change its size."""

    def _entry(self, node: Node, status: os.stat_result) -> EntryAttributes:
        """What the kernel is told of an entry."""
        return entry_of(node, status)

    def _opened(self, file: F, fd: int) -> None:
        """A handle is open from here to `_closed`."""

    def _closed(self, file: F, fd: int) -> None:
        """Its descriptor is about to be closed."""

    def _forgotten(self, status: os.stat_result) -> None:
        """The kernel has forgotten this entry. Without a link it is gone for good; its key may return as another's."""

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
    async def release(self, fh: int) -> None:
        self._closed(self._handles.pop(fh).file, fh)
        await self._close(fh)

    # Attributes

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        node = self._inodes.node(inode)
        return self._entry(node, os.fstat(node.fd))

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
            self._check_change(node, ctx.pid)
            await self._resize(node, fh, attr.st_size)
        if fields.update_atime or fields.update_mtime:
            await self._in_thread(
                system_calls.set_times,
                node.proc_path,
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
            )
        return self._entry(node, os.fstat(node.fd))

    @handler
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._in_thread(os.setxattr, self._inodes.node(inode).proc_path, name, value)

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        path = self._inodes.node(inode).proc_path
        if name == b"security.capability":
            return os.getxattr(path, name)  # the kernel asks before each write, and keeps it with the inode
        return await self._in_thread(os.getxattr, path, name)

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        names = await self._in_thread(os.listxattr, self._inodes.node(inode).proc_path)
        return [os.fsencode(name) for name in names]

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
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        directory = self._inodes.node(parent_inode)
        check_visible(directory, name)
        await self._in_thread(partial(os.rmdir, name, dir_fd=directory.fd))

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
        return self._entry(node, status), node

    async def _forget(self, number: int, lookups: int) -> None:
        fd = self._inodes.forget(number, lookups)
        if fd is not None:
            self._forgotten(os.fstat(fd))
            await self._close(fd)

    async def _close(self, fd: int) -> None:
        """Closes a descriptor, in a thread where it may be the last of an unlinked file: its blocks are freed then."""
        if os.fstat(fd).st_nlink:
            os.close(fd)
        else:
            await self._in_thread(os.close, fd)

    async def _open(self, node: Node, flags: int, pid: int) -> FileInfo:
        truncate = bool(flags & os.O_TRUNC)
        writable = truncate or flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self._check_change(node, pid)
        fd = await self._open_file(node, writable)
        try:
            if writable:
                self._check_change(node, pid)  # again: from here on it is seen to be open, and until here it was not
            info = self._register(fd, node, flags, writable)
        except BaseException:
            os.close(fd)
            raise
        if truncate:
            try:
                await self._drop_privileges(node, fd)
                await self._change_size(self._handles[fd].file, fd, 0)
            except BaseException:
                self._closed(self._handles.pop(fd).file, fd)
                os.close(fd)
                raise
        return info

    def _register(self, fd: int, node: Node, flags: int, writable: bool) -> FileInfo:
        # With the writeback cache the kernel resolves O_APPEND itself and writes pages back at their own offsets.
        append = bool(flags & os.O_APPEND) and not self.enable_writeback_cache
        file = self._file_of(node)
        privileged = writable and without_privileges(os.fstat(fd).st_mode) is not None
        self._handles[fd] = Handle(node, file, writable, append, privileged)
        self._opened(file, fd)
        return FileInfo(fh=fd, keep_cache=False, direct_io=False)

    async def _resize(self, node: Node, fh: int | None, size: int) -> None:
        handle = None if fh is None else self._handles[fh]
        if handle is not None and fh is not None and handle.writable:
            await self._drop_privileges(node, fh)
            await self._change_size(handle.file, fh, size)
            return
        fd = await self._open_file(node, writable=True)
        try:
            await self._drop_privileges(node, fd)
            await self._change_size(self._file_of(node), fd, size)
        finally:
            os.close(fd)

    async def _set_mode_and_owner(self, node: Node, mode: int | None, uid: int, gid: int) -> None:
        status = await self._change_attributes(node, partial(set_mode_and_owner, node, mode, uid, gid))
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
        """Makes a regular file. Its descriptors are in `made`, or closed when this raises."""
        check_new_name(directory, name)
        try:
            await self._make_file(directory, name, mode, ctx, made)
        except BaseException:
            made.close()
            raise

    async def _make(
        self, directory: Node, name: bytes, mode: int, ctx: RequestContext, perform: Callable[..., None]
    ) -> EntryAttributes:
        """Makes what is no regular file. `perform` takes `dir_fd`."""
        check_new_name(directory, name)
        return self._adopt(await self._in_thread(make_entry, directory, name, mode, ctx, perform))[0]
