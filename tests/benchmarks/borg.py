"""BorgBackup, as the benchmarks use it: a repository without encryption, everything of it within one directory.

Debian's borg with its usual options: chunks of a rolling hash, lz4, the files cache on.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BorgRepository:
    """A repository, and borg's caches beside it, which are not part of what it stores."""

    path: Path
    environment: dict[str, str]

    @classmethod
    def create(cls, place: Path) -> BorgRepository:
        """A new one in the directory `place`, which must not exist."""
        place.mkdir(parents=True)
        base = place / "base"
        environment = {**os.environ, "BORG_BASE_DIR": str(base), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
        made = cls(place / "repository", environment)
        made._run("init", "--encryption=none", made.path)
        return made

    def backup(self, archive: str, path: Path, *options: str) -> None:
        """`borg create` of a file or directory, which is then `path.name` in the archive."""
        self._run("create", *options, f"{self.path}::{archive}", path.name, directory=path.parent)

    @contextmanager
    def mounted(self, archive: str, mountpoint: Path) -> Iterator[Path]:
        """`borg mount` of one archive; gives the mountpoint, which is made."""
        mountpoint.mkdir()
        self._run("mount", f"{self.path}::{archive}", mountpoint)
        try:
            yield mountpoint
        finally:
            # Borg's process ends a moment after this: the lock of the repository is gone then.
            self._run("umount", mountpoint)

    def _run(self, *args: str | Path, directory: Path | None = None) -> None:
        command = ["borg", *map(str, args)]
        subprocess.run(command, env=self.environment, cwd=directory, stdin=subprocess.DEVNULL, check=True)
