"""A restore in place: makes volumes under a source mount what they were at a moment, by writing only what differs.

Everything is written through the mount, as any application writes: kernel caches stay right, the agent records it, and
the restore is itself history that can be gone back from.

Invariants:
- `undoable`: before the first change the moment before it is durable in the store, under a name unless nobody wants it;
- `said-until-ended`: before the first change the mount has noted, durably, what is being restored to which moment, and
  the note goes only when the store and the source have been found to be as they were then;
- `nothing-by-halves`: every block that is to be written is read and checked before the first change, so that damage in
  the store leaves all as it is;
- what is no volume is never removed, but for directories that are empty: it is found before the first change;
- volumes that were not there then are removed first: what belongs to the future must not lie beside the past;
- nothing outside of the mount is written, wherever symbolic links lead.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup.errors import RewindError
from dedup.history import ByteRange, History, PastImage
from dedup.terminal import TerminalProgress
from fusefs.past_file import PIECE_BYTES, compare, give_style, write_all
from fusefs.restore_plan import RestorePlan, VolumeChange

_OPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Written:
    """What was written so far."""

    bytes: int = 0
    ranges: int = 0


class InPlaceRestore:
    """Carries out one plan on the mount at `mountpoint`, an absolute path without symbolic links."""

    def __init__(
        self,
        history: History,
        plan: RestorePlan,
        mountpoint: Path,
        *,
        check: bool = True,
        progress: TerminalProgress | None = None,
    ) -> None:
        """`check`: see `require_readable`; and what was written is read back from the source and compared."""
        self._history = history
        self._plan = plan
        self._mountpoint = mountpoint
        self._check = check
        self._progress = progress
        self.written = Written()
        self.warnings: list[str] = []
        """What could not be had back, and need not be: owners, where this user may not give files away."""

    def require_way(self) -> None:
        """RewindError names what is in the way of a volume, or may not be changed; nothing is changed."""
        going = {change.path for change in self._plan.removed}
        for change in self._touched():
            path = self._path(change.path)
            if change.now is None:
                self._require_free(path, going)
            else:
                _require_writable(path.parent if change.then is None else path)

    def _require_free(self, path: Path, going: set[str]) -> None:
        """Directories lead to `path`, or can be made; and what is there is a volume that goes, or holds only such."""
        for place in (*reversed(path.relative_to(self._mountpoint).parents), path.relative_to(self._mountpoint)):
            found = self._mountpoint / place
            if str(place) in going:
                return
            if not os.path.lexists(found):
                return _require_writable(found.parent)
            if found.is_symlink() or not found.is_dir():
                raise RewindError(f"{found} is in the way of {path}, which was a volume; move it away")
        for inside in _entries(path):
            if str(inside.relative_to(self._mountpoint)) not in going:
                raise RewindError(f"{inside} is in the way: {path} was a volume; move it away")
        return None

    def require_readable(self) -> None:
        """Reads all that `run` will write. Damaged names what cannot be had back; nothing is changed."""
        if not self._check:
            return
        self._phase("check")
        for change in self._plan.kept:
            image = self._image(change)
            for found in self._plan.ranges(self._history, change):
                for offset, length in pieces(found):
                    image.read(offset, length)
                    self._advance(length)

    def run(self) -> None:
        """Makes every change and syncs it; the store is the caller's. OSError, Damaged, RewindError: half restored."""
        self._phase("restore")
        for change in self._plan.removed:
            os.unlink(self._path(change.path))
        for change in self._touched():
            if change.then is not None:
                self._restore(change)

    def _touched(self) -> Iterator[VolumeChange]:
        """Those that are not already as they were."""
        restyled = {change.path for change in self._plan.restyled}
        for change in self._plan.changes:
            if change.path in restyled or not _is_same(self._history, self._plan, change):
                yield change

    def _restore(self, change: VolumeChange) -> None:
        then = change.then
        assert then is not None, "the removed ones have none"
        image = self._image(change)
        fd = self._open(change)
        try:
            if os.fstat(fd).st_size != then.size:
                os.ftruncate(fd, then.size)
            for found in self._plan.ranges(self._history, change):
                self._write(image, fd, found)
            if not give_style(fd, then):
                owner = f"{then.uid}:{then.gid}"
                self.warnings.append(f"{change.path}: its owner was {owner}, to whom this user may not give it")
            os.fsync(fd)
            if self._check:
                self._read_back(image, fd, change)
        except OSError as error:
            error.filename = error.filename or str(self._mountpoint / change.path)
            raise
        finally:
            os.close(fd)

    def _write(self, image: PastImage, fd: int, found: ByteRange) -> None:
        for offset, length in pieces(found):
            write_all(fd, image.read(offset, length), offset)
            self.written.bytes += length
            self._advance(length)
        self.written.ranges += 1

    def _read_back(self, image: PastImage, fd: int, change: VolumeChange) -> None:
        """What the source holds, not what this machine's memory still has of the mount."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for found in self._plan.ranges(self._history, change):
            for offset, length in pieces(found):
                at = compare(os.pread(fd, length, offset), image.read(offset, length))
                if at is not None:
                    raise RewindError(
                        f"{self._path(change.path)}: what was read back at {offset + at} is not what was written: "
                        "somebody else writes to it, or the source's disk fails"
                    )

    def _image(self, change: VolumeChange) -> PastImage:
        assert change.then is not None, "the removed ones have none"
        return self._history.image(change.then.volume, self._plan.then.seq)

    def _phase(self, name: str) -> None:
        if self._progress is not None:
            total = sum(one.length for change in self._plan.kept for one in self._plan.ranges(self._history, change))
            self._progress.phase(name, total)

    def _advance(self, length: int) -> None:
        if self._progress is not None:
            self._progress.advance(length)

    # -- names -------------------------------------------------------------------------------------------------------

    def _path(self, path: str) -> Path:
        """Where a volume is. RewindError when a symbolic link leads away from there."""
        found = self._mountpoint / path
        if os.path.realpath(found.parent) != str(found.parent):
            raise RewindError(f"{found}: a symbolic link leads away from there; remove it, a directory was there")
        return found

    def _open(self, change: VolumeChange) -> int:
        path = self._path(change.path)
        if change.now is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and not path.is_symlink():
                for directory, _, _ in os.walk(path, topdown=False):
                    os.rmdir(directory)
            fd = os.open(path, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        else:
            fd = os.open(path, _OPEN)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise RewindError(f"{path} is not a regular file; move it away, a volume was there")
        return fd


def _require_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise RewindError(f"{path}: this user may not change it; restore as its owner, or as root")


def _entries(directory: Path) -> Iterator[Path]:
    """All below it but directories."""
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            found = Path(place, name)
            if found.is_symlink() or not found.is_dir():
                yield found


def pieces(found: ByteRange) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is read and written at a time."""
    end = found.offset + found.length
    for offset in range(found.offset, end, PIECE_BYTES):
        yield offset, min(PIECE_BYTES, end - offset)


def differing(history: History, plan: RestorePlan) -> list[str]:
    """The paths of what is not as it was then: there or not, size, bytes. Mode and owner are not looked at."""
    return [change.path for change in plan.changes if not _is_same(history, plan, change)]


def _is_same(history: History, plan: RestorePlan, change: VolumeChange) -> bool:
    if change.now is None or change.then is None or change.now.size != change.then.size:
        return False
    return next(plan.ranges(history, change), None) is None
