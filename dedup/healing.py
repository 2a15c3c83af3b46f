"""Healing: a damaged slot gets its block back, in place, from bytes that match its fingerprint.

Then everything that names the slot is whole again, past moments too; no pointer changes. The bytes come with records:
ingest meets a known fingerprint whose slot reads damaged. So that they do come, the appliance notes what it, or a
verification, found damaged (`Wounds`), and the agent asks for what of that lies in the head (`head_ranges`) and sends
it once more.

Invariants:
- a slot is written only with bytes that hash to the fingerprint which the container itself holds for the slot: what
  an index alone says of an address is no reason to write there;
- it was damaged before, so a torn write makes nothing worse.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Index
from dedup.container import ContainerReader
from dedup.container_pool import ContainerPool
from dedup.damage import locate_head
from dedup.errors import Damaged, StoreFull, UnknownFormat
from dedup.layout import (
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    RAW_SLOTS_OFFSET,
    RAW_TABLE_OFFSET,
    SLOTS_MAX,
    container_of,
    container_path,
    fingerprint,
    slot_of,
    unpack_container_header,
)
from dedup.pointer_map import Addresses
from dedup.quarantine import Quarantine
from dedup.reader import GroupReader
from dedup.salvage import salvage
from dedup.storage import Buffer, Storage
from dedup.types import LOST, Address, ContainerForm, ContainerId, VolumeId

log = logging.getLogger(__name__)

WOUNDS_MAX: Final = 1 << 16
"""Damaged addresses that are remembered; what is more is found by the next verification."""
RANGE_BLOCKS_MAX: Final = 256
"""Blocks of one range of `head_ranges`: what one record can carry."""


class Wounds:
    """Addresses that are known to be damaged, until each group was asked for those in its head. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Address, None] = {}
        self._taken: dict[str, set[Address]] = {}
        self.healed = 0
        """Slots that were healed since the store was opened."""

    def note(self, addresses: Iterable[int]) -> None:
        """These are damaged; from now on `take` gives them, also if it did before."""
        for where in addresses:
            if len(self._known) < WOUNDS_MAX:
                self._known[Address(where)] = None
            for taken in list(self._taken.values()):
                taken.discard(Address(where))

    def heal(self, where: Address) -> None:
        """The slot is sound again."""
        self._known.pop(where, None)
        self.healed += 1

    def take(self, group: str) -> Addresses:
        """What this group was not asked for yet, ascending."""
        taken = self._taken.setdefault(group, set())
        new = sorted(where for where in list(self._known) if where not in taken)
        taken.update(new)
        return np.array(new, dtype=np.uint64)


class Healer:
    """Writes blocks back into the containers of the store that is being written. For one thread at a time."""

    def __init__(self, storage: Storage, store_path: Path, directory: Path, pool: ContainerPool) -> None:
        self.wounds = Wounds()
        self._storage = storage
        self._directory = directory
        self._pool = pool
        self._quarantine = Quarantine(storage, store_path)

    def heal(self, where: Address, mark: bytes, block: Buffer) -> bool:
        """Whether the slot holds the block now: `block` hashes to `mark`, and so must what the slot is to hold.

        DURABLE when it returns True. StoreFailed; a full disk heals nothing.
        """
        container, slot = container_of(where), slot_of(where)
        if slot >= SLOTS_MAX or fingerprint(block) != mark:
            return False
        try:
            if not self._write(container, slot, mark, block):
                return False
            self._pool.forget(container)
            sound = self._pool.read_block(where) == bytes(block)
        except (Damaged, UnknownFormat, StoreFull) as error:
            log.warning("%s: slot %d is not healed: %s", container_path(self._directory, container), slot, error)
            return False
        if sound:
            self.wounds.heal(where)
            log.warning("%s: slot %d was damaged, and is healed", container_path(self._directory, container), slot)
        return sound

    def _write(self, container: ContainerId, slot: int, mark: bytes, block: Buffer) -> bool:
        reader = ContainerReader.open(self._storage, self._directory, container)
        try:
            if reader.fingerprints(slot, 1) != mark:
                return False
            if reader.header.form is ContainerForm.SEALED:
                slots = reader.slots()
                expected = {one: reader.fingerprints(one, 1) for one in slots}
                salvage(
                    self._storage,
                    self._directory,
                    container,
                    reader.header.journal,
                    expected,
                    {mark: bytes(block)}.get,
                    partial(self._quarantine.keep, why=f"slot {slot} of it was damaged, and was healed in a new file"),
                )
                return True
        finally:
            reader.close()
        path = container_path(self._directory, container)
        fd = self._storage.open(path, os.O_RDWR)
        try:
            # Once more through this descriptor: the file may have been sealed meanwhile.
            if (
                unpack_container_header(self._storage.pread(fd, CONTAINER_PAGE_BYTES, 0), path).form
                != ContainerForm.RAW
            ):
                return False
            if self._storage.pread(fd, FINGERPRINT_BYTES, RAW_TABLE_OFFSET + slot * FINGERPRINT_BYTES) != mark:
                return False
            self._storage.pwritev(fd, [block], RAW_SLOTS_OFFSET + slot * len(block))
            self._storage.datasync(fd)
        finally:
            self._storage.close(fd)
        return True


def head_ranges(index: Index, group: GroupReader, group_id: int, bad: Addresses) -> Iterator[tuple[VolumeId, int, int]]:
    """(volume, first block, blocks) of the latest state that names the `bad` addresses, or blocks that are lost.

    Looks through all pointer maps of the latest state. Damaged.
    """
    wanted = np.union1d(bad, np.array([LOST], dtype=np.uint64))
    for found in locate_head(index, group, Catalog(index, group_id), wanted):
        for at in range(0, len(found.addresses), RANGE_BLOCKS_MAX):
            blocks = min(RANGE_BLOCKS_MAX, len(found.addresses) - at)
            yield found.volume.volume, found.first_block + at, blocks
