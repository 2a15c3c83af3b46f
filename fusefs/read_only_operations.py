"""What a read-only mount answers to whoever would change something; the kernel asks for hardly any of it."""

from __future__ import annotations

import errno
from typing import NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields


class ReadOnlyOperations(pyfuse3.Operations):
    """Handlers that refuse with EROFS."""

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        refuse_change()

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        refuse_change()

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        refuse_change()

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        refuse_change()

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        refuse_change()

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        refuse_change()

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        refuse_change()

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        refuse_change()

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        refuse_change()

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        refuse_change()

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        refuse_change()

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        refuse_change()


def refuse_change() -> NoReturn:
    raise FUSEError(errno.EROFS)
