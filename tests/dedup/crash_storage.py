"""The system calls of `dedup.storage`, recorded, so that they can be played into a model of the disk.

`Recorder` stands in for the `os` module of `dedup.storage`: each call is made on the real files and, if it changes
something, noted. A call that it does not know is refused, so that none goes unseen. LMDB is not of that seam: its file
is noted as it is after each commit, which LMDB has synced.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lmdb
import pytest

from dedup.catalog import Index, Txn
from dedup.storage import Buffer
from tests.dedup.crash_disk import PAGE, Directory, Disk

INDEX_FILE: Final = "data.mdb"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of the real files; `play` makes it on a disk. Of a write also the file's number and what it wrote."""

    what: str
    play: Callable[[Disk], object]
    file: int = -1
    offset: int = 0
    data: bytes = b""

    def part(self, rng: random.Random) -> Event | None:
        """Of a write over several pages, what a process that was killed in it may have left: some, from the start."""
        cuts = range(PAGE - self.offset % PAGE, len(self.data), PAGE)
        return written(self.what, self.file, self.offset, self.data[: rng.choice(cuts)]) if cuts else None


def written(what: str, file: int, offset: int, data: bytes) -> Event:
    return Event(what, lambda disk: disk.files[file].write(offset, data), file, offset, data)


Before = Callable[[str, tuple[Any, ...]], Any]
"""Told of each call, its name and arguments, before it is made; may raise in its place. What it returns, if not None,
is how many bytes a read or a write takes."""


class Recorder:
    """The `os` module for `dedup.storage`: makes each call, and what it changes under `root` is played into `disk` and
    noted in `events`."""

    def __init__(self, root: Path, disk: Disk | None = None, before: Before | None = None) -> None:
        self._root = os.path.abspath(root)
        self.disk = disk or Disk()
        self.events: list[Event] = []
        self.before = before or (lambda name, arguments: None)
        self._files: dict[int, int] = {}
        """Number of the file that a descriptor is of."""
        self._directories: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if callable(value):
            raise AttributeError(f"the crash model does not know os.{name}: teach it")
        return value

    def _note(self, event: Event) -> None:
        event.play(self.disk)
        self.events.append(event)

    def _change(self, what: str, play: Callable[[Disk], object]) -> None:
        self._note(Event(what, play))

    def _inside(self, path: str | os.PathLike[str]) -> str | None:
        """The path under the root; None for one that is not."""
        relative = os.path.relpath(path, self._root)
        return None if relative.startswith("..") else "" if relative == "." else relative

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self.before("open", (path, flags))
        fd = os.open(path, flags, mode)
        inside = self._inside(path)
        if inside is None:
            return fd
        if flags & os.O_DIRECTORY:
            self._directories[fd] = inside
            return fd
        number = self.disk.number(inside)
        if number is None:
            self._change(f"create {inside}", lambda disk: disk.make(inside))
            number = len(self.disk.files) - 1
        elif flags & os.O_TRUNC:
            self._change(f"empty {inside}", lambda disk, at=number: disk.files[at].truncate(0))  # type: ignore[misc]
        self._files[fd] = number
        return fd

    def close(self, fd: int) -> None:
        self._files.pop(fd, None)
        self._directories.pop(fd, None)
        os.close(fd)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        given = self.before("pwritev", (fd, buffers, offset))
        if given is not None:
            buffers = [b"".join(map(bytes, buffers))[:given]]
        count = os.pwritev(fd, buffers, offset)
        file = self._files[fd]
        self._note(written(f"write {self._named(fd)} at {offset}", file, offset, b"".join(map(bytes, buffers))[:count]))
        return count

    def open_files(self) -> list[str]:
        """What is open now; a store that was closed has nothing."""
        return [self._named(fd) for fd in (*self._files, *self._directories)]

    def _named(self, fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self._root)

    def fdatasync(self, fd: int) -> None:
        file = self._files[fd]
        try:
            self.before("fdatasync", (fd,))
        except OSError:
            self._change(f"fail to sync {self._named(fd)}", lambda disk: disk.files[file].fail_sync())
            raise
        self._change(f"sync {self._named(fd)}", lambda disk: disk.files[file].sync())

    def fsync(self, fd: int) -> None:
        self.before("fsync", (fd,))
        path = self._directories.get(fd)
        if path is not None:
            self._change(f"sync directory {path}", lambda disk: disk.directory(path).sync())

    def statvfs(self, path: Path) -> os.statvfs_result:
        self.before("statvfs", (path,))
        return os.statvfs(path)

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        self.before("posix_fadvise", (fd,))
        assert advice == os.POSIX_FADV_DONTNEED
        if length:  # a part: only what the disk has leaves memory, and is the same there
            return
        file, path = self._files[fd], self._named(fd)
        dropped = deepcopy(self.disk.files[file]).forget()
        for number, page in dropped.items():
            with open(os.path.join(self._root, path), "r+b") as real:
                real.seek(number * PAGE)
                real.write(page[: max(0, os.fstat(fd).st_size - number * PAGE)])
        self._change(f"forget {path}", lambda disk: disk.files[file].forget())

    def ftruncate(self, fd: int, size: int) -> None:
        self.before("ftruncate", (fd, size))
        os.ftruncate(fd, size)
        file = self._files[fd]
        self._change(f"cut {self._named(fd)} to {size}", lambda disk: disk.files[file].truncate(size))

    def replace(self, source: Path, target: Path) -> None:
        self.before("replace", (source, target))
        os.replace(source, target)
        self._renamed(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", (source, target))
        os.rename(source, target)
        self._renamed(source, target)

    def _renamed(self, source: Path, target: Path) -> None:
        old, new = self._inside(source), self._inside(target)
        assert old is not None and new is not None
        self._change(f"rename {old} to {new}", lambda disk: disk.rename(old, new))

    def link(self, source: Path, target: Path) -> None:
        self.before("link", (source, target))
        os.link(source, target)
        old, new = self._inside(source), self._inside(target)
        assert old is not None and new is not None
        self._change(f"link {new} to {old}", lambda disk: disk.second_name(old, new))

    def unlink(self, path: Path) -> None:
        self.before("unlink", (path,))
        os.unlink(path)
        inside = self._inside(path)
        assert inside is not None
        self._change(f"remove {inside}", lambda disk: disk.link(inside, None))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self.before("mkdir", (path,))
        os.mkdir(path, mode)
        inside = self._inside(path)
        assert inside is not None
        self._change(f"make directory {inside}", lambda disk: disk.link(inside, Directory()))

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        given = self.before("pread", (fd, length, offset))
        return os.pread(fd, length if given is None else min(given, length), offset)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        given = self.before("preadv", (fd, buffers, offset))
        if given is not None:
            buffers = [buffers[0][: max(1, given)]]
        return os.preadv(fd, buffers, offset, flags)

    def listdir(self, path: Path) -> list[str]:
        self.before("listdir", (path,))
        return os.listdir(path)

    def fstat(self, fd: int) -> os.stat_result:
        self.before("fstat", (fd,))
        return os.fstat(fd)

    def stat(self, path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        self.before("stat", (path,))
        return os.stat(path, follow_symlinks=follow_symlinks)

    def walk(self, path: Path, onerror: Callable[[OSError], None]) -> Iterator[tuple[str, list[str], list[str]]]:
        self.before("walk", (path,))
        return os.walk(path, onerror=onerror)

    def index_stored(self, directory: str) -> None:
        """LMDB has committed."""
        path = os.path.join(directory, INDEX_FILE)
        inside = self._inside(path)
        if inside is not None:
            content = Path(path).read_bytes()
            self._change(f"commit {inside}", lambda disk: disk.store_index(inside, content))


class _CommitRefused(lmdb.Error):
    """A commit that failed as LMDB's do."""

    def __init__(self, error: OSError) -> None:
        super().__init__(os.strerror(error.errno or 0))
        vars(self)["code"] = error.errno


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Everything that a store does meanwhile goes through the recorder. LMDB and the real files are not synced."""
    original_write, original_init = Index.write, Index.__init__

    @contextmanager
    def write(self: Index) -> Iterator[Txn]:
        with original_write(self) as txn:
            yield txn
            try:
                recorder.before("commit", (self.env.path(),))
            except OSError as error:
                raise _CommitRefused(error) from error
        recorder.index_stored(self.env.path())

    def init(self: Index, directory: Path, *, writer: bool) -> None:
        original_init(self, directory, writer=writer)
        if writer:
            recorder.index_stored(str(directory))

    with unsynced(recorder) as patch:
        patch.setattr(Index, "write", write)
        patch.setattr(Index, "__init__", init)
        yield recorder


class _NoSync:
    """`os` without syncs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fdatasync(self, fd: int) -> None: ...

    def fsync(self, fd: int) -> None: ...


@contextmanager
def unsynced(system: Recorder | None = None) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is synced meanwhile: what crashes here is a model, so that waiting for the real disk proves nothing."""
    opening = lmdb.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dedup.storage.os", system or _NoSync())
        patch.setattr(lmdb, "open", lambda *args, **named: opening(*args, **{**named, "sync": False}))
        yield patch
