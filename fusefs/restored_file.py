"""A volume restored into a file of its own: sparse, checked as it is written, and gone on with after an interruption.

It is written beside the file that it becomes, under a name of its own, and renamed when all of it is durable.

Invariants:
- holes and blocks of zeros are not written: they are holes of the file;
- a stretch counts as done only when it is on the disk and was read back from there; the note that says so is replaced
  as a whole, after it. So what a note says is done, is;
- what is gone on with is the same volume of the same store at the same moment, or it is begun anew;
- bounded: what is kept in memory of a stretch is a digest for each of its pieces, STRETCH_PIECES at most.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import xxhash

from dedup.errors import Damaged, RewindError
from dedup.history import ByteRange, History
from dedup.terminal import TerminalProgress, size_text
from dedup.types import BLOCK_BYTES, Moment, VolumeState
from fusefs.past_file import PIECE_BYTES, give_style, write_all
from fusefs.system_calls import RENAME_NOREPLACE, rename
from replication.durable_file import replace_file, sync_directory

STRETCH_PIECES: Final = 256
"""Pieces with data after which what was written is synced, read back and noted."""
DAMAGED_MAX: Final = 10_000
"""Damaged ranges that are noted; where there are more, the store is no store to restore from."""
_PREFIX: Final = ".rewindfs-restore-"
_ZEROS: Final = bytes(PIECE_BYTES)
_STAT_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class RestoreIdentity:
    """What a file is a restore of."""

    store: str
    group: str
    volume: int
    seq: int
    time: int
    size: int


class RestoreNote(msgspec.Struct):
    """How far a restore has come, kept beside it: all before `done` is on the disk, and was checked if it `checked`."""

    identity: RestoreIdentity
    checked: bool
    done: int = 0
    damaged: list[tuple[int, int]] = []
    """(offset, length) of what could not be read and was left out, ascending."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What came of it: bytes and ranges written by this call, and the damaged ranges of all calls."""

    path: Path
    bytes: int
    ranges: int
    resumed_at: int
    damaged: tuple[ByteRange, ...]
    has_owner: bool


class RestoredFile:
    """One volume at one moment on its way into `path`. Blocks. Use `restore`."""

    def __init__(
        self,
        history: History,
        moment: Moment,
        volume: VolumeState,
        path: Path,
        *,
        replace: bool = False,
        check: bool = True,
        skip_damaged: bool = False,
        progress: TerminalProgress | None = None,
    ) -> None:
        """`moment` is held. `replace`: a file that is there goes. `skip_damaged`: damaged blocks are left out, as
        holes, and told."""
        self._history = history
        self._moment = moment
        self._volume = volume
        self._path = path
        self._replace = replace
        self._check = check
        self._skip_damaged = skip_damaged
        self._progress = progress
        self._image = history.image(volume.volume, moment.seq)
        self.temporary, self._note_path = beside(path)
        identity = RestoreIdentity(
            history.store_uuid, history.name, volume.volume, moment.seq, moment.time, volume.size
        )
        self._note = RestoreNote(identity, check)
        self._digests: dict[int, bytes] = {}
        """Of each piece of the stretch that has data, by its number."""
        self._bytes = self._ranges = 0
        self._end = -1

    def restore(self) -> Restored:
        """Makes the file. RewindError and OSError: repeated, it goes on, and the file at `path` is as it was."""
        fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RewindError(f"{self._path}: another restore is writing it; wait until it has ended") from None
            self._require_own(fd)
            try:
                resumed_at = self._resume(fd)
                self._write(fd)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise self._no_room(fd, error) from error
                error.filename = error.filename or str(self.temporary)
                raise
            has_owner = give_style(fd, self._volume)
            os.utime(fd, ns=(self._moment.time, self._moment.time))
            os.fsync(fd)
            self._rename()
        finally:
            os.close(fd)
        damaged = tuple(ByteRange(*one) for one in self._note.damaged)
        return Restored(self._path, self._bytes, self._ranges, resumed_at, damaged, has_owner)

    def _require_own(self, fd: int) -> None:
        """RewindError unless what was opened is there under its name, and is this user's alone."""
        status = os.fstat(fd)
        # One that was ended before the last step, by root, has its owner already: to that one it will belong anyway.
        owners = {os.geteuid()} if os.geteuid() else {0, self._volume.uid}
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners or status.st_nlink > 1:
            raise RewindError(f"{self.temporary} is there and is not this user's own file; remove it")
        if not os.path.lexists(self.temporary) or os.lstat(self.temporary).st_ino != status.st_ino:
            raise RewindError(f"{self._path}: another restore has just written it")

    # -- going on ----------------------------------------------------------------------------------------------------

    def _resume(self, fd: int) -> int:
        """Where to go on; begins anew if what is there is not the beginning of this very restore."""
        note = self._noted()
        usable = (
            note is not None
            and note.identity == self._note.identity
            and (note.checked or not self._check)
            and os.fstat(fd).st_size == self._volume.size
            and (self._skip_damaged or not note.damaged)
        )
        if usable and note is not None:
            self._note = note
            return note.done
        os.ftruncate(fd, 0)
        os.ftruncate(fd, self._volume.size)
        self._keep(0)
        return 0

    def _noted(self) -> RestoreNote | None:
        try:
            return msgspec.json.decode(self._note_path.read_bytes(), type=RestoreNote)
        except (FileNotFoundError, ValueError, RecursionError):
            return None  # none, or none that can be trusted: begun anew

    def _keep(self, done: int) -> None:
        self._note.done = done
        replace_file(self._note_path, msgspec.json.encode(self._note))

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write(self, fd: int) -> None:
        size = self._image.size
        at = begin = self._note.done
        if self._progress is not None:
            self._progress.phase("restore", sum(one.length for one in self._data_from(at)))
        while (at := self._image.next_data(at)) < size:
            piece = at // PIECE_BYTES
            end = min(size, (piece + 1) * PIECE_BYTES)
            data = self._read(at, end)
            self._put(fd, at, data)
            # The digest is of the whole piece: what lies before the first block with data is a hole.
            start = max(begin, piece * PIECE_BYTES)
            self._digests[piece] = xxhash.xxh3_128_digest(bytes(at - start) + data)
            at = end
            if len(self._digests) >= STRETCH_PIECES:
                self._settle(fd, begin, at)
                begin = at
        self._settle(fd, begin, size)

    def _data_from(self, start: int) -> Iterator[ByteRange]:
        return self._history.differing(None, (self._volume.volume, self._moment.seq), start)

    def _put(self, fd: int, offset: int, data: bytes) -> None:
        """Writes the runs of blocks that are not zeros."""
        whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
        blocks = np.frombuffer(data, dtype=np.uint64, count=whole // 8).reshape(-1, BLOCK_BYTES // 8)
        filled = np.append(blocks.any(axis=1), any(data[whole:])).astype(np.int8)
        steps = np.diff(filled, prepend=0, append=0)
        view = memoryview(data)
        for first, stop in zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True):
            run = view[first * BLOCK_BYTES : stop * BLOCK_BYTES]
            start = offset + first * BLOCK_BYTES
            write_all(fd, run, start)
            self._bytes += len(run)
            self._ranges += start != self._end
            self._end = start + len(run)
            if self._progress is not None:
                self._progress.advance(len(run))

    def _read(self, offset: int, end: int) -> bytes:
        try:
            return self._image.read(offset, end - offset)
        except Damaged as damage:
            if not self._skip_damaged:
                raise Damaged(f"{damage}; --skip-damaged restores the rest") from damage
        return b"".join(self._read_block(at, min(end, at + BLOCK_BYTES)) for at in range(offset, end, BLOCK_BYTES))

    def _read_block(self, offset: int, end: int) -> bytes:
        """The block, or zeros in its place: what is damaged is noted."""
        try:
            return self._image.read(offset, end - offset)
        except Damaged as damage:
            damaged = self._note.damaged
            if damaged and sum(damaged[-1]) == offset:
                damaged[-1] = (damaged[-1][0], end - damaged[-1][0])
            elif len(damaged) < DAMAGED_MAX:
                damaged.append((offset, end - offset))
            else:
                raise Damaged(f"more than {DAMAGED_MAX} damaged ranges: {damage}") from damage
            return bytes(end - offset)

    # -- what is done ------------------------------------------------------------------------------------------------

    def _settle(self, fd: int, begin: int, end: int) -> None:
        """Everything from `begin` to `end` is on the disk, and is what was written there."""
        os.fdatasync(fd)
        if self._check:
            self._read_back(fd, begin, end)
        self._digests.clear()
        self._keep(end)

    def _read_back(self, fd: int, begin: int, end: int) -> None:
        os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        for piece in sorted(self._digests.keys() | set(_pieces_with_data(fd, begin, end))):
            start = max(begin, piece * PIECE_BYTES)
            length = min(end, (piece + 1) * PIECE_BYTES) - start
            wanted = self._digests.get(piece) or xxhash.xxh3_128_digest(_ZEROS[:length])
            if xxhash.xxh3_128_digest(os.pread(fd, length, start)) != wanted:
                raise RewindError(
                    f"{self.temporary}: bytes {start}..{start + length} are not what was written: the disk fails, or "
                    "somebody else writes to it; restore to another disk"
                )

    def _no_room(self, fd: int, error: OSError) -> RewindError:
        needed = sum(one.length for one in self._data_from(0)) - os.fstat(fd).st_blocks * _STAT_BLOCK_BYTES
        room = os.statvfs(self._path.parent)
        missing = max(BLOCK_BYTES, needed - room.f_bavail * room.f_frsize)
        return RewindError(
            f"{self._path}: {error.strerror}: about {size_text(missing)} more are needed on its file system; make room "
            f"and repeat the command with --at seq={self._moment.seq}, it goes on where it was (so far it is "
            f"{self.temporary.name}, beside it)"
        )

    def _rename(self) -> None:
        """The name of its own becomes the file's. RewindError if somebody has made a file of that name meanwhile."""
        if self._replace:
            os.replace(self.temporary, self._path)
        else:
            _rename_new(self.temporary, self._path)
        sync_directory(self._path.parent)
        self._note_path.unlink(missing_ok=True)


def beside(path: Path) -> tuple[Path, Path]:
    """The names under which `path` is made, and noted how far it is: the same ones each time, however long its own."""
    name = _PREFIX + xxhash.xxh3_64_hexdigest(os.fsencode(path.name))
    return path.with_name(name), path.with_name(f"{name}.json")


def _rename_new(old: Path, new: Path) -> None:
    """Renames within a directory to a name that is free. FileExistsError."""
    directory = os.open(new.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        rename(directory, os.fsencode(old.name), directory, os.fsencode(new.name), RENAME_NOREPLACE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system that cannot: FAT, for one. Between the look and the rename somebody may be quicker.
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
        os.rename(old, new)
    finally:
        os.close(directory)


def _pieces_with_data(fd: int, begin: int, end: int) -> Iterator[int]:
    """The numbers of all pieces in which the file system keeps any data."""
    at = begin
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole to the end
        if at < end:
            yield at // PIECE_BYTES
        at = (at // PIECE_BYTES + 1) * PIECE_BYTES
