"""Where each range of a volume lies at a moment: in a hole, in the base, or in which data journal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from dedup import layout
from dedup.container import ContainerReader
from dedup.layout import LEAF_BLOCKS, SLOT_BITS, SLOT_MASK
from dedup.pointer_map import Addresses
from dedup.reader import GroupReader, StoreReader
from dedup.types import BASE_JOURNAL, BLOCK_BYTES, HOLE, ContainerId, JournalId, Seq, VolumeState

BASE: Final = "base"
_LEAVES_PER_REQUEST: Final = 256


@dataclass(frozen=True, slots=True)
class MapRange:
    """Bytes offset..offset+length. Of a hole the rest is None; else container and slot of the first block."""

    offset: int
    length: int
    kind: str
    """`hole`, `base` or `journal`."""
    journal: str | None = None
    container: int | None = None
    slot: int | None = None


def snapshot_map(store: StoreReader, group: GroupReader, volume: VolumeState, seq: Seq) -> Iterator[MapRange]:
    """The ranges of `volume` as it was at `seq`, in order, without a gap, up to its size.

    A range is as long as its blocks lie one behind the other in one container, or are holes. Streams; Damaged when a
    container's header cannot be read.
    """
    names = {BASE_JOURNAL: BASE, **{spec.journal: spec.name for spec in group.state.journals}}
    journals: dict[int, str] = {}
    for first, blocks, where in _runs(store, group, volume, seq):
        offset = first * BLOCK_BYTES
        length = min(blocks * BLOCK_BYTES, volume.size - offset)
        if where == HOLE:
            yield MapRange(offset, length, "hole")
            continue
        container = where >> SLOT_BITS
        if container not in journals:
            number = _journal_of(store, ContainerId(container))
            if number not in names:
                names.update(_names_elsewhere(store, group))
            journals[container] = names.setdefault(number, str(number))
        journal = journals[container]
        kind = "base" if journal == BASE else "journal"
        yield MapRange(offset, length, kind, journal, container, where & SLOT_MASK)


def _names_elsewhere(store: StoreReader, group: GroupReader) -> Iterator[tuple[JournalId, str]]:
    """The data journals of the store's other groups, which blocks may be shared with."""
    for name in store.groups():
        if name != group.name:
            other = store.group(name)
            other.refresh()
            known = {spec.journal for spec in group.state.journals}
            for spec in other.state.journals:
                if spec.journal not in known:
                    yield spec.journal, f"{name}/{spec.name}"


def _journal_of(store: StoreReader, container: ContainerId) -> JournalId:
    reader = ContainerReader.open(store.storage, store.path / layout.CONTAINERS_NAME, container)
    try:
        return reader.header.journal
    finally:
        reader.close()


def _runs(store: StoreReader, group: GroupReader, volume: VolumeState, seq: Seq) -> Iterator[tuple[int, int, int]]:
    """(first block, blocks, address of the first) of each run, holes included, to the end of the volume."""
    end = -(-volume.size // BLOCK_BYTES)
    first, blocks, where = 0, 0, int(HOLE)
    for start, count, address in _pieces(store, group, volume, seq, end):
        follows = address == HOLE if where == HOLE else address == where + blocks
        if blocks and follows:
            blocks += count
            continue
        if blocks:
            yield first, blocks, where
        first, blocks, where = start, count, address
    if blocks:
        yield first, blocks, where


def _pieces(
    store: StoreReader, group: GroupReader, volume: VolumeState, seq: Seq, end: int
) -> Iterator[tuple[int, int, int]]:
    """The same, but cut at the borders of leaves; stretches without any leaf are one hole."""
    pointers = group.pointers(volume.volume, seq)
    with store.index.read() as txn:
        leaves = pointers.written_leaves(txn)
    leaves = leaves[leaves * LEAF_BLOCKS < end]
    done = 0
    for at in range(0, len(leaves), _LEAVES_PER_REQUEST):
        with store.index.read() as txn:
            some = leaves[at : at + _LEAVES_PER_REQUEST].tolist()
            decoded = [(leaf * LEAF_BLOCKS, pointers.leaf(txn, leaf)) for leaf in some]
        for first, addresses in decoded:
            if first > done:
                yield done, first - done, HOLE
            done = min(end, first + LEAF_BLOCKS)
            yield from _pieces_of(first, addresses[: done - first])
    if done < end:
        yield done, end - done, HOLE


def _pieces_of(first: int, addresses: Addresses) -> Iterator[tuple[int, int, int]]:
    before, after = addresses[:-1], addresses[1:]
    joined = np.where(before == HOLE, after == HOLE, after == before + np.uint64(1))
    starts = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(addresses)]
    for start, stop in itertools.pairwise(starts):
        yield first + start, stop - start, int(addresses[start])
