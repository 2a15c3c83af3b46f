"""The most anonymous memory (RssAnon) that each process behind a mount holds at once, while something is measured.

Invariants:
- a process is watched through one descriptor of its /proc/PID/status, so a number used again is never taken for it;
- what a watched process starts is watched, too, from the next look on, under the name of the module it runs.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.benchmarks.mounts import processes
from tests.benchmarks.report import Report

LOOK_SECONDS: Final = 0.05
LIMIT_MB: Final = 150
_STATUS_BYTES: Final = 4096


class PeakMemory:
    """Looks every LOOK_SECONDS, in a thread, while its block runs. Kinds of processes, of any number of mounts, share
    one peak: that of the largest."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        """Bytes by kind."""
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[str, int]] = {}
        """By pid: the kind, the descriptor."""
        self._over = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="peak memory")

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        for _kind, fd in self._watched.values():
            os.close(fd)
        if self._failed is not None and error is None:
            raise self._failed

    def watch(self, kind: str, pid: int) -> None:
        """From now on, until it ends."""
        with self._lock:
            self._take(kind, pid)

    def watch_mount(self, mountpoint: Path) -> None:
        """The processes behind a source mount."""
        pids = processes(mountpoint)
        with self._lock:  # both at once: the second appliance is not just any child of the mount's process
            self._take("mount process", pids["mount"])
            self._take("second appliance", pids["second"])

    def tell(self, report: Report, during: str) -> None:
        """One target for each kind."""
        for kind, peak in sorted(self.peaks.items()):
            report.at_most(f"peak RssAnon of the {kind}, {during}", "", peak / 1e6, LIMIT_MB, "MB")

    def _run(self) -> None:
        try:
            while not self._over.wait(LOOK_SECONDS):
                with self._lock:
                    self._look()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever ends the block
            self._failed = error

    def _look(self) -> None:
        for pid, (kind, fd) in list(self._watched.items()):
            try:
                status = os.pread(fd, _STATUS_BYTES, 0)
            except ProcessLookupError:
                os.close(fd)
                del self._watched[pid]
                continue
            self.peaks[kind] = max(self.peaks.get(kind, 0), _rss_anon(status))
            for child in _children(pid) - self._watched.keys():
                self._find(child, pid, kind)

    def _take(self, kind: str, pid: int) -> None:
        self._watched[pid] = (kind, os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC))

    def _find(self, child: int, parent: int, kind: str) -> None:
        """Takes up a child, unless it has ended, or has not yet become another program than its parent."""
        try:
            words = _words(child)
            if words and words != _words(parent):
                self._take(f"{kind}'s child {_program(words)}", child)
        except (ProcessLookupError, FileNotFoundError):
            return


def _rss_anon(status: bytes) -> int:
    """Bytes; 0 of a process that has ended and is not yet waited for."""
    _, found, rest = status.partition(b"RssAnon:")
    return int(rest.split(maxsplit=1)[0]) << 10 if found else 0


def _children(pid: int) -> set[int]:
    """Of all its threads; none once it has ended. A thread that ends meanwhile hands its children to another."""
    found: set[int] = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                found.update(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))
    return found


def _words(pid: int) -> list[str]:
    return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]


def _program(words: list[str]) -> str:
    """The module that a Python runs, or the program's name."""
    return words[words.index("-m") + 1] if "-m" in words[:-1] else Path(words[0]).name
