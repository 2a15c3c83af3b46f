"""Ingest: records become blocks with addresses, and journal entries that name them (the hot path of a store).

A record's bytes are cut at block boundaries (see `staging` for those that do not begin or end there). Blocks of zeros
are holes; a fingerprint that is known is a candidate, and bytes are compared before its block is shared; the rest is
appended to the data journal in use.

Invariants:
- nothing of the group's state changes here: the caller applies the entries once they are journalled, so a failure
  costs at most slots that nothing names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from xxhash import xxh3_128_digest

from dedup.container_pool import ContainerPool
from dedup.data_journal import DataJournal
from dedup.errors import Damaged, OutOfOrder
from dedup.fingerprint_index import FingerprintIndex
from dedup.group_state import GroupState
from dedup.healing import Healer
from dedup.layout import ZERO_BLOCK, ZERO_FINGERPRINT, fingerprint
from dedup.metadata_journal import EntryKind, Logged, LoggedExtent
from dedup.pointer_map import Addresses
from dedup.slot_marks import SlotMarks
from dedup.staging import Block, Bytes, HeadReader, Piece, Rotten, Staging, pieces_of
from dedup.types import (
    BASE_JOURNAL,
    BLOCK_BYTES,
    HOLE,
    LOST,
    WRITE_BYTES_MAX,
    Address,
    Aggregate,
    Attributes,
    Bookmark,
    Correct,
    Create,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    JournalId,
    Reconcile,
    ReconcileBegin,
    ReconcileEnd,
    Record,
    Rename,
    Resize,
    Retire,
    Seq,
    Write,
)
from dedup.write_run import SmallWrites, WriteRun

log = logging.getLogger(__name__)

ZEROS_FINGERPRINT: Final = fingerprint(ZERO_BLOCK)
_EMPTY_EXTENT: Final = b""
_NO_ADDRESSES: Final[Addresses] = np.zeros(0, dtype=np.uint64)
_KINDS: Final[dict[type, EntryKind]] = {
    Write: EntryKind.WRITE,
    Aggregate: EntryKind.AGGREGATE,
    Reconcile: EntryKind.RECONCILE,
    Correct: EntryKind.CORRECT,
    Resize: EntryKind.RESIZE,
    Create: EntryKind.CREATE,
    Rename: EntryKind.RENAME,
    Retire: EntryKind.RETIRE,
    Attributes: EntryKind.ATTRIBUTES,
    Flush: EntryKind.FLUSH,
    Bookmark: EntryKind.BOOKMARK,
    Heartbeat: EntryKind.HEARTBEAT,
    EpochStart: EntryKind.EPOCH_START,
    ReconcileBegin: EntryKind.RECONCILE_BEGIN,
    ReconcileEnd: EntryKind.RECONCILE_END,
}
_CUTS: Final = [slice(at, at + BLOCK_BYTES) for at in range(0, WRITE_BYTES_MAX, BLOCK_BYTES)]
"""What cuts the largest write into blocks."""
_LARGE: Final = 16
"""Pieces of so many blocks on average may be compared each as one."""
_WRITE: Final = EntryKind.WRITE
_WITHOUT_BODY: Final = (Write, Aggregate, Reconcile)


class Ingest:
    """Turns records of one group into journal entries. Synchronous; one at a time per store."""

    def __init__(self, index: FingerprintIndex, pool: ContainerPool, base: DataJournal, healer: Healer) -> None:
        self._index = index
        self._pool = pool
        self._healer = healer
        self._base = base
        self.shared: SlotMarks | None = None
        """While a collection runs: every address that a hit shared since it began."""
        self.condemned: SlotMarks | None = None
        """While a collection runs: every slot that it takes away. The index does not name them any more; one that is
        damaged may, and their bytes are still there to be compared."""

    def log(
        self,
        records: Sequence[Record],
        state: GroupState,
        read_head: HeadReader,
        journal: DataJournal,
        journal_id: JournalId,
    ) -> list[Logged]:
        """Entries for `records`, their new blocks appended (not durable) to `journal`, Reconcile's to `base`.

        OutOfOrder if a record does not follow the one before; StoreFull or StoreFailed from the disk.
        """
        if _all_plain(records, state):
            return self._log_plain(records, journal, journal_id)
        staging = Staging(state, read_head)
        pieces: list[list[Piece]] = []
        held = state.held
        for record in records:
            first = record.first_seq if isinstance(record, Aggregate) else record.seq
            if first != held + 1 or record.seq < first:
                raise OutOfOrder(f"record {first}..{record.seq} does not follow {held}")
            held = record.seq
            pieces.append(pieces_of(staging, record))
        self._place_all(records, pieces, journal)
        return [_logged(record, found, journal_id) for record, found in zip(records, pieces, strict=True)]

    def log_run(
        self, records: Sequence[Record], state: GroupState, journal: DataJournal, journal_id: JournalId
    ) -> WriteRun | None:
        """The same for a run of small writes that follow the last record; None when they are anything else."""
        writes = SmallWrites.of(records, Seq(state.held + 1), state.run) if state.held else None
        if writes is None or not state.volumes.keys() >= set(writes.volumes):
            return None
        addresses, fingerprints = self._place(list(writes.data), journal)
        return WriteRun(writes, journal_id, addresses, b"".join(fingerprints))

    def _log_plain(self, records: Sequence[Record], journal: DataJournal, journal_id: JournalId) -> list[Logged]:
        """The same for records that are `_all_plain`: nothing has to be completed from the head, nor staged."""
        blocks: list[Bytes] = []
        whole: list[Bytes] = []
        for record in records:
            if type(record) is Write:
                data = record.extent.data
                whole.append(data)
                if len(data) == BLOCK_BYTES:
                    blocks.append(data)
                else:
                    blocks += map(memoryview(data).__getitem__, _CUTS[: len(data) // BLOCK_BYTES])
        addresses, fingerprints = self._place(blocks, journal, whole) if blocks else (_NO_ADDRESSES, [])
        entries: list[Logged] = []
        at = 0
        for record in records:
            seq = record.seq
            if type(record) is Write:
                extent = record.extent
                length = len(extent.data)
                if length == BLOCK_BYTES:
                    marks = fingerprints[at]
                    end = at + 1
                else:
                    end = at + length // BLOCK_BYTES
                    marks = b"".join(fingerprints[at:end])
                logged = LoggedExtent(extent.volume, extent.offset, length, addresses[at:end], marks)
                at = end
                entries.append(Logged(_WRITE, seq, seq, record.time, record.run, journal_id, (logged,), None))
            else:
                kind = _KINDS[type(record)]
                entries.append(Logged(kind, seq, seq, record.time, record.run, journal_id, (), record))
        return entries

    def _place_all(self, records: Sequence[Record], pieces: list[list[Piece]], journal: DataJournal) -> None:
        """Gives every piece its addresses: Reconcile's in `base`, all others in `journal`."""
        base: list[Piece] = []
        others: list[Piece] = []
        for record, found in zip(records, pieces, strict=True):
            if found:
                (base if type(record) is Reconcile else others).extend(found)
        for chosen, target in ((base, self._base), (others, journal)):
            if not chosen:
                continue
            blocks = chosen[0].blocks if len(chosen) == 1 else [block for piece in chosen for block in piece.blocks]
            addresses, fingerprints = self._place_with_rotten(blocks, target)
            at = 0
            for piece in chosen:
                end = at + len(piece.blocks)
                piece.addresses = addresses[at:end]
                piece.fingerprints = b"".join(fingerprints[at:end])
                at = end

    def _place_with_rotten(self, blocks: list[Block], journal: DataJournal) -> tuple[Addresses, list[bytes]]:
        rotten = [index for index, block in enumerate(blocks) if isinstance(block, Rotten)]
        sound = [ZERO_BLOCK if isinstance(block, Rotten) else block for block in blocks]
        addresses, fingerprints = self._place(sound, journal)
        addresses[rotten] = LOST
        if rotten:
            self._healer.wounds.note([LOST])
        return addresses, fingerprints

    def _place(
        self, blocks: list[Bytes], journal: DataJournal, whole: Sequence[Bytes] | None = None
    ) -> tuple[Addresses, list[bytes]]:
        """An address for each block: a hole, a block the store has, or a new one in `journal`; and the fingerprint that
        goes with it. `whole`: the same bytes in larger pieces, if there are any."""
        fingerprints = list(map(xxh3_128_digest, blocks))
        if ZEROS_FINGERPRINT not in fingerprints:
            return self._place_each(blocks, fingerprints, journal, whole), fingerprints
        is_zeros = np.fromiter(map(ZERO_BLOCK.startswith, blocks), bool, len(blocks))  # none is shorter
        placed = np.zeros(len(blocks), np.uint64)
        rest = np.flatnonzero(~is_zeros).tolist()
        if rest:
            others = [blocks[index] for index in rest], [fingerprints[index] for index in rest]
            placed[rest] = self._place_each(*others, journal)
        for index in np.flatnonzero(is_zeros).tolist():
            fingerprints[index] = ZERO_FINGERPRINT
        return placed, fingerprints

    def _place_each(
        self,
        blocks: list[Bytes],
        fingerprints: list[bytes],
        journal: DataJournal,
        whole: Sequence[Bytes] | None = None,
    ) -> Addresses:
        """The same of blocks of which none is zeros."""
        found = self._index.lookup(fingerprints)
        if found.count(None) == len(found) and _all_differ(fingerprints):
            return self._append(blocks, fingerprints, journal, whole)
        placed = self._known(blocks, fingerprints, found, whole or blocks)
        fresh: dict[bytes, int] = {}
        twins: list[tuple[int, int]] = []
        new: list[int] = []
        for index in np.flatnonzero(placed == HOLE).tolist():
            first = fresh.setdefault(fingerprints[index], index)
            if first != index and bytes(blocks[first]) == bytes(blocks[index]):
                twins.append((index, first))
            else:
                new.append(index)
        if new:
            got = self._append([blocks[index] for index in new], [fingerprints[index] for index in new], journal)
            placed[new] = got
        for index, first in twins:
            placed[index] = placed[first]
        return placed

    def _append(
        self,
        blocks: list[Bytes],
        fingerprints: list[bytes],
        journal: DataJournal,
        whole: Sequence[Bytes] | None = None,
    ) -> Addresses:
        addresses = journal.append(blocks, fingerprints, whole)
        self._index.note_each(fingerprints, addresses.tolist())
        return addresses

    def _known(
        self, blocks: list[Bytes], fingerprints: list[bytes], found: list[Address | None], whole: Sequence[Bytes]
    ) -> Addresses:
        """The address of each block that the store has, its bytes compared; HOLE for the others."""
        wheres = np.array(found if None not in found else [address or HOLE for address in found], np.uint64)
        condemned = self.condemned
        if condemned is not None:
            wheres[condemned.has(wheres)] = HOLE
        candidates = np.flatnonzero(wheres).tolist()
        if not candidates:
            return wheres
        if len(candidates) == 1:
            (one,) = candidates
            same = [self._pool.same(Address(int(wheres[one])), blocks[one], fingerprints[one])]
        elif len(candidates) == len(found):
            if len(whole) * _LARGE <= len(blocks) and self._pool.same_pieces(wheres, whole, fingerprints):
                same = [True] * len(blocks)
            else:
                same = self._pool.same_each(wheres, blocks, fingerprints)
        else:
            same = self._pool.same_each(
                wheres[candidates],
                [blocks[index] for index in candidates],
                [fingerprints[index] for index in candidates],
            )
        for index, is_same in zip(candidates, same, strict=True) if not all(same) else ():
            if not is_same and not self._same(Address(int(wheres[index])), fingerprints[index], blocks[index]):
                wheres[index] = HOLE
        shared = self.shared  # looked at once: a collection may end beside this
        if shared is not None:
            shared.add_each(where for where in wheres.tolist() if where != HOLE)
        return wheres

    def _same(self, address: Address, mark: bytes, block: Bytes) -> bool:
        """Whether the stored block has these very bytes; a damaged one is healed with them, or they are stored anew."""
        try:
            return self._pool.read_block(address) == bytes(block)
        except Damaged as damage:
            if self._healer.heal(address, mark, block):
                return True
            log.warning("not shared: %s", damage)
            return False


def _all_differ(fingerprints: list[bytes]) -> bool:
    return len(fingerprints) == 1 or len(set(fingerprints)) == len(fingerprints)


def _all_plain(records: Sequence[Record], state: GroupState) -> bool:
    """Whether these are writes of whole blocks to volumes that exist, flushes and heartbeats, each after the last."""
    held = state.held
    for record in records:
        held = Seq(held + 1)
        if record.seq != held:
            return False
        if type(record) is Write:
            extent = record.extent
            length = len(extent.data)
            if (
                not 0 < length <= WRITE_BYTES_MAX
                or (length | extent.offset) % BLOCK_BYTES
                or extent.zeros
                or extent.volume not in state.volumes
            ):
                return False
        elif type(record) is not Heartbeat and type(record) is not Flush:
            return False
    return True


def _logged(record: Record, pieces: list[Piece], journal: JournalId) -> Logged:
    extents = tuple(
        [
            LoggedExtent(piece.volume, piece.offset, piece.length, piece.addresses, piece.fingerprints)
            for piece in pieces
        ]
    )
    body = None if isinstance(record, _WITHOUT_BODY) else record
    if isinstance(body, Correct):
        body = replace(body, extent=Extent(body.extent.volume, body.extent.offset, _EMPTY_EXTENT))
    return Logged(
        _KINDS[type(record)],
        record.first_seq if isinstance(record, Aggregate) else record.seq,
        record.seq,
        record.time,
        record.run,
        BASE_JOURNAL if type(record) is Reconcile else journal,
        extents,
        body,
    )
