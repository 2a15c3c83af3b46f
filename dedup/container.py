"""Containers: append-only files of unique blocks. The writer of the raw form, the reader of either.

A raw file (`raw_form`) is header page | fingerprint table | slots; slot × 4096 is where a block is. `sealed` replaces
it by the sealed form under the same name; addresses stay.

Invariants:
- `no-wrong-bytes`: no block leaves a `ContainerReader` that does not match its stored fingerprint;
- a slot is written once: after a failed append the slots that it was for are never used again;
- blocks are written before their fingerprints: a table entry that is not zeros was meant to name a whole block.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from dedup.errors import Damaged, StoreFailed, Unreadable
from dedup.layout import (
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    RAW_SLOTS_OFFSET,
    RAW_TABLE_OFFSET,
    SLOTS_MAX,
    ContainerHeader,
    container_path,
    pack_container_header,
    unpack_container_header,
)
from dedup.raw_form import RawForm
from dedup.sealed_form import GroupCache, SealedForm
from dedup.storage import Buffer, Storage
from dedup.sync_log import Unsynced
from dedup.types import BLOCK_BYTES, LOST_CONTAINER, ContainerForm, ContainerId, JournalId, TimeNs

log = logging.getLogger("rewindfs.container")


STREAM_BYTES: Final = 64 << 10
"""Appends from this size on are taken for a part of a stream. Smaller ones share pages and writes to the disk with what
comes after them."""
NEAR_BYTES: Final = 32 << 20
"""So much of a stream stays in memory, while its container is being filled: what was just written is at times written
again, and compared then."""
PASSING_BYTES: Final = 4 << 20
"""So much of a stream waits for `let_pass`, and one append."""
_FEW: Final = 4
"""Up to so many blocks that are no neighbours are looked at one by one."""
_STRETCH_MIN: Final = 4
"""From so many on neighbours are read at once."""
Slots = NDArray[np.uint64]


class RawContainerWriter:
    """Fills one new container. Called by one thread at a time, but `sync`, which may run beside `append`."""

    def __init__(
        self, storage: Storage, path: Path, fd: int, container: ContainerId, journal: JournalId, unsynced: Unsynced
    ) -> None:
        """Use `create`."""
        self._storage = storage
        self._unsynced = unsynced
        self._path = path
        self._fd = fd
        self.container = container
        self.journal = journal
        self.next_slot = 0
        self._appended = 0
        """Appends that are complete, and as many of them as were synced: one that is under way counts as neither."""
        self._synced = 0
        self._forgotten = RAW_SLOTS_OFFSET
        """The slots' bytes below are left to the disk."""
        self._passing = range(0)
        """Bytes of the file that stream in and have not begun their way to the disk."""

    @classmethod
    def create(
        cls,
        storage: Storage,
        directory: Path,
        container: ContainerId,
        journal: JournalId,
        unsynced: Unsynced | None = None,
    ) -> RawContainerWriter:
        """A new, empty container; its header and its name are durable. What is appended is noted in `unsynced`.
        StoreFull leaves no file; StoreFailed may."""
        path = container_path(directory, container)
        header = ContainerHeader(container, journal, ContainerForm.RAW, TimeNs(time.time_ns()))
        try:
            fd = storage.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError as error:
            raise StoreFailed(f"{path}: a container of that number is there already; open the store anew") from error
        try:
            storage.pwritev(fd, [pack_container_header(header)], 0)
            storage.datasync(fd)
            storage.sync_directory(directory)
        except BaseException:
            storage.close(fd)
            storage.unlink(path)
            raise
        return cls(storage, path, fd, container, journal, unsynced or Unsynced())

    @property
    def slots_free(self) -> int:
        return SLOTS_MAX - self.next_slot

    def append(self, blocks: Sequence[Buffer], fingerprints: Sequence[bytes]) -> int:
        """Writes the blocks, one or several in a buffer, and returns the first slot. DURABLE after `sync`. There is a
        fingerprint for each 4096 bytes, at most `slots_free`.

        StoreFull, StoreFailed: the slots that it was for are spent.
        """
        first = self.next_slot
        count, lengths = len(fingerprints), list(map(len, blocks))
        if sum(lengths) != count * BLOCK_BYTES or any(length % BLOCK_BYTES for length in lengths):
            raise ValueError(f"{count} fingerprints for {sum(lengths)} bytes in {len(blocks)} buffers")
        if count > self.slots_free:
            raise ValueError(f"{count} blocks, {self.slots_free} slots free")
        self.next_slot = first + count
        offset, length = RAW_SLOTS_OFFSET + first * BLOCK_BYTES, count * BLOCK_BYTES
        if length >= STREAM_BYTES:
            self._storage.reserve(self._fd, offset, length)
        self._storage.pwritev(self._fd, blocks, offset)
        table_offset = RAW_TABLE_OFFSET + first * FINGERPRINT_BYTES
        self._storage.pwritev(self._fd, [table := b"".join(fingerprints)], table_offset)
        # Counted first: a sync of the files between the two looks at it, and drops what was noted before.
        self._appended += 1
        self._unsynced.note(self._path, offset, blocks)
        self._unsynced.note(self._path, table_offset, [table])
        if length >= STREAM_BYTES:
            if offset != self._passing.stop or len(self._passing) >= PASSING_BYTES:
                self.let_pass()
                self._passing = range(offset, offset)
            self._passing = range(self._passing.start, offset + length)
        return first

    def let_pass(self) -> None:
        """Has what streamed in begin its way to the disk, and what lies NEAR_BYTES behind it leave memory. To be called
        when who waits for it has been answered; it is soon done by `append`, too. StoreFailed.

        At several hundred MB/s the page cache costs more than the writing: each page is a new one, until memory is full
        and the pages of applications go (measured, of a mount without replication: 0.40 as ever, 0.8 to 1 with this).
        """
        passing, self._passing = self._passing, range(0)
        if not passing:
            return
        self._storage.begin_write_back(self._fd, passing.start, len(passing))
        far = passing.stop - NEAR_BYTES
        if far > self._forgotten:
            self._storage.forget_cached(self._fd, self._forgotten, far - self._forgotten)
            self._forgotten = far

    def sync(self) -> None:
        """Everything appended before the call is DURABLE when it returns; costs nothing when it is. StoreFailed."""
        appended = self._appended
        if appended != self._synced:
            self._storage.datasync(self._fd)
            self._synced = appended

    def close(self) -> None:
        """Gives the descriptor back. Not a sync; must not run beside one."""
        if self._forgotten > RAW_SLOTS_OFFSET:
            self._storage.forget_cached(self._fd)
        self._storage.close(self._fd)

    def discard(self) -> None:
        """Closes and removes a container of which no block was kept. StoreFailed."""
        self.close()
        self._storage.unlink(self._path)


class _Form(Protocol):
    """Where a container's bytes are, whatever they are."""

    def slots(self) -> list[int]: ...

    def offset_of(self, slot: int) -> int: ...

    def fingerprints(self, slot: int, count: int, *, wait: bool = True) -> bytes: ...

    def refresh(self) -> bool: ...

    def load(self, slot: int, count: int, out: memoryview, *, wait: bool = True) -> None: ...

    def is_compressed(self, slot: int) -> bool: ...


class ContainerReader:
    """One open container, in either form. Safe between threads, `close` excepted."""

    def __init__(self, storage: Storage, path: Path, fd: int, header: ContainerHeader, form: _Form) -> None:
        """Use `open`."""
        self._storage = storage
        self._path = path
        self._fd = fd
        self._form = form
        self.header = header
        self.users = 0
        """Kept by the pool, under its lock; as are these times of `time.monotonic`."""
        self.used_at = self.looked_at = time.monotonic()

    @classmethod
    def open(
        cls, storage: Storage, directory: Path, container: ContainerId, *, cache: GroupCache | None = None
    ) -> ContainerReader:
        """Looks at the header and opens whichever form it is. Damaged, UnknownFormat."""
        path = container_path(directory, container)
        if container == LOST_CONTAINER:
            raise Damaged(
                f"{directory}: a lost block: it was damaged when a write changed a part of it; write it whole"
            )
        try:
            fd = storage.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise Damaged(f"{path}: offset 0: the container is missing") from error
        try:
            page = storage.pread(fd, CONTAINER_PAGE_BYTES, 0)
            header = unpack_container_header(page, path)
            if header.container != container:
                raise Damaged(f"{path}: offset 0: the file is container {header.container}")
            form: _Form = (
                RawForm(storage, path, fd)
                if header.form is ContainerForm.RAW
                else SealedForm(storage, path, fd, page, cache or GroupCache())
            )
        except BaseException:
            storage.close(fd)
            raise
        return cls(storage, path, fd, header, form)

    def slots(self) -> list[int]:
        """The slots that hold a block, ascending. Says nothing about whether it is sound: `read_into` does."""
        return self._form.slots()

    def fingerprints(self, slot: int, count: int) -> bytes:
        """The stored fingerprints of the slots, 16 bytes each; zeros for one never filled. Damaged when not there."""
        self._form.refresh()
        return self._form.fingerprints(slot, count)

    def read_into(self, slot: int, count: int, out: memoryview, *, wait: bool = True) -> None:
        """Fills `out` (count × 4096 bytes) with the slots' blocks, each verified against its fingerprint.

        Damaged names file and offset; WouldBlock when not `wait` and the disk is needed. `out` is undefined then.
        """
        self._form.load(slot, count, out, wait=wait)
        fingerprints = self._form.fingerprints(slot, count, wait=wait)
        bad = _first_mismatch(out, fingerprints)
        if bad is not None and self._form.refresh():
            # The table may have been read before the slots were filled.
            bad = _first_mismatch(out, self._form.fingerprints(slot, count, wait=wait))
        if bad is not None:
            raise Damaged(
                f"{self._path}: offset {self._form.offset_of(slot + bad)}: "
                f"the block in slot {slot + bad} does not match its fingerprint"
            )

    def is_compressed(self, slot: int) -> bool:
        """Whether the block has to be decoded; False where there is none."""
        return self._form.is_compressed(slot)

    def read_block(self, slot: int) -> bytes:
        """One slot's block, verified. Damaged."""
        block = bytearray(BLOCK_BYTES)
        self.read_into(slot, 1, memoryview(block))
        return bytes(block)

    def holds_each(self, slots: Slots, blocks: Sequence[Buffer], fingerprints: Sequence[bytes]) -> list[bool]:
        """`holds` of each of the slots, which ascend."""
        if len(slots) <= _FEW:
            return self._hold_scattered(slots, blocks, fingerprints)
        edges = np.concatenate(([0], np.flatnonzero(slots[1:] != slots[:-1] + np.uint64(1)) + 1, [len(slots)]))
        counts = np.diff(edges)
        if counts.max() < _STRETCH_MIN:
            return self._hold_scattered(slots, blocks, fingerprints)
        held = np.zeros(len(slots), bool)
        for start, count in zip(edges.tolist(), counts.tolist(), strict=False):
            if count >= _STRETCH_MIN:
                some = slice(start, start + count)
                held[some] = self.holds(int(slots[start]), b"".join(blocks[some]), b"".join(fingerprints[some]))
        rest = np.flatnonzero(np.repeat(counts < _STRETCH_MIN, counts))
        if len(rest):
            places = rest.tolist()
            held[rest] = self._hold_scattered(
                slots[rest], [blocks[at] for at in places], [fingerprints[at] for at in places]
            )
        return held.tolist()

    def _hold_scattered(self, slots: Slots, blocks: Sequence[Buffer], fingerprints: Sequence[bytes]) -> list[bool]:
        """The same, of slots that need not be neighbours: a read of each."""
        if set(map(len, blocks)) != {BLOCK_BYTES}:
            raise ValueError(f"blocks of {BLOCK_BYTES} bytes are compared, and no others")
        form = self._form
        if len(slots) > _FEW and isinstance(form, RawForm):
            try:
                if form.fingerprints_of(slots) == b"".join(fingerprints):
                    offsets = (np.uint64(RAW_SLOTS_OFFSET) + slots * np.uint64(BLOCK_BYTES)).tolist()
                    stored = self._storage.pread_each(self._fd, BLOCK_BYTES, offsets)
                    # The quickest way to compare with a memoryview: none is longer, and what is shorter does not match.
                    return list(map(bytes.startswith, stored, blocks))
            except Unreadable:
                pass  # it may be one of them
        each = zip(slots.tolist(), blocks, fingerprints, strict=True)
        return [self.holds(slot, block, mark) for slot, block, mark in each]

    def holds(self, slot: int, blocks: Buffer, fingerprints: bytes) -> bool:
        """Whether the slots from `slot` on hold these very blocks, one behind the other, under these fingerprints.
        False says only that they were not found to: they may be damaged."""
        try:
            return self._holds(slot, blocks, fingerprints)
        except Damaged:
            return False

    def _holds(self, slot: int, blocks: Buffer, fingerprints: bytes) -> bool:
        count = len(fingerprints) // FINGERPRINT_BYTES
        # The bytes that the fingerprints were made of: what equals them need not be hashed again.
        stored: bytes | bytearray
        if self.header.form is ContainerForm.RAW:
            stored = self._storage.pread(self._fd, count * BLOCK_BYTES, RAW_SLOTS_OFFSET + slot * BLOCK_BYTES)
        else:
            stored = bytearray(count * BLOCK_BYTES)
            self._form.load(slot, count, memoryview(stored))
        # The quickest way to compare with a memoryview, of the same length.
        is_same = len(stored) == len(blocks) and stored.startswith(blocks)
        return is_same and self._form.fingerprints(slot, count) == fingerprints

    def is_current(self) -> bool:
        """Whether the container's name still stands for this file."""
        return self._storage.is_named(self._fd, self._path)

    def close(self) -> None:
        self._storage.close(self._fd)


def marks_of(storage: Storage, directory: Path, container: ContainerId) -> tuple[NDArray[np.uint64], bytes]:
    """The slots of a container that hold a block, ascending, and their stored fingerprints. Damaged, UnknownFormat."""
    reader = ContainerReader.open(storage, directory, container)
    try:
        slots = np.array(reader.slots(), np.uint64)
        edges = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)] if len(slots) else []
        return slots, b"".join([reader.fingerprints(int(slots[at]), end - at) for at, end in pairwise(edges)])
    finally:
        reader.close()


def _first_mismatch(blocks: memoryview, fingerprints: bytes) -> int | None:
    """The index of the first block that is not what its fingerprint says."""
    digest = xxhash.xxh3_128_digest
    if len(blocks) == BLOCK_BYTES:
        return None if digest(blocks) == fingerprints else 0
    found = b"".join([digest(blocks[at : at + BLOCK_BYTES]) for at in range(0, len(blocks), BLOCK_BYTES)])
    if found == fingerprints:
        return None
    for index in range(len(blocks) // BLOCK_BYTES):
        at = index * FINGERPRINT_BYTES
        if found[at : at + FINGERPRINT_BYTES] != fingerprints[at : at + FINGERPRINT_BYTES]:
            return index
    raise ValueError(f"{len(fingerprints)} bytes of fingerprints for {len(blocks)} bytes of blocks")
