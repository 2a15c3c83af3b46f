"""Quarantine: where a repair puts what is damaged, with a note of what it was. Nothing is ever deleted from there.

Invariants:
- the note is durable before the thing is there, so nothing lies in quarantine without one;
- a name in quarantine is never replaced: a second thing of that name gets a number.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from dedup import layout
from dedup.moment import rfc3339
from dedup.storage import Storage
from dedup.types import TimeNs

NOTE_SUFFIX: Final = ".txt"


class Quarantine:
    """The `quarantine` directory of one store; made when it is first needed. Every method is durable on return."""

    def __init__(self, storage: Storage, store_path: Path) -> None:
        self._storage = storage
        self._store_path = store_path
        self._directory = store_path / layout.QUARANTINE_NAME

    def move(self, path: Path, why: str) -> Path:
        """Takes a file or directory away. Returns where it is now. FileNotFoundError, StoreFull, StoreFailed."""
        kept = self._noted(path, why)
        self._storage.move(path, kept)
        return kept

    def keep(self, path: Path, why: str) -> Path:
        """Gives the file a second name here, so that what replaces it under its own loses nothing. As `move`."""
        kept = self._noted(path, why)
        self._storage.link(path, kept)
        return kept

    def keep_copy(self, path: Path, why: str) -> Path:
        """Copies the file, which is then changed in place. As `move`."""
        kept = self._noted(path, why)
        source = self._storage.open(path, os.O_RDONLY)
        try:
            target = self._storage.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                at = 0
                while chunk := self._storage.pread(source, _COPY_BYTES, at):
                    self._storage.pwritev(target, [chunk], at)
                    at += len(chunk)
                self._storage.datasync(target)
            finally:
                self._storage.close(target)
        finally:
            self._storage.close(source)
        self._storage.sync_directory(self._directory)
        return kept

    def _noted(self, path: Path, why: str) -> Path:
        """A free name for it, whose note is there."""
        if not self._storage.exists(self._directory):
            self._storage.mkdir(self._directory)
            self._storage.sync_directory(self._store_path)
        taken = set(self._storage.listdir(self._directory))
        name, number = path.name, 0
        while name in taken or name + NOTE_SUFFIX in taken:
            number += 1
            name = f"{path.name}.{number}"
        text = f"{rfc3339(TimeNs(time.time_ns()))} {path.relative_to(self._store_path)}: {why}\n"
        fd = self._storage.open(self._directory / (name + NOTE_SUFFIX), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            self._storage.pwritev(fd, [text.encode("utf-8", "backslashreplace")], 0)
            self._storage.datasync(fd)
        finally:
            self._storage.close(fd)
        return self._directory / name


_COPY_BYTES: Final = 1 << 20
