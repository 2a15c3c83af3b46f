"""How much of a volume changed between two moments, at the price of what changed, and not of the volume.

Where little was written between the moments, the journal says what, and it is held against the pointers of the earlier
one. Otherwise the keys of the pointer maps say which leaves to compare. Either way pointers are compared: it is exact.

Invariants:
- leaves are kept from one question to the next only for the moment that they are of, whose pointers never change;
- bounded: POINTERS_MAX pointers of one stretch of journal, LEAVES_MAX leaves of all volumes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from dedup.catalog import Catalog, Txn
from dedup.difference import indexed_leaves
from dedup.journal_entry import EntryKind, decode, extents_of
from dedup.journal_reader import scan
from dedup.layout import LEAF_BLOCKS
from dedup.overlay import Overlay
from dedup.pointer_map import Addresses
from dedup.storage import Storage
from dedup.synthesis import View, VolumePointers
from dedup.types import BLOCK_BYTES, HOLE, Consolidated, Correct, Resize, Seq, VolumeId

POINTERS_MAX: Final = 1 << 16
"""Pointers between two moments, past which the pointer maps are asked: some MB."""
LEAVES_MAX: Final = 4096
"""Leaves kept for the next question: 16 MiB."""
ENTRIES_MIN: Final = 4096
"""Entries read, at least, before a look at every leaf of the group counts as cheaper."""
_WITH_EXTENTS: Final = frozenset(
    {
        EntryKind.WRITE,
        EntryKind.AGGREGATE,
        EntryKind.RECONCILE,
        EntryKind.CORRECT,
        EntryKind.RESIZE,
        EntryKind.CONSOLIDATED,
        EntryKind.CONSOLIDATED_MORE,
    }
)
_MAY_CUT: Final = frozenset({EntryKind.RESIZE, EntryKind.CORRECT, EntryKind.CONSOLIDATED})


@dataclass(frozen=True, slots=True)
class _Written:
    """What the entries after..last say: `cut` are volumes of which they hide something, too."""

    after: Seq
    last: Seq
    overlay: Overlay = field(default_factory=Overlay)
    cut: set[VolumeId] = field(default_factory=set)


class Changes:
    """What changed between moments of one group, whose journal is in `directory`. Not for two threads at once."""

    def __init__(self, storage: Storage, directory: Path, catalog: Catalog) -> None:
        self._storage = storage
        self._directory = directory
        self._catalog = catalog
        self._asked = Seq(0), Seq(0)
        self._written: _Written | None = None
        """The answer for the two seqs `_asked` last."""
        self._leaves: OrderedDict[tuple[VolumeId, int], Addresses] = OrderedDict()
        self._leaves_of: dict[VolumeId, Seq] = {}
        """The moment that a volume's leaves in `_leaves` are of."""

    def blocks(self, txn: Txn, old: VolumePointers | None, new: VolumePointers) -> int:
        """Blocks of a volume whose pointers differ between two moments, the later last; None is all holes. Damaged.

        Asked of each moment in turn, with the one before it, it is quickest.
        """
        if old is not None:
            written = self._between(txn, old.view, new.view)
            if written is not None and new.volume not in written.cut:
                return self._counted(txn, old, written)
        self._leaves_of.pop(new.volume, None)
        changed = 0
        for leaf in indexed_leaves(
            self._catalog, txn, None if old is None else old.view, new.view, new.volume
        ).tolist():
            was = HOLE if old is None else old.leaf(txn, leaf)
            changed += int(np.count_nonzero(new.leaf(txn, leaf) != was))
        return changed

    # -- by the journal ----------------------------------------------------------------------------------------------

    def _between(self, txn: Txn, old: View, new: View) -> _Written | None:
        """What the entries between two views say; None where that is no short way to know it."""
        asked = old.state.held, new.state.held
        if asked != self._asked:
            self._written = self._read(txn, *asked, new)
            self._asked = asked
        return self._written

    def _read(self, txn: Txn, after: Seq, last: Seq, new: View) -> _Written | None:
        anchor = self._catalog.anchor(txn, after)
        if anchor is None:
            return None
        leaves = sum(volume.size // (LEAF_BLOCKS * BLOCK_BYTES) for volume in new.state.volumes.values())
        left = max(ENTRIES_MIN, leaves)
        written = _Written(after, last)
        for scanned in scan(self._storage, self._directory, anchor.position):
            if scanned.seq > last:
                break
            left -= 1
            if left < 0:
                return None
            if scanned.seq <= after or scanned.kind not in _WITH_EXTENTS:
                continue
            for extent in extents_of(scanned.raw):
                written.overlay.put(extent.volume, extent.offset // BLOCK_BYTES, extent.addresses)
            if written.overlay.count > POINTERS_MAX:
                return None
            if scanned.kind in _MAY_CUT:
                match decode(scanned.raw).body:
                    case Resize(volume=volume):
                        written.cut.add(volume)
                    case Correct(extent=corrected):
                        written.cut.add(corrected.volume)
                    case Consolidated(cuts=cuts):
                        written.cut.update(volume for volume, _ in cuts)
        return written

    def _counted(self, txn: Txn, old: VolumePointers, written: _Written) -> int:
        """How many of the pointers written differ from those of `old`. The leaves kept are then of the later moment."""
        volume = old.volume
        if self._leaves_of.get(volume) != written.after:
            for key in [key for key in self._leaves if key[0] == volume]:
                del self._leaves[key]
        self._leaves_of[volume] = written.last
        changed = 0
        for leaf, indexes, addresses in written.overlay.leaves(volume):
            held = self._leaves.pop((volume, leaf), None)
            if held is None:
                held = old.leaf(txn, leaf).copy()
            changed += int(np.count_nonzero(held[indexes] != addresses))
            held[indexes] = addresses
            self._leaves[volume, leaf] = held
            if len(self._leaves) > LEAVES_MAX:
                self._leaves.popitem(last=False)
        return changed
