"""The clone mount: volumes as they were, and writable; what is written goes to an overlay and ends with the mount.

A passthrough over the overlay's files, in which what was not written is read from the past.

Invariants:
- `store-untouched`: nothing here writes but to the overlay;
- `one-state-per-file`: all openers of a file share one `CloneFile`, found by the file's key for as long as the file has
  a name or somebody has it open. A key that comes back is another file's, and gets a new one;
- what is made (files, directories, symlinks) is taken from the overlay's room, a block each, until it is gone.

Those of `passthrough` hold as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, RequestContext, StatvfsData

from dedup.errors import RewindError, WouldBlock
from dedup.types import BLOCK_BYTES, NAME_BYTES_MAX
from fusefs import system_calls
from fusefs.clone_file import CloneFile
from fusefs.errors import fuse_error, handler, refused
from fusefs.inode_map import FileKey, Node
from fusefs.moment_xattrs import XATTR_PREFIX, moment_xattrs
from fusefs.mountpoint import CLONE_XATTR
from fusefs.names import check_new_name, check_visible
from fusefs.overlay_room import OverlayRoom
from fusefs.passthrough import Passthrough
from fusefs.passthrough_calls import Made, make_file, status_of

_TROUBLES: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class CloneMount(Passthrough[CloneFile]):
    """The handlers of the clone mount. Call `close` when pyfuse3's main loop has returned."""

    def __init__(self, directory: Path, room: OverlayRoom, describe: Callable[[], bytes] | None = None) -> None:
        """Over the overlay's `directory`; `room` is for what is made new. `describe` gives mountpoint.CLONE_XATTR."""
        super().__init__(directory)
        self._room = room
        self._describe = describe
        self._files: dict[FileKey, CloneFile] = {}
        self._made: set[FileKey] = set()
        self._trouble: str | None = None

    def add(self, files: Mapping[FileKey, CloneFile]) -> None:
        """From here on these are files of the clone; the kernel has not seen them yet."""
        self._files.update(files)

    def take_trouble(self) -> str | None:
        """Why a request failed since this was last asked that a disk with room would have served; None if none did."""
        trouble, self._trouble = self._trouble, None
        return trouble

    # The two hot paths: no thread when nothing has to be waited for.

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            handle = self._handles[fh]
            if handle.privileged:
                await self._drop_privileges(handle.node, fh)
            write = partial(handle.file.write, fh, off, buf, append=handle.append)
            try:
                return write(wait=False)
            except WouldBlock:
                return await self._in_thread(write)
        except Exception as error:  # noqa: BLE001 - must become an errno
            self._note(error)
            raise fuse_error("write", error) from None

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            file = self._handles[fh].file
            try:
                part = file.read(fh, off, size, wait=False)
            except WouldBlock:
                part = await self._in_thread(file.read, fh, off, size)
            return part  # type: ignore[return-value]  # pyfuse3 takes any buffer
        except Exception as error:  # noqa: BLE001 - must become an errno
            self._note(error)
            raise fuse_error("read", error) from None

    def _note(self, error: Exception) -> None:
        if isinstance(error, RewindError) or (isinstance(error, OSError) and error.errno in _TROUBLES):
            self._trouble = f"the overlay: {error.strerror}" if isinstance(error, OSError) else str(error)

    def _take(self) -> None:
        """The room of a new entry. ENOSPC."""
        try:
            self._room.take(1)
        except OSError as error:
            self._note(error)
            raise

    async def flush(self, fh: int) -> None:
        """Nothing is kept back."""

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._in_thread(os.fdatasync if datasync else os.fsync, fh)

    # Attributes

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        _refuse_ours(name)
        await super().setxattr(inode, name, value, ctx)

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if not name.startswith(XATTR_PREFIX):
            return await super().getxattr(inode, name, ctx)
        value = self._ours(self._inodes.node(inode)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return [*await super().listxattr(inode, ctx), *self._ours(self._inodes.node(inode))]

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        _refuse_ours(name)
        await super().removexattr(inode, name, ctx)

    def _ours(self, node: Node) -> dict[bytes, bytes]:
        if node is self._inodes.root and self._describe is not None:
            return {CLONE_XATTR.encode(): self._describe()}
        file = self._files.get(node.key)
        return {} if file is None or file.moment is None else moment_xattrs(file.moment)

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Of the overlay: what its limit and its disk leave."""
        status = await self._in_thread(os.statvfs, self._inodes.root.fd)
        used = self._room.used_bytes // BLOCK_BYTES
        free = status.f_bavail * status.f_frsize // BLOCK_BYTES
        if self._room.limit_bytes:
            free = max(0, min(free, self._room.limit_bytes // BLOCK_BYTES - used))
        result = StatvfsData()
        result.f_bsize = result.f_frsize = BLOCK_BYTES
        result.f_blocks, result.f_bfree, result.f_bavail = used + free, free, free
        result.f_files, result.f_ffree, result.f_favail = status.f_files, status.f_ffree, status.f_favail
        result.f_namemax = min(status.f_namemax, NAME_BYTES_MAX)
        return result

    # Names

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        directory = self._inodes.node(parent_inode)
        check_visible(directory, name)
        status = status_of(directory, name)
        await self._in_thread(partial(os.unlink, name, dir_fd=directory.fd))
        self._unnamed(status)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        directory = self._inodes.node(parent_inode)
        check_visible(directory, name)
        status = status_of(directory, name)
        await super().rmdir(parent_inode, name, ctx)
        self._unnamed(status)

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
        if flags not in (0, system_calls.RENAME_NOREPLACE, system_calls.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        check_visible(old_dir, name_old)
        check_new_name(new_dir, name_new)
        replaced = None
        if flags != system_calls.RENAME_EXCHANGE:
            with suppress(FileNotFoundError):
                replaced = status_of(new_dir, name_new)
        await self._in_thread(system_calls.rename, old_dir.fd, name_old, new_dir.fd, name_new, flags)
        if replaced is not None:
            self._unnamed(replaced)

    # As a passthrough

    def _entry(self, node: Node, status: os.stat_result) -> EntryAttributes:
        entry = super()._entry(node, status)
        file = self._files.get(node.key)
        if file is not None and file.moment is not None:
            # Of the blocks, only what was written is in the overlay: to some programs few blocks are a file of zeros.
            entry.st_blocks = -(-status.st_size // 512)
        return entry

    def _file_of(self, node: Node) -> CloneFile:
        return self._files[node.key]

    async def _open_file(self, node: Node, writable: bool) -> int:
        flags = os.O_RDWR if writable else os.O_RDONLY
        return await self._in_thread(os.open, node.proc_path, flags | os.O_CLOEXEC | os.O_NOCTTY)

    async def _make_file(self, directory: Node, name: bytes, mode: int, ctx: RequestContext, made: Made) -> None:
        self._take()
        try:
            status = await self._in_thread(make_file, directory, name, mode, ctx, made)
        except BaseException:
            self._room.give_back(1)
            raise
        key = status.st_dev, status.st_ino
        self._made.add(key)
        self._files[key] = CloneFile(self._room)

    async def _make(
        self, directory: Node, name: bytes, mode: int, ctx: RequestContext, perform: Callable[..., None]
    ) -> EntryAttributes:
        self._take()
        try:
            entry = await super()._make(directory, name, mode, ctx, perform)
        except BaseException:
            self._room.give_back(1)
            raise
        self._made.add(self._inodes.node(entry.st_ino).key)
        return entry

    async def _change_size(self, file: CloneFile, fd: int, size: int) -> None:
        await self._in_thread(file.resize, fd, size)

    async def _change_attributes(self, node: Node, change: Callable[[], os.stat_result]) -> os.stat_result:
        return await self._in_thread(change)

    def _unnamed(self, status: os.stat_result) -> None:
        """An entry of that status has lost its name. If nobody has it open, its room is free now."""
        key = status.st_dev, status.st_ino
        if all(handle.node.key != key for handle in self._handles.values()):
            self._give_back(key)

    def _forgotten(self, status: os.stat_result) -> None:
        if not status.st_nlink:
            key = status.st_dev, status.st_ino
            self._give_back(key)
            self._files.pop(key, None)

    def _give_back(self, key: FileKey) -> None:
        file = self._files.get(key)
        if file is not None:
            file.gone()
        if key in self._made:
            self._made.discard(key)
            self._room.give_back(1)


def _refuse_ours(name: bytes) -> None:
    if name.startswith(XATTR_PREFIX):
        raise refused(f"setting the attribute {os.fsdecode(name)!r}: these say what the file was cloned from")
