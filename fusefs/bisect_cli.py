"""The command `bisect`: finds the first bad recovery point by running a command on clones."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

import click
import trio

from dedup.errors import RewindError
from dedup.history import History
from dedup.moment import rfc3339
from dedup.terminal import group_option, json_option, print_json, shown
from dedup.types import Moment, Seq
from fusefs.bisection import Bisection, Verdict
from fusefs.clone_cli import checked_place, default_limit, overlay_options
from fusefs.clone_mount import CloneMount
from fusefs.clone_tree import normal
from fusefs.daemon import leave_when_free, serve
from fusefs.mountpoint import mount_options
from fusefs.overlay_directory import OverlayDirectory, clear_dead, make_directory
from fusefs.overlay_room import OverlayRoom
from fusefs.past_images import PastImages
from fusefs.trial import PLACEHOLDER, Outcome, Trial
from fusefs.volume_timeline import SeqRange, VolumeTimeline
from replication.address import store_path
from replication.background import configure_logging
from replication.history import open_history
from replication.reports import Subject, open_report
from replication.route import Route, route_options

_NAMES: Final = {Verdict.GOOD: "good", Verdict.BAD: "bad", Verdict.SKIPPED: "skipped"}
SUSPECTS_MAX: Final = 20
"""How many moments that may be the first bad one are printed for a person."""


class BisectFailed(RewindError):
    """The search came to no result. The message says why."""


@dataclass(frozen=True, slots=True)
class BisectSettings:
    """One search. `path`: of a volume or directory, empty for the whole group; `loop_options` None: not mounted."""

    store: str
    group: str | None
    route: Route
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


@dataclass(slots=True)
class Steps:
    """What was tried, as it goes on: lines for a person, and in a file if there is one; and rows of the document."""

    log: TextIO | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def say(self, line: str, *, result: bool = False) -> None:
        """On stderr, but for the `result`."""
        click.echo(line, err=not result)
        if self.log is not None:
            self.log.write(line + "\n")
            self.log.flush()

    def add(self, moment: Moment, outcome: Outcome, left: int | None, *, what: str = "") -> None:
        status = "" if outcome.status is None else f"  exit {outcome.status}"
        why = f" ({outcome.why})" if outcome.why else ""
        more = "" if left is None else f"; left: {left} records, about {_steps_for(left)} steps"
        self.say(f"{what}{_place(moment)}{status}: {_NAMES[outcome.verdict]}{why}{more}")
        self.rows.append(
            {**_document(moment), "exit": outcome.status, "verdict": outcome.verdict.value, "why": outcome.why or None}
        )


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", metavar="VOLUME")
@click.argument("command", metavar="-- COMMAND {}", nargs=-1, type=click.UNPROCESSED)
@click.option("--good", required=True, metavar="TIME", help="A moment at which COMMAND exits with 0.")
@click.option("--bad", required=True, metavar="TIME", help="A later one at which it does not.")
@click.option("--mount", "loop", is_flag=True, help="Loop-mount the volume; {} is where. Needs root.")
@click.option("--mount-options", metavar="OPTS", help="For --mount: options of mount(8), such as ro,noload.")
@click.option("--flushed", is_flag=True, help="Try only moments that an application had flushed.")
@click.option("--trust-ends", is_flag=True, help="Do not run COMMAND at the two ends first.")
@click.option("--log", "log_file", type=click.Path(path_type=Path, dir_okay=False), help="Keep the steps in a file.")
@click.option("--allow-other", is_flag=True, help="COMMAND may look at the volume as another user.")
@overlay_options[0]
@overlay_options[1]
@group_option
@json_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@route_options
@click.pass_context
def bisect(
    context: click.Context,
    store: str,
    volume: str,
    command: tuple[str, ...],
    good: str,
    bad: str,
    loop: bool,
    mount_options: str | None,
    flushed: bool,
    trust_ends: bool,
    log_file: Path | None,
    allow_other: bool,
    place: Path | None,
    overlay_limit: int | None,
    group: str | None,
    as_json: bool,
    debug: bool,
    route: Route,
) -> None:
    """Find the first recovery point of VOLUME that COMMAND finds bad, between two that are known.

    COMMAND is run with {} replaced, in every word, by the path of a file: the volume at the moment that is tried, a
    fresh clone that it may write to. VOLUME may be a directory of the source, or `.`: {} is a directory then. Exit
    status 0: good; 125: this moment cannot be tested, skip it; any other up to 127: bad; from 128 on, or killed by a
    signal: stop. What COMMAND prints goes to stderr.

    \b
    rewindfs bisect /backup/vm.store app.db --good 2d --bad latest -- sh -c 'sqlite3 {} "SELECT …" | grep -q …'
    """
    _check_command(command, loop=loop, mount_options=mount_options)
    path = store_path(store)
    where = checked_place(place, store, None)
    settings = BisectSettings(
        store if path is None else str(path.absolute()),
        group,
        route,
        normal(volume),
        good,
        bad,
        command,
        (mount_options or "") if loop else None,
        trust_ends,
        flushed,
        where,
        default_limit(where) if overlay_limit is None else overlay_limit,
        allow_other,
    )
    configure_logging(foreground=False, log_file=None, debug=debug or bool((context.obj or {}).get("debug")))
    with ExitStack() as stack:
        log = None if log_file is None else stack.enter_context(closing(log_file.open("a")))
        steps = Steps(log)
        steps.say(f"bisect {shown(volume)} of {shown(store)}: good {good}, bad {bad}: {shown(' '.join(command))}")
        found = trio.run(_search, settings, steps)
        _report(settings, volume, found, steps, as_json=as_json)


def _check_command(command: tuple[str, ...], *, loop: bool, mount_options: str | None) -> None:
    if not any(PLACEHOLDER in word for word in command):
        raise click.UsageError(
            "write {} in COMMAND where the path of the volume is to go, as in: -- fsck.ext4 -fn {}"
            if command
            else "no COMMAND; write it behind --, with {} for the path of the volume, as in: -- fsck.ext4 -fn {}"
        )
    if mount_options is not None and not loop:
        raise click.UsageError("--mount-options goes with --mount")
    if loop and os.geteuid() != 0:
        raise BisectFailed("--mount needs root, for the loop device; run it as root, or give COMMAND the file itself")
    if PLACEHOLDER not in command[0] and shutil.which(command[0]) is None:
        raise BisectFailed(f"{command[0]}: no such program")


# -- the search --------------------------------------------------------------------------------------------------------


async def _search(settings: BisectSettings, steps: Steps) -> Bisection:
    """Opens the history and mounts a place for clones, searches, and takes it all away again, whatever happens."""
    ends = await trio.to_thread.run_sync(_ends, settings)
    gaps = await trio.to_thread.run_sync(_gaps, settings, ends[1].seq)
    with ExitStack() as stack:
        opened = open_history(settings.store, settings.group, settings.route)
        history = await trio.to_thread.run_sync(stack.enter_context, opened)
        for end in ends:
            await trio.to_thread.run_sync(_still_there, history, end)
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
                return await _mounted(settings, trial, partial(_bisect, settings, timeline, trial, ends, steps))
            finally:
                operations.close()


def _ends(settings: BisectSettings) -> tuple[Moment, Moment]:
    with open_history(settings.store, settings.group, settings.route) as history:
        good, bad = history.resolve(settings.good), history.resolve(settings.bad)
    if good.seq >= bad.seq:
        raise BisectFailed(
            f"--good must be a moment before --bad, but {settings.good} is seq={good.seq} and {settings.bad} is "
            f"seq={bad.seq}; to find where something became good, let COMMAND exit with 0 where it is bad"
        )
    return good, bad


def _still_there(history: History, end: Moment) -> None:
    if history.resolve(f"seq={end.seq}").seq != end.seq:
        raise BisectFailed(f"seq={end.seq} has just been thinned out; try again with another moment")


def _gaps(settings: BisectSettings, last: Seq) -> list[SeqRange]:
    """All that begin at or before `last`."""
    with open_report(settings.store, Subject("points", settings.group), settings.route) as report:
        gaps = report.document().get("gaps", [])
    found = [(gap["from"]["seq"], last if gap["to"] is None else gap["to"]["seq"]) for gap in gaps]
    return [gap for gap in found if gap[0] <= last]


async def _mounted(settings: BisectSettings, trial: Trial, search: Callable[[], Any]) -> Bisection:
    """Runs `search` while the clones' mount is there. KeyboardInterrupt after SIGINT or SIGTERM, everything undone."""
    make_directory(trial.mountpoint)
    options = mount_options(settings.store, allow_other=settings.allow_other)
    leaving = trio.Event()
    result: Bisection | None = None

    async def serving(task_status: trio.TaskStatus[None]) -> None:
        await serve(trial.operations, trial.mountpoint, options, signals=(), task_status=task_status)
        if not leaving.is_set():
            raise BisectFailed(f"{trial.mountpoint} was unmounted by somebody else")

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(serving)
            try:
                async with trio.open_nursery() as inner:
                    inner.start_soon(_cancel_at_signal, signals, inner.cancel_scope)
                    result = await search()
                    inner.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    leaving.set()
                    await leave_when_free(trial.mountpoint)
    if result is None:
        raise KeyboardInterrupt
    return result


async def _cancel_at_signal(signals: Any, scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _bisect(
    settings: BisectSettings, timeline: VolumeTimeline, trial: Trial, ends: tuple[Moment, Moment], steps: Steps
) -> Bisection:
    good, bad = ends
    if await trio.to_thread.run_sync(timeline.alike, good, bad):
        raise BisectFailed(
            f"{settings.path or '.'} is the same at seq={good.seq} and at seq={bad.seq}: it cannot be good at the one "
            "and bad at the other"
        )
    if not settings.trust_ends:
        for end, verdict in ((good, Verdict.GOOD), (bad, Verdict.BAD)):
            await _check_end(trial, end, verdict, steps)
    bisection = Bisection(timeline, good, bad)
    while (moment := await trio.to_thread.run_sync(bisection.next)) is not None:
        outcome = await trial.run(moment)
        bisection.tell(moment, outcome.verdict)
        steps.add(moment, outcome, bisection.left)
    return bisection


async def _check_end(trial: Trial, end: Moment, wanted: Verdict, steps: Steps) -> None:
    outcome = await trial.run(end)
    steps.add(end, outcome, None, what=f"the {wanted.value} end, ")
    if outcome.verdict is Verdict.SKIPPED:
        raise BisectFailed(f"the {wanted.value} end, {_place(end)}, cannot be tested{_because(outcome)}; give another")
    if outcome.verdict is not wanted:
        raise BisectFailed(f"the {wanted.value} end, {_place(end)}, is {outcome.verdict.value}{_because(outcome)}")


def _because(outcome: Outcome) -> str:
    return f": {outcome.why}" if outcome.why else f": COMMAND exited with status {outcome.status}"


# -- what is said ------------------------------------------------------------------------------------------------------


def _report(settings: BisectSettings, volume: str, found: Bisection, steps: Steps, *, as_json: bool) -> None:
    """The result; BisectFailed when what was skipped leaves several."""
    decided = not found.skipped
    if as_json:
        suspects = [stretch.first for stretch in found.skipped]
        print_json(
            {
                "volume": settings.path or ".",
                "first_bad": _document(found.first_bad) if decided else None,
                "last_good": _document(found.last_good),
                "suspects": [_document(moment) for moment in ([] if decided else [*suspects, found.first_bad])],
                "steps": steps.rows,
                "skipped": [row for row in steps.rows if row["verdict"] == Verdict.SKIPPED.value],
            }
        )
    say = partial(steps.say, result=not as_json)
    if not decided:
        moments = [*(stretch.first for stretch in found.skipped), found.first_bad]
        for moment in moments[:SUSPECTS_MAX]:
            say(f"  {_place(moment)}")
        if len(moments) > SUSPECTS_MAX:
            say(f"  … and {len(moments) - SUSPECTS_MAX} more, up to {_place(moments[-1])}")
        raise BisectFailed(
            f"only skipped moments are left: any of {len(moments)} may be the first bad one, from "
            f"{_place(moments[0])}, to {_place(moments[-1])}; the last good one is {_place(found.last_good)}"
        )
    seq = found.last_good.seq
    say(f"to look at it:   rewindfs browse {shown(settings.store)} DIR, then DIR/points/@seq={seq}/{shown(volume)}")
    say(f"to have it back: rewindfs restore {shown(settings.store)} {shown(volume)} --at seq={seq} --to FILE")
    say(f"first bad recovery point: {_place(found.first_bad)}; last good one: {_place(found.last_good)}")


def _place(moment: Moment) -> str:
    return f"seq={moment.seq} at {rfc3339(moment.time)} ({moment.kind.value})"


def _document(moment: Moment) -> dict[str, Any]:
    return {"seq": moment.seq, "time": rfc3339(moment.time), "kind": moment.kind.value}


def _steps_for(left: int) -> int:
    return math.ceil(math.log2(left + 1))
