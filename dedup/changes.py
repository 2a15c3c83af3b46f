"""How much of a volume changed between two moments, at the price of what changed, and not of the volume.

Which leaves to compare is read from the journal where few records lie between the moments, and otherwise from the keys
of the pointer maps. Either names every leaf that may differ, and the pointers themselves are compared: so it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Txn
from dedup.journal_entry import EntryKind, decode
from dedup.journal_reader import Scanned, first_position, scan
from dedup.layout import (
    ADDRESS_BYTES,
    ENTRY_HEADER,
    ENTRY_HEADER_BYTES,
    EXTENT_HEADER,
    EXTENT_HEADER_BYTES,
    FINGERPRINT_BYTES,
    LEAF_BLOCKS,
)
from dedup.storage import Storage
from dedup.synthesis import View, VolumePointers
from dedup.types import BLOCK_BYTES, HOLE, Consolidated, Seq, VolumeId

_MAY_CUT: Final = frozenset({EntryKind.RESIZE, EntryKind.CORRECT, EntryKind.CONSOLIDATED})
_ENTRIES_MIN: Final = 512
"""Entries read, at least, before a look at every leaf of the volume counts as cheaper."""
_POINTER_BYTES: Final = ADDRESS_BYTES + FINGERPRINT_BYTES
_HEADER: Final = ENTRY_HEADER.struct
_EXTENT: Final = EXTENT_HEADER.struct


class Changes:
    """What changed between moments of one group, whose journal is in `directory`."""

    def __init__(self, storage: Storage, directory: Path, catalog: Catalog) -> None:
        self._storage = storage
        self._directory = directory
        self._catalog = catalog

    def blocks(self, txn: Txn, old: VolumePointers | None, new: VolumePointers) -> int:
        """Blocks of a volume whose pointers differ between two moments, the later last; None is all holes. Damaged."""
        before = None if old is None else old.view
        leaves = self._journalled(txn, before, new.view, new.volume)
        if leaves is None:
            leaves = self._indexed(txn, before, new.view, new.volume)
        changed = 0
        for leaf in sorted(leaves):
            was = HOLE if old is None else old.leaf(txn, leaf)
            changed += int(np.count_nonzero(new.leaf(txn, leaf) != was))
        return changed

    def _journalled(self, txn: Txn, old: View | None, new: View, volume: VolumeId) -> set[int] | None:
        """The leaves that the entries between the views name; None where that is no short way to know them."""
        sizes = [view.state.volumes[volume].size for view in (old, new) if view and volume in view.state.volumes]
        left = max(_ENTRIES_MIN, *(size // (LEAF_BLOCKS * BLOCK_BYTES) for size in sizes))
        since = Seq(0) if old is None else old.state.held
        anchor = self._catalog.anchor(txn, since)
        start = first_position(self._storage, self._directory) if anchor is None else anchor.position
        leaves: set[int] = set()
        for scanned in scan(self._storage, self._directory, start):
            if scanned.seq > new.state.held:
                break
            if scanned.seq <= since:
                continue
            left -= 1
            if left < 0 or (scanned.kind in _MAY_CUT and _cuts(scanned, volume)):
                return None
            leaves.update(_leaves_of(scanned, volume))
        return leaves

    def _indexed(self, txn: Txn, old: View | None, new: View, volume: VolumeId) -> set[int]:
        """The leaves with a version between the views' anchors, and those that their overlays may change."""
        pointers = self._catalog.pointers
        leaves = set(pointers.changed_leaves(txn, volume, Seq(0) if old is None else old.anchor, new.anchor))
        for view in (old, new):
            if view is not None:
                overlay = view.state.overlay
                leaves.update(leaf for leaf, _, _ in overlay.leaves(volume))
                if volume in overlay.cuts:
                    leaves.update(pointers.leaves(txn, volume, overlay.cuts[volume] // LEAF_BLOCKS))
        return leaves


def _cuts(scanned: Scanned, volume: VolumeId) -> bool:
    """Whether the entry may hide what the volume had behind some block."""
    body = decode(scanned.raw).body
    if isinstance(body, Consolidated):
        return any(cut == volume for cut, _ in body.cuts)
    return True


def _leaves_of(scanned: Scanned, volume: VolumeId) -> Iterator[int]:
    """The leaves of the volume that the entry's extents touch; the entry was verified."""
    count = _HEADER.unpack_from(scanned.raw)[-1]
    at = ENTRY_HEADER_BYTES
    for _ in range(count):
        named, _, offset, _, blocks = _EXTENT.unpack_from(scanned.raw, at)
        at += EXTENT_HEADER_BYTES + blocks * _POINTER_BYTES
        if named == volume and blocks:
            first = offset // BLOCK_BYTES
            yield from range(first // LEAF_BLOCKS, (first + blocks - 1) // LEAF_BLOCKS + 1)
