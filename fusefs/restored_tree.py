"""All volumes of one moment restored into a directory that is made for them; gone on with after an interruption.

Invariants:
- the directory has its name only when everything in it is whole, checked and durable: until then it has one of its own;
- a volume has its name in there only when it is done, so those that have are not restored again;
- what is gone on with is the same place of the same store at the same moment, or it is begun anew;
- one restore at a time writes into it: a moment's volumes do not mix with another's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import msgspec

from dedup.errors import RewindError
from dedup.history import ByteRange, History
from dedup.terminal import TerminalProgress
from dedup.types import Moment, VolumeState
from fusefs.restored_file import Restored, RestoredFile, beside
from replication.durable_file import replace_file, sync_directory


class TreeNote(msgspec.Struct):
    """What the directory is a restore of, and which ranges of it are damaged: path → [(offset, length)]."""

    store: str
    group: str
    place: str
    seq: int
    time: int
    checked: bool
    damaged: dict[str, list[tuple[int, int]]] = {}


class RestoredTree:
    """The volumes below a place at one moment, on their way into the directory `path`. Blocks. Use `restore`."""

    def __init__(
        self,
        history: History,
        moment: Moment,
        place: str,
        volumes: dict[str, VolumeState],
        path: Path,
        *,
        check: bool = True,
        skip_damaged: bool = False,
        progress: TerminalProgress | None = None,
    ) -> None:
        """`moment` is held. `volumes` by their paths within the directory."""
        self._history = history
        self._moment = moment
        self._volumes = volumes
        self._path = path
        self._check = check
        self._skip_damaged = skip_damaged
        self._progress = progress
        self.temporary, self._note_path = beside(path)
        self._note = TreeNote(history.store_uuid, history.name, place, moment.seq, moment.time, check)

    def restore(self) -> list[Restored]:
        """Makes the directory. RewindError and OSError: repeated, it goes on."""
        if self._path.is_dir() and next(self._path.iterdir(), None) is not None:
            raise RewindError(f"{self._path} is not empty; name a directory that is not there yet: it is made")
        fd = self._claimed()
        try:
            self._resume()
            done = [self._restore(name, volume) for name, volume in sorted(self._volumes.items())]
            for directory, _, _ in os.walk(self.temporary, topdown=False):
                sync_directory(Path(directory))
            os.chmod(self.temporary, 0o777 & ~_umask())
            os.rename(self.temporary, self._path)
        finally:
            os.close(fd)
        sync_directory(self._path.parent)
        self._note_path.unlink(missing_ok=True)
        return done

    def _claimed(self) -> int:
        """Makes the directory with a name of its own, if it is not there; nobody else writes into it until the
        descriptor is closed. RewindError when somebody does, or it is another user's."""
        self.temporary.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise RewindError(f"{self.temporary} is there and is another user's; remove it")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RewindError(f"{self._path}: another restore is writing it; wait until it has ended") from None
            if not os.path.lexists(self.temporary) or os.lstat(self.temporary).st_ino != status.st_ino:
                raise RewindError(f"{self._path}: another restore has just written it")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _resume(self) -> None:
        """Begins anew, unless what is there is the beginning of this very restore."""
        try:
            note = msgspec.json.decode(self._note_path.read_bytes(), type=TreeNote)
        except (FileNotFoundError, ValueError, RecursionError):
            note = None
        wanted = self._note
        if note is not None and (self._skip_damaged or not note.damaged) and (note.checked or not self._check):
            wanted.checked, wanted.damaged = note.checked, note.damaged
            if note == wanted:
                return
            wanted.checked, wanted.damaged = self._check, {}
        for inside in self.temporary.iterdir():
            shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
        replace_file(self._note_path, msgspec.json.encode(wanted))

    def _restore(self, name: str, volume: VolumeState) -> Restored:
        path, final = self.temporary / name, self._path / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = RestoredFile(
                self._history,
                self._moment,
                volume,
                path,
                check=self._check,
                skip_damaged=self._skip_damaged,
                progress=self._progress,
            ).restore()
            if made.damaged:
                self._note.damaged[name] = [(one.offset, one.length) for one in made.damaged]
                replace_file(self._note_path, msgspec.json.encode(self._note))
            return Restored(final, made.bytes, made.ranges, made.resumed_at, made.damaged, made.has_owner)
        damaged = tuple(ByteRange(*one) for one in self._note.damaged.get(name, ()))
        return Restored(final, 0, 0, volume.size, damaged, has_owner=True)


def _umask() -> int:
    """The process's. It can only be had by setting it: nothing else is made meanwhile."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
