"""The repair of containers: what a damaged one still holds, and what other containers hold a second time.

Memory: the fingerprints of a few damaged containers at a time; the journals are read twice for each few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from dedup import layout
from dedup.container import ContainerReader
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged
from dedup.journal_entry import LoggedExtent, extents_of
from dedup.journal_reader import chain, scan_segment
from dedup.layout import FINGERPRINT_BYTES, SLOT_BITS, SLOT_MASK, container_path
from dedup.quarantine import Quarantine
from dedup.reachability import Reachability
from dedup.salvage import found_in, salvage
from dedup.storage import Storage
from dedup.types import BASE_JOURNAL, HOLE, LOST_CONTAINER, Address, ContainerId, JournalId

_TOGETHER: Final = 8
"""Damaged containers that are repaired together: some 20 MB of fingerprints."""


@dataclass(slots=True)
class _Named:
    """What the journals say of one damaged container."""

    expected: dict[int, bytes] = field(default_factory=dict)
    journal: JournalId = BASE_JOURNAL
    """Of the first entry that names it: the one that filled it."""


class ContainerRepair:
    """Repairs the containers of one store, to which nothing may append meanwhile."""

    def __init__(self, storage: Storage, path: Path, quarantine: Quarantine, groups: Sequence[str]) -> None:
        self._storage = storage
        self._directory = path / layout.CONTAINERS_NAME
        self._journals = [path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME for name in groups]
        self._quarantine = quarantine
        self._pool = ContainerPool(storage, self._directory)
        self.lost = 0
        """Blocks that could not be had back, of the containers that were written anew."""

    def run(self, slots: Reachability, *, names_are_known: bool) -> Iterator[tuple[str, Path]]:
        """Repairs every container in which `slots` found damage; says what was done, each once it is durable.

        Unless all `names_are_known` (a journal is broken) what does not open stays as it is: nobody could tell what
        of it is to be kept.
        """
        todo = sorted({*slots.damaged, *slots.unreadable} - {LOST_CONTAINER})
        try:
            for start in range(0, len(todo), _TOGETHER):
                yield from self._repair(todo[start : start + _TOGETHER], slots, names_are_known)
        finally:
            self._pool.close()

    def _repair(
        self, containers: Sequence[int], slots: Reachability, names_are_known: bool
    ) -> Iterator[tuple[str, Path]]:
        named = self._named(containers)
        unopened = set()
        for container, found in named.items():
            unnamed = self._unnamed_slots(ContainerId(container), found.expected)
            if unnamed is None:
                unopened.add(container)
            else:
                found.expected.update(unnamed)
        twins = self._twins(named, slots)
        for container in containers:
            found = named[container]
            if container in unopened and not names_are_known:
                continue
            if container not in unopened and not self._gains(container, found, twins, slots):
                continue
            path = container_path(self._directory, ContainerId(container))
            missing = not self._storage.exists(path)
            why = slots.unreadable.get(container) or "blocks of it are damaged"
            salvaged = salvage(
                self._storage,
                self._directory,
                ContainerId(container),
                found.journal,
                found.expected,
                partial(self._block, twins),
                partial(self._quarantine.keep, why=why),
            )
            self._pool.forget(ContainerId(container))
            self.lost += salvaged.lost
            what = "missing" if missing else "damaged"
            yield (
                f"a {what} container was written anew: {salvaged.kept} blocks kept, {salvaged.healed} healed from "
                f"copies, {salvaged.lost} lost",
                path,
            )

    def _extents(self) -> Iterator[tuple[JournalId, LoggedExtent]]:
        """Every extent of every entry that can be read, with its entry's data journal."""
        for directory in self._journals:
            try:
                segments = chain(self._storage, directory)
            except Damaged:
                continue
            for segment in segments:
                try:
                    for scanned in scan_segment(self._storage, directory, segment):
                        for extent in extents_of(scanned.raw):
                            yield scanned.journal, extent
                except Damaged:
                    continue  # `verify` has named it; what comes behind is of no less use

    def _named(self, containers: Sequence[int]) -> dict[int, _Named]:
        named = {container: _Named() for container in containers}
        wanted = np.array(containers, dtype=np.uint64)
        for journal, extent in self._extents():
            hits = np.isin(extent.addresses >> np.uint64(SLOT_BITS), wanted)
            for index in np.flatnonzero(hits).tolist():
                where = int(extent.addresses[index])
                found = named[where >> SLOT_BITS]
                if not found.expected:
                    found.journal = journal
                found.expected.setdefault(where & SLOT_MASK, _mark(extent, index))
        return named

    def _unnamed_slots(self, container: ContainerId, named: Iterable[int]) -> dict[int, bytes] | None:
        """Sound slots that no entry names; None when the container does not open."""
        try:
            reader = ContainerReader.open(self._storage, self._directory, container)
        except Damaged:
            return None
        known, found = set(named), {}
        try:
            for slot in reader.slots():
                if slot not in known:
                    try:
                        reader.read_block(slot)
                    except Damaged:
                        continue
                    found[slot] = reader.fingerprints(slot, 1)
        finally:
            reader.close()
        return found

    def _twins(self, named: dict[int, _Named], slots: Reachability) -> dict[bytes, Address]:
        """Where else blocks of these containers lie: an address outside of them for each fingerprint that has one."""
        wanted: set[bytes] = set()
        for container, found in named.items():
            marks = set(found.expected.values())
            wanted |= marks - found_in(self._storage, self._directory, ContainerId(container), marks)
        twins: dict[bytes, Address] = {}
        if not wanted:
            return twins
        for _, extent in self._extents():
            marks_of = extent.fingerprints
            for index, where in enumerate(extent.addresses.tolist()):
                mark = marks_of[index * FINGERPRINT_BYTES : (index + 1) * FINGERPRINT_BYTES]
                if mark in wanted and where != HOLE and where >> SLOT_BITS not in named and where not in slots.bad:
                    twins.setdefault(mark, Address(where))
        return twins

    def _gains(self, container: int, found: _Named, twins: dict[bytes, Address], slots: Reachability) -> bool:
        """Whether any damaged slot of a container that opens would be sound after it was written anew."""
        bad = {
            mark
            for slot, mark in found.expected.items()
            if slots.bad_count > len(slots.bad) or (container << SLOT_BITS | slot) in slots.bad
        }
        if not bad:
            return False
        return any(mark in twins for mark in bad) or bool(
            found_in(self._storage, self._directory, ContainerId(container), bad)
        )

    def _block(self, twins: dict[bytes, Address], mark: bytes) -> bytes | None:
        where = twins.get(mark)
        if where is None:
            return None
        try:
            return self._pool.read_block(where)
        except Damaged:
            return None


def _mark(extent: LoggedExtent, index: int) -> bytes:
    return extent.fingerprints[index * FINGERPRINT_BYTES : (index + 1) * FINGERPRINT_BYTES]
