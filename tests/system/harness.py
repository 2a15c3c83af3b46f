"""A world for one system test: directories, the real commands, loop mounts, and an honest end.

Every process of a test carries a token in its environment, so that all of them are found again, however they were
started and whatever became of their parents; nothing else is ever killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio

from dedup.reader import GroupReader, StoreReader
from dedup.types import Gap, Seq
from fusefs.agent_control import ask
from fusefs.mountpoint import control_socket, mount_at, mounts
from fusefs.volume_table import STATE_DIRECTORY

ROOT = Path(__file__).resolve().parent.parent.parent
TOKEN_NAME = "REWINDFS_TEST"
COMMAND_SECONDS_MAX = 120
END_SECONDS_MAX = 60
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""With the administrator's programs, which not every root has in PATH."""


@dataclass(frozen=True)
class Pids:
    """The processes behind a source mount."""

    mount: int
    second: int | None
    """The embedded second appliance; None while there is none, or where it is a service elsewhere."""


class World:
    """What one test has made. `close` undoes it and returns what had to be undone by force."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = directory / "source"
        self.store = directory / "store"
        self.mnt = directory / "mnt"
        self.snap = directory / "snap"
        for path in (self.source, self.mnt, self.snap):
            path.mkdir()
        self.token = uuid4().hex
        self.environment = {**os.environ, TOKEN_NAME: self.token, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
        self.environment["PATH"] = SEARCH_PATH
        self.target: tuple[str | Path, ...] = ()
        """Where a mount sends its records to, as options; by default `store`, embedded."""
        self.enter: tuple[str, ...] = ()
        """Words to start a mount with, where it is to run on another host; see `network.Host`."""
        self._loop_mounts: list[Path] = []

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = COMMAND_SECONDS_MAX, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Any program, with this test's token. `check` shows what it said when it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.directory,
            env=self.environment,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            words = shlex.join(str(word) for word in command)
            raise AssertionError(f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def rewindfs(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "fusefs", *args, check=check)

    def json(self, *args: str | Path) -> Any:
        return json.loads(self.rewindfs(*args, "--json").stdout)

    def refused(self, *args: str | Path) -> str:
        """The error line of a command that must fail with status 1 and say nothing but that line."""
        done = self.rewindfs(*args, check=False)
        assert done.returncode == 1, f"exit {done.returncode}: {done.stdout}{done.stderr}"
        assert done.stdout == ""
        # A warning may come first: that store and source share a file system, as here they do.
        (line,) = (line for line in done.stderr.splitlines() if not line.startswith("rewindfs: warning: "))
        assert line.startswith("rewindfs: error: "), line
        return line.removeprefix("rewindfs: error: ")

    def mount(self, mode: str = "sync", *options: str | Path, wait_base: bool = True) -> Pids:
        """Mounts `source` at `mnt`, with `store` or the `target`."""
        log = ["--log-file", self.directory / "mount.log"]
        base = ["--wait-base"] if wait_base else []
        target = self.target or ("--store", self.store)
        command = (*self.enter, sys.executable, "-m", "fusefs", "mount", self.source, self.mnt, *target)
        self.run(*command, "--mode", mode, *base, *log, *options)
        return self.pids()

    def ask(self, command: str, **body: object) -> Any:
        """What the process behind the mount answers, without a command's start: for what is asked often."""
        return trio.run(ask, control_socket(self.mnt), command, body)

    def wait_for_state(self, *states: str) -> dict[str, Any]:
        """The status as soon as its state is one of these; AssertionError after a minute."""
        return self.wait_for_status(lambda status: status["state"] in states, f"state {' or '.join(states)}")

    def wait_for_status(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first status that is as `wanted`. Nobody is told of such changes, so it is asked again and again."""
        end = time.monotonic() + END_SECONDS_MAX
        while True:
            status: dict[str, Any] = self.ask("status")
            if wanted(status):
                return status
            assert time.monotonic() < end, f"{what} not reached: {status}\n{self.logs()}"
            time.sleep(0.02)

    @contextmanager
    def reader(self) -> Iterator[GroupReader]:
        """The store's only group, read beside whoever writes it."""
        store = StoreReader.open(self.store)
        try:
            yield store.group()
        finally:
            store.close()

    def check_equal(self) -> None:
        """Asserts that the store's `@latest` is a recovery point and holds every file of the source, byte for byte.

        The source must be at rest. With a mount, everything is made durable first.
        """
        if mount_at(self.mnt) is not None:
            self.ask("durable")
        with self.reader() as group:
            seq = group.resolve("latest").seq
            volumes = group.volumes_at(seq)
            files = {str(file.relative_to(self.source)): file for file in volumes_in(self.source)}
            assert volumes.keys() == files.keys()
            for path, volume in volumes.items():
                status = files[path].stat()
                assert volume.size == status.st_size, path
                assert (volume.mode, volume.uid, volume.gid) == (status.st_mode & 0o7777, status.st_uid, status.st_gid)
                check_same(image_bytes(group, path, seq), files[path].read_bytes(), f"{path} at seq={seq}")

    def gaps(self) -> list[Gap]:
        with self.reader() as group:
            return group.gaps()

    def pids(self) -> Pids:
        pids = self.ask("status")["pids"]
        return Pids(pids["mount"], pids.get("second"))

    def browse(self) -> Path:
        """Mounts the snapshots of `store` at `snap`."""
        self.rewindfs("browse", self.store, self.snap, "--log-file", self.directory / "browse.log")
        return self.snap

    def unmount(self) -> None:
        """Unmounts the source mount and waits until its processes have left."""
        pids = self.pids()
        self.rewindfs("unmount", self.mnt)
        wait_for_end(pids.mount)
        if pids.second is not None:
            wait_for_end(pids.second)

    def loop_mount(self, image: Path) -> Path:
        """Mounts the file system inside `image` on a loop device that goes when it is unmounted."""
        place = self.directory / f"loop{len(list(self.directory.glob('loop*')))}"
        place.mkdir()
        self.run("mount", "-o", "loop", image, place)
        self._loop_mounts.append(place)
        return place

    def loop_unmount(self, place: Path) -> None:
        device = next(mount.source for mount in mounts() if mount.path == place)
        self.run("umount", place)
        self._loop_mounts.remove(place)
        self._wait_until_detached(device)

    def ext4_image(self, name: str = "disk.img", mebibytes: int = 32) -> Path:
        """A fresh ext4 image in the source directory."""
        image = self.source / name
        image.parent.mkdir(parents=True, exist_ok=True)
        with open(image, "xb") as file:
            file.truncate(mebibytes << 20)
        self.run("mkfs.ext4", "-q", "-F", image)
        return image

    def sql(self, database: Path, statements: str, *, check: bool = True) -> str:
        """What the sqlite3 command prints."""
        return self.run("sqlite3", database, stdin=statements, check=check).stdout.strip()

    def fio(self, file: Path, *options: str, mebibytes: int = 16) -> None:
        """Random writes to `file`, each read back and verified by fio."""
        self.run(
            *("fio", "--name=verify", f"--filename={file}", f"--size={mebibytes}M", "--rw=randwrite", "--bs=4k-64k"),
            *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--ioengine=psync", "--randrepeat=0", *options),
        )

    def check_ext4(self, image: Path) -> None:
        """Replays the journal of a copy that was taken while in use, then asserts that the file system is sound."""
        replayed = self.run("e2fsck", "-y", "-E", "journal_only", image, check=False)
        # Where the journal itself is destroyed, e2fsck goes on to repair everything: that would hide the damage.
        assert "? yes" not in replayed.stdout, f"{image} was repaired, not replayed: {replayed.stdout[:2000]}"
        assert replayed.returncode in (0, 1), replayed.stdout + replayed.stderr
        self.run("e2fsck", "-fn", image)

    def processes(self) -> list[int]:
        """Every live process that was started by this test."""
        mark = f"{TOKEN_NAME}={self.token}".encode()
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                # A zombie's environment is empty: it is not in this list.
                if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self.directory.glob("*.log")))

    def close(self) -> list[str]:
        """Unmounts, waits for the processes to leave, and says what was left and had to be forced."""
        left: list[str] = []
        # What lies on a rewindfs mount goes before it, what it lies on goes after it.
        below = [place for place in reversed(self._loop_mounts) if self.run("umount", place, check=False).returncode]
        for mount in reversed(self._fuse_mounts()):
            if self.run("fusermount3", "-u", mount, check=False).returncode:
                left.append(f"{mount} was busy")
                self.run("umount", "-l", mount, check=False)
        for pid in self.processes():
            try:
                wait_for_end(pid)
            except AssertionError:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                left.append(f"process {pid} did not leave: {command}")
                os.kill(pid, signal.SIGKILL)
        for place in below:
            if self.run("umount", place, check=False).returncode:
                left.append(f"{place} was busy")
                self.run("umount", "-l", place, check=False)
        try:
            self._wait_until_detached()
        except AssertionError as error:
            left.append(str(error))
            for device in self._loop_devices():
                self.run("losetup", "-d", device, check=False)
        left.extend(f"{mount} is still mounted" for mount in self._fuse_mounts())
        return left

    def _fuse_mounts(self) -> list[str]:
        found = [mount for mount in mounts() if mount.path.is_relative_to(self.directory)]
        return [str(mount.path) for mount in found if mount.fstype.startswith("fuse")]

    def _loop_devices(self) -> list[str]:
        listing = self.run("losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE").stdout
        lines = [line.split(" ", 1) for line in listing.splitlines()]
        return [name for name, file in lines if file.startswith(f"{self.directory}/")]

    def _wait_until_detached(self, device: str | None = None) -> None:
        """Until `device` is free, or all are. The kernel frees one a moment after its last user, and says nothing."""
        end = time.monotonic() + END_SECONDS_MAX
        while (devices := self._loop_devices()) and device in (None, *devices):
            assert time.monotonic() < end, f"still attached: {devices}"
            time.sleep(0.02)


def wait_for_end(pid: int) -> None:
    """Returns when process `pid` has ended; AssertionError after a minute."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([pidfd], [], [], END_SECONDS_MAX)
    finally:
        os.close(pidfd)
    assert ended, f"process {pid} has not ended"


def volumes_in(source: Path) -> list[Path]:
    """The files of a source directory that are volumes."""
    return [
        file
        for file in source.rglob("*")
        if file.is_file() and not file.is_symlink() and STATE_DIRECTORY not in file.relative_to(source).parts[:1]
    ]


def image_bytes(group: GroupReader, path: str, seq: Seq) -> bytes:
    """A whole volume as it was at `seq`."""
    image = group.image(group.volumes_at(seq)[path].volume, seq)
    return b"".join(image.read(offset, 1 << 20) for offset in range(0, image.size, 1 << 20))


def check_same(found: bytes, wanted: bytes, what: str) -> None:
    """Asserts equality; names the first differing block, not the megabytes."""
    if found == wanted:
        return
    assert len(found) == len(wanted), f"{what}: {len(found)} bytes instead of {len(wanted)}"
    blocks = [at for at in range(0, len(found), 4096) if found[at : at + 4096] != wanted[at : at + 4096]]
    first = blocks[0]
    raise AssertionError(
        f"{what}: {len(blocks)} blocks differ, the first at {first}: {found[first : first + 32].hex()} instead of "
        f"{wanted[first : first + 32].hex()}"
    )


def digest(path: Path) -> str:
    """Of the whole content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def missing_tools(tools: Sequence[str]) -> list[str]:
    """Those of `tools` that are not installed."""
    return [tool for tool in tools if shutil.which(tool, path=SEARCH_PATH) is None]
