"""Verification: one named check for each invariant that a store can be checked for alone. Reads, never writes.

    journal                every entry decodes, and seqs follow each other (`order`)
    pointers-resolve       every address that a journal entry or any version of a pointer map names is a slot that is
                           there and has the fingerprint that the journal says; on request its bytes match it
    index-equals-journal   pointer maps, volumes and names of the last checkpoint equal a replay of the whole journal
    containers             every container that is named opens: header, form, sealed table
    catalog                snapshots and bookmarks name recovery points that are held; gaps are well-formed

It runs beside a writer: what is appended after it began is left for the next time, a last entry that is not whole is
the end. Memory: `reachability` (a bit per slot) and `head_replay` (bounded windows) say what they take.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import lmdb
import numpy as np

from dedup import layout
from dedup.container import ContainerReader
from dedup.damage import Check, Damage, Report, locate
from dedup.errors import Damaged, StoreError, UnknownFormat
from dedup.group_verify import CATALOG, INDEX, JOURNAL, POINTERS, GroupVerifier
from dedup.reachability import Reachability
from dedup.reader import StoreReader
from dedup.types import BLOCK_BYTES, ContainerId

CONTAINERS: Final = "containers"
CHECKS: Final = (JOURNAL, POINTERS, INDEX, CONTAINERS, CATALOG)


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

    What is wrong inside is in the report. NotAStore, UnknownFormat; Damaged when the index cannot be opened at all.
    """
    store = StoreReader.open(path)
    try:
        return _Verifier(store, progress or NoProgress()).run(read_data)
    finally:
        store.close()


class _Verifier:
    def __init__(self, store: StoreReader, progress: Progress) -> None:
        self._store = store
        self._progress = progress
        self._containers = store.path / layout.CONTAINERS_NAME
        self._slots = Reachability(store.storage, self._containers)
        self._checks = {name: Check(name) for name in CHECKS}
        self._groups: list[GroupVerifier] = []

    def run(self, read_data: bool) -> Report:
        with self._store.index.read() as txn:
            ids = self._store.index.group_ids(txn)
        on_disk = self._store.storage.listdir(self._store.path / layout.GROUPS_NAME)
        for name in sorted({*ids, *on_disk}):
            group = GroupVerifier(self._store, name, ids.get(name), self._checks, self._slots)
            self._groups.append(group)
            self._guarded(group)
        self._slots.flush()
        if read_data:
            self._progress.phase("blocks", self._slots.blocks * BLOCK_BYTES)
            self._slots.read_data(self._progress.advance)
        self._checks[POINTERS].items = self._slots.items
        self._check_containers()
        if self._slots.bad_count:
            self._name_bad_blocks()
        return Report(tuple(self._checks.values()))

    def _guarded(self, group: GroupVerifier) -> None:
        """What the index itself refuses is damage of the check that met it."""
        steps: list[tuple[str, Callable[[], None]]] = [
            (INDEX, group.begin),
            (JOURNAL, lambda: self._read_journal(group)),
            (INDEX, group.compare),
            (POINTERS, group.versions),
            (CATALOG, group.catalog),
        ]
        for check, step in steps:
            try:
                step()
            except (Damaged, lmdb.Error) as error:
                self._checks[check].add(Damage(str(error), group=group.name))

    def _read_journal(self, group: GroupVerifier) -> None:
        self._progress.phase(f"journal of {group.name}", group.journal_bytes)
        group.journal(self._progress.advance)

    def _check_containers(self) -> None:
        check = self._checks[CONTAINERS]
        for name in self._store.storage.listdir(self._containers):
            container = layout.container_named(name)
            if container is None:
                continue
            check.items += 1
            try:
                ContainerReader.open(self._store.storage, self._containers, container).close()
            except (Damaged, UnknownFormat) as error:
                # One that was never synced, and so is named by nothing, is what a crash leaves; it is never read.
                if self._slots.named(container) or not self._checks[JOURNAL].ok:
                    check.add(Damage(str(error), name))
        for number in sorted(self._slots.unreadable):
            path = layout.container_path(self._containers, ContainerId(number))
            if not path.exists():
                check.add(Damage(f"{path}: the container is missing", path.name))

    def _name_bad_blocks(self) -> None:
        """Damaged addresses, as ranges of volumes in snapshots; what is in none, by the journal; else by itself."""
        check = self._checks[POINTERS]
        left = set(self._slots.bad)
        for group in self._groups:
            if group.group_id is None:
                continue
            bad = np.array(sorted(self._slots.bad), dtype=np.uint64)
            try:
                reader = self._store.group(group.name)
                for found in locate(self._store.index, reader, group.group_id, bad):
                    where = found.addresses[0]
                    check.add(found.damage(group.name, self._slots.bad[where], _file(where)))
                    left.difference_update(found.addresses)
                self._name_by_journal(group, left)
            except (StoreError, lmdb.Error):
                # The journal or the index is damaged too, and their checks say so: no moment can be looked into.
                continue
        for where in sorted(left):
            check.add(Damage(self._slots.bad[where], _file(where)))
        check.omitted += self._slots.bad_count - len(self._slots.bad)

    def _name_by_journal(self, group: GroupVerifier, left: set[int]) -> None:
        """Names what no snapshot has by the first record that wrote it."""
        if not left:
            return
        reader = self._store.group(group.name)
        for seq, volume, block, where in group.first_naming(left):
            state = reader.view(seq).volume(volume)
            path = state.path if state is not None else f"volume {volume}"
            what = f"{self._slots.bad[where]}; in recovery points from seq={seq} on"
            self._checks[POINTERS].add(
                Damage(what, _file(where), group.name, None, path, block * BLOCK_BYTES, BLOCK_BYTES)
            )
            left.discard(where)


def _file(where: int) -> str:
    return layout.container_name(ContainerId(where >> layout.SLOT_BITS))
