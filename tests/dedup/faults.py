"""Storages that fail on purpose."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from dedup.errors import StoreFailed, StoreFull
from dedup.storage import Buffer, Storage


class FaultyStorage(Storage):
    """Counts the calls that change something, and refuses the one told to, after tearing it.

    `refuse_write_after` bytes more may be written, then every write raises StoreFull having written only those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuse_write_after: int | None = None
        self.refuse_sync = False
        self.refuse_truncate = False
        self.synced: list[Path] = []
        self.reads: list[int] = []

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self.reads.append(length)
        return super().pread(fd, length, offset)

    def pread_each(self, fd: int, length: int, offsets: Sequence[int]) -> list[bytes]:
        return [self.pread(fd, length, offset) for offset in offsets]

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        if self.refuse_write_after is None:
            super().pwritev(fd, buffers, offset)
            return
        whole = b"".join(bytes(buffer) for buffer in buffers)
        part = whole[: self.refuse_write_after]
        super().pwritev(fd, [part], offset)
        self.refuse_write_after -= len(part)
        if len(part) < len(whole):
            raise StoreFull(f"{self.path_of(fd)}: {os.strerror(errno.ENOSPC)}")

    def datasync(self, fd: int) -> None:
        if self.refuse_sync:
            raise StoreFailed(f"{self.path_of(fd)}: sync failed: {os.strerror(errno.EIO)}")
        super().datasync(fd)
        self.synced.append(self.path_of(fd))

    def truncate(self, fd: int, size: int) -> None:
        if self.refuse_truncate:
            raise StoreFailed(f"{self.path_of(fd)}: {os.strerror(errno.EIO)}")
        super().truncate(fd, size)


class FaultKind(Enum):
    """What one system call does instead of its work."""

    NO_SPACE = "no space"
    NO_SPACE_AFTER_PART = "no space after a part"
    STAYS_FULL = "no space from now on"
    IO_ERROR = "input/output error"
    STAYS_BROKEN = "no more changes, ever"
    SHORT = "only a part"


_MAKING: Final = frozenset({"pwritev", "create", "mkdir", "replace", "rename", "link", "commit"})
"""Calls that take room."""
_CHANGING: Final = _MAKING | {"fdatasync", "fsync", "ftruncate", "unlink"}


@dataclass(frozen=True, slots=True)
class Call:
    """One system call of a run: its place in the order of calls, and what it is."""

    number: int
    name: str
    what: str

    @property
    def changes(self) -> bool:
        """Whether it changes something, or makes it durable."""
        return self.name in _CHANGING

    def faults(self) -> list[Fault]:
        """Everything that it can do wrong."""
        kinds = [FaultKind.IO_ERROR]
        if self.name in _MAKING:
            kinds.append(FaultKind.NO_SPACE)
        if self.name in _CHANGING:
            kinds.append(FaultKind.STAYS_BROKEN)
        if self.name == "pwritev":
            kinds += [FaultKind.NO_SPACE_AFTER_PART, FaultKind.STAYS_FULL, FaultKind.SHORT]
        if self.name in ("pread", "preadv"):
            kinds.append(FaultKind.SHORT)
        return [Fault(self, kind) for kind in kinds]


@dataclass(frozen=True, slots=True)
class Fault:
    call: Call
    kind: FaultKind

    def __str__(self) -> str:
        return f"call {self.call.number}, {self.call.name} {self.call.what}: {self.kind.value}"


class FailingCalls:
    """For `Recorder.before`: counts system calls, and makes one go wrong. Without a fault it lists them in `calls`."""

    def __init__(self, fault: Fault | None = None) -> None:
        self._fault = fault
        self.calls: list[Call] = []
        self.healed = False
        self.hit = False

    def heal(self) -> None:
        """No call fails any more."""
        self.healed = True

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> int | None:
        if name == "open" and arguments[1] & os.O_CREAT:
            name = "create"
        call = Call(len(self.calls), name, _what(arguments[0]))
        self.calls.append(call)
        fault = self._fault
        if fault is None or self.healed or call.number < fault.call.number:
            return None
        if call.number == fault.call.number:
            assert (name, call.what) == (fault.call.name, fault.call.what), "the run is not the same as before"
            self.hit = True
            return self._now(fault.kind, name, arguments)
        stays = {FaultKind.STAYS_FULL: (_MAKING, errno.ENOSPC), FaultKind.STAYS_BROKEN: (_CHANGING, errno.EIO)}
        names, error = stays.get(fault.kind, ((), 0))
        if fault.kind is FaultKind.NO_SPACE_AFTER_PART and call.number == fault.call.number + 1:
            names, error = _MAKING, errno.ENOSPC
        if name in names:
            raise OSError(error, os.strerror(error))
        return None

    def _now(self, kind: FaultKind, name: str, arguments: tuple[Any, ...]) -> int | None:
        if kind in (FaultKind.SHORT, FaultKind.NO_SPACE_AFTER_PART):
            return _half(name, arguments)
        error = errno.ENOSPC if kind in (FaultKind.NO_SPACE, FaultKind.STAYS_FULL) else errno.EIO
        raise OSError(error, os.strerror(error))


def _half(name: str, arguments: tuple[Any, ...]) -> int:
    """Half of what a read or a write is to take."""
    if name == "pread":
        return int(arguments[1]) // 2
    return sum(len(buffer) for buffer in arguments[1]) // 2


def _what(argument: Any) -> str:
    path = os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)
    return "/".join(Path(path).parts[-2:])


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))
