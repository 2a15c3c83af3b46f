"""The store's one writer: opening with recovery, ingest, durability, checkpoints.

Invariants:
- log first: an entry's blocks are in their containers before the entry is in the journal, and nothing else is on the
  hot path;
- durable = in an entry of the sync log, or the containers of all data journals synced, then the journal; a checkpoint =
  the files synced, then one synced index commit that carries the seq and the journal position it holds: the index never
  leads the journal;
- opening replays the journal from the last checkpoint; a torn end is cut off; a slot is never used twice, since each
  opening starts new containers;
- one writer: the lock is held from `open` to `close` (`one-writer`);
- after a failed sync the writer stops (StoreFailed): what was not durable is cut off, so that nobody takes it for kept;
- outside the time from an entry of the sync log to the next sync of the files that log is empty.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from dedup import layout
from dedup.catalog import Index
from dedup.container import marks_of
from dedup.container_pool import ContainerPool
from dedup.data_journal import DataJournal
from dedup.errors import Damaged, NameRefused, StoreBusy, StoreError, StoreFailed, StoreFull, UnknownFormat
from dedup.fingerprint_index import FingerprintIndex
from dedup.group_writer import GroupWriter
from dedup.healing import Healer
from dedup.ingest import Ingest
from dedup.marker import create_marker, read_marker, refuse_network
from dedup.own_blocks import OwnBlocks
from dedup.reindex import ANCHOR_POINTERS, ANCHOR_RECORDS
from dedup.settling import settle
from dedup.storage import Storage
from dedup.sync_log import SyncLog
from dedup.sync_log_restore import restore
from dedup.types import BASE_JOURNAL, FINE_JOURNAL, ContainerId, JournalId, Record
from dedup.usage import StoreUsage, measure
from dedup.watermark import Watermark

log = logging.getLogger(__name__)

CHECKPOINT_POINTERS: Final = ANCHOR_POINTERS
"""Pointers put since the last checkpoint that make the next one due: 64 MiB of blocks, a few MB of memory."""
CHECKPOINT_RECORDS: Final = ANCHOR_RECORDS
"""Entries that make one due: what a moment's synthesis and an opening replay at most, some tens of milliseconds."""
CHECKPOINT_SECONDS: Final = 60.0
"""And its age, when there is anything to write."""
LOCK_AGAIN_SECONDS: Final = 0.1
GROUP_NAME_BYTES_MAX: Final = 64
JOURNALS_MAX: Final = 256
"""Data journals of a store, over all its groups: each that receives has a file open."""


class _Closable(Protocol):
    def close(self) -> None: ...


class Store:
    """The writer of one store. Not thread-safe but for `sync` and `merge`: the caller takes turns for the rest."""

    def __init__(self, path: Path, storage: Storage, lock_fd: int, uuid: bytes) -> None:
        self.path = path
        self.storage = storage
        self.uuid = uuid.hex()
        self._lock_fd = lock_fd
        self._failed: str | None = None
        self._sync_lock = threading.Lock()
        if not storage.exists(path / layout.INDEX_NAME):
            storage.mkdir(path / layout.INDEX_NAME)  # a repair was cut short after it gave the index up
        self.index = Index(path / layout.INDEX_NAME, writer=True)
        containers = path / layout.CONTAINERS_NAME
        try:
            # LMDB syncs its file, not the name: without the index recovery could not tell what was durable.
            storage.sync_directory(path / layout.INDEX_NAME)
            storage.sync_directory(path)
            found = max((layout.container_named(name) or 0 for name in storage.listdir(containers)), default=0)
            self.watermark = self.index.watermark()
            self.fingerprints = FingerprintIndex(self.index, storage)
        except BaseException:
            self.index.close()
            raise
        self.sync_log = SyncLog(storage, path)
        self.pool = ContainerPool(storage, containers)
        self._next_container = max(found + 1, self.watermark.next_container)
        self.base_journal = self._new_journal(BASE_JOURNAL, "base")
        self.fine_journal = self._new_journal(FINE_JOURNAL, "fine")
        self.healer = Healer(storage, path, containers, self.pool)
        self._data_journals = {BASE_JOURNAL: self.base_journal, FINE_JOURNAL: self.fine_journal}
        """Those that have received since the store was opened; each stays able to."""
        self.ingest = Ingest(self.fingerprints, self.pool, self.base_journal, self.healer)
        self.own_blocks = OwnBlocks(self)
        self._groups: dict[str, GroupWriter] = {}
        self._checkpointed_at = time.monotonic()

    @staticmethod
    def create(path: Path, storage: Storage | None = None) -> None:
        """Makes an empty store. NotAStore when the directory is neither new nor empty. Durable when it returns."""
        create_marker(storage or Storage(), path)

    @classmethod
    def open(cls, path: Path, storage: Storage | None = None) -> Store:
        """Takes the lock and recovers. StoreBusy, NotAStore, UnknownFormat, Damaged."""
        storage = storage or Storage()
        marker = read_marker(storage, path)
        refuse_network(path)
        lock_fd = storage.open(path / layout.LOCK_NAME, os.O_RDWR | os.O_CREAT)
        try:
            if not _locked(storage, lock_fd):
                raise StoreBusy(f"{path} is being written by another process; one store has one writer at a time")
            restore(storage, path)
            store = cls(path, storage, lock_fd, marker.uuid)
        except BaseException:
            storage.close(lock_fd)
            raise
        try:
            settle(storage, path, store.index, store.watermark)
            store.fingerprints.load(store._unmerged_fingerprints())
            for name in sorted(storage.listdir(path / layout.GROUPS_NAME)):
                store.group(name)
            store.checkpoint()
        except BaseException:
            store.abandon()
            raise
        return store

    def _unmerged_fingerprints(self) -> Iterator[tuple[bytes, NDArray[np.uint64]]]:
        """Those that LMDB may not have, from the containers' own tables. What cannot be read costs deduplication."""
        merged = self.fingerprints.merged
        containers = self.path / layout.CONTAINERS_NAME
        for name in self.storage.listdir(containers) if merged is not None else ():
            container = layout.container_named(name)
            if merged is None or container is None or merged.whole.covers_whole(container):
                continue
            try:
                slots, fingerprints = marks_of(self.storage, containers, container)
            except (Damaged, UnknownFormat) as damage:
                log.warning("blocks of a container are stored once more when they come again: %s", damage)
                continue
            yield fingerprints, slots + np.uint64(layout.address(container, 0))

    def spent(self, container: ContainerId) -> None:
        """An entry names it: its number is not given again, though its file and the index may be lost."""
        self._next_container = max(self._next_container, container + 1)

    def _allocate(self) -> ContainerId:
        container = ContainerId(self._next_container)
        self._next_container += 1
        return container

    def group(self, name: str) -> GroupWriter:
        """The group of that name, made durably if it is new. StoreError for a name that cannot be one."""
        group = self._groups.get(name)
        if group is None:
            _check_group_name(name)
            group = self._groups[name] = GroupWriter.open(self, name)
        return group

    def data_journal(self, journal: JournalId) -> DataJournal:
        """The data journal of that number, ready to receive."""
        opened = self._data_journals.get(journal)
        if opened is None:
            opened = self._data_journals[journal] = self._new_journal(journal, f"number {journal}")
        return opened

    def _new_journal(self, journal: JournalId, name: str) -> DataJournal:
        containers = self.path / layout.CONTAINERS_NAME
        return DataJournal(self.storage, containers, journal, name, self._allocate, self.sync_log.unsynced)

    def free_journal(self) -> JournalId:
        """A number that no data journal of any group has. NameRefused when there is none left."""
        taken = max(spec.journal for group in self._groups.values() for spec in group.state.journals)
        if taken >= JOURNALS_MAX:
            raise NameRefused(f"{self.path} has {JOURNALS_MAX} data journals, the most there can be; use one of them")
        return JournalId(taken + 1)

    @property
    def groups(self) -> Sequence[GroupWriter]:
        """Every group of the store."""
        return list(self._groups.values())

    @property
    def has_one_group(self) -> bool:
        """Whether every block of the store is one group's, or nobody's."""
        return len(self._groups) < 2

    def refuse_if_failed(self) -> None:
        """StoreFailed once a sync or a write has failed; open the store anew."""
        if self._failed is not None:
            raise StoreFailed(self._failed)

    def fail(self, why: str) -> None:
        """Stops the writer: every later call that would change the store raises StoreFailed."""
        self._failed = self._failed or why
        log.critical("the store at %s has stopped: %s", self.path, why)

    def sync(self) -> None:
        """Makes everything received before the call durable; each group's `durable` says so after.

        May run in a worker thread while another thread ingests. On failure the journals are cut back to what is
        durable, as far as the disk allows, and StoreFailed is raised now and ever after.
        """
        self._sync(self._keep_or_sync)

    def sync_files(self) -> None:
        """`sync` of the files themselves, and of all of them: nothing is in the sync log only."""
        self._sync(self._sync_files)

    def _sync(self, make_durable: Callable[[], None]) -> None:
        with self._sync_lock:
            self.refuse_if_failed()
            marks = [(group, group.held, group.position) for group in list(self._groups.values())]
            try:
                make_durable()
            except BaseException as error:
                # Whatever it is: what was noted for the sync log is not noted any more.
                self.fail(f"{error}; what was not durable is discarded and will be sent again")
                for group, _, _ in marks:
                    group.discard_after_durable(str(error))
                if isinstance(error, StoreError):
                    raise StoreFailed(str(error)) from error
                raise
            for group, held, position in marks:
                group.is_durable(held, position)

    def _keep_or_sync(self) -> None:
        unsynced = self.sync_log.unsynced.take()
        if unsynced is None or (unsynced and not self.sync_log.keep(unsynced)):
            self._sync_files()

    def _sync_files(self) -> None:
        self.sync_log.unsynced.take()
        # Looked at after that: whatever it had been told of is in these.
        for journal in list(self._data_journals.values()):
            journal.sync()
        for group in list(self._groups.values()):
            group.journal.sync()
        self.sync_log.empty()

    def checkpoint_due(self) -> bool:
        """Whether `checkpoint` should be called soon."""
        pointers = records = 0
        for group in self._groups.values():
            pointers += group.state.overlay.count
            records += group.state.records
            if group.state.new_snapshots:
                return True  # a bookmark: its readers shall have nothing to replay
        if pointers >= CHECKPOINT_POINTERS or records >= CHECKPOINT_RECORDS:
            return True
        return bool(pointers) and time.monotonic() - self._checkpointed_at >= CHECKPOINT_SECONDS

    def checkpoint(self) -> None:
        """Durable, then the index catches up with the journal in one synced commit. No ingest meanwhile.

        StoreFull, and then it may be called again; StoreFailed, now and ever after.
        """
        self.sync_files()
        self.fingerprints.freeze()
        dirty = [group for group in self._groups.values() if group.state.records]
        if dirty or self.fingerprints.pending_count:
            now = self._watermark_now()
            try:
                with self.index.write() as txn:
                    for group in dirty:
                        group.catalog.put(txn, group.state, group.position)
                    self.fingerprints.commit(txn, now)
                    self.index.put_watermark(txn, now)
            except StoreFull:
                self.fingerprints.give_room()
                raise
            except StoreFailed as error:
                self.fail(str(error))
                raise
            self.fingerprints.committed()
        for group in dirty:
            group.checkpointed()
        self._checkpointed_at = time.monotonic()

    def merge(self) -> bool:
        """Some ten milliseconds of work on the fingerprint index; False: there is none until the next checkpoint.

        May run in a thread beside everything else, but `close`. What it meets gives the work up, and does not stop the
        store; StoreFailed once that has stopped.
        """
        self.refuse_if_failed()
        return self.fingerprints.merge()

    def complete_containers(self) -> None:
        """What is stored next begins new containers, so that those so far can be sealed and collected."""
        for journal in self._data_journals.values():
            journal.rotate()

    def settle(self) -> Watermark:
        """A checkpoint whose watermark is of this very moment. No ingest meanwhile.

        What it covers whole, no data journal appends to any more; and no number below its `next_container` is given
        again, whatever is removed.
        """
        self.checkpoint()
        now = self._watermark_now()
        if self.index.watermark() != now:
            with self.index.write() as txn:
                self.index.put_watermark(txn, now)
        return now

    def _watermark_now(self) -> Watermark:
        journals = self._data_journals.values()
        taking = {one.container: one.slots_used for one in journals if one.container is not None}
        return Watermark(ContainerId(self._next_container), taking)

    def log_records(self, group: GroupWriter, records: Sequence[Record]) -> None:
        """GroupWriter.ingest's work; here because blocks and fingerprints are the store's."""
        self.refuse_if_failed()
        try:
            self._log_records(group, records)
        except StoreFull:
            self.fingerprints.give_room()
            raise

    def _log_records(self, group: GroupWriter, records: Sequence[Record]) -> None:
        chosen = group.state.journal
        journal = self.data_journal(chosen)
        run = self.ingest.log_run(records, group.state, journal, chosen)
        entries = [] if run else self.ingest.log(records, group.state, group, journal, chosen)
        try:
            if run:
                group.append_run(run)
            else:
                group.append(entries)
        except StoreFailed as error:
            self.fail(str(error))
            raise
        if run:
            self.own_blocks.note_run(group, run)
        else:
            self.own_blocks.note(group, entries)

    def let_pass(self) -> None:
        """What was ingested last and is large begins its way to the disk and leaves memory: some 0.1 ms a MiB of work
        that nobody needs to wait for. No ingest meanwhile. StoreFailed."""
        for journal in self._data_journals.values():
            journal.let_pass()

    def usage(self) -> StoreUsage:
        """Sizes now; walks the store's files."""
        groups = list(self._groups.values())
        logical = sum(group.state.logical_bytes for group in groups)
        return measure(self.path, logical, sum(group.snapshot_count() for group in groups))

    def close(self) -> None:
        """A last checkpoint, then the lock is given back. After StoreFailed only the latter."""
        try:
            if self._failed is None:
                self.checkpoint()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Gives everything back without another write, as a killed process would."""
        parts: list[_Closable] = [
            *self._groups.values(),
            *self._data_journals.values(),
            self.sync_log,
            self.pool,
            self.fingerprints,
            self.index,
        ]
        for part in parts:
            part.close()
        self.storage.close(self._lock_fd)


def _locked(storage: Storage, fd: int) -> bool:
    """Takes the store's lock. Readers look at it for an instant: so it is tried again."""
    if not storage.lock(fd):
        time.sleep(LOCK_AGAIN_SECONDS)
        return storage.lock(fd)
    return True


def _check_group_name(name: str) -> None:
    plain = name.isascii() and name.replace("-", "a").replace("_", "a").replace(".", "a").isalnum()
    if not plain or name.startswith(".") or len(name) > GROUP_NAME_BYTES_MAX:
        raise StoreError(
            f"{name!r} cannot name a group: use up to {GROUP_NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`, "
            "not starting with `.` (mount --name)"
        )
