"""System calls that Python's `os` lacks: renameat2, utimensat with omitted times, openat2 from the caches only.

Each raises OSError with the real errno. Only `open_cached` promises not to block.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_UTIME_OMIT: Final = (1 << 30) - 2
_SYS_OPENAT2: Final = 437
"""The same number on every architecture, as for all calls since 2019."""
_RESOLVE_CACHED: Final = 0x20
_NS_PER_SECOND: Final = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_utimensat = _libc.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_PATH_CACHED: Final = _OpenHow(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_CACHED)


def rename(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2) between two directory descriptors."""
    if _renameat2(old_dir, old, new_dir, new, flags):
        raise _error(old)


def set_times(path: bytes, accessed_ns: int | None, modified_ns: int | None) -> None:
    """Sets the given times of what `path` names, leaving a time that is None untouched."""
    times = (_Timespec * 2)(_timespec(accessed_ns), _timespec(modified_ns))
    if _utimensat(_AT_FDCWD, path, ctypes.byref(times), 0):
        raise _error(path)


def open_cached(directory: int, name: bytes) -> int | None:
    """An O_PATH descriptor of an entry, when the kernel's caches know it: never waits for a disk.

    None when they do not, or when the kernel is too old to say. FileNotFoundError when they know that there is none.
    """
    fd = int(_syscall(_SYS_OPENAT2, directory, name, ctypes.byref(_PATH_CACHED), ctypes.sizeof(_PATH_CACHED)))
    if fd >= 0:
        return fd
    error = _error(name)
    if error.errno in (errno.EAGAIN, errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return None
    raise error


def _timespec(time_ns: int | None) -> _Timespec:
    if time_ns is None:
        return _Timespec(0, _UTIME_OMIT)
    return _Timespec(*divmod(time_ns, _NS_PER_SECOND))


def _error(name: bytes) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), os.fsdecode(name))
