"""The data protection agent: every change of the source passes here, is recorded, and only then reaches the source.

Invariants:
- `order`: the range of a write, the volume of a resize, the group for a namespace change is locked from before its seq
  is given until the source call has returned, so that the source applies changes in the order of their seqs;
- `acknowledged-is-kept`: a region is marked in the intent log, durably, before its first write, and stays marked until
  its records are durable at the second appliance and its bytes on the source's disk;
- a record that the source then refused is corrected under the same lock, with what the source really holds;
- names and sizes change within a bracket (namespace_brackets.py). A name's change is made
  before it is recorded, since only then is its outcome known; the lock of the whole group is held meanwhile.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic

import pyfuse3
import trio

from dedup.types import (
    VOLUME_BYTES_MAX,
    Bookmark,
    ClockRun,
    Correct,
    Create,
    Extent,
    Flush,
    ReconcileEnd,
    Record,
    Rename,
    Resize,
    Retire,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from fusefs.inode_map import FileKey
from fusefs.intercept import CreateFile, NamespaceChange, RemoveFile, RenamePath
from fusefs.namespace_brackets import NamespaceBrackets
from fusefs.range_lock import RangeLock
from fusefs.source_writes import sync_file, write_at
from fusefs.volume_records import attributes_record, check_moves, create_record, retire_record
from fusefs.volume_table import Volume, VolumeTable, check_path
from replication.agent_link import RECORD_BYTES, AgentLink
from replication.errors import LinkDown, LinkReset, OutageError
from replication.intent_log import IntentLog, IntentLogFailed
from replication.messages import Level
from replication.near_thread import NearThread
from replication.region_tracker import REGION_BYTES, RegionTracker, regions_of

log = logging.getLogger(__name__)

_NO_SEQ = Seq(0)
_INSIST_SECONDS = 0.2
HOUSEKEEPING_SECONDS = 5.0
"""How often marks that may go are looked for; they rest 30 s before."""


class Agent:
    """Implements `intercept.Intercept`. Its coroutines are pyfuse3 handlers' and are not cancelled but at the end."""

    def __init__(
        self, source: Path, link: AgentLink, volumes: VolumeTable, intent: IntentLog, tracker: RegionTracker
    ) -> None:
        self.source = source
        self.link = link
        self.first = link.first
        self.volumes = volumes
        self.intent = intent
        self.tracker = tracker
        self.lock = RangeLock()
        self._syncs = NearThread("source syncs")
        self.brackets = NamespaceBrackets(source, intent, link.first)
        self.unrecorded_retired: list[VolumeId] = []
        """Volumes that are gone and of which the store was not told."""

    # -- handles -----------------------------------------------------------------------------------------------------

    def volume_of(self, key: FileKey) -> VolumeId | None:
        """The volume a file is, or None when it is not recorded."""
        volume = self.volumes.by_key(key)
        return None if volume is None else volume.id

    def opened(self, volume: VolumeId | None, fd: int) -> None:
        """Nothing is kept per handle."""

    def released(self, volume: VolumeId | None, fd: int) -> None:
        """Nothing is kept per handle."""

    # -- writes ------------------------------------------------------------------------------------------------------

    async def write(self, volume: VolumeId | None, fd: int, offset: int, data: bytes, append: bool) -> int:
        """Records `data` and writes it to the source, in the order of the seqs. Returns the bytes written.

        The source's OSError is raised after the record has been corrected; OutageError before the source saw anything.
        """
        if volume is None or self.volumes.get(volume) is None:
            return write_at(fd, data, os.fstat(fd).st_size if append and volume is None else offset)
        length = len(data)
        if append:
            claim = await self.lock.claim_volume(volume)
        else:
            claim = self.lock.try_claim(volume, offset, length) or await self.lock.claim(volume, offset, length)
        try:
            known = self.volumes.get(volume)
            if known is None:  # unlinked while this waited for its turn
                return write_at(fd, data, offset)
            if append and offset >= known.size:
                # Below the end it is no append but a page of a mapping that the kernel writes back through this handle.
                offset = os.fstat(fd).st_size
            return await self._write_claimed(known, fd, offset, data, length)
        finally:
            self.lock.release(claim)

    async def _write_claimed(self, volume: Volume, fd: int, offset: int, data: bytes, length: int) -> int:
        seq = _NO_SEQ
        end = offset + length
        if end > VOLUME_BYTES_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self.tracker.write_begin(volume.id, offset, length, now=monotonic())
        try:
            first, last = offset // REGION_BYTES, (end - 1) // REGION_BYTES
            if not (
                self.intent.is_marked(volume.id, first) and (first == last or self._marked(volume.id, first, last))
            ):
                await self._mark(volume.id, first, last)
            refusal: OSError | OutageError | None = None
            written = 0
            if (self.link.has_room(length) or await self.link.room(length)) and volume.known:
                seq, time, run = self.link.stamp()
                self.link.take(Write(seq, time, run, Extent(volume.id, offset, data)))
                if end > volume.size:
                    volume.growing[seq] = end
                if not self.first.is_acknowledged(seq):
                    try:
                        await self.first.acknowledged(seq)
                    except OutageError as error:
                        refusal = error
            if refusal is None:
                try:
                    written = write_at(fd, data, offset)
                except OSError as error:
                    refusal = error
            if written < length:
                volume.growing.pop(seq, None)
                seq = await self._correct(volume, fd, seq, offset, length)
                if refusal is not None:
                    raise refusal
            elif end > volume.size:
                volume.size = end
            return written
        finally:
            if volume.growing:
                volume.growing.pop(seq, None)
            self.tracker.write_end(volume.id, offset, length, seq, now=monotonic())

    def _marked(self, volume: VolumeId, first: int, last: int) -> bool:
        return all(self.intent.is_marked(volume, region) for region in range(first, last + 1))

    async def _mark(self, volume: VolumeId, first: int, last: int) -> None:
        marked = await self.intent.mark(volume, first, last)
        ahead = range(last + 1, marked.stop)
        if ahead:
            self.tracker.touch(volume, ahead, self.link.last, now=monotonic())

    async def _correct(self, volume: Volume, fd: int, refused: Seq, offset: int, length: int) -> Seq:
        """Replaces what record `refused` claimed by what the source holds. Still under the lock. Returns its seq.

        Writes elsewhere in the volume may be recorded and not made yet: the size spares what they will have made.
        """
        volume.size = os.fstat(fd).st_size
        if refused == _NO_SEQ:
            return _NO_SEQ
        log.warning("%s: the source refused or shortened the write of seq %d; corrected", volume.path, refused)
        extent = None
        if await self.link.room_to_correct(length):
            size = volume.size_to_be
            count = max(0, min(length, size - offset))
            try:
                extent = Extent(volume.id, offset, os.pread(fd, count, offset).ljust(count, b"\0"))
            except OSError as error:
                log.error("%s: what it holds at %d cannot be read: %s; a reconcile is owed", volume.path, offset, error)
        if extent is None:
            # The moment is no recovery point; what the range holds is told by the reconcile that is owed now.
            nothing = Extent(volume.id, offset, b"")
            self.link.owe(lambda seq, time, run: Correct(seq, time, run, refused, volume.size_to_be, nothing))
            return refused
        return self.link.put(lambda seq, time, run: Correct(seq, time, run, refused, size, extent))

    async def resize(self, volume: VolumeId | None, fd: int, size: int) -> None:
        """Records the new size and sets it. OSError EFBIG past what a volume may have."""
        if volume is not None and size > VOLUME_BYTES_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if volume is None or self.volumes.get(volume) is None:
            await trio.to_thread.run_sync(os.ftruncate, fd, size)
            return
        claim = await self.lock.claim_volume(volume)
        try:
            known = self.volumes.get(volume)
            old = os.fstat(fd).st_size
            if known is None or old == size:
                await trio.to_thread.run_sync(os.ftruncate, fd, size)
                return
            await self._resize_claimed(known, fd, old, size)
        finally:
            self.lock.release(claim)

    async def _resize_claimed(self, volume: Volume, fd: int, old: int, size: int) -> None:
        # What grows is zeros on both sides; what is cut off differs when nobody records that.
        cut = max(0, old - size)
        self.tracker.write_begin(volume.id, size, cut, now=monotonic())
        try:
            await self.brackets.begin()
            if regions := regions_of(size, cut):
                await self._mark_in_bracket(volume.id, regions)
            await self._resize_in_bracket(volume, fd, old, size)
        finally:
            self.tracker.write_end(volume.id, size, cut, self.link.last, now=monotonic())

    async def _mark_in_bracket(self, volume: VolumeId, regions: range) -> None:
        try:
            await self._mark(volume, regions.start, regions.stop - 1)
        except BaseException:
            self.brackets.close(_NO_SEQ)
            raise

    async def _resize_in_bracket(self, volume: Volume, fd: int, old: int, size: int) -> None:
        seq: Seq | None = _NO_SEQ
        try:
            if await self.link.room(RECORD_BYTES) and volume.known:
                seq = self.link.put(lambda seq, time, run: Resize(seq, time, run, volume.id, size))
                await self.first.acknowledged(seq)
            else:
                seq = None
            await trio.to_thread.run_sync(os.ftruncate, fd, size)
            volume.size = size
        except (OSError, OutageError):
            if size > old:
                seq = await self._correct(volume, fd, seq or _NO_SEQ, old, 0)
            else:
                seq = self._take_back(volume, fd, seq or _NO_SEQ)
            raise
        finally:
            self.brackets.close(seq)

    def _take_back(self, volume: Volume, fd: int, refused: Seq) -> Seq | None:
        """What record `refused` cut off is still there, and may be large: left to a reconcile."""
        volume.size = os.fstat(fd).st_size
        if refused == _NO_SEQ:
            return _NO_SEQ
        nothing = Extent(volume.id, 0, b"")
        self.link.owe(lambda seq, time, run: Correct(seq, time, run, refused, volume.size_to_be, nothing))
        return None

    async def fsync(self, volume: VolumeId | None, fd: int, datasync: bool) -> None:
        """Syncs the source and records a recovery point; in sync mode it is durable at the second appliance, too.

        The point is what had been written when the application asked: it is recorded then, and both sides sync at the
        same time. Where there is no room for it at once, as in an outage, the source is synced first.
        """
        seq = self._put_flush(volume) if volume is not None and self.link.has_room(RECORD_BYTES) else _NO_SEQ
        token = self.tracker.token()
        await self._syncs.run(os.fdatasync if datasync else os.fsync, fd)
        if volume is None or self.volumes.get(volume) is None:
            return
        self.tracker.source_synced(volume, token)
        if seq == _NO_SEQ and await self.link.room(RECORD_BYTES):
            seq = self._put_flush(volume)
        if seq != _NO_SEQ:
            await self.first.flushed(seq)

    def _put_flush(self, volume: VolumeId) -> Seq:
        """Records the flush; not that of a volume that is gone, or that the store does not know."""
        known = self.volumes.get(volume)
        if known is None or not known.known:
            return _NO_SEQ
        seq = self.link.put(lambda seq, time, run: Flush(seq, time, run, volume))
        self.first.flush_soon(seq)
        return seq

    # -- names and attributes ----------------------------------------------------------------------------------------

    async def attributes(self, volume: VolumeId, change: Callable[[], os.stat_result]) -> os.stat_result:
        """Runs a change of mode or owner and records what came of it."""
        claim = await self.lock.claim_volume(volume)
        try:
            status = await trio.to_thread.run_sync(change)
            known = self.volumes.get(volume)
            outcome = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
            if known is not None and outcome != (known.mode, known.uid, known.gid):
                known.mode, known.uid, known.gid = outcome
                known.restyled = True
                if known.known and await self.link.room(RECORD_BYTES):
                    known.restyled = False
                    seq = self.link.put(partial(attributes_record, known))
                    await self.first.acknowledged(seq)
            return status
        finally:
            self.lock.release(claim)

    async def namespace(self, change: NamespaceChange) -> os.stat_result | None:
        """Makes and records a change of names while nothing else of the group changes."""
        for path in (change.new, change.old) if isinstance(change, RenamePath) else (change.path,):
            check_path(path)
        claim = await self.lock.claim_all()
        try:
            if isinstance(change, RenamePath):
                check_moves([(volume.id, path) for volume, path in self._all_moves(change)])
            await self.brackets.begin()
            seq: Seq | None = _NO_SEQ
            try:
                recorded = await self.link.room(RECORD_BYTES)
                outcome = await trio.to_thread.run_sync(change.perform)
                seq = None  # made, and unrecorded until the record is taken, whatever is raised meanwhile
                build = self._outcome(change, outcome, recorded)
                if recorded and build is None:
                    seq = _NO_SEQ
                elif recorded and build is not None:
                    seq = self.link.put(build)
                    await self.first.acknowledged(seq)
                return outcome
            finally:
                self.brackets.close(seq)
        finally:
            self.lock.release(claim)

    def _outcome(
        self, change: NamespaceChange, status: os.stat_result | None, recorded: bool
    ) -> Callable[..., Create | Retire | Rename] | None:
        """Takes a change that was made into the table; returns what builds its record, None where there is none.

        Unless it is `recorded`, what the store is not told is kept for catch_up.py.
        """
        match change:
            case CreateFile(path=path):
                if status is None:
                    raise RuntimeError("a file was made and its status is unknown")
                made = self.volumes.add(path, status)
                made.known = recorded
                return partial(create_record, made)
            case RemoveFile(key=key):
                removed = None if key is None else self.volumes.by_key(key)
                if removed is None:
                    return None
                self._retire(removed, recorded)
                return partial(retire_record, removed.id) if removed.known else None
            case RenamePath():
                return self._renamed(change, recorded)

    def _renamed(self, change: RenamePath, recorded: bool) -> Callable[..., Rename] | None:
        moved = self._all_moves(change)
        replaced: list[Volume] = []
        if not change.exchange and change.replaced is not None and change.replaced != change.key:
            gone = self.volumes.by_key(change.replaced)
            if gone is not None:
                replaced.append(gone)
                self._retire(gone, recorded)
        self.volumes.move(moved)
        for volume, _ in moved:
            volume.moved = volume.moved or not recorded
        moves = tuple((volume.id, path) for volume, path in moved if volume.known)
        retired = tuple(volume.id for volume in replaced if volume.known)
        if not moves and not retired:
            return None
        return lambda seq, time, run: Rename(seq, time, run, moves, retired)

    def _all_moves(self, change: RenamePath) -> list[tuple[Volume, str]]:
        moved = self._moves(change.key, change.is_directory, change.old, change.new)
        if change.exchange:
            moved += self._moves(change.replaced, change.replaced_is_directory, change.new, change.old)
        return moved

    def _moves(self, key: FileKey | None, is_directory: bool, old: str, new: str) -> list[tuple[Volume, str]]:
        if is_directory:
            return [(volume, new + volume.path[len(old) :]) for volume in self.volumes.below(old)]
        volume = None if key is None else self.volumes.by_key(key)
        return [] if volume is None else [(volume, new)]

    def _retire(self, volume: Volume, recorded: bool) -> None:
        self.volumes.remove(volume)
        if volume.known and not recorded:
            self.unrecorded_retired.append(volume.id)
        self.intent.volumes_gone(volume.id)
        self.tracker.volume_gone(volume.id)

    # -- the group ---------------------------------------------------------------------------------------------------

    async def bookmark(self, name: str, within: float = math.inf) -> Seq:
        """Records a named recovery point across all volumes, after a flush, and returns its seq at once.

        RequestRefused if the name is taken; OutageError when it cannot be recorded now, or not within so many seconds.
        A link that is down, and no outage yet, is waited for: the second appliance may be starting again.
        """
        until = trio.current_time() + within
        with trio.move_on_at(until):
            await self.check_bookmark(name)
            await self.sync()
            if not await self.link.room(RECORD_BYTES):
                raise OutageError("the second appliance cannot be reached: nothing is recorded now, nor is a bookmark")
        if trio.current_time() >= until:  # whatever the scope caught: a thread is not cut short
            raise OutageError(f"the bookmark could not be recorded within {within:g} s, and is not")
        self.link.require_equal()
        return self.link.put(lambda seq, time, run: Bookmark(seq, time, run, name))

    async def sync(self) -> None:
        """What was written to the source is on its disk when this returns."""
        await trio.to_thread.run_sync(pyfuse3.syncfs, str(self.source))

    async def check_bookmark(self, name: str) -> None:
        """Asks the second appliance whether there may be a bookmark of that name now. Errors as `bookmark`."""
        self.link.require_equal()
        while True:
            try:
                await self.first.request("name.check", {"name": name})
                return
            except (LinkDown, LinkReset):
                if self.first.outage:
                    raise
                await trio.sleep(_INSIST_SECONDS)

    async def insist(self, build: Callable[[Seq, TimeNs, ClockRun], Record]) -> Seq:
        """Records something that must not be missing, however long an outage lasts. Raises HistoryLost."""
        while True:
            if await self.link.room_by_and_by(RECORD_BYTES):
                return self.link.put(build)
            await trio.sleep(_INSIST_SECONDS)

    async def end_gap(self, spells: int) -> Seq | None:
        """Records that the store equals the source; None when changes have gone unrecorded since `link.spells` was
        `spells`: then another reconcile is owed first. Raises HistoryLost."""
        while True:
            if await self.link.room_by_and_by(RECORD_BYTES):
                return self.link.put(ReconcileEnd) if self.link.spells == spells else None
            if self.link.spells != spells:
                return None
            await trio.sleep(_INSIST_SECONDS)

    def equal_again(self, spells: int) -> None:
        """The end of the gap is durable: nothing is owed any more, unless changes went unrecorded since."""
        if self.link.spells == spells:
            self.link.equal = True
            self.brackets.equal_again()

    async def housekeeping(self, keep: Callable[[Seq], object]) -> None:
        """Lets marks go that are no longer needed. `keep` notes, durably and in a thread, up to which seq the second
        appliance had everything durable: a store that ever holds less is not the one the marks were cleared for.

        Runs until cancelled.
        """
        while True:
            await trio.sleep(HOUSEKEEPING_SECONDS)
            try:
                await self.brackets.settle()
                await self._let_marks_go(keep)
            except (OSError, IntentLogFailed) as error:
                # A full or failing disk of the source: marks that stay do no harm.
                log.error("marks cannot be let go, trying again: %s", error)

    async def _let_marks_go(self, keep: Callable[[Seq], object]) -> None:
        for volume in self.tracker.unsynced(monotonic()):
            await self._sync_source(volume)
        self.tracker.durable(durable := self.first.durable)
        if self.tracker.has_clearable(monotonic()):
            await trio.to_thread.run_sync(keep, durable)
            # Looked at now: a change may have gone unrecorded meanwhile, and its region must keep its mark.
            spells = None if self.link.equal else self.link.spells
            self.intent.clear(self.tracker.clearable(monotonic(), spells))
        await self.intent.flush()

    async def _sync_source(self, volume: VolumeId) -> None:
        known = self.volumes.get(volume)
        if known is None:
            return
        token = self.tracker.token()
        # Renamed or unlinked meanwhile: the next round finds it, or it is gone.
        if await trio.to_thread.run_sync(sync_file, self.source / known.path, known.key):
            self.tracker.source_synced(volume, token)

    async def drain(self) -> None:
        """Everything recorded is durable at the second appliance, everything written is on the source's disk."""
        claim = await self.lock.claim_all()
        try:
            await self.first.reached(self.link.last, Level.DURABLE)
            await self.brackets.sync()
        finally:
            self.lock.release(claim)
