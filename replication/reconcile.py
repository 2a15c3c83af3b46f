"""Reconcile: makes the store hold what the source holds, while applications write. Initial sync, resync and verify.

Regions are taken some at a time. Of a volume of which the store knows nothing, the data is sent; elsewhere the second
appliance is asked from coarse to fine what differs (digests.py), and the blocks that do are sent. Bytes are read and
their record is stamped under the range lock, so they are what the source holds at that seq, and they are held against
what the store holds *at that place of the record stream*; what applications write meanwhile follows as records of its
own. (Online initialization beside application IO; US 10,031,690 describes the idea.)

Invariants:
- no lock is held while an answer of the second appliance is awaited;
- what is on its way is bounded: a question for each of REGIONS_AHEAD regions, and the pace's bytes of data;
- a region is told to `on_equal` only once all of it was found equal, or sent, since its job began.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import trio

from dedup.errors import RewindError
from dedup.types import BLOCK_BYTES, Extent, Reconcile, Seq, VolumeId
from replication.agent_link import RECORD_BYTES, AgentLink
from replication.differences import Differences
from replication.digests import MANY, Digester, read_places
from replication.errors import LinkDown, LinkReset
from replication.frame_layout import COMPARE, WRITE
from replication.messages import COMPARE_UNITS, SUM_UNITS, Compare, Level
from replication.pacing import Pace
from replication.region_tracker import REGION_BYTES, Region, regions_of
from replication.source_reads import data_at, read_range

log = logging.getLogger(__name__)

REGIONS_AHEAD: Final = 16
"""Regions under way: hides a round trip behind the reading of others, and small volumes' round trips behind each other.
Those that await an answer hold no data."""
READERS: Final = 2
"""Regions that are read and hashed at a time."""
_RETRY_SECONDS: Final = 0.2
UNREADABLE_SECONDS: Final = 5.0
"""How long a reconcile waits where the source could not be read: an application may write the range anew meanwhile."""

OnDiffering = Callable[[VolumeId, Region], Awaitable[None]]
OnEqual = Callable[[VolumeId, Region, Seq, int], None]
"""(volume, region, last seq of its comparison, `link.spells` when that began)."""


class SourceFiles(Protocol):
    """What a reconcile needs of the source."""

    def opened(self, volume: VolumeId) -> AbstractAsyncContextManager[int | None]:
        """The volume's file, open for reading while the context lasts; None once the volume is gone."""
        ...

    def claimed(self, volume: VolumeId, offset: int, length: int) -> AbstractAsyncContextManager[bool]:
        """Holds the range lock while the context lasts; False when the volume is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What to reconcile of one volume: `regions`, or its data alone when the store knows it to be zeros (`fresh`)."""

    volume: VolumeId
    regions: Sequence[Region]
    fresh: bool = False


@dataclass(slots=True)
class Reconciled:
    """How far a reconcile is, in bytes of the source; and what it found. Changes while it runs."""

    kind: str = "start"
    """`start` (of a mount), `resync` (after an outage), `online` or `verify` (by command)."""
    done: int = 0
    total: int = 0
    compared: int = 0
    """Bytes that were held against the store's, each once."""
    sent: int = 0
    """Bytes of data that were sent."""
    said: int = 0
    """Bytes of all frames that the reconcile sent, data and questions."""
    differing_blocks: int = 0

    def begin(self, kind: str) -> None:
        """Another reconcile: everything from nothing."""
        self.kind = kind
        self.done = self.total = self.compared = self.sent = self.said = self.differing_blocks = 0

    def document(self) -> dict[str, object]:
        """The `reconcile` of `status`."""
        differing = self.differing_blocks * BLOCK_BYTES
        return {"kind": self.kind, "done": self.done, "total": self.total, "sent": self.sent, "differing": differing}


@dataclass(slots=True)
class Reconciler:
    """One run over some work. `verify_only`: what differs is noted in `found` and not sent.

    `on_differing` is awaited before anything of a region that differs is sent, `on_equal` called when it is equal.
    """

    link: AgentLink
    source: SourceFiles
    verify_only: bool = False
    progress: Reconciled = field(default_factory=Reconciled)
    found: Differences = field(default_factory=Differences)
    on_differing: OnDiffering | None = None
    on_equal: OnEqual | None = None
    _pace: Pace = field(init=False)
    _digester: Digester = field(default_factory=lambda: Digester(b""))
    _unacknowledged: deque[tuple[Seq, int]] = field(default_factory=deque)
    _ahead: int = 0
    _throttling: trio.Lock = field(default_factory=trio.Lock)
    _readers: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(READERS))
    _interrupted: bool = False
    _failure: Exception | None = None

    def __post_init__(self) -> None:
        self._pace = Pace(lambda: self.link.last)

    async def run(self, work: Iterable[Work]) -> None:
        """Returns when every region was found equal or sent (queued, in order). Goes on over lost links.

        Raises HistoryLost; verifying, also the source's OSError. Cancelled, it stops between two messages.
        """
        todo = list(work)
        self.progress.total += sum(len(one.regions) for one in todo) * REGION_BYTES
        compared = ((one, region) for one in todo if not one.fresh for region in one.regions)
        fresh = ((one, region) for one in todo if one.fresh for region in one.regions)
        async with trio.open_nursery() as nursery:
            # One after the other: what is sent together lies together, and who reads it later reads on.
            nursery.start_soon(self._take_jobs, fresh, nursery.cancel_scope)
            for _ in range(REGIONS_AHEAD):
                nursery.start_soon(self._take_jobs, compared, nursery.cancel_scope)
        if self._failure is not None:
            raise self._failure

    async def send(self, volume: VolumeId, offset: int, length: int) -> None:
        """Sends one range of a volume, no longer than a record may be, whatever the store holds there."""
        async with self.source.opened(volume) as fd:
            if fd is not None:
                await self._send(volume, fd, offset, length)

    async def _take_jobs(self, jobs: Iterator[tuple[Work, Region]], scope: trio.CancelScope) -> None:
        try:
            for work, region in jobs:
                await self._take_job(work, region)
        except (RewindError, OSError) as error:
            self._failure = self._failure or error
            scope.cancel()

    async def _take_job(self, work: Work, region: Region) -> None:
        spells, before = self.link.spells, self.link.last
        async with self.source.opened(work.volume) as fd:
            if fd is not None:
                seq = max(before, await self._region(work, fd, region))
                if self.on_equal is not None and not self.verify_only:
                    self.on_equal(work.volume, region, seq, spells)
        self.progress.done += REGION_BYTES

    async def _region(self, work: Work, fd: int, region: Region) -> Seq:
        """Compares or sends one region. Returns the last seq that this took."""
        if work.fresh:
            return await self._send_data(work.volume, fd, region)
        blocks, seq = await self._differing(work.volume, fd, region)
        if not blocks:
            return seq
        self.progress.differing_blocks += len(blocks)
        if self.verify_only:
            for offset, length in _runs(blocks):
                self.found.add(work.volume, offset, length)
            return seq
        if self.on_differing is not None:
            await self.on_differing(work.volume, region)
        for offset, length in _runs(blocks):
            self.found.add(work.volume, offset, length)
            while length > 0:
                size = min(length, self._pace.send_bytes)
                # Zeros too: the store holds something else there.
                seq = max(seq, await self._send(work.volume, fd, offset, size))
                offset, length = offset + size, length - size
        return seq

    # -- what differs -----------------------------------------------------------------------------------------------

    async def _differing(self, volume: VolumeId, fd: int, region: Region) -> tuple[list[int], Seq]:
        """Numbers of the region's blocks that differ, ascending, and the last seq at which that was asked."""
        blocks: list[int] = []
        last = Seq(0)
        todo: deque[tuple[int, int, int]] = deque([(region * REGION_BYTES, REGION_BYTES, 0)])
        while todo:
            offset, length, unit = todo.popleft()
            answer = await self._ask(volume, fd, offset, length, unit)
            if answer is None:
                continue
            unit, seq, differing = answer
            last = max(last, seq)
            first = offset // BLOCK_BYTES
            if unit in SUM_UNITS:
                places = read_places(differing)
                alone = [index for index, place in enumerate(places) if 0 < place < MANY]
                blocks += [first + index * unit // BLOCK_BYTES + places[index] - 1 for index in alone]
                several = bytes(place == MANY for place in places)
            elif unit == BLOCK_BYTES:
                blocks += [first + index for index, mark in enumerate(differing) if mark]
                continue
            else:
                several = differing
            finer = COMPARE_UNITS[COMPARE_UNITS.index(unit) - 1]
            todo += [(offset + start * unit, count * unit, finer) for start, count in _stretches(several)]
        return sorted(blocks), last

    async def _ask(
        self, volume: VolumeId, fd: int, offset: int, length: int, unit: int
    ) -> tuple[int, Seq, bytes] | None:
        """Compares a range: the unit used, the seq, the answer. `unit` 0 takes what suits the volume's size. None when
        there is nothing of the range (past the end, volume gone)."""
        while True:
            asked = await self._question(volume, fd, offset, length, unit)
            if asked is None:
                return None
            try:
                answer = await self.link.first.compared(asked[1])
            except (LinkReset, LinkDown) as reset:
                if not self._interrupted:  # said once: many ranges ask again, many times, as long as an outage lasts
                    log.info("volume %d is compared again from %d on: %s", volume, offset, reset)
                self._interrupted = True
                await trio.sleep(_RETRY_SECONDS)
            else:
                self._interrupted = False
                return *asked, answer

    async def _question(self, volume: VolumeId, fd: int, offset: int, length: int, unit: int) -> tuple[int, Seq] | None:
        """Queues the Compare of one range, once that can be: its unit and seq."""
        while True:
            async with self._pace.step(), self.source.claimed(volume, offset, length) as held:
                there = max(0, min(length, os.fstat(fd).st_size - offset)) if held else 0
                if not there:
                    return None
                size = unit or next((one for one in COMPARE_UNITS if one >= there), COMPARE_UNITS[-1])
                digester = self._current_digester()
                digests = await self._read(volume, partial(read_range, digester, size), fd, there, offset)
                # Not with the key of a session that has ended: every block would differ.
                if (
                    digests is not None
                    and await self.link.room_by_and_by(len(digests) + RECORD_BYTES)
                    and self.link.first.digest_key == digester.key
                ):
                    seq, time, run = self.link.stamp()
                    self.link.take(Compare(seq, time, run, volume, offset, digests, size))
                    self._pace.own += 1
                    self.progress.said += COMPARE.size + len(digests)
                    self.progress.compared += 0 if unit else there
                    return size, seq
            await trio.sleep(_RETRY_SECONDS if digests is not None else UNREADABLE_SECONDS)

    def _current_digester(self) -> Digester:
        key = self.link.first.digest_key
        if self._digester.key != key:
            self._digester = Digester(key)
        return self._digester

    # -- what is sent -----------------------------------------------------------------------------------------------

    async def _send_data(self, volume: VolumeId, fd: int, region: Region) -> Seq:
        """Sends what is not a hole."""
        last = Seq(0)
        offset, end = region * REGION_BYTES, (region + 1) * REGION_BYTES
        while offset < end:
            length = min(end - offset, self._pace.send_bytes)
            last = max(last, await self._send(volume, fd, offset, length, holes=False))
            offset += length
        return last

    async def _send(self, volume: VolumeId, fd: int, offset: int, length: int, *, holes: bool = True) -> Seq:
        """Sends the range, which is no longer than a record may be; nothing where it is one hole and these are not to
        be sent. Returns the record's seq, or 0."""
        read = os.pread if holes else data_at
        while True:
            async with self._pace.step(), self.source.claimed(volume, offset, length) as held:
                data = await self._read(volume, read, fd, length, offset) if held else b""
                if data == b"":
                    return Seq(0)
                if data is not None and await self.link.room_by_and_by(len(data)):
                    seq, time, run = self.link.stamp()
                    extent = _extent(volume, offset, data)
                    self.link.take(Reconcile(seq, time, run, extent))
                    self._pace.own += 1
                    break
            # In an outage this waits without the lock: writers go on, and their regions are marked.
            await trio.sleep(_RETRY_SECONDS if data is not None else UNREADABLE_SECONDS)
        self.progress.sent += len(extent.data)
        self.progress.said += WRITE.size + len(extent.data)
        await self._throttle(seq, len(extent.data))
        return seq

    async def _throttle(self, seq: Seq, nbytes: int) -> None:
        self._unacknowledged.append((seq, nbytes))
        self._ahead += nbytes
        async with self._throttling:
            while self._ahead > self._pace.bytes_ahead and self._unacknowledged:
                first, size = self._unacknowledged.popleft()
                await self.link.first.reached(first, Level.RECEIVED)
                self._ahead -= size

    async def _read(
        self, volume: VolumeId, read: Callable[[int, int, int], bytes], fd: int, length: int, offset: int
    ) -> bytes | None:
        """What `read` makes of the range; None where the source cannot be read there now. The gap stays open as long:
        the store cannot be said to equal what nobody can read."""
        try:
            return await trio.to_thread.run_sync(read, fd, length, offset, limiter=self._readers)
        except OSError as error:
            if self.verify_only:
                raise
            log.error("volume %d at %d cannot be read: %s; the reconcile tries again", volume, offset, error)
            return None


def all_regions(size: int) -> Sequence[Region]:
    """Every region of a volume of that size."""
    return [Region(number) for number in regions_of(0, size)]


def _extent(volume: VolumeId, offset: int, data: bytes) -> Extent:
    """Zeros are not worth their bytes."""
    if data.count(0) == len(data):
        return Extent(volume, offset, b"", len(data))
    return Extent(volume, offset, data)


def _stretches(marks: bytes) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of marks that are 1."""
    start = marks.find(1)
    while start >= 0:
        end = marks.find(0, start)
        end = len(marks) if end < 0 else end
        yield start, end - start
        start = marks.find(1, end)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Byte ranges of runs of consecutive blocks, which ascend."""
    start = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            yield blocks[start] * BLOCK_BYTES, (index - start) * BLOCK_BYTES
            start = index
