"""Unix sockets by paths of any length."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from replication.errors import LinkDown

SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path holds 108 bytes with its NUL."""


def connect_or_close(sock: socket.socket, path: Path) -> None:
    """Connects to who listens at `path`. LinkDown, with the OSError as its cause; the socket is closed then."""
    try:
        with_address(path, sock.connect)
    except OSError as error:
        sock.close()
        raise LinkDown(f"cannot connect to {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise


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
