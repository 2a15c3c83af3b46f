"""An agent's start: what may differ between source and store, decided from what the last end left, and recorded.

Pure decision (`plan`), then the records that bring the store's list of volumes up to date (`begin`), then the
reconcile of contents, beside applications that write (`make_equal`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

import trio

from dedup.types import Epoch, EpochStart, VolumeId, VolumeState
from fusefs.agent import Agent
from fusefs.agent_source import AgentSource
from fusefs.state_directory import AgentState, FileMark
from fusefs.volume_records import attributes_record, create_record, resize_record, retire_record
from replication.intent_log import IntentLog
from replication.messages import Level, Welcome
from replication.reconcile import Reconciled, Reconciler, Work, all_regions
from replication.region_tracker import Region

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the start has to do. `clean`: nothing; the history goes on without a gap."""

    everything: bool
    """Every volume is compared whole."""
    created: tuple[str, ...]
    """Files that the store does not know."""
    retired: tuple[VolumeState, ...]
    """Volumes whose files are gone."""
    changed: tuple[str, ...]
    """Files that were changed behind the mount: compared whole."""
    regions: Mapping[VolumeId, Sequence[Region]]
    """Marked regions of the other volumes."""
    gap: bool = False
    """The history is in a gap already: a start before this one began it and did not live to end it."""

    @property
    def clean(self) -> bool:
        return not (self.everything or self.created or self.retired or self.changed or self.regions or self.gap)


def plan(
    welcome: Welcome,
    known: Sequence[VolumeState],
    files: Mapping[str, os.stat_result],
    last: AgentState,
    intent: IntentLog,
) -> Plan:
    """Decides from the store's list, the source's, and what the agent before left behind."""
    by_path = {volume.path: volume for volume in known}
    created = tuple(sorted(files.keys() - by_path.keys()))
    retired = tuple(volume for volume in known if volume.path not in files)
    clean_end = last.clean is not None and last.clean.held == welcome.held
    everything = (
        not welcome.has_base
        or welcome.held < last.durable
        or last.store != welcome.store
        or last.others
        or intent.everything
        # A name that was being changed may have put another file in a volume's place.
        or intent.found_namespace
        or (last.clean is not None and not clean_end)
    )
    changed = []
    for path in sorted(files.keys() & by_path.keys()):
        left = last.clean.volumes.get(path) if last.clean is not None else None
        touched = left != FileMark.of(files[path]) if clean_end else by_path[path].size != files[path].st_size
        if touched:
            changed.append(path)
    compared = {by_path[path].volume for path in changed}
    kept = {by_path[path].volume for path in files.keys() & by_path.keys()}
    regions = {
        volume: marked for volume, marked in intent.marked().items() if volume in kept and volume not in compared
    }
    return Plan(everything, created, retired, tuple(changed), {} if everything else regions, welcome.reconciling)


async def begin(
    agent: Agent, plan: Plan, epoch: Epoch, known: Sequence[VolumeState], files: Mapping[str, os.stat_result]
) -> list[Work]:
    """Records the start and brings the list of volumes up to date. Returns the contents that are to be reconciled.

    Applications may write as soon as it returns: every file is a volume that the store knows.
    """
    if plan.everything or plan.created or plan.changed:
        # Before anything is recorded: should this start be killed, the next one owes the same.
        await agent.intent.mark_everything()
    await agent.insist(lambda seq, time, run: EpochStart(seq, time, run, epoch, plan.clean))
    for gone in plan.retired:
        await agent.insist(partial(retire_record, gone.volume))
        agent.intent.volumes_gone(gone.volume)
    work: list[Work] = []
    for volume in known:
        status = files.get(volume.path)
        if status is None:
            continue
        added = agent.volumes.add(volume.path, status, volume.volume)
        if status.st_size != volume.size:
            await agent.insist(partial(resize_record, added))
        if (added.mode, added.uid, added.gid) != (volume.mode, volume.uid, volume.gid):
            await agent.insist(partial(attributes_record, added))
        if plan.everything or volume.path in plan.changed:
            work.append(Work(volume.volume, all_regions(status.st_size)))
        elif volume.volume in plan.regions:
            work.append(Work(volume.volume, plan.regions[volume.volume]))
    for path in plan.created:
        work.append(await _record_file(agent, path, files[path]))
    return work


async def _record_file(agent: Agent, path: str, status: os.stat_result) -> Work:
    made = agent.volumes.add(path, status)
    await agent.insist(partial(create_record, made))
    return Work(made.id, all_regions(status.st_size), fresh=True)


async def make_equal(agent: Agent, work: Sequence[Work], progress: Reconciled, spells: int = 0) -> None:
    """Reconciles the contents, then records the end of the gap: from there on every record is a recovery point.

    `spells` is `link.spells` as of the choice of `work`: where changes went unrecorded since, it goes around again.
    """
    await Reconciler(agent.link, AgentSource(agent), progress=progress).run(work)
    while (end := await agent.end_gap(spells)) is None:
        spells = agent.link.spells
        again = await _work_after_outage(agent)
        await Reconciler(agent.link, AgentSource(agent), progress=progress).run(again)
        work = [*work, *again]
    await agent.first.reached(end, Level.DURABLE)
    for one in work:
        if one.regions:
            agent.tracker.touch(one.volume, range(one.regions[0], one.regions[-1] + 1), end, now=monotonic())
    agent.intent.namespace_compared()
    agent.intent.clear_everything()
    agent.equal_again(spells)
    log.info("the store equals the source as of seq %d; %d bytes were sent", end, progress.sent)


async def _work_after_outage(agent: Agent) -> list[Work]:
    fresh = set(await agent.catch_up())
    work = [Work(volume.id, all_regions(volume.size), fresh=True) for volume in agent.volumes if volume.id in fresh]
    return work + [Work(volume, regions) for volume, regions in agent.intent.marked().items() if volume not in fresh]


async def resync_after_outages(agent: Agent, progress: Reconciled) -> None:
    """Whenever changes went unrecorded and records are taken again: brings the store up to date and ends the gap.

    Runs until cancelled.
    """
    while True:
        await agent.link.gap_opened.wait()
        agent.link.gap_opened = trio.Event()
        if not agent.link.equal:  # else the reconcile under way when it opened has closed it, too
            spells = agent.link.spells
            await make_equal(agent, await _work_after_outage(agent), progress, spells)
