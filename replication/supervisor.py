"""The embedded second appliance: a child process that is started, watched, restarted and stopped.

Invariants:
- The child lives at most as long as its parent: the parent's end of a socket pair is open in the parent only, and the
  child leaves by itself, with a last checkpoint, when it sees that end closed, also by a kill.
- `serve` is ready only when the child is; a child that cannot start the first time is the caller's error.
- A child that dies later is started again, after 0.1 s doubling to 5 s; a child that was up for a while starts the
  count anew.
"""

from __future__ import annotations

import logging
import os
import signal
import site
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import trio

from replication.background import StartFailed
from replication.control import SOCKET_NAME, UNIX_PREFIX

log = logging.getLogger("rewindfs.supervisor")

BACKOFF_SECONDS_MIN: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0
STEADY_SECONDS: Final = 30.0
"""A child that was ready for so long did not fail to start."""
LEAVE_SECONDS: Final = 120.0
"""How long a child may take for its last checkpoint before it is killed; nothing acknowledged is lost then either."""
LINE_BYTES_MAX: Final = 4096
_READY: Final = b"ready"
_ERROR: Final = b"error "


class Guardian:
    """The child's side: tells the parent when it is ready or why not, and notices when the parent is gone.

    Every method does nothing where there is no parent that waits (`fd` None).
    """

    def __init__(self, fd: int | None) -> None:
        self._socket = None if fd is None else socket.socket(fileno=fd)
        self._told = False
        if self._socket is not None:
            self._socket.setblocking(False)
            os.set_inheritable(self._socket.fileno(), False)

    def ready(self) -> None:
        """The parent may use it from now on."""
        self._tell(_READY)

    def failed(self, text: str) -> None:
        """It could not start, and ends. Does nothing after `ready`."""
        self._tell(_ERROR + " ".join(text.split()).encode(errors="surrogateescape"))

    async def watch(self, gone: Callable[[], None]) -> None:
        """Calls `gone` once the parent is; returns then."""
        if self._socket is None:
            return
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                said = self._socket.recv(1)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                said = b""
            if not said:
                log.info("the process that started this appliance is gone: leaving")
                gone()
                return

    def _tell(self, line: bytes) -> None:
        if self._socket is None or self._told:
            return
        self._told = True
        try:
            self._socket.send(line[: LINE_BYTES_MAX - 1] + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            log.info("the process that started this appliance is gone already")


class Supervisor:
    """Keeps one second appliance running for a store. `serve` is its life."""

    def __init__(
        self,
        store: Path,
        *,
        listen: Path | None = None,
        log_file: Path | None = None,
        foreground: bool = False,
        debug: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        """`listen` is a socket besides the one in the store. The child logs to `log_file`; without one to stderr when
        `foreground`, else nowhere: no terminal is kept open by it."""
        self.socket = listen or store / SOCKET_NAME
        """Where the child listens, for `connect_unix`."""
        self.process: trio.Process | None = None
        self.starts = 0
        arguments = [*(command or python_module("fusefs")), *(["--debug"] if debug else [])]
        arguments += ["appliance", "second", "-f", "--store", str(store)]
        arguments += ["--listen", f"{UNIX_PREFIX}{self.socket}"]
        arguments += ["--log-file", str(log_file)] if log_file else []
        self._arguments = arguments
        self._output = None if foreground and log_file is None else subprocess.DEVNULL

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the child until cancelled; then stop it with SIGTERM and wait for its last checkpoint.

        Raises StartFailed with the child's own line when it cannot start the first time.
        """
        backoff = BACKOFF_SECONDS_MIN
        started = False
        while True:
            began = trio.current_time()
            try:
                status = await self._one_life(task_status if not started else trio.TASK_STATUS_IGNORED)
            except StartFailed as error:
                if not started:
                    raise
                log.error("the second appliance does not start, trying again in %g s: %s", backoff, error)
            else:
                if trio.current_time() - began >= STEADY_SECONDS:
                    backoff = BACKOFF_SECONDS_MIN
                log.error("the second appliance ended with %s; starting it again in %g s", status, backoff)
            started = True
            await trio.sleep(backoff)
            backoff = min(2 * backoff, BACKOFF_SECONDS_MAX)

    async def _one_life(self, task_status: trio.TaskStatus[None]) -> str:
        """Start the child and wait for its end: how it ended. Raises StartFailed when that was before it was ready."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                process = await self._start(theirs)
            try:
                await self._await_ready(ours, process)
                log.info("the second appliance runs as process %d", process.pid)
                task_status.started()
                return _status(await process.wait())
            finally:
                await self._end(process)
        finally:
            self.process = None
            ours.close()

    async def _start(self, theirs: socket.socket) -> trio.Process:
        # A session of its own: Ctrl-C on the terminal is for the parent, which drains first.
        process: trio.Process = await trio.lowlevel.open_process(
            [*self._arguments, "--ready-fd", str(theirs.fileno())],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        self.process = process
        self.starts += 1
        return process

    async def _await_ready(self, ours: socket.socket, process: trio.Process) -> None:
        ours.setblocking(False)
        said = b""
        while not said.endswith(b"\n") and len(said) < LINE_BYTES_MAX:
            await trio.lowlevel.wait_readable(ours)
            some = ours.recv(LINE_BYTES_MAX)
            if not some:
                break
            said += some
        line = said.strip()
        if line == _READY:
            return
        if line.startswith(_ERROR):
            raise StartFailed(line[len(_ERROR) :].decode(errors="surrogateescape"))
        status = _status(await process.wait())
        raise StartFailed(f"the second appliance ended with {status} before it was ready; its log says more")

    async def _end(self, process: trio.Process) -> None:
        """Have the child leave, and wait for it; harmless when it has."""
        if process.returncode is not None:
            return
        with trio.CancelScope(shield=True):
            process.send_signal(signal.SIGTERM)
            # One that is stopped would never see it.
            process.send_signal(signal.SIGCONT)
            with trio.move_on_after(LEAVE_SECONDS):
                await process.wait()
            if process.returncode is None:
                log.error("the second appliance does not leave within %g s: killing it", LEAVE_SECONDS)
                process.kill()
                await process.wait()


def python_module(name: str) -> list[str]:
    """The beginning of the command that runs a module of ours; the rest are its arguments."""
    # -P: what lies in the working directory is somebody else's, and never one of our modules.
    return [sys.executable, "-P", "-m", name]


def child_environment() -> dict[str, str]:
    """Ours, and the way to these very packages: a process in the background has another directory than its start."""
    here = str(Path(__file__).resolve().parent.parent)
    if here in site.getsitepackages():
        return dict(os.environ)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _status(returncode: int) -> str:
    """How a process ended, for a person."""
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    return f"status {returncode}"
