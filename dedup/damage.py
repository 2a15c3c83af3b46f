"""What `verify` finds: checks by name, and damage located for a person by snapshot, volume and range of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Index
from dedup.layout import SLOT_BITS
from dedup.pointer_map import Addresses
from dedup.reader import GroupReader
from dedup.synthesis import VolumePointers
from dedup.types import BLOCK_BYTES, Seq, VolumeState

JOURNAL: Final = "journal"
MANIFEST: Final = "manifest"
POINTERS: Final = "pointers-resolve"
INDEX: Final = "index-equals-journal"
CONTAINERS: Final = "containers"
CATALOG: Final = "catalog"
POLICY: Final = "policy"
CHECKS: Final = (JOURNAL, MANIFEST, POINTERS, INDEX, CONTAINERS, CATALOG, POLICY)
"""The names of the checks, in the order of the report; `verify` says what each is."""

LATEST: Final = "latest"
"""What damage of the latest state has for the name of a snapshot."""
DAMAGE_MAX: Final = 1000
"""Damage that one check names; what is more is only counted."""
_LEAVES_PER_REQUEST: Final = 256


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong. `snapshot` is a name, or `latest`; offset and length are bytes of the volume."""

    what: str
    file: str | None = None
    group: str | None = None
    snapshot: str | None = None
    volume: str | None = None
    offset: int | None = None
    length: int | None = None


@dataclass(slots=True)
class Check:
    """One invariant, what it was held against (`items`), and where it does not hold."""

    name: str
    items: int = 0
    damage: list[Damage] = field(default_factory=list)
    omitted: int = 0
    """Damage found but not in `damage`, which is bounded."""

    @property
    def ok(self) -> bool:
        return not self.damage and not self.omitted

    def add(self, damage: Damage) -> None:
        if len(self.damage) < DAMAGE_MAX:
            self.damage.append(damage)
        else:
            self.omitted += 1


@dataclass(frozen=True, slots=True)
class Repair:
    """One thing that a repair did. `file` is relative to the store."""

    what: str
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one `verify`; `repairs` is what was done before it, in order."""

    checks: tuple[Check, ...]
    repairs: tuple[Repair, ...] = ()

    @property
    def repaired(self) -> int:
        return len(self.repairs)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True)
class Located:
    """Consecutive damaged blocks of one volume at one moment, all of one container."""

    snapshot: str
    volume: VolumeState
    first_block: int
    addresses: tuple[int, ...]

    def damage(self, group: str, what: str, file: str) -> Damage:
        offset = self.first_block * BLOCK_BYTES
        length = max(0, min(len(self.addresses) * BLOCK_BYTES, self.volume.size - offset))
        return Damage(what, file, group, self.snapshot, self.volume.path, offset, length)


def locate(index: Index, group: GroupReader, group_id: int, bad: Addresses) -> Iterator[Located]:
    """Where the `bad` addresses lie in each snapshot of the group and in its latest state. Damaged."""
    catalog = Catalog(index, group_id)
    for snapshot in group.snapshots():
        for volume in group.volumes_at(Seq(snapshot.seq)).values():
            if snapshot.volume in (None, volume.volume):
                pointers = VolumePointers(group.view(Seq(snapshot.seq)), catalog, volume.volume)
                yield from _locate(index, pointers, snapshot.name, volume, bad)
    yield from locate_head(index, group, catalog, bad)


def locate_head(index: Index, group: GroupReader, catalog: Catalog, bad: Addresses) -> Iterator[Located]:
    """Where the `bad` addresses lie in the latest state. Damaged."""
    for volume in group.volumes_at(group.held).values():
        pointers = VolumePointers(group.view(group.held), catalog, volume.volume)
        yield from _locate(index, pointers, LATEST, volume, bad)


def _locate(
    index: Index, pointers: VolumePointers, name: str, volume: VolumeState, bad: Addresses
) -> Iterator[Located]:
    with index.read() as txn:
        leaves = pointers.written_leaves(txn)
    for at in range(0, len(leaves), _LEAVES_PER_REQUEST):
        with index.read() as txn:
            decoded = [(leaf, pointers.leaf(txn, leaf)) for leaf in leaves[at : at + _LEAVES_PER_REQUEST]]
        for leaf, addresses in decoded:
            yield from _runs(leaf * len(addresses), addresses, bad, name, volume)


def _runs(first: int, addresses: Addresses, bad: Addresses, name: str, volume: VolumeState) -> Iterator[Located]:
    hits = np.flatnonzero(np.isin(addresses, bad))
    if len(hits) == 0:
        return
    containers = addresses[hits] >> np.uint64(SLOT_BITS)
    breaks = np.flatnonzero((np.diff(hits) != 1) | (containers[1:] != containers[:-1])) + 1
    for run in np.split(hits, breaks):
        yield Located(name, volume, first + int(run[0]), tuple(addresses[run].tolist()))
