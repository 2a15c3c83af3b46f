"""What a passthrough does to the directory behind it, as plain functions that may wait for a disk: run them in threads.

The exceptions are `status_of`, `status_if_any`, `entry_of`, `room_of` and `without_privileges`, which touch only what
is in memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from pyfuse3 import EntryAttributes, RequestContext, StatvfsData

from dedup.types import NAME_BYTES_MAX
from fusefs.inode_map import Node
from fusefs.names import HIDDEN_NAME

TIMEOUT_SECONDS: Final = 1
"""How long the kernel trusts names and attributes. Through the mount it is told of every change at once, so this only
bounds how long a change made behind the mount stays unseen; 0 would cost a getattr per read."""
PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


F = TypeVar("F")


@dataclass(slots=True, eq=False)
class Handle(Generic[F]):
    """An open file; its number is its descriptor. `file` is what the mount knows of the file."""

    node: Node
    file: F
    writable: bool
    append: bool
    privileged: bool
    """The file has set-user-id or set-group-id, which the next write must clear."""


@dataclass(slots=True, eq=False)
class Listing:
    """An open directory, with the names it had when its listing began; its number is its descriptor."""

    node: Node
    names: list[bytes] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Made:
    """Descriptors of a file made by a `perform`; whoever called it closes those that are left."""

    path_fd: int | None = None
    fd: int | None = None

    def close(self) -> None:
        for fd in (self.path_fd, self.fd):
            if fd is not None:
                os.close(fd)
        self.path_fd = self.fd = None

    def take_path_fd(self) -> int:
        fd, self.path_fd = self.path_fd, None
        if fd is None:
            raise RuntimeError("nothing was made: perform did not run")
        return fd


def status_of(directory: Node, name: bytes) -> os.stat_result:
    """lstat of an entry that the kernel has just looked up for this request: it is in the caches."""
    return os.stat(name, dir_fd=directory.fd, follow_symlinks=False)


def status_if_any(directory: Node, name: bytes) -> os.stat_result | None:
    try:
        return status_of(directory, name)
    except FileNotFoundError:
        return None


def entry_of(node: Node, status: os.stat_result) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = node.number
    entry.entry_timeout = entry.attr_timeout = TIMEOUT_SECONDS
    entry.st_mode = status.st_mode
    entry.st_nlink = status.st_nlink
    entry.st_uid = status.st_uid
    entry.st_gid = status.st_gid
    entry.st_rdev = status.st_rdev
    entry.st_size = status.st_size
    entry.st_blksize = status.st_blksize
    entry.st_blocks = status.st_blocks
    entry.st_atime_ns = status.st_atime_ns
    entry.st_mtime_ns = status.st_mtime_ns
    entry.st_ctime_ns = status.st_ctime_ns
    return entry


def room_of(status: os.statvfs_result) -> StatvfsData:
    result = StatvfsData()
    for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
        setattr(result, f"f_{name}", getattr(status, f"f_{name}"))
    result.f_namemax = min(status.f_namemax, NAME_BYTES_MAX)
    return result


def without_privileges(mode: int) -> int | None:
    """The permissions without set-user-id and set-group-id; None when there is nothing to clear.

    Set-group-id without group execute is no privilege but a mark for locking, and stays.
    """
    drop = mode & stat.S_ISUID
    if mode & stat.S_IXGRP:
        drop |= mode & stat.S_ISGID
    return stat.S_IMODE(mode & ~drop) if drop else None


def close_duplicate(fd: int) -> None:
    os.close(os.dup(fd))


def names_in(fd: int, is_root: bool) -> list[bytes]:
    names = [os.fsencode(name) for name in os.listdir(fd)]
    return [name for name in names if name != HIDDEN_NAME] if is_root else names


def open_entries(directory: int, names: list[bytes]) -> list[tuple[bytes, int | None]]:
    found: list[tuple[bytes, int | None]] = []
    try:
        for name in names:
            try:
                found.append((name, os.open(name, PATH_FLAGS, dir_fd=directory)))
            except FileNotFoundError:
                found.append((name, None))
    except BaseException:
        for _, fd in found:
            if fd is not None:
                os.close(fd)
        raise
    return found


def set_mode_and_owner(node: Node, mode: int | None, uid: int, gid: int) -> os.stat_result:
    if (uid, gid) != (-1, -1):
        os.chown(node.proc_path, uid, gid)
    if mode is not None:  # after chown, which clears set-user-id and set-group-id
        os.chmod(node.proc_path, mode)
    return os.fstat(node.fd)


def make_file(directory: Node, name: bytes, mode: int, ctx: RequestContext, made: Made) -> os.stat_result:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    made.fd = os.open(name, flags, stat.S_IMODE(mode), dir_fd=directory.fd)
    try:
        made.path_fd = os.open(b"/proc/self/fd/%d" % made.fd, os.O_PATH | os.O_CLOEXEC)
        return _settle(directory, made.path_fd, mode, ctx)
    except BaseException:
        os.unlink(name, dir_fd=directory.fd)
        raise


def make_entry(directory: Node, name: bytes, mode: int, ctx: RequestContext, perform: Callable[..., None]) -> int:
    perform(dir_fd=directory.fd)
    path_fd = os.open(name, PATH_FLAGS, dir_fd=directory.fd)
    try:
        _settle(directory, path_fd, mode, ctx)
    except BaseException:
        os.close(path_fd)
        raise
    return path_fd


def _settle(directory: Node, path_fd: int, mode: int, ctx: RequestContext) -> os.stat_result:
    """Gives a new entry the caller's owner and mode, as if the caller had made it and not this daemon."""
    status, path = os.fstat(path_fd), b"/proc/self/fd/%d" % path_fd
    gid = status.st_gid if os.fstat(directory.fd).st_mode & stat.S_ISGID else ctx.gid
    if (status.st_uid, status.st_gid) != (ctx.uid, gid):
        os.chown(path, ctx.uid, gid)
    if stat.S_ISLNK(status.st_mode):
        return os.fstat(path_fd)
    wanted = stat.S_IMODE(mode) & ~ctx.umask
    if stat.S_ISDIR(status.st_mode):
        wanted |= status.st_mode & stat.S_ISGID  # inherited from a set-group-id directory
    if stat.S_IMODE(os.fstat(path_fd).st_mode) != wanted:
        os.chmod(path, wanted)
    return os.fstat(path_fd)
