"""The process of a bisection: the history, the mount for clones, the search over both, and the end of it all.

Invariants:
- what was looked at stays for as long as it takes: all of history where that can be pinned, else each moment tried;
- however it ends, with a result, an error or a signal, the command has ended, and no mount and no overlay is left.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from dedup.errors import RewindError
from dedup.moment import rfc3339
from dedup.pins import Pinning
from dedup.types import Moment, Seq
from fusefs.bisection import Bisection, Verdict
from fusefs.clone_mount import CloneMount
from fusefs.daemon import serve
from fusefs.mounting import mount_options
from fusefs.mountpoint import MountBusy, leave_when_free
from fusefs.opened_history import opened_history
from fusefs.overlay_directory import OverlayDirectory, clear_dead, make_directory
from fusefs.overlay_room import OverlayRoom
from fusefs.past_images import PastImages
from fusefs.trial import Outcome, Trial, TrialFailed
from fusefs.volume_timeline import SeqRange, VolumeTimeline
from replication.cache_options import CachePlace
from replication.history import open_history
from replication.reports import Subject, open_report
from replication.route import Route

SIGNAL_SECONDS: Final = 0.2
"""How long after the command's end by a signal our own copy of that signal may come."""

Report = Callable[[Moment, Outcome, int | None, str], None]
"""Is told of each step: the moment, what came of it, how many records are left to look at (None: not begun), and what
is special about it."""


class BisectFailed(RewindError):
    """The search came to no result. The message says why."""


@dataclass(frozen=True, slots=True)
class BisectSettings:
    """One search. `path`: of a volume or directory, empty for the whole group; `loop_options` None: not mounted."""

    store: str
    group: str | None
    route: Route
    cache: CachePlace
    path: str
    good: str
    bad: str
    command: tuple[str, ...]
    loop_options: str | None
    trust_ends: bool
    flushed: bool
    place: Path
    limit_bytes: int
    allow_other: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A bisection that has come to its end; whether its path is of a volume (else of a directory)."""

    bisection: Bisection
    is_volume: bool


async def search(settings: BisectSettings, report: Report) -> Found:
    """Opens the history and mounts a place for clones, searches, and takes it all away again, whatever happens."""
    ends = await trio.to_thread.run_sync(_ends, settings)
    gaps = await trio.to_thread.run_sync(_gaps, settings, ends[1].seq)
    texts = [f"seq={end.seq}" for end in ends]
    opened = opened_history(
        settings.store, settings.group, settings.route, settings.cache, *texts, pinning=Pinning.EVERYTHING
    )
    async with opened as (history, held):
        if held != ends:
            raise BisectFailed("one of the two ends has just been thinned out; try again with another moment")
        await trio.to_thread.run_sync(clear_dead, settings.place)
        with await trio.to_thread.run_sync(OverlayDirectory.create, settings.place) as overlay:
            room = OverlayRoom(settings.limit_bytes)
            images = PastImages(history)
            operations = CloneMount(overlay.files, room)
            trial = Trial(
                images, operations, overlay, room, overlay.path / "clones",
                settings.path, settings.command, settings.loop_options,
            )  # fmt: skip
            within = Seq(ends[0].seq + 1), Seq(ends[1].seq - 1)
            timeline = VolumeTimeline(history, images.turn, settings.path, within, gaps, flushed=settings.flushed)
            try:
                return await _mounted(settings, trial, partial(_bisect, settings, timeline, trial, ends, report))
            finally:
                operations.close()


def _ends(settings: BisectSettings) -> tuple[Moment, Moment]:
    with open_history(settings.store, settings.group, settings.route, cache=settings.cache) as history:
        good, bad = history.resolve(settings.good), history.resolve(settings.bad)
    if good.seq >= bad.seq:
        raise BisectFailed(
            f"--good must be a moment before --bad, but {settings.good} is seq={good.seq} and {settings.bad} is "
            f"seq={bad.seq}; to find where something became good, let COMMAND exit with 0 where it is bad"
        )
    return good, bad


def _gaps(settings: BisectSettings, last: Seq) -> list[SeqRange]:
    """All that begin at or before `last`."""
    with open_report(settings.store, Subject("points", settings.group), settings.route) as report:
        gaps = report.document().get("gaps", [])
    found = [(gap["from"]["seq"], last if gap["to"] is None else gap["to"]["seq"]) for gap in gaps]
    return [gap for gap in found if gap[0] <= last]


async def _mounted(settings: BisectSettings, trial: Trial, search: Callable[[], Awaitable[Found]]) -> Found:
    """Runs `search` while the clones' mount is there. KeyboardInterrupt after SIGINT or SIGTERM, everything undone."""
    make_directory(trial.mountpoint)
    options = mount_options(settings.store, allow_other=settings.allow_other)
    leaving, stop = trio.Event(), trio.Event()
    result: Found | None = None

    async def serving(task_status: trio.TaskStatus[None]) -> None:
        await serve(trial.operations, trial.mountpoint, options, signals=(), stop=stop, task_status=task_status)
        if not leaving.is_set():
            raise BisectFailed(f"{trial.mountpoint} was unmounted by somebody else")

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(serving)
            try:
                async with trio.open_nursery() as inner:
                    inner.start_soon(_cancel_at_signal, signals, inner.cancel_scope)
                    result = await _unless_interrupted(search)
                    inner.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    leaving.set()
                    try:
                        # In a thread, like all that looks at a mountpoint: it is this process that answers.
                        await trio.to_thread.run_sync(leave_when_free, trial.mountpoint)
                    except MountBusy:
                        stop.set()  # What the command left behind must not cost the result: it gets errors from now on.
    if result is None:
        raise KeyboardInterrupt
    return result


async def _unless_interrupted(search: Callable[[], Awaitable[Found]]) -> Found:
    try:
        return await search()
    except TrialFailed:
        # A terminal's Ctrl-C reaches the command as well, and that it has ended may be seen before the signal is.
        await trio.sleep(SIGNAL_SECONDS)
        raise


async def _cancel_at_signal(signals: Any, scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _bisect(
    settings: BisectSettings, timeline: VolumeTimeline, trial: Trial, ends: tuple[Moment, Moment], report: Report
) -> Found:
    good, bad = ends
    for end in ends:
        is_volume = await trio.to_thread.run_sync(timeline.require, end)
    if await trio.to_thread.run_sync(timeline.alike, good, bad):
        raise BisectFailed(
            f"{settings.path or '.'} is the same at seq={good.seq} and at seq={bad.seq}: it cannot be good at the one "
            "and bad at the other"
        )
    if not settings.trust_ends:
        for end, verdict in ((good, Verdict.GOOD), (bad, Verdict.BAD)):
            await _check_end(trial, end, verdict, report)
    bisection = Bisection(timeline, good, bad)
    while (moment := await trio.to_thread.run_sync(bisection.next)) is not None:
        outcome = await trial.run(moment)
        bisection.tell(moment, outcome.verdict)
        report(moment, outcome, bisection.left, "")
    return Found(bisection, is_volume)


async def _check_end(trial: Trial, end: Moment, wanted: Verdict, report: Report) -> None:
    outcome = await trial.run(end)
    report(end, outcome, None, f"the {wanted.value} end, ")
    if outcome.verdict is Verdict.SKIPPED:
        raise BisectFailed(
            f"the {wanted.value} end, {place_text(end)}, cannot be tested{_because(outcome)}; give another"
        )
    if outcome.verdict is not wanted:
        raise BisectFailed(f"the {wanted.value} end, {place_text(end)}, is {outcome.verdict.value}{_because(outcome)}")


def _because(outcome: Outcome) -> str:
    return f": {outcome.why}" if outcome.why else f": COMMAND exited with status {outcome.status}"


def place_text(moment: Moment) -> str:
    """A moment for a person."""
    return f"seq={moment.seq} at {rfc3339(moment.time)} ({moment.kind.value})"
