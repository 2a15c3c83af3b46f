"""What the agent does to a file of the source, besides recording it."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from fusefs.inode_map import FileKey
from fusefs.volume_table import key_of

log = logging.getLogger(__name__)


def sync_file(path: Path, key: FileKey) -> bool:
    """Syncs the file; False, and nothing is synced, when it is no longer the one at `path`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if key_of(os.fstat(fd)) != key:
            return False
        os.fdatasync(fd)
        return True
    finally:
        os.close(fd)


def write_at(fd: int, data: bytes, offset: int) -> int:
    """Writes all of `data`, or what the source takes of it; raises its error when it takes nothing."""
    written = os.pwrite(fd, data, offset)
    view = memoryview(data)
    while written < len(data):
        try:
            more = os.pwrite(fd, view[written:], offset + written)
        except OSError as error:
            log.debug("short write: %s", errno.errorcode.get(error.errno or 0, "?"))
            break
        if not more:
            break
        written += more
    return written
