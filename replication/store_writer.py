"""The one store of a second appliance, shared by its sessions: ingest, sync and checkpoint in their order.

Invariants:
- order: one lock serialises ingest, checkpoint and commands; a sync runs beside ingest, but never two syncs at once.
- A sync answers exactly the requests made before it began; all of them share it. One made meanwhile waits for the next.
- Between a point that `keep` has kept and what is ingested next there is a checkpoint, but on a full disk.
- Whatever was received becomes durable within about SYNC_SECONDS, or the store has failed.
- After StoreFailed nothing is given to the store any more; every later call raises it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

from dedup.errors import StoreError, StoreFailed, StoreFull
from dedup.types import WRITE_BYTES_MAX, Record
from replication.near_thread import NearThread

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from dedup.store import Store

log = logging.getLogger("rewindfs.second_appliance")

SYNC_SECONDS: Final = 1.0
"""Longest that received records wait for a sync that nobody asked for."""
SYNC_BYTES: Final = 64 << 20
"""Payload received after which a sync begins at once."""
THREAD_BYTES: Final = WRITE_BYTES_MAX + (64 << 10)
"""Batches from this size on are ingested in a thread. A lone record, however large, is not: to who waits for it the way
there and back is a fifth of the time. The loop stands for about 1 ms then, for longer where the kernel holds up writers
to the page cache."""
CHECKPOINT_RETRY_SECONDS: Final = 5.0
MERGE_SHARE: Final = 0.05
"""Of the time, for merging runs of fingerprints beside ingest: enough for some 500 MiB of new blocks a second. Of what
is left over when the next run is due ingest waits for the end."""
MERGE_PAUSE_SECONDS_MAX: Final = 2.0
"""From one piece of it to the next, however long the last had to wait for the disk."""

T = TypeVar("T")
Args = TypeVarTuple("Args")


@dataclass(slots=True)
class Round:
    """One sync, and those who wait for it."""

    done: trio.Event = field(default_factory=trio.Event)
    error: StoreError | None = None


class StoreWriter:
    """Gives a store's synchronous calls to trio tasks. `serve` must run for anything to become durable."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.failed = trio.Event()
        """Set when the store has stopped; `error` says why."""
        self.error: StoreFailed | None = None
        self.syncs = 0
        self.received_bytes = 0
        """Payload ingested so far."""
        self._lock = trio.Lock()
        self._syncs = NearThread("store syncs")
        self._kept = False
        """A point was kept, and no checkpoint has been since."""
        self._unsynced_bytes = 0
        self._dirty = trio.Event()
        self._now = trio.Event()
        self._next = Round()
        self._checkpoint_due = trio.Event()
        self._merge_due = trio.Event()
        self._merge_due.set()
        self._changed = trio.Event()

    @property
    def changed(self) -> trio.Event:
        """The event that the next sync or checkpoint sets. Take it before looking at what is durable."""
        return self._changed

    async def ingest(self, group: GroupWriter, records: Sequence[Record], nbytes: int) -> None:
        """All records are RECEIVED when it returns, or none when it raises (StoreFull, StoreFailed, OutOfOrder, …).

        Cancelled: none, unless they are being ingested in a thread: then it ends first and returns.
        """
        if nbytes < THREAD_BYTES and not self._kept and not self._lock.locked():
            # Nobody holds the lock, and nobody can take it before the next await.
            self._ingest_here(group, records)
        else:
            async with self._lock:
                if self._kept:
                    await self._checkpoint_kept()
                if nbytes >= THREAD_BYTES:
                    await self._call(group.ingest, records)
                else:
                    self._ingest_here(group, records)
        self._unsynced_bytes += nbytes
        self.received_bytes += nbytes
        self._dirty.set()
        if self._unsynced_bytes >= SYNC_BYTES:
            self._now.set()
        if self.store.checkpoint_due():
            self._checkpoint_due.set()

    def let_pass(self) -> None:
        """To be called when who waits for an `ingest` has been answered; see `Store.let_pass`. Raises StoreFailed."""
        if self._lock.locked() or self.error is not None:
            return  # the next one does it
        try:
            self.store.let_pass()
        except StoreFailed as error:
            self.fail(error)
            raise

    async def run(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """Calls in a thread, with the store to itself. Raises what the call raises. Cancelled: it ends first."""
        async with self._lock:
            return await self._call(function, *args)

    async def _call(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """Calls in a thread; under the lock, if the call needs the store to itself. StoreFailed stops this writer."""
        self._check()
        try:
            return await trio.to_thread.run_sync(function, *args)
        except StoreFailed as error:
            self.fail(error)
            raise

    async def keep(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """`run` of what keeps the head as a point. A checkpoint comes next, so that who reads that point has nothing to
        replay; it is not waited for here, but by what is ingested after."""
        async with self._lock:
            result = await self._call(function, *args)
            self._kept = True
        self._checkpoint_due.set()
        return result

    async def _checkpoint_kept(self) -> None:
        try:
            await self._call(self.store.checkpoint)
        except StoreFull:
            self._checkpoint_due.set()  # the next one says so; that readers replay more is no reason to stop writers
        self._kept = False
        self._tell()

    async def sync(self) -> None:
        """Return when all that was received before the call is DURABLE. Raises StoreFull, StoreFailed."""
        turn = self.request_sync()
        await turn.done.wait()
        if turn.error is not None:
            raise turn.error

    def request_sync(self) -> Round:
        """Have a sync begin soon, without waiting for it."""
        self._check()
        self._dirty.set()
        self._now.set()
        return self._next

    def expect_sync(self) -> None:
        """Something is held and not durable: let the next regular sync include it."""
        self._dirty.set()

    async def checkpoint(self) -> None:
        """Return when all that was received is in a checkpoint, and so durable. Raises StoreFull, StoreFailed."""
        self._checkpoint_due = trio.Event()
        # Beside ingest: the checkpoint, which has the store to itself, then finds little left to sync.
        await self._call(self.store.sync_files)
        await self.run(self.store.checkpoint)
        self._kept = False
        self._merge_due.set()
        self._tell()

    async def serve(self) -> None:
        """Syncs, checkpoints and merges until cancelled, or until the store has failed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sync_loop)
            nursery.start_soon(self._checkpoint_loop)
            nursery.start_soon(self._merge_loop)
            await self.failed.wait()
            nursery.cancel_scope.cancel()

    def fail(self, error: StoreFailed) -> None:
        """The store has stopped: everyone who waits for a sync is told, and every later call."""
        if self.error is None:
            log.critical("the store has failed: %s", error)
            self.error = error
            self._next.error = error
            self._next.done.set()
            self.failed.set()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _ingest_here(self, group: GroupWriter, records: Sequence[Record]) -> None:
        self._check()
        try:
            group.ingest(records)
        except StoreFailed as error:
            self.fail(error)
            raise

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _sync_loop(self) -> None:
        while True:
            await self._dirty.wait()
            with trio.move_on_after(SYNC_SECONDS):
                await self._now.wait()
            turn, self._next = self._next, Round()
            self._dirty, self._now = trio.Event(), trio.Event()
            self._unsynced_bytes = 0
            try:
                await self._syncs.run(self.store.sync)
            except StoreFull as error:
                log.error("cannot sync, trying again: %s", error)
                turn.error = error
                self._dirty.set()
            except StoreFailed as error:
                turn.error = error
                self.fail(error)
            else:
                self.syncs += 1
                self._tell()
            finally:
                turn.done.set()

    async def _checkpoint_loop(self) -> None:
        while True:
            await self._checkpoint_due.wait()
            try:
                await self.checkpoint()
            except StoreFull as error:
                log.error("cannot checkpoint, trying again in %d s: %s", CHECKPOINT_RETRY_SECONDS, error)
                await trio.sleep(CHECKPOINT_RETRY_SECONDS)
                self._checkpoint_due.set()
            except StoreFailed:
                return  # `fail` has told everyone

    async def _merge_loop(self) -> None:
        """What each checkpoint makes due, beside ingest and a little at a time. Nothing needs it: when it meets what
        nobody foresaw, that is logged, and the store is as it was, with more runs."""
        while True:
            await self._merge_due.wait()
            self._merge_due = trio.Event()
            is_more = True
            while is_more:
                began = trio.current_time()
                try:
                    is_more = await trio.to_thread.run_sync(self.store.merge)
                except StoreFailed as error:
                    self.fail(error)
                    return
                except Exception:
                    log.exception("runs of fingerprints are not merged any more until the store is opened anew")
                    return
                pause = (trio.current_time() - began) * (1 / MERGE_SHARE - 1)
                await trio.sleep(min(pause, MERGE_PAUSE_SECONDS_MAX))
