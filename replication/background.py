"""A process's way into the background, and its log.

`run` is the outermost call of a process that stays: a mount, an appliance.

Invariants:
- A command that returns 0 has left a process behind that is ready; one that returns 1 has left none.
- No fork after the first thread or the first trio loop.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Final

import trio

from dedup.errors import RewindError
from replication.explanation import cause, explain
from replication.heap import give_back_when_idle, keep_freed_memory
from replication.notify import ServiceManager

log = logging.getLogger("rewindfs.background")

STATUS_BYTES_MAX: Final = 64 << 10
"""What a starting process may say to the command that waits for it."""
GC_THRESHOLDS: Final = (200_000, 50, 1000)
"""A queue of thousands of records is no garbage: at Python's own thresholds the collector walks it again and again, for
30 ms at a time (measured: 8 % of an async write, and nearly all of its longest waits). What is allocated here is freed
by its reference counts."""
LOG_FORMAT: Final = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
LOG_TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%S"


class StartFailed(RewindError):
    """The background process ended before it was ready. The message is what it said."""


class Ready:
    """The starting process's line to whoever waits for it: the command, in the foreground the service manager.

    Use one of `ready` and `failed`, once; after `ready`, `stopping` as soon as the process begins to leave."""

    def __init__(self, status_fd: int | None, log_file: Path | None, manager: ServiceManager | None = None) -> None:
        self._status_fd = status_fd
        self._log_file = log_file
        self._manager = ServiceManager() if manager is None else manager
        self.done = False

    def ready(self, status: str = "") -> None:
        """Lets the command return 0 and leaves the terminal: from here on stdout and stderr are the log file, or
        nothing. In the foreground the service manager is told, with what `status` says of the service."""
        self.done = True
        self._manager.ready(status)
        if self._status_fd is None:
            return
        root = logging.getLogger()
        for handler in list(root.handlers):
            if isinstance(handler, _UntilReady):
                root.removeHandler(handler)
        sys.stdout.flush()
        sys.stderr.flush()
        if self._log_file is None:
            sink = os.open(os.devnull, os.O_WRONLY)
        else:
            sink = os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)
        self._say("ready")

    def stopping(self, status: str = "") -> None:
        """Tells the service manager that the end has begun."""
        self._manager.stopping(status)

    def failed(self, text: str) -> None:
        """Lets the command fail with `text`, one line. The caller ends the process."""
        self.done = True
        if self._status_fd is not None:
            self._say("error " + " ".join(text.split()))

    def _say(self, line: str) -> None:
        assert self._status_fd is not None
        try:
            os.write(self._status_fd, line.encode(errors="surrogateescape")[: STATUS_BYTES_MAX - 64] + b"\n")
        except BrokenPipeError:
            log.warning("the command that started this process did not wait for it")
        os.close(self._status_fd)
        self._status_fd = None


class _UntilReady(logging.StreamHandler):  # type: ignore[type-arg]
    """Warnings of a process that is still starting, for the person who started it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("rewindfs: %(levelname)s: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(record.levelname, record.levelname.lower(), 1)


def configure_logging(*, foreground: bool, log_file: Path | None, debug: bool) -> None:
    """One format, times in UTC: to `log_file` where there is one, else in the foreground to stderr, else nowhere.

    A background process also shows its warnings on stderr until it is ready. The file may be rotated by renaming it.
    """
    formatter = logging.Formatter(LOG_FORMAT, LOG_TIME_FORMAT)
    formatter.converter = time.gmtime
    handlers: list[logging.Handler] = []
    if log_file is not None:
        handlers.append(WatchedFileHandler(log_file))
    elif foreground:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(formatter)
    if not foreground:
        handlers.append(_UntilReady())
    logging.basicConfig(handlers=handlers, level=logging.DEBUG if debug else logging.INFO, force=True)
    logging.captureWarnings(True)
    # One line per idle FUSE task is no help to anybody.
    logging.getLogger("pyfuse3").setLevel(logging.INFO)


async def _run(main: Callable[[Ready], Awaitable[None]], ready: Ready) -> None:
    trio.lowlevel.spawn_system_task(give_back_when_idle)
    await main(ready)


def run(
    main: Callable[[Ready], Awaitable[None]], *, foreground: bool, log_file: Path | None = None, debug: bool = False
) -> None:
    """Runs `main(ready)` under trio, here (`foreground`) or in a new background process.

    In the background the calling process never comes back from here but by SystemExit(0), once `main` has called
    `ready.ready()`, or by StartFailed with what `main` raised before that. Call it before anything opens a file,
    starts a thread or a trio loop, and with absolute paths: the background process's directory is `/`. What `main`
    raises after it was ready goes to the log, and the process exits 1.
    """
    log_file = log_file.absolute() if log_file else None
    gc.set_threshold(*GC_THRESHOLDS)
    keep_freed_memory()
    if foreground:
        configure_logging(foreground=True, log_file=log_file, debug=debug)
        trio.run(_run, main, Ready(None, log_file, ServiceManager.from_environment()))
        return
    ready = background(log_file)
    status = 1
    try:
        configure_logging(foreground=False, log_file=log_file, debug=debug)
        trio.run(_run, main, ready)
        status = 0
    except BaseException as failure:
        # The end of this process, whatever the reason: all that is left to do is to say it.
        error = cause(failure)
        if ready.done:
            log.critical("ended by an error: %s", explain(error), exc_info=failure)
        else:
            log.debug("could not start", exc_info=failure)
            ready.failed(explain(error))
    finally:
        logging.shutdown()
    sys.exit(status)


def background(log_file: Path | None) -> Ready:
    """Goes on in a new background process; returns there only, with its line to the command.

    The caller's process waits: SystemExit(0) when the other is ready, StartFailed when it said why not or died.
    Ctrl-C meanwhile asks the other to leave. Descriptors that a shell handed down are closed over there (stderr is
    kept until `ready`), so that nobody waits for a pipe this process holds.
    """
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ctrl-C waits until the command knows whom to pass it on to.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    first = os.fork()
    if first:
        os.close(write_fd)
        os.waitpid(first, 0)
        _await_ready(read_fd, log_file, mask)
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(read_fd)
    os.write(write_fd, b"pid %d\n" % os.getpid())
    os.chdir("/")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)
        except OSError as error:
            # The descriptor that listed the directory is in the listing, and closed by now.
            if error.errno != errno.EBADF:
                raise
    return Ready(write_fd, log_file)


def _await_ready(status_fd: int, log_file: Path | None, mask: set[int | signal.Signals]) -> None:
    """The waiting command's side of `background`, with SIGINT blocked; `mask` is what was before. Never returns."""
    said = b""
    while b"\n" not in said and (some := os.read(status_fd, STATUS_BYTES_MAX)):
        said += some
    words = said.split()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while len(said) < STATUS_BYTES_MAX and (some := os.read(status_fd, STATUS_BYTES_MAX)):
            said += some
    except KeyboardInterrupt:
        if words[:1] == [b"pid"]:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(int(words[1]), signal.SIGTERM)
            while os.read(status_fd, STATUS_BYTES_MAX):
                pass
        raise
    last = said.splitlines()[-1] if said else b""
    if last == b"ready":
        raise SystemExit(0)
    if last.startswith(b"error "):
        raise StartFailed(last[6:].decode(errors="surrogateescape"))
    where = f"; see {log_file}" if log_file else "; run it with --log-file FILE or -f to see why"
    raise StartFailed(f"the background process ended before it was ready{where}")
