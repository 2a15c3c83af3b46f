"""The command `rewindfs reconcile` in the mount's process: everything is compared online, beside applications.

A difference between two sound sides means that the history was wrong there since an unknown moment. So that it is said,
what is repaired lies in a gap: it begins before the first block is sent and ends when all is equal; the log and the
command name the ranges. Moments before it can still be restored, and may be wrong in those ranges. Where nothing
differs, nothing is recorded and no gap begins. A block that is damaged at the store differs too, and is healed.

Invariants:
- one such reconcile at a time, and none while another is due or under way;
- a region that differs is marked in the intent log, durably, before the gap begins: whatever ends this halfway, an
  unmount, a kill, an outage, a cancellation, it is compared again before the gap ends;
- it ends when the command that asked for it is gone: nobody polled for CLIENT_SECONDS.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

import trio

from dedup.errors import RewindError
from dedup.types import ReconcileBegin, Seq, VolumeId
from fusefs.agent import Agent
from fusefs.agent_control import Body, Handlers
from fusefs.agent_source import AgentSource
from fusefs.agent_start import now_equal
from replication.explanation import explain
from replication.messages import Level
from replication.reconcile import Reconciled, Reconciler, Work, all_regions
from replication.region_tracker import Region

log = logging.getLogger(__name__)

CLIENT_SECONDS: Final = 15.0
"""A command polls about each second."""
POLL_SECONDS: Final = 1.0
"""How long a poll waits for the end."""
REASON: Final = "a reconcile found that the store differed from the source"
_INTERRUPTED: Final = (
    "recording was interrupted while source and store were compared; the mount reconciles by itself, try again once "
    "`rewindfs status` says protected"
)


@dataclass(slots=True)
class _Run:
    """One reconcile by command."""

    number: int
    verify_only: bool
    progress: Reconciled
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    report: Body = field(default_factory=dict)
    error: str = "cancelled"


class OnlineReconcile:
    """Runs what the command asks for. `serve` must run for it, until the drain cancels it."""

    def __init__(self) -> None:
        self._due = trio.Event()
        self._run: _Run | None = None
        """The last one, over or not."""
        self._serving = False

    @property
    def progress(self) -> Reconciled | None:
        """Of the one under way."""
        return self._run.progress if self._run is not None and not self._run.done.is_set() else None

    def handlers(self) -> Handlers:
        """For the control socket."""
        return {"reconcile.start": self._start, "reconcile.poll": self._poll, "reconcile.cancel": self._cancel}

    async def serve(self, agent: Agent) -> None:
        """Runs until cancelled, or until the history is lost."""
        self._serving = True
        try:
            while True:
                await self._due.wait()
                self._due = trio.Event()
                if self._run is not None:
                    await _attempt(agent, self._run)
        finally:
            self._serving = False
            if self._run is not None:
                self._run.done.set()

    async def _start(self, body: Body) -> Body:
        if not self._serving:
            raise RewindError("the mount is being left; mount it again first")
        if self.progress is not None:
            raise RewindError("a reconcile by command is under way already; see `rewindfs status`")
        number = 1 if self._run is None else self._run.number + 1
        verify_only = bool(body.get("verify_only"))
        run = self._run = _Run(number, verify_only, Reconciled("verify" if verify_only else "online"))
        run.scope.deadline = trio.current_time() + CLIENT_SECONDS
        self._due.set()
        return {"id": number}

    async def _poll(self, body: Body) -> Body:
        """Where it is, after POLL_SECONDS or at the end; then the report, or RewindError."""
        run = self._named(body)
        run.scope.deadline = trio.current_time() + CLIENT_SECONDS
        with trio.move_on_after(POLL_SECONDS):
            await run.done.wait()
        if run.done.is_set() and run.error:
            raise RewindError(run.error)
        return {**run.progress.document(), "finished": run.done.is_set(), "report": run.report}

    async def _cancel(self, body: Body) -> Body:
        run = self._named(body)
        run.scope.cancel()
        await run.done.wait()
        return {}

    def _named(self, body: Body) -> _Run:
        if self._run is None or body.get("id") != self._run.number:
            raise RewindError("that reconcile is over")
        return self._run


async def _attempt(agent: Agent, run: _Run) -> None:
    try:
        with run.scope:
            run.report = await _reconcile(agent, run)
            run.error = ""
        if run.scope.cancelled_caught:
            log.info("the reconcile by command was cancelled")
    except (RewindError, OSError) as error:
        run.error = explain(error)
        log.error("the reconcile by command ended: %s", run.error)
    finally:
        run.done.set()


async def _reconcile(agent: Agent, run: _Run) -> Body:
    """The report. Raises RewindError when it cannot be made."""
    agent.link.require_equal()
    spells = agent.link.spells
    known = [volume for volume in agent.volumes if volume.known]
    names = {volume.id: volume.path for volume in known}
    gap = _Gap(agent, spells)
    reconciler = Reconciler(
        agent.link,
        AgentSource(agent),
        verify_only=run.verify_only,
        progress=run.progress,
        on_differing=gap.take_in,
        on_equal=gap.equal,
    )
    try:
        await reconciler.run([Work(volume.id, all_regions(volume.size)) for volume in known])
        if agent.link.spells != spells:
            raise RewindError(_INTERRUPTED)
        await gap.end()
    finally:
        gap.leave()
    found = reconciler.found
    names.update((volume.id, volume.path) for volume in agent.volumes)
    ranges = [{"volume": names[number], "offset": at, "length": size} for number, at, size in sorted(found.ranges)]
    if ranges:
        log.error("source and store differed in %d bytes: %s", found.bytes, ranges[:10])
    return {
        "compared_bytes": run.progress.compared,
        "differing_bytes": found.bytes,
        "ranges": ranges,
        "ranges_omitted": found.omitted,
        "sent_bytes": run.progress.sent,
        "wire_bytes": run.progress.said,
    }


class _Gap:
    """The gap of one reconcile, which begins with the first region that differs."""

    def __init__(self, agent: Agent, spells: int) -> None:
        self._agent = agent
        self._spells = spells
        self._taken: set[tuple[VolumeId, Region]] = set()
        self._beginning = trio.Lock()
        self._begun = self._ended = False

    async def take_in(self, volume: VolumeId, region: Region) -> None:
        """Returns when blocks of the region may be sent: it is marked, and the gap has begun. RewindError where another
        reconcile is owed meanwhile."""
        agent = self._agent
        self._taken.add((volume, region))
        await agent.intent.mark_ranges([(volume, range(region, region + 1))])
        async with self._beginning:
            if agent.link.spells != self._spells:
                raise RewindError(_INTERRUPTED)
            if self._begun:
                return
            self._begun = True
            agent.link.equal = False
            log.error("source and store differ: %s; a gap begins", REASON)
            await agent.insist(lambda seq, time, run: ReconcileBegin(seq, time, run, REASON))

    def equal(self, volume: VolumeId, region: Region, seq: Seq, spells: int) -> None:
        """The region is equal: if it was not before, its mark may go."""
        if (volume, region) in self._taken:
            self._agent.tracker.equal(volume, region, seq, spells)

    async def end(self) -> None:
        """All is equal: ends the gap, if it has begun; durable when it returns."""
        if not self._begun:
            return
        seq = await self._agent.end_gap(self._spells)
        if seq is None:
            raise RewindError(_INTERRUPTED)
        await self._agent.first.reached(seq, Level.DURABLE)
        now_equal(self._agent, self._spells, seq)
        self._ended = True

    def leave(self) -> None:
        """Whatever came of it: a gap that has begun and not ended is left to the mount, as one after an outage is."""
        if self._begun and not self._ended:
            self._agent.link.gap_opened.set()
