"""One restore in place, from the command's side: what it agrees on with the mount's process before and after it.

Order: the claim; what is in the way, looked for; all that is to be written, read once; a bookmark, durable; the plan
from there to the moment wanted; the note of what is begun; the changes; everything durable; the store's latest moment
held against the one wanted; the source synced; the note dropped, the claim given back.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from dedup.errors import RewindError, UnknownName
from dedup.history import History
from dedup.moment import default_name
from dedup.pins import Pinning
from dedup.terminal import terminal_progress
from dedup.types import Moment, Seq, TimeNs
from fusefs.agent_control import Body, ask
from fusefs.in_place import InPlaceRestore, Written, differing
from fusefs.mountpoint import absolute, control_socket
from fusefs.open_files import holders
from fusefs.restore_plan import RestorePlan, make_plan, volumes_at
from replication.explanation import explain, is_expected
from replication.history import held_moments, open_history
from replication.route import Route
from replication.status import LinkState


@dataclass(frozen=True, slots=True)
class InPlaceRequest:
    """What the person asked for. `place` is a volume, a directory, or WHOLE_GROUP."""

    store: str
    group: str | None
    place: str
    at: str
    mountpoint: Path
    route: Route
    force: bool = False
    bookmark: bool = True
    check: bool = True


@dataclass(frozen=True, slots=True)
class InPlaceReport:
    """What was done. `bookmark` is empty where there is none; `after` is the store's moment at the end."""

    plan: RestorePlan
    written: Written
    bookmark: str
    after: Moment
    undo: str
    warnings: tuple[str, ...]


class InPlaceSession:
    """A restore in place between a store's history and the mount of the same group."""

    def __init__(self, request: InPlaceRequest, history: History, then: Moment) -> None:
        """`then` is held."""
        self._request = request
        self.history = history
        self._then = then
        self._mountpoint = absolute(request.mountpoint)
        self._ask = partial(_ask, control_socket(self._mountpoint))

    @contextmanager
    def plan(self) -> Iterator[RestorePlan]:
        """What would be done if it were begun now. The moments are held while the block runs."""
        with self._latest() as now:
            yield make_plan(self.history, self._request.place, now, self._then)

    def restore(self) -> InPlaceReport:
        """Does it. RewindError and OSError say what came of it: nothing was changed, or all is half restored."""
        with _kept_mounted(self._mountpoint):
            claim, unfinished = self._claim()
            try:
                report = self._restore(claim, unfinished)
            except BaseException:
                with suppress(RewindError, OSError):  # the mount may have died; the claim ends with this process
                    self._ask("restore.end", id=claim)
                raise
            self._ask("restore.end", id=claim, place=self._request.place, done=True)
            return report

    def _restore(self, claim: object, unfinished: list[dict[str, Any]]) -> InPlaceReport:
        with self.plan() as plan:
            if not differing(self.history, plan) and not plan.restyled:
                bookmark = self._noted(unfinished)
                return InPlaceReport(
                    plan, Written(), bookmark, plan.now, self._command(bookmark) if bookmark else "", ()
                )
            with self._carrying_out(plan) as restore:
                restore.require_way()
                restore.require_readable()
        bookmark = self._noted(unfinished) or (self._bookmark() if self._request.bookmark else "")
        with self.plan() as plan:
            if bookmark and self.history.snapshot(bookmark) is None:
                raise RewindError(f"{self._request.store} does not show the bookmark {bookmark} that the mount made")
            self._ask("restore.begin", id=claim, place=plan.place, seq=plan.then.seq, bookmark=bookmark)
            return self._carry_out(plan, bookmark)

    @contextmanager
    def _latest(self) -> Iterator[Moment]:
        """The moment of now, with all that was written through the mount, held. RewindError when the store does not
        have it: a copy of a store has its uuid, too."""
        self._flush()
        durable: Any = self._ask("durable")["durable_seq"]
        with held_moments(self.history, "latest") as (now,):
            if now.seq < durable:
                raise RewindError(
                    f"{self._request.store} ends at seq={now.seq}, and what the mount feeds has seq={durable} already: "
                    "it is a copy of that store, or was put back to an older state; name the one that the mount feeds"
                )
            yield now

    def _flush(self) -> None:
        """Has the kernel write what it keeps of files that are open: of mappings, and with `mount --writeback` of all.
        Otherwise it would come later, over what was restored."""
        reply: dict[str, Any] = self._ask("restore.open", place=self._request.place)
        for path in reply["open"]:
            with suppress(FileNotFoundError):  # removed since
                fd = os.open(self._mountpoint / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    # -- before ------------------------------------------------------------------------------------------------------

    def _claim(self) -> tuple[object, list[dict[str, Any]]]:
        """The claim's number, and what is half restored at this place. RewindError names who has it open."""
        request = self._request
        reply: dict[str, Any] = self._ask("restore.start", place=request.place, pid=os.getpid(), force=request.force)
        if in_use := reply["in_use"]:
            first = self._mountpoint / in_use[0]
            more = f" (and {len(in_use) - 1} volumes more)" if len(in_use) > 1 else ""
            found = ", ".join(holders(first)) or "by somebody whom this user may not see: ask root"
            raise RewindError(
                f"{first} is in use{more}: {found}; stop that first, or give --force and restart it afterwards"
            )
        return reply["id"], reply["unfinished"]

    def _noted(self, unfinished: list[dict[str, Any]]) -> str:
        """The bookmark of before an earlier try at the same, which the undo leads to; empty where there was none. It is
        kept whatever this try wants: the moment before this one is half restored."""
        names = [str(note["bookmark"]) for note in unfinished if note["seq"] == self._then.seq]
        return next((name for name in names if self.history.snapshot(name) is not None), "")

    def _bookmark(self) -> str:
        """Names the moment before."""
        name = f"before-restore-{default_name(TimeNs(time.time_ns()))}"
        self._ask("bookmark", name=name)
        return name

    # -- the changes, and after --------------------------------------------------------------------------------------

    def _carry_out(self, plan: RestorePlan, bookmark: str) -> InPlaceReport:
        undo = self._command(bookmark or f"seq={plan.now.seq}")
        try:
            with self._carrying_out(plan) as restore:
                restore.run()
            after = self._compared(plan)
        except BaseException as error:
            again = self._command(f"seq={plan.then.seq}")
            half = f"{plan.place} is half restored: `{again}` goes on, `{undo}` undoes it"
            if is_expected(error):
                raise HalfRestored(f"{explain(error)}; {half}") from error
            click.echo(f"rewindfs: warning: {half}", err=True)
            raise
        return InPlaceReport(plan, restore.written, bookmark, after, undo, tuple(restore.warnings))

    @contextmanager
    def _carrying_out(self, plan: RestorePlan) -> Iterator[InPlaceRestore]:
        with terminal_progress() as progress:
            yield InPlaceRestore(self.history, plan, self._mountpoint, check=self._request.check, progress=progress)

    def _compared(self, plan: RestorePlan) -> Moment:
        """The store's latest moment, whose pointers are those of the moment wanted. RewindError where they are not."""
        with self._latest() as after:
            if wrong := differing(self.history, make_plan(self.history, plan.place, after, plan.then)):
                raise RewindError(
                    f"{', '.join(wrong[:5])}: not as at seq={plan.then.seq} after all: somebody else wrote there"
                )
            return after

    def _command(self, at: str) -> str:
        """The command line of this restore, to another moment."""
        request = self._request
        words = ["rewindfs", "restore", request.store, request.place, "--at", at, "--in-place", str(request.mountpoint)]
        if request.group is not None:
            words += ["--group", request.group]
        return shlex.join([*words, *request.route.words])


class HalfRestored(RewindError):
    """A restore in place ended in the middle. The message says how to go on, and how to undo it."""


@contextmanager
def in_place_session(request: InPlaceRequest) -> Iterator[InPlaceSession]:
    """A session with a mount that is fit for it: of this store and group, and protected. RewindError says why not."""
    mountpoint = absolute(request.mountpoint)
    status: dict[str, Any] = _ask(control_socket(mountpoint), "status")
    if "store_uuid" not in status:
        raise RewindError(f"{mountpoint}: its process is older than this command; unmount it, and mount it again")
    group = status["group"]
    if request.group not in (None, group):
        raise RewindError(f"{mountpoint} is the mount of group {group}, not of group {request.group}")
    if status["state"] != "protected":
        raise RewindError(
            f"{mountpoint} is {status['state']}, so that now is no recovery point and the restore could not be undone; "
            "try again once `rewindfs status` says protected"
        )
    if status["link"] != LinkState.CONNECTED.value:
        raise RewindError(
            f"{mountpoint}: its link to {status['target']} is {status['link']}, so that nothing can be made durable; "
            "try again once `rewindfs status` says connected"
        )
    with _history_of(request, group, status) as history, held_moments(history, request.at) as (then,):
        volumes_at(history.group_at(Seq(then.seq)), request.place)
        yield InPlaceSession(request, history, then)


@contextmanager
def _kept_mounted(mountpoint: Path) -> Iterator[None]:
    """Nobody unmounts it while the block runs: it would be busy. What came after that would go into the bare directory
    below. NotMounted."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        control_socket(mountpoint)
        yield
    finally:
        os.close(fd)


@contextmanager
def _history_of(request: InPlaceRequest, group: str, status: dict[str, Any]) -> Iterator[History]:
    fed = status["store_path"] or status["target"]
    another = f"{absolute(request.mountpoint)} feeds group {group} of {fed}"
    with ExitStack() as opened:
        try:
            history = opened.enter_context(open_history(request.store, group, request.route, pinning=Pinning.MOMENTS))
        except UnknownName as error:
            raise RewindError(f"{another}, and {request.store} has no such group: {error}") from error
        if history.store_uuid != status["store_uuid"]:
            raise RewindError(f"{another}, which is not the store {request.store}; name the one that the mount feeds")
        yield history


def _ask(socket: Path, command: str, **body: object) -> Body:
    return trio.run(ask, socket, command, body)
