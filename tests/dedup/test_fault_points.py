"""Every system call of a workload goes wrong in every way it can, once each: the store says so, and keeps its word.

After each: what was refused for want of room is asked again and then taken; after any other error the store is opened
anew, which finds all that was durable, and all that was received unless the store said that it has stopped. Then the
power fails too.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dedup.errors import Damaged, NotAStore, StoreError, StoreFailed, StoreFull
from tests.dedup.crash_disk import ALL, CORNERS, some
from tests.dedup.crash_storage import Recorder, recording, unsynced
from tests.dedup.crash_workload import SCENES, Run, check_after_crash, small_files
from tests.dedup.faults import Call, FailingCalls, Fault, FaultKind

FAILURES_MAX = 20


@pytest.fixture(autouse=True)
def _small_files_few_words(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small_files(monkeypatch)
    caplog.set_level(logging.CRITICAL + 1, "dedup")


def calls_of_the_workload(root: Path) -> list[Call]:
    """Every system call, in order; the same in each run."""
    counting = FailingCalls()
    with recording(Recorder(root, before=counting)):
        run = Run(root / "store")
        for scene in SCENES:
            scene(run)
    return counting.calls


class Tried:
    """Runs the workload with faults, and counts."""

    def __init__(self, directory: Path, moments: int) -> None:
        self._directory = directory
        self._moments = moments
        self._may_be_lost = False
        self._failures: list[Exception] = []
        self.faults = 0
        self.refused = 0
        self.states = 0

    def run(self, fault: Fault) -> None:
        root = self._directory / "run"
        root.mkdir()
        self.faults += 1
        try:
            self._run(root, fault)
        except Exception as error:  # noqa: BLE001 - gathered; `report` raises it
            error.add_note(str(fault))
            self._failures.append(error)
            if len(self._failures) >= FAILURES_MAX:
                self.report()
        finally:
            shutil.rmtree(root)

    def _run(self, root: Path, fault: Fault) -> None:
        failing = FailingCalls(fault)
        recorder = Recorder(root, before=failing)
        run = Run(root / "store", make_room=failing.heal)
        refusal: StoreError | None = None
        with recording(recorder):
            try:
                for scene in SCENES:
                    scene(run)
            except (StoreFull, StoreFailed, Damaged) as error:
                refusal = error
                run.kill()
        assert failing.hit
        failing.heal()
        self._may_be_lost = fault.call.name in ("pread", "preadv") and fault.kind is FaultKind.IO_ERROR
        # What a writer has not synced when it stops, it takes back: it will be sent again.
        self._check(recorder, run, killed=not isinstance(refusal, StoreFailed), kept=ALL)
        if refusal is None:
            return
        self.refused += 1
        self._check(recorder, run, killed=False, kept=some(fault.call.number))
        with recording(recorder):
            try:
                run.recover()
                run.kill()
            except NotAStore:
                return
        self._check(recorder, run, killed=False, kept=CORNERS[0])

    def _check(self, recorder: Recorder, run: Run, *, killed: bool, kept: object) -> None:
        self.states += 1
        target = self._directory / "crashed"
        target.mkdir()
        try:
            recorder.disk.after(kept).write(target)  # type: ignore[arg-type]
            with unsynced():
                check_after_crash(
                    target / "store",
                    run.promise,
                    run.models,
                    killed=killed,
                    moments=self._moments,
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


def try_faults(directory: Path, share: float, record_property: Callable[[str, object], None], moments: int) -> None:
    (directory / "run").mkdir()
    calls = calls_of_the_workload(directory / "run")
    shutil.rmtree(directory / "run")
    faults = [fault for call in calls for fault in call.faults()]
    chosen = random.Random(5).sample(faults, round(len(faults) * share))
    tried = Tried(directory, moments)
    for fault in sorted(chosen, key=lambda fault: fault.call.number):
        tried.run(fault)
    line = f"{tried.report()}; in the workload: {len(calls)} calls, {len(faults)} faults"
    record_property("tried", line)
    print(line)


def test_some_calls_fail(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    try_faults(tmp_path, 0.02, record_property, moments=8)


@pytest.mark.slow
def test_every_call_fails_in_every_way(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    try_faults(tmp_path, 1.0, record_property, moments=8)
