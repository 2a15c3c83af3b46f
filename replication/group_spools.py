"""The spools of a first appliance that serves several groups: DIR/GROUP, one each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import trio

from replication.errors import SpoolFailed
from replication.spool import LOCK_NAME, SPOOL_BYTES_MAX, Spool


@dataclass(frozen=True, slots=True)
class GroupSpools:
    """`limit` is for each of them, in bytes."""

    directory: Path
    limit: int = SPOOL_BYTES_MAX

    async def groups(self) -> list[str]:
        """Those that have a spool; the directory is made if absent. Raises SpoolFailed."""
        return await trio.to_thread.run_sync(self._groups)

    async def open(self, group: str) -> Spool:
        """The group's spool, made if absent, and the directory; the caller closes it. Raises SpoolError,
        UnknownFormat."""
        return await trio.to_thread.run_sync(self._open, group)

    def _open(self, group: str) -> Spool:
        self._make()
        return Spool.open(self.directory / group, self.limit)

    def _make(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise SpoolFailed(f"{self.directory}: the spools cannot be used: {error.strerror}") from error

    def _groups(self) -> list[str]:
        self._make()
        try:
            return sorted(name for name in os.listdir(self.directory) if (self.directory / name / LOCK_NAME).exists())
        except OSError as error:
            raise SpoolFailed(f"{self.directory}: the spools cannot be used: {error.strerror}") from error
