"""Answers the kernel's INIT request with a flag that libfuse cannot be asked for: FUSE_HANDLE_KILLPRIV_V2.

Without it the kernel asks for the attribute `security.capability` before every single write(2), to clear it: a second
round trip that halves the rate of small writes. The flag says that the file system clears privileges itself: the source
drops capabilities on each write of ours, and the source mount set-user-id and set-group-id.

pyfuse3 calls `Operations.init` after libfuse has read the INIT request and before libfuse answers it. The answer sent
from there counts; the kernel turns libfuse's own away with ENOENT, which libfuse ignores. What is answered here agrees
with what libfuse believes, that flag aside. Nothing else can be in flight: the kernel sends nothing before INIT is
answered. Should anything not be as expected, libfuse's answer stands and only the rate suffers.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import Final

from replication.own_descriptors import descriptors_of

_log = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("=IiQ")
"""fuse_out_header: length, error, unique."""
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHIIH22x")
"""fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout."""
_FIRST_UNIQUE: Final = 2
"""Requests are numbered from here in steps of two, and INIT is the first one of a mount."""
_MAJOR, _MINOR = 7, 38
_READAHEAD_ANY: Final = 0xFFFF_FFFF
"""The kernel takes the smaller of this and its own."""
_PAGES_MAX: Final = 256
_WRITE_BYTES_MAX: Final = _PAGES_MAX * 4096
"""As large as libfuse's receive buffer allows."""

_ASYNC_READ: Final = 1 << 0
_ATOMIC_O_TRUNC: Final = 1 << 3
_BIG_WRITES: Final = 1 << 5
_AUTO_INVAL_DATA: Final = 1 << 12
_DO_READDIRPLUS: Final = 1 << 13
_ASYNC_DIO: Final = 1 << 15
_WRITEBACK_CACHE: Final = 1 << 16
_PARALLEL_DIROPS: Final = 1 << 18
_MAX_PAGES: Final = 1 << 22
_HANDLE_KILLPRIV_V2: Final = 1 << 28
_FLAGS: Final = (
    _ASYNC_READ
    | _ATOMIC_O_TRUNC
    | _BIG_WRITES
    | _AUTO_INVAL_DATA
    | _DO_READDIRPLUS
    | _ASYNC_DIO
    | _PARALLEL_DIROPS
    | _MAX_PAGES
    | _HANDLE_KILLPRIV_V2
)


def answer_init(*, writeback: bool) -> bool:
    """To be called from `Operations.init`, once. False where libfuse's answer will have to do. Raises nothing."""
    flags = _FLAGS | (_WRITEBACK_CACHE if writeback else 0)
    body = _INIT_OUT.pack(_MAJOR, _MINOR, _READAHEAD_ANY, flags, 0, 0, _WRITE_BYTES_MAX, 1, _PAGES_MAX, 0, 0, 0, 0)
    try:
        os.write(_fuse_device(), _HEADER.pack(_HEADER.size + len(body), 0, _FIRST_UNIQUE) + body)
    except OSError as error:
        _log.info("our INIT answer was not taken (%s): the kernel will ask for capabilities before each write", error)
        return False
    return True


def _fuse_device() -> int:
    """The descriptor of this process's only FUSE mount."""
    found = descriptors_of("/dev/fuse")
    if len(found) != 1:
        raise OSError(errno.EBADF, f"{len(found)} FUSE devices are open, not one")
    return found[0]
