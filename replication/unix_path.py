"""Unix sockets by paths of any length."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path holds 108 bytes with its NUL."""


def with_address(path: Path, call: Callable[[bytes], None]) -> None:
    """Calls with an address that the kernel takes for `path`, however long its directory is."""
    plain = os.fsencode(path)
    if len(plain) <= SOCKET_PATH_BYTES_MAX:
        call(plain)
        return
    with _directory(path.parent) as descriptor:
        short = f"/proc/self/fd/{descriptor}/".encode() + os.fsencode(path.name)
        if len(short) > SOCKET_PATH_BYTES_MAX:
            raise OSError(errno.ENAMETOOLONG, f"the name of the socket is too long: {path.name}")
        call(short)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
