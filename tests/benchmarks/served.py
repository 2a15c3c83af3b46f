"""FUSE mounts whose process a benchmark starts in the foreground, so that it knows which one it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.benchmarks.mounts import ENVIRONMENT, ROOT

MOUNT_SECONDS: Final = 30.0


@contextmanager
def served(mountpoint: Path, *command: str | Path) -> Iterator[int]:
    """`python -m COMMAND MOUNTPOINT`, which is made; gives the pid of the process once it is mounted."""
    mountpoint.mkdir()
    arguments = [sys.executable, "-m", *map(str, command), str(mountpoint)]
    process = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + MOUNT_SECONDS
        while not os.path.ismount(mountpoint):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{mountpoint} was not mounted")
            time.sleep(0.01)
        yield process.pid
    finally:
        if os.path.ismount(mountpoint):
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
        else:
            process.kill()
        process.wait()


@contextmanager
def browsed(store: Path, mountpoint: Path) -> Iterator[int]:
    """The snapshot mount of a store; gives its pid."""
    log = mountpoint.with_name(f"{mountpoint.name}.log")
    with served(mountpoint, "fusefs", "browse", "--foreground", "--log-file", log, store) as pid:
        yield pid
