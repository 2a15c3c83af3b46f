"""How a failure inside a FUSE handler reaches the application: always as an errno, never as the end of the daemon.

pyfuse3 leaves its main loop on any exception but FUSEError, which unmounts nothing and strands every application. So
each handler is wrapped: an OSError keeps its errno, a RewindError becomes EIO with a log line that says why, and what
nobody foresaw becomes EIO with a traceback in the log. Cancellation passes through.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from dedup.errors import MomentGone, RewindError
from replication.intent_log import IntentLogFailed

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Repeats:
    """Remembers the last line, so that thousands of writers refused for one reason are one line in the log."""

    def __init__(self) -> None:
        self._last = ""

    def is_new(self, line: str) -> bool:
        new, self._last = line != self._last, line
        return new


_repeats = _Repeats()


def fuse_error(operation: str, error: Exception) -> pyfuse3.FUSEError:
    """The FUSEError that answers `operation`; logs what the errno alone would not tell. Raises nothing."""
    if isinstance(error, pyfuse3.FUSEError):
        return error
    if isinstance(error, OSError) and error.errno:
        return pyfuse3.FUSEError(error.errno)
    if isinstance(error, IntentLogFailed) and isinstance(error.__cause__, OSError):
        # The mark's disk is the source's: full for the one, full for the other.
        return pyfuse3.FUSEError(error.__cause__.errno or errno.EIO)
    if isinstance(error, MomentGone):
        return pyfuse3.FUSEError(errno.ESTALE)  # the kernel looks the name up again
    if isinstance(error, RewindError):
        if _repeats.is_new(f"{operation}: {error}"):
            _log.error("%s refused with EIO: %s", operation, error)
    else:
        _log.error("%s failed unexpectedly, answered with EIO", operation, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def handler(function: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Wraps a FUSE handler so that the only exceptions it lets out are FUSEError and cancellation."""

    @functools.wraps(function)
    async def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the one place where everything must become an errno
            raise fuse_error(function.__name__, error) from None

    return wrapped


def refused(what: str) -> OSError:
    """The EPERM to raise for what is refused on purpose; the log says what and why."""
    _log.warning("refused with EPERM: %s", what)
    return OSError(errno.EPERM, os.strerror(errno.EPERM))
