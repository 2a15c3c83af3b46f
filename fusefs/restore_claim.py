"""What a restore in place claims of a mount: while it writes, nobody else opens those volumes for writing.

Invariants:
- one claim at a time; it ends with the process that has it, however that ends;
- other volumes are never held up, and reading never is.
"""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass

from dedup.errors import RewindError

WHOLE_GROUP = "."


def is_below(path: str, place: str) -> bool:
    """Whether `path` is `place`, or lies in that directory of the source; WHOLE_GROUP is the source itself."""
    return place in (WHOLE_GROUP, path) or path.startswith(place + "/")


@dataclass(frozen=True, slots=True)
class _Claim:
    number: int
    place: str
    """A volume's path, or a directory's, or WHOLE_GROUP."""
    pid: int
    pidfd: int
    exclusive: bool


class RestoreClaims:
    """The claim of one mount. Everything is immediate: to be used on the loop."""

    def __init__(self) -> None:
        self._claim: _Claim | None = None
        self._last = 0

    def take(self, place: str, pid: int, *, exclusive: bool) -> int:
        """The claim's number. `exclusive`: from here on, requests of other processes than `pid` are refused.

        RewindError when another restore has a claim, or when there is no such process here.
        """
        if (other := self._current()) is not None:
            raise RewindError(f"another restore is under way, by process {other.pid}; wait until it has ended")
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise RewindError(
                f"process {pid} is not seen by the process of the mount; run the restore outside of a container"
            ) from None
        self._last += 1
        self._claim = _Claim(self._last, place, pid, pidfd, exclusive)
        return self._last

    def require(self, number: object) -> None:
        """RewindError unless that claim still stands."""
        claim = self._current()
        if claim is None or claim.number != number:
            raise RewindError("that restore is over")

    def end(self, number: object) -> None:
        """Ends that claim; nothing if it has ended."""
        if self._claim is not None and self._claim.number == number:
            self._drop()

    def concern(self, pid: int) -> bool:
        """Whether thread `pid` has to leave anything alone."""
        if self._claim is None or pid == self._claim.pid:
            return False
        claim = self._current()
        return claim is not None and claim.exclusive

    def check(self, pid: int, *paths: str) -> None:
        """OSError EBUSY when thread `pid` must leave one of the paths alone: a directory, too, that holds such."""
        if self._claim is None or not self.concern(pid):
            return
        place, owner = self._claim.place, self._claim.pid
        for path in paths:
            if is_below(path, place) or place.startswith(path + "/"):
                raise OSError(errno.EBUSY, f"being restored by process {owner}", path)

    def _current(self) -> _Claim | None:
        if self._claim is not None:
            ended = select.poll()
            ended.register(self._claim.pidfd, select.POLLIN)
            if ended.poll(0):
                self._drop()
        return self._claim

    def _drop(self) -> None:
        if self._claim is not None:
            os.close(self._claim.pidfd)
            self._claim = None
