"""Reconcile: makes the store hold what the source holds, while applications write. Initial sync, resync and verify.

Ranges are taken one after another. Where the store knows nothing of a volume, its data is sent; elsewhere digests of
the source's blocks are compared at the second appliance with what it holds *at that place of the record stream*, and
blocks that differ are sent. Bytes are read and their record is stamped under the range lock, so they are what the
source holds at that seq; what applications write meanwhile follows as records of its own. (Online initialization
beside application IO; US 10,031,690 describes the idea.)

Invariants:
- no lock is held while an answer of the second appliance is awaited;
- what is on its way is bounded: COMPARES_AHEAD compares, BYTES_AHEAD of data.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import trio

from dedup.types import BLOCK_BYTES, WRITE_BYTES_MAX, Extent, Reconcile, Seq, VolumeId
from replication.agent_link import RECORD_BYTES, AgentLink
from replication.errors import LinkDown, LinkReset
from replication.messages import DIGEST_BYTES, Compare, Level
from replication.region_tracker import REGION_BYTES, Region, regions_of

log = logging.getLogger(__name__)

COMPARES_AHEAD: Final = 4
"""Compares that may await their answer: hides one round trip behind the reading of the next regions."""
BYTES_AHEAD: Final = 8 << 20
"""Data that may await its acknowledgement: a quarter of the queue, so that writers find room."""
_Read = Callable[[int, int, int], bytes]
"""(fd, length, offset) → bytes, as os.pread."""
_ZEROS: Final = bytes(BLOCK_BYTES)
_RETRY_SECONDS: Final = 0.2
UNREADABLE_SECONDS: Final = 5.0
"""How long a reconcile waits where the source could not be read: an application may write the range anew meanwhile."""


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

    done: int = 0
    total: int = 0
    sent: int = 0
    differing_blocks: int = 0


@dataclass(slots=True)
class _Pending:
    region: Region
    offset: int
    length: int
    seq: Seq


@dataclass(slots=True)
class Reconciler:
    """One run over some work. `verify_only`: what differs is counted and not sent."""

    link: AgentLink
    source: SourceFiles
    verify_only: bool = False
    progress: Reconciled = field(default_factory=Reconciled)
    _unacknowledged: deque[tuple[Seq, int]] = field(default_factory=deque)
    _ahead: int = 0

    async def run(self, work: Iterable[Work]) -> None:
        """Returns when every range was found equal or sent (queued, in order). Goes on over lost links."""
        todo = list(work)
        self.progress.total = sum(len(one.regions) for one in todo) * REGION_BYTES
        for one in todo:
            async with self.source.opened(one.volume) as fd:
                if fd is not None and one.fresh:
                    await self._send_data(one, fd)
                elif fd is not None:
                    await self._compare(one, fd)
                else:
                    self.progress.done += len(one.regions) * REGION_BYTES

    async def send(self, volume: VolumeId, offset: int, length: int) -> None:
        """Sends one range of a volume, no longer than a record may be, whatever the store holds there."""
        async with self.source.opened(volume) as fd:
            if fd is not None:
                await self._send(volume, fd, offset, length, os.pread)

    # -- a volume of which the store knows nothing ------------------------------------------------------------------

    async def _send_data(self, work: Work, fd: int) -> None:
        for region in work.regions:
            start = region * REGION_BYTES
            for offset in range(start, start + REGION_BYTES, WRITE_BYTES_MAX):
                await self._send(work.volume, fd, offset, WRITE_BYTES_MAX, _data_at)
            self.progress.done += REGION_BYTES

    async def _send(self, volume: VolumeId, fd: int, offset: int, length: int, read: _Read) -> None:
        """Sends what `read` finds in the range, which is no longer than a record may be."""
        while True:
            async with self.source.claimed(volume, offset, length) as held:
                data = await self._read(volume, read, fd, length, offset) if held else b""
                if data == b"":
                    return
                if data is not None and await self.link.room_by_and_by(len(data)):
                    seq, time, run = self.link.stamp()
                    self.link.take(Reconcile(seq, time, run, Extent(volume, offset, data)))
                    break
            # In an outage this waits without the lock: writers go on, and their regions are marked.
            await trio.sleep(_RETRY_SECONDS if data is not None else UNREADABLE_SECONDS)
        self.progress.sent += len(data)
        await self._throttle(seq, len(data))

    async def _throttle(self, seq: Seq, nbytes: int) -> None:
        self._unacknowledged.append((seq, nbytes))
        self._ahead += nbytes
        while self._ahead > BYTES_AHEAD:
            first, size = self._unacknowledged.popleft()
            await self.link.first.reached(first, Level.RECEIVED)
            self._ahead -= size

    # -- a volume that the store knows ------------------------------------------------------------------------------

    async def _compare(self, work: Work, fd: int) -> None:
        todo = deque(work.regions)
        pending: deque[_Pending] = deque()
        while todo or pending:
            while todo and len(pending) < COMPARES_AHEAD:
                region = todo.popleft()
                asked = await self._ask(work.volume, fd, region)
                if asked is None:
                    self.progress.done += REGION_BYTES
                else:
                    pending.append(asked)
            if not pending:
                continue
            oldest = pending.popleft()
            try:
                differing = await self.link.first.compared(oldest.seq)
            except (LinkReset, LinkDown) as reset:
                log.info("region %d of volume %d is compared again: %s", oldest.region, work.volume, reset)
                todo.appendleft(oldest.region)
                await trio.sleep(_RETRY_SECONDS)
                continue
            self.progress.differing_blocks += differing.count(1)
            if not self.verify_only:
                for offset, length in _runs(differing, oldest.offset):
                    # Zeros too: the store holds something else there.
                    await self._send(work.volume, fd, offset, length, os.pread)
            self.progress.done += REGION_BYTES

    async def _ask(self, volume: VolumeId, fd: int, region: Region) -> _Pending | None:
        """Queues the Compare of one region; None when there is nothing of it (past the end, volume gone)."""
        offset = region * REGION_BYTES
        while True:
            async with self.source.claimed(volume, offset, REGION_BYTES) as held:
                length = max(0, min(REGION_BYTES, os.fstat(fd).st_size - offset)) if held else 0
                if not length:
                    return None
                key = self.link.first.digest_key
                digests = await self._read(volume, partial(_digests, key), fd, length, offset)
                # Not with the key of a session that has ended: every block would differ.
                if (
                    digests is not None
                    and await self.link.room_by_and_by(len(digests) + RECORD_BYTES)
                    and self.link.first.digest_key == key
                ):
                    seq, time, run = self.link.stamp()
                    self.link.take(Compare(seq, time, run, volume, offset, digests))
                    return _Pending(region, offset, length, seq)
            await trio.sleep(_RETRY_SECONDS if digests is not None else UNREADABLE_SECONDS)

    async def _read(self, volume: VolumeId, read: _Read, fd: int, length: int, offset: int) -> bytes | None:
        """What `read` makes of the range; None where the source cannot be read there now. The gap stays open as long:
        the store cannot be said to equal what nobody can read."""
        try:
            return await trio.to_thread.run_sync(read, fd, length, offset)
        except OSError as error:
            if self.verify_only:
                raise
            log.error("volume %d at %d cannot be read: %s; the reconcile tries again", volume, offset, error)
            return None


def all_regions(size: int) -> Sequence[Region]:
    """Every region of a volume of that size."""
    return [Region(number) for number in regions_of(0, size)]


def digest(key: bytes, block: bytes | memoryview) -> bytes:
    """A Compare's digest of one block: BLAKE2b keyed for the session, so that equal blocks cannot be told by others."""
    return hashlib.blake2b(block, key=key, digest_size=DIGEST_BYTES).digest()


def _data_at(fd: int, length: int, offset: int) -> bytes:
    """The bytes of a range, b"" if it is one hole or past the end."""
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data from here to the end
            raise
        return b""
    return b"" if data >= offset + length else os.pread(fd, length, offset)


def _digests(key: bytes, fd: int, length: int, offset: int) -> bytes:
    """Digests of every block of a range, the last one padded with zeros. A hole is not read."""
    content = _data_at(fd, length, offset)
    zeros = digest(key, _ZEROS)
    count = -(-length // BLOCK_BYTES)
    if not content:
        return zeros * count
    view = memoryview(content.ljust(count * BLOCK_BYTES, b"\0"))
    return b"".join(digest(key, view[at : at + BLOCK_BYTES]) for at in range(0, len(view), BLOCK_BYTES))


def _runs(differing: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of runs of differing blocks, none longer than a record may be."""
    index = differing.find(1)
    while index >= 0:
        end = differing.find(0, index)
        end = len(differing) if end < 0 else end
        start, stop = offset + index * BLOCK_BYTES, offset + end * BLOCK_BYTES
        for at in range(start, stop, WRITE_BYTES_MAX):
            yield at, min(WRITE_BYTES_MAX, stop - at)
        index = differing.find(1, end)
