"""A workload is crashed at every file operation it makes, and what a crash can leave there is opened again.

`crash_workload` has the work, `crash_disk` what a crash can leave, `crash_checks` what must be true after. Each run
prints how many points and states it tried.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedup.layout import container_named
from dedup.storage import Storage
from tests.dedup.crash_checks import GroupModel, Promise, check_after_crash, opened
from tests.dedup.crash_disk import ALL, CORNERS, Disk, Image, some
from tests.dedup.crash_storage import Event, Recorder, recording, unsynced
from tests.dedup.crash_workload import SCENES, Run, Scene, small_files

FAILURES_MAX = 20


@pytest.fixture(autouse=True)
def _small_files_few_words(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Recovery says what it cuts off, thousands of times here."""
    small_files(monkeypatch)
    caplog.set_level(logging.CRITICAL + 1, "dedup")


@dataclass(frozen=True, slots=True)
class Point:
    """A crash after so many of the recorded events, and what was promised by then."""

    events: int
    promise: Promise


@dataclass(frozen=True, slots=True)
class Recording:
    """One run: its events, and the points between them."""

    events: tuple[Event, ...]
    points: tuple[Point, ...]
    models: dict[str, GroupModel]

    def disks(self) -> Iterator[tuple[Point, Disk, Event | None]]:
        """Each point with the disk as it is then (not to be changed or kept) and the event that comes next."""
        disk = Disk()
        for point in self.points:
            if point.events:
                self.events[point.events - 1].play(disk)
            yield point, disk, self.events[point.events] if point.events < len(self.events) else None


def points_of(events: int, marks: list[tuple[int, Promise]]) -> tuple[Point, ...]:
    """Of all promises made before the same event the last counts: what a call promised it promised by returning."""
    last = dict(marks)
    promise = Promise()
    points = []
    for at in range(events + 1):
        promise = last.get(at, promise)
        points.append(Point(at, promise))
    return tuple(points)


def record(root: Path, scenes: Sequence[Scene] = SCENES) -> Recording:
    """The workload, played under `root`."""
    recorder = Recorder(root)
    marks: list[tuple[int, Promise]] = []
    with pytest.MonkeyPatch.context() as patch, recording(recorder):
        small_files(patch)
        run = Run(root / "store", lambda promise: marks.append((len(recorder.events), promise)))
        for scene in scenes:
            scene(run)
        run.kill()
    return Recording(tuple(recorder.events), points_of(len(recorder.events), marks), run.models)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """The whole workload."""
    return record(tmp_path_factory.mktemp("recorded"))


class Tried:
    """Checks images, each once for the same promise, counts, and gathers what fails."""

    def __init__(
        self, directory: Path, models: dict[str, GroupModel], moments: int, failures_max: int = FAILURES_MAX
    ) -> None:
        self._directory = directory
        self._models = models
        self._moments = moments
        self._failures_max = failures_max
        self._seen: set[tuple[int, Promise, bool]] = set()
        self._failures: list[Exception] = []
        self.points = 0
        self.states = 0

    def check(
        self, image: Image, promise: Promise, what: str, *, killed: bool, models: dict[str, GroupModel] | None = None
    ) -> None:
        """`what` was crashed, and how."""
        key = (image.fingerprint(), promise, killed)
        if key in self._seen:
            return
        self._seen.add(key)
        self.states += 1
        target = self._directory / "crashed"
        target.mkdir()
        try:
            image.write(target)
            models = self._models if models is None else models
            check_after_crash(target / "store", promise, models, killed=killed, moments=self._moments)
        except Exception as error:  # noqa: BLE001 - gathered; `report` raises it
            error.add_note(f"crashed {what}")
            self._failures.append(error)
            if len(self._failures) >= self._failures_max:
                self.report()
        finally:
            shutil.rmtree(target)

    def report(self) -> str:
        """What was tried; raises what failed."""
        tried = f"{self.points} crash points, {self.states} states opened, checked and gone on with"
        if self._failures:
            raise ExceptionGroup(f"{tried}; {len(self._failures)} failed", self._failures)
        return tried


def what(point: Point, recording: Recording) -> str:
    before = recording.events[point.events - 1].what if point.events else "at the start"
    return f"at point {point.events}, after: {before}"


def crash(recording: Recording, tried: Tried, chosen: set[int], randoms: int, corners: int) -> None:
    """Crashes at the chosen points: a kill, a kill within the next write, power cuts."""
    for point, disk, following in recording.disks():
        if point.events not in chosen:
            continue
        tried.points += 1
        rng = random.Random(point.events)
        where = what(point, recording)
        tried.check(disk.after(ALL), point.promise, f"{where}; killed", killed=True)
        part = None if following is None else following.part(rng)
        if part is not None:
            torn = deepcopy(disk)
            part.play(torn)
            tried.check(torn.after(ALL), point.promise, f"{where}; killed in: {part.what}", killed=True)
        cuts = [*rng.sample(CORNERS, corners), *(some(point.events * 1000 + number) for number in range(randoms))]
        for survival in cuts:
            tried.check(disk.after(survival), point.promise, f"{where}; power cut: {survival}", killed=False)


@dataclass(frozen=True, slots=True)
class Killed:
    """A writer was killed at a point, and another goes on."""

    point: Point
    disk: Disk
    """As the first one left it; not to be changed or kept."""
    recorder: Recorder
    """What the other one does."""
    again: Run


def killed(recording_: Recording, tried: Tried, chosen: set[int], directory: Path) -> Iterator[Killed]:
    """Each of the chosen points. The other writer's files are gone when the next one comes."""
    for point, disk, _ in recording_.disks():
        if point.events not in chosen or not point.promise.created:
            continue
        tried.points += 1
        root = directory / "again"
        root.mkdir()
        disk.after(ALL).write(root)
        owed = dict(point.promise.groups)
        again = Run(root / "store", models=dict(recording_.models), owed=owed, created=True, seed=1_000_000)
        again.damaged = point.promise.damaged
        yield Killed(point, disk, Recorder(root, deepcopy(disk)), again)
        shutil.rmtree(root)


def crash_recovery(recording_: Recording, tried: Tried, chosen: set[int], directory: Path, every: int) -> None:
    """Kills at the chosen points; the power fails while the next writer recovers and goes on. What the first left in
    memory is not durable because a second has read it."""
    for one in killed(recording_, tried, chosen, directory):
        point, recorder, again = one.point, one.recorder, one.again
        marks: list[tuple[int, Promise, dict[str, GroupModel]]] = []
        again.mark = lambda promise: marks.append((len(recorder.events), promise, dict(again.models)))  # noqa: B023
        with recording(recorder):
            again.recover()
            again.kill()
        at = (point.promise, recording_.models)
        replay = deepcopy(one.disk)
        for number in range(len(recorder.events) + 1):
            if number:
                recorder.events[number - 1].play(replay)
            at = next(((promise, models) for when, promise, models in reversed(marks) if when == number), at)
            if (number + point.events) % every:
                continue
            event = recorder.events[number - 1].what if number else "the start"
            for survival in (CORNERS[0], some(point.events * 1000 + number)):
                where = f"{what(point, recording_)}; killed; power cut in recovery after: {event}: {survival}"
                tried.check(replay.after(survival), at[0], where, killed=False, models=at[1])


def crash_sealed(recording_: Recording, tried: Tried, chosen: set[int], directory: Path) -> None:
    """Kills at the chosen points; the next writer seals all that may be sealed, and ends; then the power fails. What
    the first left to be written must not come over that."""
    for one in killed(recording_, tried, chosen, directory):
        point, again = one.point, one.again
        with recording(one.recorder):
            store = again.opened = opened(again.path, point.promise)
            store.complete_containers()
            covered = store.settle()
            for name in store.storage.listdir(again.path / "containers"):
                container = container_named(name)
                if container is not None and covered.covers_whole(container):
                    again.seal(container)
            again.kill()
        for survival in (*CORNERS, some(point.events)):
            where = f"{what(point, recording_)}; killed; sealed; power cut: {survival}"
            tried.check(one.recorder.disk.after(survival), point.promise, where, killed=False)


def said(tried: Tried, recording: Recording, record_property: Callable[[str, object], None]) -> None:
    line = f"{tried.report()}; points in the workload: {len(recording.points)}"
    record_property("tried", line)
    print(line)


def test_crashed_at_some_file_operations(
    recorded: Recording, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tried = Tried(tmp_path, recorded.models, moments=8)
    chosen = set(random.Random(3).sample(range(len(recorded.points)), 36))
    with unsynced():
        crash(recorded, tried, chosen, randoms=1, corners=1)
    said(tried, recorded, record_property)


def test_power_cut_while_recovering_at_some(
    recorded: Recording, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tried = Tried(tmp_path, recorded.models, moments=8)
    chosen = set(random.Random(4).sample(range(len(recorded.points)), 4))
    with unsynced():
        crash_recovery(recorded, tried, chosen, tmp_path, every=16)
    said(tried, recorded, record_property)


def test_an_old_sync_log_does_not_come_over_what_was_sealed_since(
    recorded: Recording, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tried = Tried(tmp_path, recorded.models, moments=4)
    emptied = [number for number, event in enumerate(recorded.events, 1) if event.what == "write store/synclog at 0"]
    with unsynced():
        crash_sealed(recorded, tried, set(random.Random(5).sample(emptied, 8)), tmp_path)
    said(tried, recorded, record_property)


@pytest.mark.slow
def test_power_cut_while_recovering(
    recorded: Recording, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tried = Tried(tmp_path, recorded.models, moments=8)
    chosen = set(range(0, len(recorded.points), 8))
    with unsynced():
        crash_recovery(recorded, tried, chosen, tmp_path, every=9)
    said(tried, recorded, record_property)


@pytest.mark.slow
def test_crashed_at_every_file_operation(
    recorded: Recording, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tried = Tried(tmp_path, recorded.models, moments=24)
    with unsynced():
        crash(recorded, tried, set(range(len(recorded.points))), randoms=2, corners=len(CORNERS))
    said(tried, recorded, record_property)


@pytest.mark.parametrize(
    ("method", "of"),
    [
        ("datasync", ".rwc"),
        ("datasync", ".rwj"),
        ("datasync", "STORE.tmp"),
        ("datasync", "synclog"),
        ("sync_directory", "store"),
        ("sync_directory", "index"),
        ("sync_directory", "containers"),
        ("sync_directory", "groups"),
        ("sync_directory", "journal"),
    ],
)
def test_a_sync_that_is_left_out_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, of: str
) -> None:
    """The proof of the proof: without any one kind of sync the same check fails."""
    original = getattr(Storage, method)

    def left_out(storage: Storage, where: int | Path) -> None:
        path = storage.path_of(where) if isinstance(where, int) else where
        if not path.name.endswith(of):
            original(storage, where)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, method, left_out)
        (tmp_path / "recorded").mkdir()
        recording_ = record(tmp_path / "recorded", SCENES[:4])
    tried = Tried(tmp_path, recording_.models, moments=8, failures_max=1)
    with unsynced(), pytest.raises(ExceptionGroup, match="1 failed"):
        for point, disk, _ in recording_.disks():
            if point.events % 3 == 0 or point.events < 40:
                tried.check(disk.after(CORNERS[0]), point.promise, what(point, recording_), killed=False)
                tried.check(disk.after(some(point.events)), point.promise, what(point, recording_), killed=False)
