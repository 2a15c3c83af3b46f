"""The second appliance's work for its own store: sealing, consolidation, garbage collection. In the background, or when
asked to.

A child computes (`worker_process`), this process commits. One thing at a time, and each bounded: while agents write,
the child works a share of the time only, and nothing here has the store to itself for longer than one small step.

Invariants:
- all that changes the store goes through `StoreWriter.run`;
- whatever is cut off here, by a stop or a kill, leaves a sound store, and is found and done again;
- a command comes first: the background's work is cut off for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from dedup import layout
from dedup.consolidation_preview import Preview
from dedup.consolidator import Outcome
from dedup.container_size import examine
from dedup.errors import Damaged, RewindError, StoreError, StoreFailed, UnknownFormat
from dedup.gc import Collected, Collection, Dead, Plan
from dedup.pins import pinned
from dedup.retention import Policy, load_policy
from dedup.types import ContainerForm, ContainerId, TimeNs
from dedup.worker import FindDead, Foresee, Foreseen, Found, Freed, Mark, Marked, Remove, Seal, WorkFailed
from replication.store_writer import StoreWriter
from replication.thinning import Thinning
from replication.worker_process import WorkerLost, WorkerProcess, working

if TYPE_CHECKING:
    from dedup.store import Store

log = logging.getLogger("rewindfs.maintenance")

ROUND_SECONDS: Final = 30.0
"""Between two looks for something to do."""
SEAL_AGE_SECONDS: Final = 30.0
"""A container that was written to so lately is not sealed: the page cache has it, and reads of now are quick."""
COLLECT_SECONDS: Final = 24 * 3600.0
"""Between two collections when nothing was dropped that is known of: crashes and full disks leave a little."""
COLLECT_SECONDS_MIN: Final = 3600.0
"""Between two collections of what was dropped: each reads the whole journal."""
BUSY_SHARE: Final = 0.25
"""Of the time, what background work takes at most while agents write."""
BUSY_BYTES: Final = 256 << 10
"""Payload in LOAD_SECONDS from which on they do; less is heartbeats and a quiet log file."""
LOAD_SECONDS: Final = 1.0


class Maintenance:
    """`serve` is the background; `collect` may be called at any time, from any task."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._store: Store = writer.store
        self._turn = trio.Lock()
        self._background = trio.CancelScope()
        self._sealed: set[ContainerId] = set()
        """Containers that need no look any more: sealed ones, and such as cannot be."""
        self._collect_at = float("inf")
        self._collected_at = float("-inf")
        self._thinning = Thinning(writer, self._child)

    def garbage(self) -> None:
        """Something was dropped: it is collected soon, but not again and again."""
        self._collect_at = min(self._collect_at, self._collected_at + COLLECT_SECONDS_MIN)

    def reconsider(self) -> None:
        """The policy is another one: what the background does by the old one is cut off."""
        self._background.cancel()

    async def serve(self) -> None:
        """Rounds until cancelled, or until the store has failed."""
        self._collect_at = min(self._collect_at, trio.current_time() + COLLECT_SECONDS)
        settled = False
        while self._writer.error is None:
            try:
                with trio.CancelScope() as self._background:
                    async with self._turn:
                        if not settled:
                            # What the writer before had open is closed now, and the index shall say so.
                            await self._writer.run(self._store.settle)
                            settled = True
                        await self._round()
            except StoreFailed:
                return  # the writer has told everyone
            except WorkFailed as error:
                log.critical("no more sealing and no more collecting until the next start: %s", error)
                return
            except RewindError as error:
                log.error("put off: %s", error)
            self._store.pool.close_idle()
            await trio.sleep(ROUND_SECONDS)

    async def _round(self) -> None:
        candidates = await trio.to_thread.run_sync(self._sealable)
        if candidates:
            async with self._child() as worker:
                await self._seal(worker, candidates)
        policy = await trio.to_thread.run_sync(load_policy, self._store.storage, self._store.path)
        if (await self._thinning.round(policy)).pieces:
            self.garbage()
        if trio.current_time() >= self._collect_at and not await trio.to_thread.run_sync(self._all_is_pinned):
            # Should it fail, it is not tried again at once: it reads all there is.
            self._collected_at = trio.current_time()
            self._collect_at = self._collected_at + COLLECT_SECONDS_MIN
            done = await self._collect(dry_run=False)
            self._collect_at = trio.current_time() + (COLLECT_SECONDS_MIN if done.postponed else COLLECT_SECONDS)

    def _all_is_pinned(self) -> bool:
        """Whether a reader pins everything, so that nothing could be swept."""
        return pinned(self._store.storage, self._store.path).everything

    # -- sealing -----------------------------------------------------------------------------------------------------

    def _sealable(self) -> list[ContainerId]:
        """Raw containers that are closed and synced, and were for a while."""
        store = self._store
        directory = store.path / layout.CONTAINERS_NAME
        watermark = store.index.watermark()
        written_before = time.time_ns() - int(SEAL_AGE_SECONDS * 1e9)
        found = []
        numbers = {layout.container_named(name) for name in store.storage.listdir(directory)}
        self._sealed &= numbers
        for container in sorted(number for number in numbers if number is not None and number not in self._sealed):
            if container >= watermark.next_container or container in watermark.open:
                continue
            try:
                size = examine(store.storage, directory, container)
            except FileNotFoundError:
                continue
            except (Damaged, UnknownFormat) as damage:
                self._leave(container, damage)
                continue
            if size.form is ContainerForm.SEALED:
                self._sealed.add(container)
            elif size.slots and size.written_ns <= written_before:
                found.append(container)
        return found

    async def _seal(self, worker: WorkerProcess, containers: list[ContainerId]) -> None:
        freed = 0
        for container in containers:
            try:
                reply = await worker.ask(Seal(container))
            except Damaged as damage:
                self._leave(container, damage)
                continue
            assert isinstance(reply, Freed)
            self._store.pool.forget(container)
            self._sealed.add(container)
            freed += reply.bytes
        log.info("%d containers sealed, %d bytes less on disk", len(containers), freed)

    def _leave(self, container: ContainerId, damage: StoreError) -> None:
        """A container that cannot be sealed: said once."""
        self._sealed.add(container)
        log.error("container %d is not sealed: %s", container, damage)

    # -- consolidation -----------------------------------------------------------------------------------------------

    async def consolidate(self, policy: Policy | None = None) -> tuple[Outcome, Collected]:
        """History thinned as the policy says, the store's own if None, and what became garbage collected: now.

        Raises WorkerLost, or what the store raises; what was done before stays done.
        """
        self._background.cancel()
        async with self._turn:
            if policy is None:
                policy = await trio.to_thread.run_sync(load_policy, self._store.storage, self._store.path)
            outcome = await self._thinning.all(policy)
            if outcome.pieces:
                await self._writer.run(self._store.complete_containers)
            return outcome, await self._collect(dry_run=False)

    async def foresee(self) -> Preview:
        """What `consolidate` would do."""
        self._background.cancel()
        async with self._turn:
            policy = await trio.to_thread.run_sync(load_policy, self._store.storage, self._store.path)
            for group in self._store.groups:
                await self._writer.run(group.complete_segment)
            collection: Collection = await self._writer.run(Collection.begin, self._store)
            try:
                async with self._child() as worker:
                    reply = await worker.ask(Foresee(collection.boundary, policy, TimeNs(time.time_ns())))
                    assert isinstance(reply, Foreseen)
                    return reply.preview
            finally:
                collection.end()

    # -- garbage collection ------------------------------------------------------------------------------------------

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """A collection now; the background gives way. Raises WorkerLost, or what the store raises."""
        self._background.cancel()
        async with self._turn:
            return await self._collect(dry_run=dry_run)

    async def _collect(self, *, dry_run: bool) -> Collected:
        collection: Collection = await self._writer.run(Collection.begin, self._store)
        try:
            async with self._child() as worker:
                marked = await worker.ask(Mark(collection.boundary))
                assert isinstance(marked, Marked)
                if dry_run:
                    return Collected(marked.plan)
                done = await self._sweep(worker, collection, marked.plan)
        finally:
            collection.end()
        plan = done.plan
        log.info("collected: %d containers, %d blocks dead, %d bytes freed",
                 plan.containers, plan.dead_blocks, done.freed_bytes)  # fmt: skip
        return done

    async def _sweep(self, worker: WorkerProcess, collection: Collection, plan: Plan) -> Collected:
        freed = 0
        skipped: list[str] = []
        for planned in plan.rewrites:
            if holders := await trio.to_thread.run_sync(collection.postponed):
                return Collected(plan, freed, tuple(skipped), holders)
            try:
                found = await worker.ask(FindDead(planned.container))
                assert isinstance(found, Found)
                condemned = await self._condemn(collection, found.dead)
                if condemned or not planned.slots:
                    reply = await worker.ask(Remove(planned.container, condemned))
                    assert isinstance(reply, Freed)
                    freed += reply.bytes
                    await self._writer.run(collection.swept, planned.container)
            except Damaged as damage:
                log.error("not collected: %s", damage)
                skipped.append(str(damage))
            finally:
                collection.rewritten(planned.container)
        return Collected(plan, freed, tuple(skipped))

    async def _condemn(self, collection: Collection, dead: Dead) -> tuple[int, ...]:
        """Piece by piece, so that ingest comes in between, for most of the time while agents write."""
        condemned: list[int] = []
        for piece in dead.pieces():
            began = trio.current_time()
            condemned += await self._writer.run(collection.condemn, piece)
            await trio.sleep((trio.current_time() - began) * (1 / BUSY_SHARE - 1))
        return tuple(condemned)

    # -- the child ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _child(self) -> AsyncIterator[WorkerProcess]:
        """A child that works as much as the load allows."""
        met: RewindError | None = None
        async with working(self._store.path) as worker, trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_load, worker)
            try:
                yield worker
            except RewindError as error:
                met = error  # raised below: a nursery would hide it in a group
            finally:
                nursery.cancel_scope.cancel()
        if met is not None:
            raise met

    async def _watch_load(self, worker: WorkerProcess) -> None:
        share = 0.0
        before = self._writer.received_bytes - BUSY_BYTES  # busy until proven otherwise
        while True:
            is_busy = self._writer.received_bytes - before >= BUSY_BYTES
            before = self._writer.received_bytes
            wanted = BUSY_SHARE if is_busy else 1.0
            if wanted != share:
                share = wanted
                try:
                    await worker.take_share(share)
                except WorkerLost:
                    return  # whoever asks it something is told
            await trio.sleep(LOAD_SECONDS)
