"""restic, as the benchmarks use it: a repository with a password in its environment, everything within one directory.

Debian's restic with its usual options, its cache included. A restic repository is always encrypted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class ResticRepository:
    """A repository, and restic's cache beside it, which is not part of what it stores."""

    path: Path
    environment: dict[str, str]

    @classmethod
    def create(cls, place: Path) -> ResticRepository:
        """A new one in the directory `place`, which must not exist."""
        place.mkdir(parents=True)
        environment = {**os.environ, "RESTIC_PASSWORD": "benchmark", "RESTIC_CACHE_DIR": str(place / "cache")}
        made = cls(place / "repository", environment)
        made._run("init")
        return made

    def backup(self, path: Path, *options: str) -> None:
        """`restic backup` of a file or directory, which is then `path.name` in the latest snapshot."""
        self._run(*options, "backup", path.name, directory=path.parent)

    @contextmanager
    def mounted(self, mountpoint: Path) -> Iterator[Path]:
        """`restic mount`; gives the directory of the latest snapshot."""
        mountpoint.mkdir()
        command = self._command("mount", mountpoint)
        process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            latest = mountpoint / "snapshots" / "latest"
            end = time.monotonic() + MOUNT_SECONDS
            while not os.path.ismount(mountpoint):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("restic mount did not start")
                time.sleep(0.05)
            yield latest
        finally:
            # It unmounts by itself then.
            process.send_signal(signal.SIGINT)
            process.wait()

    def _command(self, *args: str | Path) -> list[str]:
        return ["restic", "--quiet", "--repo", str(self.path), *map(str, args)]

    def _run(self, *args: str | Path, directory: Path | None = None) -> None:
        subprocess.run(self._command(*args), env=self.environment, cwd=directory, stdin=subprocess.DEVNULL, check=True)
