"""The life of a mounting process, with real mounts: ready, left, refused, killed."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusefs.mounting import MountpointRefused, check_mountpoint
from fusefs.mountpoint import FSTYPE, control_socket, mount_at, unmount

SCRIPT = Path(__file__).with_name("one_file_mount.py")
ROOT = SCRIPT.parent.parent.parent

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="this machine has no /dev/fuse")


class Process:
    """A started `one_file_mount.py`."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir(exist_ok=True)
        self.log_file = directory / "log"
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(self, behaviour: str) -> list[str | Path]:
        return [sys.executable, SCRIPT, self.mountpoint, self.log_file, behaviour]

    def start(self, behaviour: str = "serve") -> subprocess.CompletedProcess[str]:
        # Both outputs are pipes: communicate() would hang if the background process kept one of them.
        return subprocess.run(
            self.command(behaviour),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def pid(self) -> int:
        return int(re.findall(r"pid (\d+)", self.log)[-1])

    def wait_for_end(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        ready, _, _ = select.select([pidfd], [], [], 60)
        os.close(pidfd)
        assert ready, f"process {pid} is still there"


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    yield process
    while mount_at(process.mountpoint):
        unmount(process.mountpoint, lazy=True)


def test_command_returns_when_the_mount_is_ready(process: Process) -> None:
    started = process.start()
    assert started.returncode == 0, started.stderr
    mount = mount_at(process.mountpoint)
    assert mount is not None
    assert (mount.fstype, mount.source) == (FSTYPE, "a source, with \\ and ü")
    assert (process.mountpoint / "file").stat().st_size == 0
    assert os.getsid(process.pid) != os.getsid(0)


def test_unmounting_from_outside_drains(process: Process) -> None:
    process.start()
    pid = process.pid
    subprocess.run(["fusermount3", "-u", process.mountpoint], check=True)
    process.wait_for_end(pid)
    assert process.log.count("drained") == 1
    assert mount_at(process.mountpoint) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts_and_drains(process: Process, number: signal.Signals) -> None:
    process.start()
    pid = process.pid
    os.kill(pid, number)
    process.wait_for_end(pid)
    assert process.log.count("drained") == 1
    assert mount_at(process.mountpoint) is None
    assert os.listdir(process.mountpoint) == []


def test_signal_leaves_also_when_files_are_open(process: Process) -> None:
    process.start()
    pid = process.pid
    file = os.open(process.mountpoint / "file", os.O_RDONLY)
    os.kill(pid, signal.SIGTERM)
    process.wait_for_end(pid)
    with pytest.raises(OSError):
        os.close(file)
    assert "files are still open" in process.log
    assert process.log.count("drained") == 1
    assert mount_at(process.mountpoint) is None


def test_leaving_by_itself_drains(process: Process) -> None:
    process.start("stop")
    pid = process.pid
    assert (process.mountpoint / "file").exists()
    process.wait_for_end(pid)
    assert process.log.count("drained") == 1
    assert mount_at(process.mountpoint) is None


def test_reason_not_to_start_is_the_commands_error(process: Process) -> None:
    started = process.start("refuse")
    assert started.returncode == 1
    assert started.stderr.splitlines()[-1].endswith("StartFailed: refused, as the test wants")
    assert mount_at(process.mountpoint) is None


def test_death_before_ready_is_the_commands_error(process: Process) -> None:
    started = process.start("die")
    assert started.returncode == 1
    assert f"ended before it was ready; see {process.log_file}" in started.stderr


def test_interrupting_the_command_ends_what_it_started(process: Process) -> None:
    os.mkfifo(process.log_file)
    with subprocess.Popen(process.command("wait"), env=process.environment, start_new_session=True) as command:
        with open(process.log_file) as log:
            pid = int(log.readline().split()[-1])
            os.kill(command.pid, signal.SIGINT)
            process.wait_for_end(pid)
        assert command.wait(60) != 0


def test_bug_in_a_handler_unmounts_and_is_logged(process: Process) -> None:
    process.start("crash")
    pid = process.pid
    with pytest.raises(OSError):
        os.stat(process.mountpoint / "file")
    process.wait_for_end(pid)
    assert "ended by an error: ZeroDivisionError: a bug in a handler" in process.log
    assert "drained" not in process.log
    assert mount_at(process.mountpoint) is None


def test_stale_mount_is_cleaned_and_said(process: Process) -> None:
    process.start()
    pid = process.pid
    os.kill(pid, signal.SIGKILL)
    process.wait_for_end(pid)
    with pytest.raises(OSError, match="not connected|abort"):
        os.stat(process.mountpoint)
    again = process.start()
    assert again.returncode == 0, again.stderr
    assert "cleaned a stale mount of a source" in again.stderr
    assert process.pid != pid
    assert (process.mountpoint / "file").exists()


def test_second_mount_at_one_place_is_refused(process: Process) -> None:
    process.start()
    with pytest.raises(MountpointRefused, match="already mounted there; use another directory, or rewindfs unmount"):
        check_mountpoint(process.mountpoint)


def test_mount_that_answers_no_control_socket_is_named(process: Process, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not the mountpoint of a source mount"):
        control_socket(tmp_path)


def test_mountpoint_must_be_an_empty_directory(tmp_path: Path) -> None:
    check_mountpoint(tmp_path)
    with pytest.raises(MountpointRefused, match="does not exist"):
        check_mountpoint(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(MountpointRefused, match="not a directory"):
        check_mountpoint(tmp_path / "file")
    with pytest.raises(MountpointRefused, match="not empty.*'file'"):
        check_mountpoint(tmp_path)
