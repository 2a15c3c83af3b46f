"""Every system call of a workload goes wrong in every way it can, once each: the store says so, and keeps its word.

After each: what was refused for want of room is asked again and then taken; after any other error the store is opened
anew, which finds all that was durable, and all that was received unless the store said that it has stopped. Then the
power fails too.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedup.errors import Damaged, NotAStore, StoreError, StoreFailed, StoreFull
from tests.dedup.crash_checks import check_after_crash
from tests.dedup.crash_disk import ALL, CORNERS, Disk, Image, Survival
from tests.dedup.crash_storage import Recorder, recording, unsynced
from tests.dedup.crash_workload import SCENES, Run, Scene, small_files
from tests.dedup.faults import FailingCalls, Fault, FaultKind

FAILURES_MAX = 20
MOMENTS = 6
"""Of each group, compared after each fault."""


@pytest.fixture(autouse=True)
def _small_files_few_words(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small_files(monkeypatch)
    caplog.set_level(logging.CRITICAL + 1, "dedup")


@dataclass(frozen=True, slots=True)
class Chapter:
    """One scene, and what there is before it: the disk, and the run so far."""

    scene: Scene
    disk: Disk
    image: Image
    run: Run


def chapters_of_the_workload(root: Path) -> list[Chapter]:
    recorder = Recorder(root)
    chapters = []
    with recording(recorder):
        run = Run(root / "store")
        for scene in SCENES:
            disk = deepcopy(recorder.disk)
            chapters.append(Chapter(scene, disk, disk.after(ALL), run.copy(root / "store")))
            scene(run)
    return chapters


class Tried:
    """Runs the workload with faults, and counts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._may_be_lost = False
        self._failures: list[Exception] = []
        self.calls = 0
        self.faults = 0
        self.possible = 0
        self.refused = 0
        self.states = 0

    def faults_of(self, chapter: Chapter) -> list[Fault]:
        """Every fault of every call that the scene makes: a run with none."""
        counting = FailingCalls()
        with self._begun(chapter, counting) as (_, run):
            chapter.scene(run)
            run.kill()
        self.calls += len(counting.calls)
        return [fault for call in counting.calls for fault in call.faults()]

    @contextmanager
    def _begun(self, chapter: Chapter, calls: FailingCalls) -> Iterator[tuple[Recorder, Run]]:
        root = self._directory / "run"
        root.mkdir()
        chapter.image.write(root)
        recorder = Recorder(root, deepcopy(chapter.disk))
        run = chapter.run.copy(root / "store")
        try:
            with recording(recorder):
                if run.created:
                    run.open()
                recorder.before = calls
                yield recorder, run
        finally:
            run.kill()
            shutil.rmtree(root)

    def run(self, chapter: Chapter, fault: Fault) -> None:
        """Plays the scene with the fault."""
        self.faults += 1
        try:
            self._run(chapter, fault)
        except Exception as error:  # noqa: BLE001 - gathered; `report` raises it
            error.add_note(f"{chapter.scene.__name__}, {fault}")
            self._failures.append(error)
            if len(self._failures) >= FAILURES_MAX:
                self.report()

    def _run(self, chapter: Chapter, fault: Fault) -> None:
        failing = FailingCalls(fault)
        self._may_be_lost = fault.call.name in ("pread", "preadv") and fault.kind is FaultKind.IO_ERROR
        refusal: StoreError | None = None
        with self._begun(chapter, failing) as (recorder, run):
            run.make_room = failing.heal
            try:
                chapter.scene(run)
            except (StoreFull, StoreFailed, Damaged) as error:
                refusal = error
            run.kill()
            assert failing.hit
            assert not recorder.open_files()
            failing.heal()
            # What a writer has not synced when it stops, it takes back: it will be sent again.
            self._check(recorder, run, killed=not isinstance(refusal, StoreFailed), kept=ALL)
            if refusal is None:
                return
            self.refused += 1
            try:
                run.recover()
            except NotAStore:
                return
            run.kill()
            self._check(recorder, run, killed=False, kept=CORNERS[0])

    def _check(self, recorder: Recorder, run: Run, *, killed: bool, kept: Survival) -> None:
        self.states += 1
        target = self._directory / "crashed"
        target.mkdir()
        try:
            recorder.disk.after(kept).write(target)
            with unsynced():
                check_after_crash(
                    target / "store",
                    run.promise,
                    run.models,
                    killed=killed,
                    moments=MOMENTS,
                    may_be_lost=self._may_be_lost,
                )
        finally:
            shutil.rmtree(target)

    def report(self) -> str:
        """What was tried; raises what failed."""
        tried = f"{self.faults} faults, {self.refused} of them ended the run, {self.states} states opened and checked"
        if self._failures:
            raise ExceptionGroup(f"{tried}; {len(self._failures)} failed", self._failures)
        return tried


def try_faults(directory: Path, share: float, record_property: Callable[[str, object], None]) -> None:
    """`share` of the faults of calls that change something, a tenth of that of those that only read."""
    (directory / "whole").mkdir()
    chapters = chapters_of_the_workload(directory / "whole")
    rng = random.Random(5)
    tried = Tried(directory)
    for chapter in chapters:
        for fault in tried.faults_of(chapter):
            tried.possible += 1
            if rng.random() < (share if fault.call.changes else share / 10):
                tried.run(chapter, fault)
    line = f"{tried.report()}; in the workload: {tried.calls} calls, {tried.possible} faults"
    record_property("tried", line)
    print(line)


def test_some_calls_fail(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    try_faults(tmp_path, 0.01, record_property)


@pytest.mark.slow
def test_every_call_fails_in_every_way(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Every call that changes something, that is; of those that read, one in ten."""
    try_faults(tmp_path, 1.0, record_property)
