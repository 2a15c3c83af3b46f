"""Consolidation in the second appliance: when a group's history is looked at, and how a piece gets from the child, who
folds it, to the writer, who commits it.

Invariants:
- all that changes the store goes through `StoreWriter.run`, a piece at a time;
- a segment is completed when it has been appended to for a while, so that it can grow old as a whole; a store that is
  not written to gets no new segments but for heartbeats.
"""

from __future__ import annotations

import logging
import random
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from dedup.consolidation import Folded, SegmentAges, plan
from dedup.consolidator import Outcome, commit_piece, discard_pieces, forget_names, history_of
from dedup.journal_reader import SegmentFile, chain
from dedup.retention import Policy
from dedup.types import Seq, TimeNs
from dedup.worker import Thin, Thinned
from replication.store_writer import StoreWriter
from replication.worker_process import WorkerProcess

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter

log = logging.getLogger("rewindfs.maintenance")

SEGMENT_SECONDS: Final = 600.0
"""For how long a segment is appended to before it is completed: history is thinned so much later than it may be."""
WINDOWED_SECONDS_MIN: Final = 30.0
"""The same at least where IOs go to a windowed data journal: for as long as its window."""
COMMIT_TRIES: Final = 64
COMMIT_PAUSE_SECONDS_MAX: Final = 0.03
_SECOND_NS: Final = 1_000_000_000


class Children(Protocol):
    """Where a child that computes comes from."""

    def __call__(self) -> AbstractAsyncContextManager[WorkerProcess]: ...


@dataclass(slots=True)
class _Watched:
    """What is remembered of a group between two looks."""

    segment: Seq
    since: float
    """When its active segment was seen first, by trio's clock."""
    known: dict[SegmentFile, SegmentAges] = field(default_factory=dict)


class Thinning:
    """Called by one task at a time."""

    def __init__(self, writer: StoreWriter, children: Children) -> None:
        self._writer = writer
        self._children = children
        self._groups: dict[str, _Watched] = {}

    async def round(self, policy: Policy) -> Outcome:
        """What is due now. Raises WorkerLost, or what the store raises."""
        outcome = Outcome()
        for group in self._writer.store.groups:
            if self._segment_due(group, policy):
                await self._writer.run(group.complete_segment)
            outcome += await self._thin(group, policy)
        return outcome

    async def all(self, policy: Policy) -> Outcome:
        """The same, of all that was written so far."""
        outcome = Outcome()
        for group in self._writer.store.groups:
            await self._writer.run(group.complete_segment)
            outcome += await self._thin(group, policy)
        return outcome

    def _watched(self, group: GroupWriter) -> _Watched:
        segment = group.position.segment
        watched = self._groups.get(group.name)
        if watched is None:
            watched = self._groups[group.name] = _Watched(segment, trio.current_time())
        if watched.segment != segment:
            watched.segment, watched.since = segment, trio.current_time()
        return watched

    def _segment_due(self, group: GroupWriter, policy: Policy) -> bool:
        finest = policy.tiers[0][1] / _SECOND_NS
        seconds = min(SEGMENT_SECONDS, max(1.0, finest / 4))
        spec = group.state.journal_spec(group.state.journal)
        if spec is not None and spec.granularity_ns:
            seconds = min(seconds, max(WINDOWED_SECONDS_MIN, spec.granularity_ns / _SECOND_NS))
        return trio.current_time() - self._watched(group).since >= seconds

    async def _thin(self, group: GroupWriter, policy: Policy) -> Outcome:
        now = TimeNs(time.time_ns())
        await self._writer.run(forget_names, group, now)
        watched = self._watched(group)
        if not await self._writer.run(_is_due, group, policy, now, watched):
            return Outcome()
        outcome = Outcome()
        postponed: tuple[Seq, ...] = ()
        async with self._children() as worker:
            while True:
                reply = await worker.ask(Thin(group.name, policy, now, postponed, tuple(watched.known.values())))
                assert isinstance(reply, Thinned)
                watched.known = {one.segment: one for one in reply.known}
                folded = reply.folded
                if folded is None:
                    break
                if await self._commit(group, folded):
                    outcome += Outcome(1, folded.freed_bytes)
                else:
                    postponed = (*postponed, folded.piece.stretch.last)
        if outcome.pieces:
            done = "group %s: %d pieces of history thinned, %d bytes less"
            log.info(done, group.name, outcome.pieces, outcome.freed_bytes)
        return replace(outcome, postponed=len(postponed))

    async def _commit(self, group: GroupWriter, folded: Folded) -> bool:
        """Whether the piece took its place. It cannot while a reader is just pinning, which may be nearly always: so it
        is tried often, and at no regular times."""
        for _ in range(COMMIT_TRIES):
            done = await self._writer.run(commit_piece, group, folded)
            if done is not None:
                return done
            await trio.sleep(random.uniform(0.0, COMMIT_PAUSE_SECONDS_MAX))
        log.warning("group %s: readers look moments up all the time, and keep history from being thinned", group.name)
        await self._writer.run(discard_pieces, group)
        return False


def _is_due(group: GroupWriter, policy: Policy, now: TimeNs, watched: _Watched) -> bool:
    """Whether a child is needed: for a raw segment that was not read yet, or a piece that is due."""
    files = chain(group.store.storage, group.directory)
    watched.known = {file: ages for file, ages in watched.known.items() if file in set(files)}
    with group.store.index.read() as txn:
        history = history_of(group, txn)
        rows = {SegmentFile(row.first, row.generation) for row in history.manifest.rows if row.generation}
        if any(file not in rows and file not in watched.known for file in files[:-1]):
            return True
        return bool(plan(history, policy, history.now(now), watched.known))
