"""A store in memory that can lose what a power cut loses, fill up, fail, and be put back to an older copy.

It has the part of dedup.store's interface that a second appliance uses to ingest. Everything is kept as records, so a
test may look at any moment.

Invariants:
- a killed process loses nothing of it; a power cut loses some end of what was not synced, never more;
- `held_ever` and `durable_ever` are the most it ever held: nobody may have been told of more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_digest

from dedup.errors import Damaged, OutOfOrder, StoreFailed, StoreFull, UnknownName
from dedup.pointer_map import Addresses
from dedup.storage import Storage
from dedup.types import (
    BLOCK_BYTES,
    Address,
    Aggregate,
    Bookmark,
    ClockRun,
    Epoch,
    EpochStart,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    VolumeState,
)
from tests.simulation.chance import Chance
from tests.simulation.image import Image
from tests.simulation.trace import Trace


@dataclass(frozen=True)
class ModelUsage:
    bytes: int


@dataclass(frozen=True)
class ModelRange:
    """In the place of dedup.held_range.HeldRange."""

    content: bytearray

    @property
    def is_hole(self) -> bool:
        return not any(self.content)

    def read(self) -> tuple[bytearray, frozenset[int]]:
        return self.content, frozenset()


class ModelBlocks:
    """In the place of a store's own blocks and its pool: blocks by fingerprint, read later by address."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance
        self._blocks: dict[int, bytes] = {}

    def candidates(self, group: ModelGroup, fingerprints: Sequence[bytes]) -> Addresses:
        there: dict[bytes, bytes] = {}
        for volume in group.image.volumes.values():
            content = volume.content
            for at in range(0, len(content) - BLOCK_BYTES + 1, BLOCK_BYTES):
                block = bytes(content[at : at + BLOCK_BYTES])
                there[xxh3_128_digest(block)] = block
        found = np.zeros(len(fingerprints), dtype=np.uint64)
        for place, fingerprint in enumerate(fingerprints):
            if fingerprint in there:
                address = len(self._blocks) + 2
                self._blocks[address] = there[fingerprint]
                found[place] = address
        return found

    def read_addresses(self, addresses: Addresses, into: memoryview) -> None:
        for place, address in enumerate(addresses.tolist()):
            into[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES] = self.read_block(Address(address))

    def read_block(self, address: Address) -> bytes:
        if self._chance.happens(0.02):
            raise Damaged(f"the block at {address} was collected")
        return self._blocks[address]


@dataclass(eq=False)
class ModelGroup:
    """One group: its records, the image they make, and the image of those that are durable."""

    store: ModelStore
    name: str
    log: list[Record] = field(default_factory=list)
    image: Image = field(default_factory=Image)
    durable_image: Image = field(default_factory=Image)
    durable_count: int = 0
    held_ever: Seq = Seq(0)
    durable_ever: Seq = Seq(0)
    names: set[str] = field(default_factory=set)
    _owners: list[tuple[int, str]] = field(default_factory=list)
    """Behind how many records each began."""
    _first_owner: str = ""

    @property
    def owners(self) -> tuple[str, ...]:
        return (self._first_owner,) if self._first_owner else tuple(agent for _, agent in self._owners)

    def set_owner(self, agent: str) -> None:
        self.store.refuse_if_failed()
        if not self.held:
            self._first_owner = agent
        elif self.owners[-1:] != (agent,):
            self._owners = [*(one for one in self._owners if one[1] != agent), (len(self.log), agent)]
            self.store.sync()

    @property
    def held(self) -> Seq:
        return self.image.held

    @property
    def durable(self) -> Seq:
        return self.durable_image.held

    @property
    def epoch(self) -> Epoch:
        return self.image.epoch

    @property
    def time(self) -> TimeNs:
        return self.image.time

    @property
    def run(self) -> ClockRun:
        return self.image.run

    @property
    def has_base(self) -> bool:
        return bool(self.image.base)

    @property
    def reconciling(self) -> bool:
        return self.image.reconciling

    @property
    def next_volume(self) -> VolumeId:
        return self.image.next_volume

    def volumes(self) -> list[VolumeState]:
        return [self.image.volumes[volume].state() for volume in sorted(self.image.volumes)]

    def name_exists(self, name: str) -> bool:
        return name in self.names

    def ingest(self, records: Sequence[Record]) -> None:
        self.store.refuse_if_failed()
        if self.store.full:
            raise StoreFull("the disk under the store is full")
        last = self.held
        for record in records:
            first = record.first_seq if isinstance(record, Aggregate) else record.seq
            if first != last + 1:
                raise OutOfOrder(f"record {first} does not follow {last}")
            if isinstance(record, EpochStart) and record.epoch <= self.epoch:
                self.store.trace.violated("one-writer", f"epoch {record.epoch} starts after epoch {self.epoch}")
            last = record.seq
        if not self.image.knows(list(records)):
            raise UnknownName("no such volume")
        for record in records:
            self.image.apply(record)
            if isinstance(record, Bookmark):
                self.names.add(record.name)
        self.log += records
        if self._first_owner:
            self._owners, self._first_owner = [(len(records), self._first_owner)], ""
        self.held_ever = max(self.held_ever, self.held)
        self.store.trace.note(f"ingest {len(records)} up to {self.held}")

    def held_range(self, volume: VolumeId, offset: int, blocks: int) -> ModelRange:
        found = self.image.volumes.get(volume)
        if found is None:
            raise UnknownName(f"no volume {volume}")
        length = blocks * BLOCK_BYTES
        return ModelRange(bytearray(found.content[offset : offset + length]).ljust(length, b"\0"))

    def sync(self) -> None:
        for record in self.log[self.durable_count :]:
            self.durable_image.apply(record)
        self.durable_count = len(self.log)
        self.durable_ever = max(self.durable_ever, self.durable)

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` records; what is left is durable, as after an opening."""
        if count < self.durable_count:
            self.durable_image, self.durable_count = Image(), 0
        del self.log[count:]
        self._owners = [one for one in self._owners if one[0] <= count]
        self._first_owner = ""
        self.sync()
        self.image = self.durable_image.copy()
        self.names = {record.name for record in self.log if isinstance(record, Bookmark)}

    def count_up_to(self, seq: Seq) -> int:
        """How many of the log's entries end at or before `seq`."""
        return bisect_left(self.log, seq + 1, key=lambda record: record.seq)


class ModelStore:
    """What survives the processes of a second appliance."""

    uuid = "5eed"
    path = Path("a store that is in memory only")
    storage = Storage()

    def __init__(self, trace: Trace, chance: Chance) -> None:
        self.trace = trace
        self.full = False
        """Nothing more is taken."""
        self.sync_fails = False
        """The next sync fails, and the store with it."""
        self.own_blocks = self.pool = ModelBlocks(chance)
        self._chance = chance
        self._failed = False
        self._groups: dict[str, ModelGroup] = {}

    @property
    def groups(self) -> Sequence[ModelGroup]:
        return list(self._groups.values())

    def group(self, name: str) -> ModelGroup:
        return self._groups.setdefault(name, ModelGroup(self, name))

    def refuse_if_failed(self) -> None:
        if self._failed:
            raise StoreFailed("the store failed before; open it anew")

    def sync(self) -> None:
        self.refuse_if_failed()
        if self.sync_fails:
            self.sync_fails, self._failed = False, True
            self.trace.note("sync fails")
            raise StoreFailed("fdatasync of the journal failed: Input/output error")
        for group in self.groups:
            group.sync()

    def let_pass(self) -> None:
        """Nothing lies in memory."""

    def checkpoint_due(self) -> bool:
        return False

    def merge(self) -> bool:
        """It has nothing to merge."""
        return False

    def checkpoint(self) -> None:
        self.sync()

    def usage(self) -> ModelUsage:
        return ModelUsage(bytes=1)

    # -- what happens to it ------------------------------------------------------------------------------------------

    def open_again(self, *, power: bool) -> None:
        """A new process opens it. With `power` the host was without: an end of what was not synced is lost."""
        for group in self.groups:
            count = len(group.log)
            if self._failed:
                count = group.durable_count
            elif power:
                count = self._chance.number(group.durable_count, count)
            if count < group.durable_count:
                raise AssertionError("a power cut loses nothing that is durable")
            group.keep(count)
        self._failed = self.sync_fails = False

    def put_back(self) -> None:
        """Somebody restored it from an old copy. To be done while nobody has it open."""
        for group in self.groups:
            group.keep(self._chance.number(0, group.durable_count))
