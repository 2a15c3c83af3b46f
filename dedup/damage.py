"""What `verify` finds: checks by name, and damage located for a person by snapshot, volume and range of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Index
from dedup.layout import POINTER_KEY, SLOT_BITS
from dedup.pointer_map import Addresses, Leaves, distinct_leaves, named_by
from dedup.reader import GroupReader
from dedup.synthesis import VolumePointers
from dedup.types import BLOCK_BYTES, Seq, VolumeId, VolumeState

JOURNAL: Final = "journal"
MANIFEST: Final = "manifest"
POINTERS: Final = "pointers-resolve"
INDEX: Final = "index-equals-journal"
FINGERPRINTS: Final = "fingerprints"
CONTAINERS: Final = "containers"
CATALOG: Final = "catalog"
POLICY: Final = "policy"
CHECKS: Final = (JOURNAL, MANIFEST, POINTERS, INDEX, FINGERPRINTS, CONTAINERS, CATALOG, POLICY)
"""The names of the checks, in the order of the report; `verify` says what each is."""

LATEST: Final = "latest"
"""What damage of the latest state has for the name of a snapshot."""
DAMAGE_MAX: Final = 1000
"""Damage that one check names; what is more is only counted."""
_LEAVES_PER_REQUEST: Final = 256
_VERSIONS_PER_REQUEST: Final = 4096


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
    named = _leaves_naming(index, group_id, bad)
    for snapshot in group.snapshots():
        view = group.view(Seq(snapshot.seq))
        for volume in view.state.volumes.values():
            if snapshot.volume in (None, volume.volume):
                changed = view.state.overlay.leaf_numbers(volume.volume)
                leaves = distinct_leaves(named.get(volume.volume, ()), changed)
                pointers = VolumePointers(view, catalog, volume.volume)
                yield from _locate(index, pointers, snapshot.name, volume, bad, leaves)
    yield from locate_head(index, group, catalog, bad)


def _leaves_naming(index: Index, group_id: int, bad: Addresses) -> dict[VolumeId, set[int]]:
    """The leaves of which any version names a `bad` address: one pass through all versions, not one per snapshot."""
    found: dict[VolumeId, set[int]] = {}
    start = POINTER_KEY.pack(group_id, 0, 0, 0)
    prefix = start[:2]
    while start:
        keys: list[bytes] = []
        named: list[Addresses] = []
        with index.read() as txn, txn.cursor(index.db["pointers"]) as cursor:
            more = cursor.set_range(start)
            while more and cursor.key().startswith(prefix) and len(keys) < _VERSIONS_PER_REQUEST:
                keys.append(cursor.key())
                named.append(named_by(cursor.value(), cursor.key()))
                more = cursor.next()
            start = cursor.key() if more and cursor.key().startswith(prefix) else b""
        if keys:
            owners = np.repeat(np.arange(len(keys)), [len(addresses) for addresses in named])
            for owner in np.unique(owners[np.isin(np.concatenate(named), bad)]).tolist():
                _, volume, leaf, _ = POINTER_KEY.unpack(keys[owner])
                found.setdefault(VolumeId(volume), set()).add(leaf)
    return found


def locate_head(index: Index, group: GroupReader, catalog: Catalog, bad: Addresses) -> Iterator[Located]:
    """Where the `bad` addresses lie in the latest state. Damaged."""
    for volume in group.volumes_at(group.held).values():
        pointers = VolumePointers(group.view(group.held), catalog, volume.volume)
        with index.read() as txn:
            leaves = pointers.written_leaves(txn)
        yield from _locate(index, pointers, LATEST, volume, bad, leaves)


def _locate(
    index: Index, pointers: VolumePointers, name: str, volume: VolumeState, bad: Addresses, leaves: Leaves
) -> Iterator[Located]:
    for at in range(0, len(leaves), _LEAVES_PER_REQUEST):
        with index.read() as txn:
            decoded = [(leaf, pointers.leaf(txn, leaf)) for leaf in leaves[at : at + _LEAVES_PER_REQUEST].tolist()]
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
