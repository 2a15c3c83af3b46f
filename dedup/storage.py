"""The only place of the store that makes file system calls (LMDB aside).

Tests subclass `Storage` to tear, drop, fill up and fail each call. Errors are turned into the store's own here, and
name the path:

- no space, quota: StoreFull; any other refusal of a change, any failed sync: StoreFailed;
- a read that fails: Unreadable, which is Damaged (the disk does not give the bytes back);
- FileNotFoundError and FileExistsError pass through: callers ask for them.

Invariants:
- every open descriptor that came from here has its path in `_paths` until `close`;
- `pwritev` has written everything when it returns; when it raises, any part may have been written.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn

from dedup.errors import OnItsWay, StoreFailed, StoreFull, Unreadable, WouldBlock

Buffer = bytes | bytearray | memoryview

IOV_MAX: Final = 1024
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_SYNC_FILE_RANGE_WRITE: Final = 2
"""sync_file_range(2); of linux/fs.h. Python has neither."""
_FALLOC_FL_KEEP_SIZE: Final = 1
"""fallocate(2); of linux/falloc.h. Python has posix_fallocate only, which makes the file longer."""
_libc = ctypes.CDLL(None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_EXT4: Final = 0xEF53
"""What fstatfs(2) says first; of linux/magic.h. Python's statvfs does not tell it."""
_STATFS_BYTES: Final = 512
"""More than any system's."""
_fstatfs = getattr(_libc, "fstatfs", None)
if _fstatfs is not None:
    _fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class Storage:
    """File system calls, synchronous. Safe to share between threads; one descriptor's user orders its own calls."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A new descriptor (close-on-exec). FileNotFoundError, FileExistsError, StoreFull, StoreFailed."""
        try:
            fd = os.open(path, flags | os.O_CLOEXEC, mode)
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            _refused(error, path, "cannot be opened")
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        """Gives the descriptor back. Promises nothing about what was written: `datasync` does."""
        # The path goes first: the number may be given out anew, to another thread, as soon as it is closed.
        self._paths.pop(fd, None)
        os.close(fd)

    def path_of(self, fd: int) -> Path:
        """What the descriptor was opened as, for messages."""
        return self._paths.get(fd, Path(f"descriptor {fd}"))

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes, short only at the end of the file. Unreadable when the disk refuses."""
        try:
            data = os.pread(fd, length, offset)
            while 0 < len(data) < length:
                more = os.pread(fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            self._unread(error, fd, offset)
        return data

    def pread_each(self, fd: int, length: int, offsets: Sequence[int]) -> list[bytes]:
        """`pread` of `length` bytes at each offset, quicker than as many calls. Unreadable if the disk refuses one."""
        found = []
        try:
            for offset in offsets:
                found.append(os.pread(fd, length, offset))
        except OSError as error:
            self._unread(error, fd, offset)
        if set(map(len, found)) - {length}:
            return [self.pread(fd, length, offset) for offset in offsets]  # one was short: of the file, or of the call
        return found

    def pread_into(self, fd: int, buffers: list[memoryview], offset: int, *, wait: bool = True) -> int:
        """Fills the buffers in order and returns the bytes read, short only at the end of the file.

        With `wait` False nothing is waited for: OnItsWay when not all of it is in memory; then the kernel has asked the
        disk, for what it reads ahead, too. WouldBlock when the file system cannot tell. The buffers' content is then
        undefined. Unreadable when the disk refuses.
        """
        flags = 0 if wait else os.RWF_NOWAIT
        total = 0
        pending = buffers
        while pending:
            try:
                count = os.preadv(fd, pending[:IOV_MAX], offset + total, flags)
            except OSError as error:
                if not wait and error.errno == errno.EAGAIN:
                    raise OnItsWay from None
                if not wait and error.errno == errno.EOPNOTSUPP:
                    raise WouldBlock from None
                self._unread(error, fd, offset + total)
            if count == 0:
                break
            total += count
            if len(pending) == 1 and count == pending[0].nbytes:
                break
            pending = _after(pending, count)
        return total

    def map_to_read(self, fd: int, length: int, offset: int) -> mmap.mmap:
        """A part of the file, which it has, as memory that shows what is written to it. `offset` is of a page.
        StoreFailed.

        It is read page by page, when looked at; where the disk refuses that, the process is killed (SIGBUS).
        """
        try:
            mapped = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
        except OSError as error:
            _refused(error, self.path_of(fd), "cannot be mapped")
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Writes all the buffers one after the other. Not durable. StoreFull, StoreFailed: any part may be written."""
        count = self._pwritev_some(fd, buffers[:IOV_MAX], offset)
        if count == sum(map(len, buffers)):
            return  # as nearly always: one call took it all
        pending = _after([memoryview(buffer) for buffer in buffers if len(buffer)], count)
        while pending:
            offset += count
            count = self._pwritev_some(fd, pending[:IOV_MAX], offset)
            pending = _after(pending, count)

    def _pwritev_some(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        try:
            return os.pwritev(fd, buffers, offset)
        except OSError as error:
            _refused(error, self.path_of(fd), f"offset {offset}: write failed")

    def datasync(self, fd: int) -> None:
        """What was written to the file before the call, and its size, is durable on return.

        StoreFailed on any error: the kernel may have dropped the data and would report success the next time, so the
        caller must not try again.
        """
        try:
            os.fdatasync(fd)
        except OSError as error:
            raise StoreFailed(f"{self.path_of(fd)}: sync failed: {error.strerror}; open the store anew") from error

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """Room on the disk for what is written there next; the file is not longer before that. A hint, on ext4 and
        where the C library has it: what the disk refuses is told by the write.

        ext4 sets room aside for each block of a write else, which is more than a third of what writing a MiB costs it.
        Others are not asked: XFS has the same cost either way, btrfs a higher one, and does not compress what is
        written to such room, whatever it was mounted with.
        """
        if _fallocate is not None and _is_ext4(fd):
            _fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length)

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        """What was written there begins its way to the disk, and nobody waits. A hint, where the C library has it: what
        fails on the way is told by `datasync`."""
        if _sync_file_range is not None:
            _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def forget_cached(self, fd: int, offset: int = 0, length: int = 0) -> None:
        """Drops what memory has of the file, or of `length` bytes of it, as far as the disk has it: the next read gives
        what is there.

        After a sync that failed there are pages in memory that the disk does not have, and that are called clean.
        StoreFailed.
        """
        try:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            _refused(error, self.path_of(fd), "cannot be read anew")

    def sync_directory(self, path: Path) -> None:
        """The names in the directory are durable on return. StoreFailed."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise StoreFailed(f"{path}: sync failed: {error.strerror}; open the store anew") from error

    def truncate(self, fd: int, size: int) -> None:
        """Sets the file's size. Not durable. StoreFull, StoreFailed."""
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            _refused(error, self.path_of(fd), f"cannot be cut to {size} bytes")

    def replace(self, src: Path, dst: Path) -> None:
        """Renames over `dst` (same directory) and syncs the directory: after a crash one or the other is there.

        `src` must have been synced before. StoreFull, StoreFailed.
        """
        try:
            os.replace(src, dst)
        except OSError as error:
            _refused(error, dst, f"cannot be replaced by {src.name}")
        self.sync_directory(dst.parent)

    def move(self, src: Path, dst: Path) -> None:
        """Renames a file or directory into another directory and syncs both. `dst` must not exist. StoreFull, ..."""
        try:
            os.rename(src, dst)
        except FileNotFoundError:
            raise
        except OSError as error:
            _refused(error, src, f"cannot be moved to {dst}")
        self.sync_directory(dst.parent)
        self.sync_directory(src.parent)

    def link(self, src: Path, dst: Path) -> None:
        """Gives the file a second name, durable on return; the first may then be replaced. FileExistsError, ..."""
        try:
            os.link(src, dst)
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            _refused(error, src, f"cannot be kept as {dst}")
        self.sync_directory(dst.parent)

    def unlink(self, path: Path) -> None:
        """Removes the name. Not durable until `sync_directory`. FileNotFoundError, StoreFailed."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            _refused(error, path, "cannot be removed")

    def mkdir(self, path: Path) -> None:
        """Makes one directory, mode 0700. Not durable until its parent is synced. FileExistsError, StoreFull, ..."""
        try:
            os.mkdir(path, 0o700)
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            _refused(error, path, "cannot be made")

    def listdir(self, path: Path) -> list[str]:
        """The names in the directory, sorted. FileNotFoundError, StoreFailed."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            raise
        except OSError as error:
            _refused(error, path, "cannot be listed")

    def size(self, fd: int) -> int:
        """The file's size in bytes."""
        try:
            return os.fstat(fd).st_size
        except OSError as error:
            _refused(error, self.path_of(fd), "cannot be examined")

    def stat(self, fd: int) -> os.stat_result:
        """What the file system knows of the open file."""
        try:
            return os.fstat(fd)
        except OSError as error:
            _refused(error, self.path_of(fd), "cannot be examined")

    def file_bytes(self, path: Path) -> int:
        """The size of the file of that name. FileNotFoundError, StoreFailed."""
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            raise
        except OSError as error:
            _refused(error, path, "cannot be examined")

    def free_bytes(self, path: Path) -> int:
        """What may still be written to the file system of that directory. StoreFailed."""
        try:
            status = os.statvfs(path)
        except OSError as error:
            _refused(error, path, "cannot be examined")
        return status.f_bavail * status.f_frsize

    def walk(self, path: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """Every file under the directory; others may be at work there, and what is gone by then is left out.
        StoreFailed."""

        def unlisted(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                _refused(error, Path(error.filename), "cannot be listed")

        for directory, _, names in os.walk(path, onerror=unlisted):
            for name in names:
                found = Path(directory, name)
                try:
                    yield found, os.stat(found, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    _refused(error, found, "cannot be examined")

    def is_named(self, fd: int, path: Path) -> bool:
        """Whether the name stands for the open file, and not for another or none."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            _refused(error, path, "cannot be examined")
        status = self.stat(fd)
        return (found.st_ino, found.st_dev) == (status.st_ino, status.st_dev)

    def exists(self, path: Path) -> bool:
        """Whether the name is there, whatever it is."""
        return os.path.lexists(path)

    def lock(self, fd: int, *, shared: bool = False) -> bool:
        """Takes the lock of the open file, exclusive or shared, without waiting; False when another's is in the way.

        Ends with `unlock` or `close`; killed processes lose theirs.
        """
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            _refused(error, self.path_of(fd), "cannot be locked")
        return True

    def unlock(self, fd: int) -> None:
        """Gives the lock of the open file back; the file stays open."""
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError as error:
            _refused(error, self.path_of(fd), "cannot be unlocked")

    def _unread(self, error: OSError, fd: int, offset: int) -> NoReturn:
        raise Unreadable(f"{self.path_of(fd)}: offset {offset}: cannot be read: {error.strerror}") from error


def _is_ext4(fd: int) -> bool:
    """Or an older one of its kind."""
    said = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    return _fstatfs is not None and _fstatfs(fd, said) == 0 and said[0] == _EXT4


def _refused(error: OSError, path: Path, what: str) -> NoReturn:
    if error.errno in _NO_SPACE:
        raise StoreFull(f"{path}: {what}: {error.strerror}; free space on the store's disk") from error
    raise StoreFailed(f"{path}: {what}: {error.strerror}; open the store anew") from error


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers after their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []
