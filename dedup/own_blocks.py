"""Which stored blocks a group may be told that it has: those that its own records name.

The containers of a store are shared by its groups, and so is the fingerprint index. A peer who asks by fingerprint for
a block learns whether it is there; it must not learn what another group holds.

Invariants:
- with one group in the store, every block is its own. With several, a block is a group's own once an entry of it was
  journalled that names the block, or a version of its pointer maps was read that does: what is not known costs bytes on
  the wire, it never tells;
- a slot is never used twice, so a mark stays true, also when the block was collected;
- memory: 2 KiB for each container with a mark, CONTAINERS_MAX of them for each group (of a store with several); past
  that, what was known is forgotten.

For one thread at a time, the one that has the store to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.errors import Damaged
from dedup.metadata_journal import Logged
from dedup.pointer_map import Addresses, named_by
from dedup.slot_marks import SlotMarks
from dedup.types import HOLE
from dedup.write_run import WriteRun

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from dedup.store import Store

CONTAINERS_MAX: Final = 1 << 14
"""32 MiB of marks, for 1 TiB of blocks."""
VERSIONS_PER_LOOK: Final = 2048
"""Versions of the pointer maps that are read in one look: some 10 ms."""
_PREFIX: Final = Struct(">H")


@dataclass(slots=True)
class _Known:
    marks: SlotMarks = field(default_factory=SlotMarks)
    next_key: bytes | None = b""
    """Where in the pointer maps to read on; None when all is read."""


class OwnBlocks:
    """For all groups of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, _Known] = {}

    def note(self, group: GroupWriter, entries: Sequence[Logged]) -> None:
        """The group has journalled them."""
        if self._store.has_one_group:
            return
        marks = self._of(group).marks
        for entry in entries:
            for extent in entry.extents:
                marks.add(extent.addresses)

    def note_run(self, group: GroupWriter, run: WriteRun) -> None:
        """The same of a run of small writes."""
        if not self._store.has_one_group:
            self._of(group).marks.add(run.addresses)

    def candidates(self, group: GroupWriter, fingerprints: Sequence[bytes]) -> Addresses:
        """For each fingerprint the address of a block of the group's own that may be the same; HOLE where there is
        none. Damaged when the index is."""
        found = self._store.fingerprints.lookup(fingerprints)
        addresses = np.array([HOLE if where is None else where for where in found], dtype=np.uint64)
        if len(self._store.groups) > 1 and addresses.any():
            known = self._of(group)
            self._read_on(group, known)
            addresses[~known.marks.has(addresses)] = HOLE
        return addresses

    def _of(self, group: GroupWriter) -> _Known:
        known = self._known.get(group.name)
        if known is None or known.marks.containers > CONTAINERS_MAX:
            # What was forgotten is not read again: it would be too much once more.
            known = self._known[group.name] = _Known() if known is None else _Known(next_key=None)
        return known

    def _read_on(self, group: GroupWriter, known: _Known) -> None:
        """The next versions of the group's pointer maps; what is put behind this point later is noted."""
        if known.next_key is None:
            return
        prefix = _PREFIX.pack(group.catalog.group_id)
        with self._store.index.read() as txn, txn.cursor(self._store.index.db["pointers"]) as cursor:
            more = cursor.set_range(known.next_key or prefix)
            for _ in range(VERSIONS_PER_LOOK):
                if not more or not cursor.key().startswith(prefix):
                    known.next_key = None
                    return
                with suppress(Damaged):  # its blocks are sent; who reads this version is told
                    known.marks.add(named_by(cursor.value(), cursor.key()))
                more = cursor.next()
            known.next_key = cursor.key() if more else None
