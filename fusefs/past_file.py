"""A file that is made to be what a volume was: all of its bytes, its mode and its owner."""

from __future__ import annotations

import os
import stat
from typing import Final

from dedup.types import VolumeState

PIECE_BYTES: Final = 1 << 20
"""Read and written at a time."""
_PERMISSIONS: Final = 0o777


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite, until everything is written. OSError."""
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count


def compare(found: bytes, wanted: bytes) -> int | None:
    """The offset of the first byte that differs, or that one of them lacks; None when they are equal."""
    if found == wanted:
        return None
    shorter = min(len(found), len(wanted))
    return next((at for at in range(shorter) if found[at] != wanted[at]), shorter)


def give_style(fd: int, then: VolumeState) -> bool:
    """Gives a file the mode and the owner of then. False where this user may not give it to that owner: then it has the
    permissions, and no set-user-id, which would be another user's. OSError."""
    status = os.fstat(fd)
    mode, given = then.mode, True
    if (status.st_uid, status.st_gid) != (then.uid, then.gid):
        try:
            os.fchown(fd, then.uid, then.gid)
        except PermissionError:
            mode, given = then.mode & _PERMISSIONS, False
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)
    return given
