"""Verification: one named check for each invariant that a store can be checked for alone. Reads, never writes.

    journal                every entry decodes, and seqs follow each other from 1 on (`order`)
    manifest               the manifest of each journal reads, and its consolidated segments are what it says
    pointers-resolve       every address that a journal entry or any version of a pointer map names is a slot that is
                           there and has the fingerprint that the journal says; on request its bytes match it
    index-equals-journal   the index opens, and every checkpoint in it (volumes, pointer maps; of the last one also
                           names, gaps, clock runs) equals a replay of the journal up to there
    fingerprints           every run of fingerprints that the index names opens; one that does not costs deduplication,
                           and nothing else
    containers             every container that is named opens: header, form, sealed table
    policy                 the retention policy reads, where one was set
    catalog                snapshots and bookmarks name recovery points that are held; gaps are well-formed

It runs beside a writer: what is appended after it began is left for the next time, a last entry that is not whole is
the end. Memory: `reachability` (a bit per slot) and `head_replay` (bounded windows) say what they take.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np

from dedup import layout
from dedup.catalog import Index
from dedup.container import ContainerReader
from dedup.container_pool import ContainerPool
from dedup.damage import (
    CATALOG,
    CHECKS,
    CONTAINERS,
    FINGERPRINTS,
    INDEX,
    JOURNAL,
    POINTERS,
    POLICY,
    Check,
    Damage,
    Report,
    locate,
)
from dedup.errors import Damaged, StoreError, StoreFailed, UnknownFormat
from dedup.fingerprint_run import FingerprintRun
from dedup.fingerprint_runs import run_name
from dedup.group_verify import GroupVerifier
from dedup.index_compare import IndexRefused
from dedup.marker import read_marker
from dedup.pins import ReaderPins
from dedup.reachability import Reachability
from dedup.reader import StoreReader
from dedup.retention import load_policy
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, LOST_CONTAINER, ContainerId


class Progress(Protocol):
    """Told how far a long work is; in bytes."""

    def phase(self, name: str, total_bytes: int) -> None:
        """A part of the work begins."""

    def advance(self, done_bytes: int) -> None:
        """So much more of the part is done."""


class NoProgress:
    """Tells nobody."""

    def phase(self, name: str, total_bytes: int) -> None: ...

    def advance(self, done_bytes: int) -> None: ...


def verify(path: Path, *, read_data: bool = False, progress: Progress | None = None) -> Report:
    """Checks the store at `path`, `read_data`: every block too. Any number at once, beside a writer too.

    Meanwhile nothing is thinned out or swept. What is wrong inside is in the report. NotAStore, UnknownFormat; Damaged
    when the marker is; StoreBusy, StoreFailed when nothing can be pinned.
    """
    storage = Storage()
    read_marker(storage, path)
    pins = ReaderPins.open(path, storage, everything=True)
    try:
        return inspect(path, storage, read_data=read_data, progress=progress).report
    finally:
        pins.close()


def inspect(path: Path, storage: Storage, *, read_data: bool = False, progress: Progress | None = None) -> Inspection:
    """As `verify`, with everything that was found out: what a repair goes by."""
    read_marker(storage, path)
    inspection = Inspection(path, storage, progress or NoProgress())
    inspection.run(read_data)
    return inspection


class Inspection:
    """One verification, and what it found."""

    def __init__(self, path: Path, storage: Storage, progress: Progress) -> None:
        self.path = path
        self.containers = path / layout.CONTAINERS_NAME
        self.slots = Reachability(storage, self.containers)
        self.groups: list[GroupVerifier] = []
        self.checks = {name: Check(name) for name in CHECKS}
        self._storage = storage
        self._progress = progress

    @property
    def report(self) -> Report:
        return Report(tuple(self.checks.values()))

    def run(self, read_data: bool) -> None:
        index = self._open_index()
        try:
            self._check(index, read_data)
        finally:
            if index is not None:
                index.close()

    def _open_index(self) -> Index | None:
        check = self.checks[INDEX]
        check.items += 1
        try:
            return Index(self.path / layout.INDEX_NAME, writer=False)
        except Damaged as error:
            check.add(Damage(str(error), layout.INDEX_NAME))
            return None

    def _check(self, index: Index | None, read_data: bool) -> None:
        ids: dict[str, int] = {}
        if index is not None:
            try:
                with index.read() as txn:
                    ids = index.group_ids(txn)
                for read in (index.watermark, index.merged, index.gone):
                    read()
                self._check_runs(index)
            except (Damaged, lmdb.Error) as error:
                self.checks[INDEX].add(Damage(str(error), layout.INDEX_NAME))
        self._check_policy()
        on_disk = self._storage.listdir(self.path / layout.GROUPS_NAME)
        for name in sorted({*ids, *on_disk}):
            group = GroupVerifier(self._storage, self.path, index, name, ids.get(name), self.checks, self.slots)
            self.groups.append(group)
            self._guarded(group)
        self.slots.flush()
        if read_data:
            self._progress.phase("blocks", self.slots.blocks * BLOCK_BYTES)
            self.slots.read_data(self._progress.advance)
        self.checks[POINTERS].items = self.slots.items
        self._check_containers()
        if self.slots.bad_count:
            self._name_bad_blocks(index)

    def _check_runs(self, index: Index) -> None:
        check = self.checks[FINGERPRINTS]
        for number in index.fingerprint_runs():
            path = self.path / layout.INDEX_NAME / run_name(number)
            check.items += 1
            try:
                FingerprintRun.open(self._storage, path).close()
                continue
            except FileNotFoundError:
                what = f"{path}: the run is missing"
            except (Damaged, UnknownFormat, StoreFailed) as error:
                what = str(error)
            if number in index.fingerprint_runs():  # else a writer has merged it since
                what = f"{what}; blocks are stored once more when they come again, and that is all"
                check.add(Damage(what, f"{layout.INDEX_NAME}/{path.name}"))

    def _check_policy(self) -> None:
        check = self.checks[POLICY]
        check.items += 1
        try:
            load_policy(self._storage, self.path)
        except (Damaged, UnknownFormat) as error:
            check.add(Damage(str(error), layout.POLICY_NAME))

    def _guarded(self, group: GroupVerifier) -> None:
        """What the index itself refuses is damage of the check that met it."""
        steps: list[tuple[str, Callable[[], None]]] = [
            (INDEX, group.begin),
            (JOURNAL, lambda: self._read_journal(group)),
            (INDEX, group.compare),
            (INDEX, group.versions),
            (CATALOG, group.catalog),
        ]
        for check, step in steps:
            try:
                step()
            except (Damaged, lmdb.Error, IndexRefused) as error:
                check = check if isinstance(error, Damaged) else INDEX
                self.checks[check].add(Damage(str(error), group=group.name))

    def _read_journal(self, group: GroupVerifier) -> None:
        self._progress.phase(f"journal of {group.name}", group.journal_bytes)
        group.journal(self._progress.advance)

    def _check_containers(self) -> None:
        check = self.checks[CONTAINERS]
        for name in self._storage.listdir(self.containers):
            container = layout.container_named(name)
            if container is None:
                continue
            check.items += 1
            try:
                ContainerReader.open(self._storage, self.containers, container).close()
            except (Damaged, UnknownFormat) as error:
                # One that was never synced, and so is named by nothing, is what a crash leaves; it is never read.
                if self.slots.named(container) or not self.checks[JOURNAL].ok:
                    check.add(Damage(str(error), name))
        for number in sorted(self.slots.unreadable):
            path = layout.container_path(self.containers, ContainerId(number))
            if number != LOST_CONTAINER and not self._storage.exists(path):
                check.add(Damage(f"{path}: the container is missing", path.name))

    def _name_bad_blocks(self, index: Index | None) -> None:
        """Damaged addresses, as ranges of volumes in snapshots; what is in none, by the journal; else by itself."""
        check = self.checks[POINTERS]
        bad = self.slots.bad
        left = set(bad)
        if index is not None:
            store = StoreReader(self.path, self._storage, index, ContainerPool(self._storage, self.containers))
            for group in self.groups:
                if group.group_id is not None:
                    self._name_of_group(store, group, left)
        for where in sorted(left):
            check.add(Damage(bad[where], _file(where)))
        check.omitted += self.slots.bad_count - len(bad)

    def _name_of_group(self, store: StoreReader, group: GroupVerifier, left: set[int]) -> None:
        bad = np.array(sorted(self.slots.bad), dtype=np.uint64)
        try:
            reader = store.group(group.name)
            assert group.group_id is not None
            for found in locate(store.index, reader, group.group_id, bad):
                where = found.addresses[0]
                self.checks[POINTERS].add(found.damage(group.name, self.slots.bad[where], _file(where)))
                left.difference_update(found.addresses)
            self._name_by_journal(store, group, left)
        except (StoreError, lmdb.Error):
            # The journal or the index is damaged too, and their checks say so: no moment can be looked into.
            return

    def _name_by_journal(self, store: StoreReader, group: GroupVerifier, left: set[int]) -> None:
        """Names what no snapshot has by the first record that wrote it."""
        if not left:
            return
        reader = store.group(group.name)
        for seq, volume, block, where in group.first_naming(left):
            state = reader.view(seq).volume(volume)
            path = state.path if state is not None else f"volume {volume}"
            what = f"{self.slots.bad[where]}; in recovery points from seq={seq} on"
            self.checks[POINTERS].add(
                Damage(what, _file(where), group.name, None, path, block * BLOCK_BYTES, BLOCK_BYTES)
            )
            left.discard(where)


def _file(where: int) -> str:
    return layout.container_name(ContainerId(where >> layout.SLOT_BITS))
