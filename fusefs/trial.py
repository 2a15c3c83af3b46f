"""One try of a person's command on a past moment: a fresh clone, perhaps a loop mount of it, the command, and the end.

Invariants:
- whatever happens, the command has ended and the clone and its loop mount are gone when a try is over;
- an answer counts only if the command saw nothing but the past and a disk with room: a full overlay, or a block that
  the store could not give, makes the moment one that cannot be tested;
- the command's own output goes to stderr, so that stdout is the caller's.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from dedup.errors import RewindError, UnknownName
from dedup.types import Moment
from fusefs.bisection import Verdict
from fusefs.clone_mount import CloneMount
from fusefs.clone_tree import chosen, lay_out
from fusefs.overlay_directory import OverlayDirectory, make_directory, remove_tree
from fusefs.overlay_room import OverlayRoom
from fusefs.past_images import PastImages
from fusefs.process_tree import end_tree

log = logging.getLogger("rewindfs.bisect")

PLACEHOLDER: Final = "{}"
"""Where in the command the path goes."""
SKIP_STATUS: Final = 125
STOP_STATUS: Final = 128
BUSY_SECONDS: Final = 5.0
"""How long a loop mount may stay busy after the command: what it left behind may still be closing its files."""
BUSY_TRIES_MAX: Final = 25


class TrialFailed(RewindError):
    """The command did not say good, bad or skip. The message says what it did."""


class _CannotMount(RewindError):
    """There is nothing at that moment that mount(8) would take."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a try; `status` None where the command was not run, and `why` says why not."""

    verdict: Verdict
    status: int | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried at each moment. `path`: of a volume, or of a directory of volumes; empty for all of the group."""

    images: PastImages
    operations: CloneMount
    overlay: OverlayDirectory
    room: OverlayRoom
    mountpoint: Path
    path: str
    command: Sequence[str]
    loop_options: str | None
    """Of mount(8), where the command wants the file system in the volume; else None."""

    async def run(self, moment: Moment) -> Outcome:
        """One try. `mountpoint` serves `operations` meanwhile. TrialFailed; OverlayRefused, MomentGone, OSError."""
        try:
            async with self._clone(moment) as place:
                self.operations.take_trouble()
                if self.loop_options is None:
                    outcome = await self._command(place, moment)
                else:
                    async with self._loop_mount(place) as inside:
                        outcome = await self._command(inside, moment)
                await trio.to_thread.run_sync(self._require_mount, moment)
        except (UnknownName, _CannotMount) as reason:
            return Outcome(Verdict.SKIPPED, None, str(reason))
        trouble = self.operations.take_trouble()
        return outcome if trouble is None else Outcome(Verdict.SKIPPED, outcome.status, trouble)

    @asynccontextmanager
    async def _clone(self, moment: Moment) -> AsyncIterator[Path]:
        """A clone of that moment, in a directory of its own."""
        name = str(moment.seq)
        await trio.to_thread.run_sync(self._lay_out, moment, self.overlay.files / name)
        try:
            yield self.mountpoint / name / self.path
        finally:
            with trio.CancelScope(shield=True):
                # Through the mount, so that the kernel forgets it, and its room is given back.
                await trio.to_thread.run_sync(_remove, self.mountpoint / name)
                await trio.to_thread.run_sync(self._release, moment)

    def _lay_out(self, moment: Moment, directory: Path) -> None:
        with self.images.turn:
            self.images.history.hold(moment.seq)
            group = self.images.history.group_at(moment.seq)
        try:
            volumes = chosen(group, self.path)
            make_directory(directory)
            self.operations.add(lay_out(directory, group, volumes, self.images, self.room))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            self._release(moment)
            raise

    def _require_mount(self, moment: Moment) -> None:
        if not (self.mountpoint / str(moment.seq)).is_dir():
            raise TrialFailed(f"{self.mountpoint}: the clone of seq={moment.seq} went away under the command")

    def _release(self, moment: Moment) -> None:
        with self.images.turn:
            self.images.history.release(moment.seq)

    @asynccontextmanager
    async def _loop_mount(self, file: Path) -> AsyncIterator[Path]:
        """The file system in `file`. _CannotMount."""
        place = self.overlay.path / "loop"
        place.mkdir(exist_ok=True)
        options = ",".join(["loop", *filter(None, [self.loop_options])])
        with trio.CancelScope(shield=True):
            done = await _run("mount", "-o", options, "--", str(file), str(place))
        if done.returncode:
            raise _CannotMount(f"not mounted: {_said(done)}")
        try:
            yield place
        finally:
            with trio.CancelScope(shield=True):
                await _unmount(place)

    async def _command(self, place: Path, moment: Moment) -> Outcome:
        words = [word.replace(PLACEHOLDER, str(place)) for word in self.command]
        stdout = sys.stderr.fileno()
        done = await trio.run_process(words, stdin=None, stdout=stdout, check=False, deliver_cancel=end_tree)
        status = done.returncode
        if status == 0:
            return Outcome(Verdict.GOOD, status)
        if 0 < status < STOP_STATUS:
            return Outcome(Verdict.SKIPPED if status == SKIP_STATUS else Verdict.BAD, status)
        how = f"was ended by signal {-status}" if status < 0 else f"exited with status {status}"
        raise TrialFailed(
            f"stopped at seq={moment.seq}: {words[0]} {how}; 0 is good, {SKIP_STATUS} skips, any other up to "
            f"{STOP_STATUS - 1} is bad"
        )


def _remove(directory: Path) -> None:
    try:
        remove_tree(directory)
    except OSError as error:
        # Something that the command left behind goes on in there. The next try has a directory of its own.
        log.warning("%s: not removed before the end: %s", directory, error)


async def _unmount(place: Path) -> None:
    """Unmounts `place`, lazily where a process that the command left behind keeps it busy. TrialFailed."""
    for _ in range(BUSY_TRIES_MAX):
        if not (await _run("umount", "--", str(place))).returncode:
            return
        await trio.sleep(BUSY_SECONDS / BUSY_TRIES_MAX)
    log.warning("%s: still in use after the command has ended; it goes when what the command left behind ends", place)
    done = await _run("umount", "-l", "--", str(place))
    if done.returncode:
        raise TrialFailed(f"{place}: could not be unmounted after the command: {_said(done)}")


async def _run(*command: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join(done.stderr.decode(errors="replace").split())
