"""Which names the source mount lets applications see and make."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

import pyfuse3

from dedup.types import NAME_BYTES_MAX
from fusefs.errors import refused
from fusefs.inode_map import Node
from fusefs.system_calls import RENAME_EXCHANGE, RENAME_NOREPLACE

HIDDEN_NAME: Final = b".rewindfs"
"""The state directory at the root of the source: applications neither see it nor can make one."""


def check_visible(directory: Node, name: bytes) -> None:
    if name == HIDDEN_NAME and directory.number == pyfuse3.ROOT_INODE:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    _check_length(name)


def _check_length(name: bytes) -> None:
    if len(name) > NAME_BYTES_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def check_new_name(directory: Node, name: bytes) -> None:
    """EPERM for the state directory; EILSEQ for what is not UTF-8, as records carry paths as text."""
    if name == HIDDEN_NAME and directory.number == pyfuse3.ROOT_INODE:
        raise refused(f"making {os.fsdecode(name)!r}: the name is reserved")
    _check_length(name)
    try:
        name.decode()
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, os.strerror(errno.EILSEQ)) from None


def check_rename(name: bytes, moved: os.stat_result, target: os.stat_result | None, flags: int) -> None:
    """OSError for a rename that is refused before anything is recorded, since its outcome is certain; the source has
    the last word. `target` is what has the new name now."""
    if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if stat.S_ISREG(moved.st_mode) and moved.st_nlink > 1:
        raise refused(f"rename of {os.fsdecode(name)!r}: it has {moved.st_nlink} hard links")
    if target is None and flags == RENAME_EXCHANGE:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if target is not None and flags == RENAME_NOREPLACE:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
