"""An agent's start: what may differ between source and store, decided from what the last end left, and recorded.

Pure decision (`plan`), then the records that bring the store's list of volumes up to date (`begin`), then the
reconcile of contents, beside applications that write (`make_equal`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

import trio

from dedup.errors import Damaged
from dedup.types import Epoch, EpochStart, Seq, VolumeId, VolumeState
from fusefs.agent import Agent
from fusefs.agent_source import AgentSource
from fusefs.catch_up import catch_up
from fusefs.state_directory import AgentState, FileMark
from fusefs.volume_records import attributes_record, create_record, resize_record, retire_record
from fusefs.volume_table import Volume
from replication.intent_log import IntentLog
from replication.messages import Level, Welcome
from replication.reconcile import Reconciled, Reconciler, Work, all_regions
from replication.region_tracker import Region, regions_of
from replication.source_reads import data_ranges

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
    """The history is in a gap already, or there is no base: a start before this one did not live to end it."""

    @property
    def clean(self) -> bool:
        return not (self.everything or self.created or self.retired or self.changed or self.regions or self.gap)


def open_intent(path: Path, last: AgentState) -> IntentLog:
    """The intent log; where it is lost or damaged a new one, by which everything is compared. Blocks. OSError."""
    try:
        if not path.exists() and last.store:
            # There was one since the first mount: what was marked in it is unknown.
            raise Damaged(f"{path} is gone")
        return IntentLog.open(path)
    except Damaged as damage:
        log.error("%s; everything will be compared", damage)
        return IntentLog.open_damaged(path)


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
    # The same seq with another time is another record: of a copy of the store that went another way.
    same = last.clean is not None and last.clean.time in (0, welcome.time)
    clean_end = last.clean is not None and last.clean.held == welcome.held and same
    everything = (
        welcome.held < last.durable
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
    gap = welcome.reconciling or not welcome.has_base
    return Plan(everything, created, retired, tuple(changed), {} if everything else regions, gap)


async def begin(
    agent: Agent, plan: Plan, epoch: Epoch, known: Sequence[VolumeState], files: Mapping[str, os.stat_result]
) -> list[Work]:
    """Records the start and brings the list of volumes up to date. Returns the contents that are to be reconciled.

    Applications may write as soon as it returns: every file is a volume that the store knows.
    """
    here = [volume for volume in known if volume.path in files]
    added = {volume.volume: agent.volumes.add(volume.path, files[volume.path], volume.volume) for volume in here}
    created = [agent.volumes.add(path, files[path]) for path in plan.created]
    work: list[Work] = []
    for number, one in added.items():
        if plan.everything or one.path in plan.changed:
            work.append(Work(number, all_regions(one.size)))
        elif number in plan.regions:
            work.append(Work(number, plan.regions[number]))
    work += await trio.to_thread.run_sync(_data_of, agent.source, created)
    # Before anything is recorded: should this start be killed, the next one owes the same, less what was confirmed.
    await agent.intent.mark_ranges((part.volume, span) for part in work for span in _spans(part.regions))
    for marked in agent.intent.marked():
        if agent.volumes.get(marked) is None:
            agent.intent.volumes_gone(marked)
    await agent.insist(lambda seq, time, run: EpochStart(seq, time, run, epoch, plan.clean))
    for gone in plan.retired:
        await agent.insist(partial(retire_record, gone.volume))
    for state in here:
        volume = added[state.volume]
        if volume.size != state.size:
            await agent.insist(partial(resize_record, volume))
        if (volume.mode, volume.uid, volume.gid) != (state.mode, state.uid, state.gid):
            await agent.insist(partial(attributes_record, volume))
    for volume in created:
        await agent.insist(partial(create_record, volume))
    return work


def _data_of(source: Path, volumes: Sequence[Volume]) -> list[Work]:
    """The data of volumes of which the store knows nothing, by regions. Blocks."""
    work = []
    for volume in volumes:
        fd = os.open(source / volume.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            regions = {region for span in data_ranges(fd, volume.size) for region in regions_of(*span)}
        finally:
            os.close(fd)
        work.append(Work(volume.id, [Region(region) for region in sorted(regions)], fresh=True))
    return work


def _spans(regions: Sequence[Region]) -> Iterator[range]:
    """Runs of consecutive regions, which ascend."""
    start = 0
    for index in range(1, len(regions) + 1):
        if index == len(regions) or regions[index] != regions[index - 1] + 1:
            yield range(regions[start], regions[index - 1] + 1)
            start = index


async def make_equal(agent: Agent, work: Sequence[Work], progress: Reconciled) -> None:
    """Reconciles what a start has found that it owes, and ends the gap. Raises HistoryLost."""
    progress.begin("start")
    await _settle(agent)
    await _make_equal(agent, work, progress, 0)


async def _settle(agent: Agent) -> None:
    """The listing that the start recorded is durable on both sides: from now on the marks alone say what is owed, and a
    start after this one goes on where this one ends."""
    await agent.first.reached(agent.link.last, Level.DURABLE)
    try:
        await agent.brackets.sync()
    except OSError as error:
        log.error("the source cannot be synced: %s; if this mount is killed, the next one compares everything", error)
        return
    agent.intent.namespace_compared()
    agent.intent.clear_everything()


async def _make_equal(agent: Agent, work: Sequence[Work], progress: Reconciled, spells: int) -> None:
    """Reconciles the contents, then records the end of the gap: from there on every record is a recovery point.

    `spells` is `link.spells` as of the choice of `work`: where changes went unrecorded since, it goes around again.
    """
    await reconciler(agent, progress).run(work)
    while (end := await agent.end_gap(spells)) is None:
        spells = agent.link.spells
        await reconciler(agent, progress).run(await _work_after_outage(agent))
    await agent.first.reached(end, Level.DURABLE)
    now_equal(agent, spells, end)
    log.info("the store equals the source as of seq %d; %d bytes were sent", end, progress.sent)


def reconciler(agent: Agent, progress: Reconciled) -> Reconciler:
    """One that lets go of each region's mark as soon as that may be."""
    return Reconciler(agent.link, AgentSource(agent), progress=progress, on_equal=agent.tracker.equal)


def now_equal(agent: Agent, spells: int, end: Seq) -> None:
    """The end of the gap is durable, `end` its seq: marks that nobody follows may go as others do."""
    for volume, regions in agent.intent.marked().items():
        for region in regions:
            if (volume, region) not in agent.tracker:
                agent.tracker.touch(volume, range(region, region + 1), end, now=monotonic())
    agent.equal_again(spells)


async def _work_after_outage(agent: Agent) -> list[Work]:
    fresh = set(await catch_up(agent))
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
            progress.begin("resync")
            await _make_equal(agent, await _work_after_outage(agent), progress, spells)
