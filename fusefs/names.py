"""Which names the source mount lets applications see and make."""

from __future__ import annotations

import errno
import os
from typing import Final

import pyfuse3

from dedup.types import NAME_BYTES_MAX
from fusefs.errors import refused
from fusefs.inode_map import Node

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
