"""The peer of sync mode: QEMU's synchronous mirror, in C. Two qemu-storage-daemon processes: one exports a file over
NBD on a Unix socket; the other serves, over FUSE, a quorum of a local file and that one.

A write returns when both have taken it (vote-threshold 2); a read asks the local file alone (read-pattern fifo). Files
are raw, caches and everything else as by default. It keeps one copy and no past.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.mounts import new_volume

QEMU = "qemu mirror"
PROGRAM = "qemu-storage-daemon"
START_SECONDS_MAX = 30


@contextmanager
def _daemon(pidfile: Path, *words: str) -> Iterator[int]:
    """A storage daemon, ready once it has written its pidfile; gives its pid."""
    process = subprocess.Popen([PROGRAM, *words, "--pidfile", str(pidfile)], stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS_MAX
        while not pidfile.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{PROGRAM} did not start")
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def qemu_mirror(directory: Path, size: int) -> Iterator[Path]:
    """A mirror of `size` random bytes; gives the directory of the file that is served, `data`."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir(parents=True)
    local, remote, socket = directory / "local", directory / "remote", directory / "nbd.sock"
    new_volume(local, size)
    shutil.copyfile(local, remote)
    (mountpoint / "data").touch()
    far = {"driver": "file", "node-name": "far", "filename": str(remote)}
    near = {"driver": "file", "node-name": "near", "filename": str(local)}
    link = {
        "driver": "nbd", "node-name": "link", "export": "far", "server": {"type": "unix", "path": str(socket)},
    }  # fmt: skip
    both = {
        "driver": "quorum", "node-name": "both", "children": ["near", "link"],
        "vote-threshold": 2, "read-pattern": "fifo",
    }  # fmt: skip
    with (
        _daemon(
            directory / "far.pid",
            *("--blockdev", json.dumps(far)),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "type=nbd,id=far,node-name=far,writable=on"),
        ),
        _daemon(
            directory / "near.pid",
            *("--blockdev", json.dumps(near), "--blockdev", json.dumps(link), "--blockdev", json.dumps(both)),
            *(
                "--export",
                f"type=fuse,id=both,node-name=both,mountpoint={mountpoint / 'data'},writable=on,growable=off",
            ),
        ),
    ):
        yield mountpoint
