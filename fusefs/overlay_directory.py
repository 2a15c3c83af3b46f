"""The private directories below which clones keep what is written to them, and their removal.

Invariants:
- a directory belongs to one process, which keeps it locked for as long as it lives; nobody else enters it;
- one that is not locked was left by a process that was killed. The next clone in the same place removes it, with what
  is still mounted in it; it touches only directories of its own user that bear the name.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Self

from dedup.errors import RewindError
from fusefs.mountpoint import FSTYPE, mounts

log = logging.getLogger("rewindfs.overlay")

PREFIX: Final = "rewindfs-clone-"


class OverlayRefused(RewindError):
    """The overlay cannot be kept there. The message says why and what to do."""


def default_place() -> Path:
    """Where overlays are kept unless somebody says otherwise: $TMPDIR, else /var/tmp."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def check_place(place: Path, store: Path | None, mountpoint: Path | None) -> None:
    """OverlayRefused unless overlays can be kept in `place`. `store` and `mountpoint` are paths on this host."""
    try:
        device = os.stat(place).st_dev
    except OSError as error:
        raise OverlayRefused(f"{place}: {error.strerror}; name a directory for the overlay with --overlay") from error
    if not place.is_dir():
        raise OverlayRefused(f"{place} is not a directory; name one for the overlay with --overlay")
    here = Path(os.path.realpath(place))
    for what, path in (("store", store), ("mountpoint", mountpoint)):
        if path is not None and (here == path or path in here.parents):
            raise OverlayRefused(f"{place}: the overlay cannot lie in the {what} {path}; use another --overlay")
    number = f"{os.major(device)}:{os.minor(device)}"
    if any(mount.device == number and mount.fstype == FSTYPE for mount in mounts()):
        raise OverlayRefused(f"{place}: the overlay cannot lie on a mount of rewindfs; use another --overlay")


class OverlayDirectory:
    """One process's own directory. `files` is for what is passed through; other names in `path` are free.

    As a context manager it is removed at the end: nothing of it may be in use any more.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.files = path / "own" / "files"
        self._fd = fd

    @classmethod
    def create(cls, place: Path) -> OverlayDirectory:
        """Makes one below `place`. OverlayRefused."""
        while True:
            try:
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            except OSError as error:
                raise OverlayRefused(f"{place}: no overlay can be made there: {error.strerror}") from error
            fd = _lock(path)
            if fd is None:
                continue  # somebody who clears up was quicker than our lock
            made = cls(path, fd)
            # Others may pass through to what is mounted in it, but not to the files themselves.
            path.chmod(0o711)
            made.files.parent.mkdir(mode=0o700)
            make_directory(made.files)
            return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Everything in it goes. OSError."""
        try:
            remove_tree(self.path)
        finally:
            os.close(self._fd)


def make_directory(path: Path) -> None:
    """Makes a directory that everybody may look into, with its parents, whatever the umask is."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir()
        path.chmod(0o755)


def clear_dead(place: Path) -> int:
    """Removes the directories in `place` that killed processes left; returns how many. What cannot go is logged."""
    cleared = 0
    for path in sorted(place.glob(PREFIX + "*")):
        try:
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            fd = _lock(path)
            if fd is None:
                continue
            try:
                _unmount_below(path)
                remove_tree(path)
            finally:
                os.close(fd)
        except FileNotFoundError:
            continue  # another one clears up as well
        except OSError as error:
            log.warning("%s: what a killed clone left there could not be removed: %s", path, error)
            continue
        cleared += 1
        log.warning("%s: removed, the process that it belonged to was killed", path)
    return cleared


def _lock(path: Path) -> int | None:
    """A descriptor that locks the directory at `path`; None when another has it, or it is no longer there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.lstat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _unmount_below(path: Path) -> None:
    """Lazily: whoever served it is dead."""
    inside = [mount for mount in mounts() if mount.path.is_relative_to(path)]
    for mount in reversed(inside):
        command = ["fusermount3", "-u", "-z", "--"] if mount.fstype == FSTYPE else ["umount", "-l", "--"]
        done = subprocess.run([*command, mount.path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise OSError(errno.EBUSY, f"{mount.path} is still mounted: {said}")


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it. OSError."""
    # What an application forbids in the clone, it forbids to a process without root as well.
    for root, names, _ in os.walk(path):
        for name in names:
            directory = os.path.join(root, name)
            if not os.path.islink(directory):
                os.chmod(directory, 0o700)
    shutil.rmtree(path)
