"""Repair: makes of a damaged store the best that its own bytes allow, and says what it did.

A store in which a file is of a version that is not known here is refused before anything else: such a file is no
damage, and nobody here could tell what it needs. Then, in this order, each step complete and durable before the next:

1. what the sync log has; the marker, directories that are missing, NAME.tmp files;
2. the manifest of a journal, from the consolidated segments themselves;
3. containers: each that does not open, or has a damaged slot of which the block is found elsewhere, is written anew
   (`salvage`); what is damaged is kept in `quarantine/`; a container without a block that nothing names goes;
4. a journal that is broken, with `accept_loss` only: it is cut at the first bad entry, what is cut off is kept in
   `quarantine/`;
5. the index: one that does not equal the journal goes to `quarantine/`, and is made anew from journal and containers;
6. the store is opened for writing once and closed, as any appliance would; then it is verified.

Invariants:
- nothing is deleted that any entry of a journal names; what is replaced or cut off is in quarantine before;
- history is never cut short unless that was asked for;
- what is of an unknown version is never taken for damage: no step catches UnknownFormat;
- killed at any instant it can be run again: no step relies on what an earlier one remembered.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dedup import layout
from dedup.container import ContainerReader
from dedup.container_repair import ContainerRepair
from dedup.damage import INDEX, Repair, Report
from dedup.errors import Damaged, NotAStore, StoreBusy, Unreadable
from dedup.format_check import refuse_unknown
from dedup.group_verify import GroupVerifier
from dedup.journal_repair import cut_journal, restore_manifest
from dedup.marker import DIRECTORIES, read_marker, refuse_network, write_marker
from dedup.quarantine import Quarantine
from dedup.storage import Storage
from dedup.store import Store
from dedup.sync_log import SYNC_LOG_NAME
from dedup.sync_log_restore import restore
from dedup.verify import Inspection, NoProgress, Progress, inspect


def repair(
    path: Path,
    *,
    read_data: bool = False,
    accept_loss: bool = False,
    storage: Storage | None = None,
    progress: Progress | None = None,
) -> Report:
    """Repairs the store at `path`, which nobody may have open for writing, and verifies it; the report has both.

    `read_data` looks for damage in every block too. `accept_loss` lets a broken journal be cut at its first bad entry.
    NotAStore, StoreBusy, UnknownFormat; StoreFull, StoreFailed: run it again.
    """
    storage = storage or Storage()
    _refuse_no_store(storage, path)
    lock = storage.open(path / layout.LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        if not storage.lock(lock):
            raise StoreBusy(f"{path} is being written by another process; stop it (`rewindfs unmount`), then repair")
        repairer = _Repairer(storage, path, progress or NoProgress(), read_data, accept_loss)
        repairer.run()
    finally:
        storage.close(lock)
    if repairer.openable:
        repairer.open_once()
    # A block that was lost has its fingerprint still: only reading it tells.
    read_data = read_data or repairer.lost > 0
    report = inspect(path, storage, read_data=read_data, progress=progress).report
    return replace(report, repairs=tuple(repairer.done))


def _refuse_no_store(storage: Storage, path: Path) -> None:
    """NotAStore unless there is a marker, or at least what only a store has."""
    has_parts = all(storage.exists(path / name) for name in (layout.CONTAINERS_NAME, layout.GROUPS_NAME))
    if not has_parts and not storage.exists(path / layout.STORE_MARKER_NAME):
        raise NotAStore(f"{path} is not a rewindfs store: it has no {layout.STORE_MARKER_NAME} file")
    refuse_network(path)


class _Repairer:
    def __init__(self, storage: Storage, path: Path, progress: Progress, read_data: bool, accept_loss: bool) -> None:
        self.done: list[Repair] = []
        self.lost = 0
        """Blocks of containers that were written anew without them."""
        self.log_is_left = False
        """What was durable in the sync log alone may be lost."""
        self.openable = False
        """Whether opening the store for writing can only do good."""
        self._storage = storage
        self._path = path
        self._progress = progress
        self._read_data = read_data
        self._accept_loss = accept_loss
        self._containers = path / layout.CONTAINERS_NAME
        self._quarantine = Quarantine(storage, path)
        self._ends: dict[str, int] = {}

    def _note(self, what: str, path: Path | None = None) -> None:
        self.done.append(Repair(what, None if path is None else str(path.relative_to(self._path))))

    def run(self) -> None:
        refuse_unknown(self._storage, self._path)
        self._restore_log()
        self._restore_marker()
        self._restore_directories()
        self._drop_temporaries()
        rebuild = self._restore_manifests()
        found = inspect(self._path, self._storage, read_data=self._read_data, progress=self._progress)
        sound = all(group.sound for group in found.groups)
        containers = ContainerRepair(
            self._storage, self._path, self._quarantine, [group.name for group in found.groups]
        )
        for what, path in containers.run(found.slots, names_are_known=sound):
            self._note(what, path)
        self.lost = containers.lost
        if sound:
            self._drop_unnamed(found)
        cut = [self._cut(group) for group in found.groups if not group.sound]
        self.openable = all(cut) or all(group.sound or group.bridged for group in found.groups)
        if (rebuild or any(cut) or not found.checks[INDEX].ok) and all(cut):
            self._give_up_index()
        self._ends = {group.name: group.last for group in found.groups}

    def _restore_log(self) -> None:
        try:
            restore(self._storage, self._path)
        except Damaged as error:
            self._restore_part_of_log(str(error))

    def _restore_part_of_log(self, why: str) -> None:
        path = self._path / SYNC_LOG_NAME
        try:
            kept = self._quarantine.keep_copy(path, why)
        except Unreadable:
            kept = self._quarantine.move(path, why)
        self.log_is_left = True
        left = restore(self._storage, self._path, leaving=True)
        files = ", ".join(sorted({str(file.relative_to(self._path)) for file in left})) or SYNC_LOG_NAME
        self._note(f"the sync log could not be restored whole, of {files}: {why}; it is now {kept.name} there", kept)

    # -- marker, directories, leftovers ------------------------------------------------------------------------------

    def _restore_marker(self) -> None:
        path = self._path / layout.STORE_MARKER_NAME
        try:
            read_marker(self._storage, self._path)
            return
        except (NotAStore, Damaged) as error:
            why = str(error)
        if self._storage.exists(path):
            self._quarantine.keep(path, why)
        write_marker(self._storage, self._path)
        self._note("the marker was made anew, with another store id: agents that connect reconcile", path)

    def _restore_directories(self) -> None:
        for name in DIRECTORIES:
            if not self._storage.exists(self._path / name):
                self._storage.mkdir(self._path / name)
                self._storage.sync_directory(self._path)
                self._note("the directory was missing", self._path / name)
        groups = self._path / layout.GROUPS_NAME
        for name in self._storage.listdir(groups):
            if not self._storage.exists(groups / name / layout.JOURNAL_NAME):
                self._storage.mkdir(groups / name / layout.JOURNAL_NAME)
                self._storage.sync_directory(groups / name)
                self._note("the directory was missing", groups / name / layout.JOURNAL_NAME)

    def _journals(self) -> list[Path]:
        groups = self._path / layout.GROUPS_NAME
        return [groups / name / layout.JOURNAL_NAME for name in self._storage.listdir(groups)]

    def _drop_temporaries(self) -> None:
        for directory in (self._path, self._containers, *self._journals()):
            for name in self._storage.listdir(directory):
                if name.endswith(layout.TEMPORARY_SUFFIX):
                    self._storage.unlink(directory / name)
                    self._note("a file that was never completed was removed", directory / name)

    def _restore_manifests(self) -> bool:
        """Whether any was made anew, so that the index may be of another one."""
        restored = False
        for directory in self._journals():
            what = restore_manifest(self._storage, directory, self._quarantine)
            if what is not None:
                self._note(what, directory / layout.MANIFEST_NAME)
                restored = True
        return restored

    # -- containers that nothing names -------------------------------------------------------------------------------

    def _drop_unnamed(self, found: Inspection) -> None:
        for name in self._storage.listdir(self._containers):
            container = layout.container_named(name)
            if container is None or found.slots.named(container):
                continue
            path = self._containers / name
            try:
                reader = ContainerReader.open(self._storage, self._containers, container)
            except Damaged as error:
                if self._storage.file_bytes(path) > layout.RAW_SLOTS_OFFSET:
                    kept = self._quarantine.move(path, str(error))
                    self._note(f"a container that nothing names does not open; it is now {kept.name} there", kept)
                    continue
            else:
                filled = bool(reader.slots())
                reader.close()
                if filled:
                    continue
            self._storage.unlink(path)
            self._storage.sync_directory(self._containers)
            self._note("an empty container that nothing names was removed", path)

    # -- journals and index ------------------------------------------------------------------------------------------

    def _cut(self, group: GroupVerifier) -> bool:
        """Cuts a broken journal at its first bad entry, if that was asked for and is of use; whether it was cut."""
        if not self._accept_loss or group.bridged or group.broken_at is None:
            return False
        directory = self._path / layout.GROUPS_NAME / group.name / layout.JOURNAL_NAME
        for what, path in cut_journal(self._storage, directory, group.broken_at, self._quarantine):
            self._note(what, path)
        return True

    def _give_up_index(self) -> None:
        path = self._path / layout.INDEX_NAME
        if self._storage.listdir(path):
            self._quarantine.move(path, "does not equal the journal, or cannot be read")
            self._storage.mkdir(path)
            self._storage.sync_directory(self._path)
        self._note("the index was made anew from the journal and the containers", path)

    def open_once(self) -> None:
        """Recovery, as at each opening; what it cuts off is said."""
        store = Store.open(self._path, self._storage)
        try:
            held = {group.name: group.held for group in store.groups}
        except BaseException:
            store.abandon()
            raise
        store.close()
        for name, last in sorted(self._ends.items()):
            if held.get(name, last) < last:
                why = (
                    "were cut off; the sync log may have had blocks of them, and is in quarantine/"
                    if self.log_is_left
                    else "had not become durable, and were cut off; the agent sends them again"
                )
                self._note(f"group {name}: seq {held[name] + 1}..{last} {why}")
