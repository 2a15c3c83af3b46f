"""Containers: append-only files of unique blocks. The writer of the raw form, the reader of either, the pool.

A raw file (`raw_form`) is header page | fingerprint table | slots; slot × 4096 is where a block is. `sealed` replaces
it by the sealed form under the same name; addresses stay.

Invariants:
- `no-wrong-bytes`: no block leaves a `ContainerReader` that does not match its stored fingerprint;
- a slot is written once: after a failed append the slots that it was for are never used again;
- blocks are written before their fingerprints: a table entry that is not zeros was meant to name a whole block;
- the pool keeps at most `open_max` descriptors besides those in use at the moment; one in use is never closed;
- a file that was replaced or removed is held open for CURRENT_SECONDS while it is read, for about IDLE_SECONDS else,
  where somebody calls `close_idle` now and then.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from dedup.errors import Damaged, StoreFailed, WouldBlock
from dedup.layout import (
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    RAW_SLOTS_OFFSET,
    RAW_TABLE_OFFSET,
    SLOT_BITS,
    SLOT_MASK,
    SLOTS_MAX,
    ZERO_BLOCK,
    ContainerHeader,
    container_path,
    pack_container_header,
    unpack_container_header,
)
from dedup.raw_form import RawForm
from dedup.sealed_form import GroupCache, SealedForm
from dedup.storage import Buffer, Storage
from dedup.types import BLOCK_BYTES, LOST_CONTAINER, Address, ContainerForm, ContainerId, JournalId, TimeNs

log = logging.getLogger("rewindfs.container")

_RUN_BLOCKS_MAX: Final = 1024
"""Blocks of one read."""
IDLE_SECONDS: Final = 60.0
"""A descriptor that nobody used for so long is closed: if its file was replaced, it keeps the old one on the disk."""
AHEAD_RUNS_MAX: Final = 64
"""Stretches that are looked at for one call."""
DECODERS: Final = 2
"""Threads that decode ahead of sequential readers; zstd leaves the others at their work meanwhile."""
DECODING_MAX: Final = 8
"""Stretches that are being decoded, or wait for it."""
CURRENT_SECONDS: Final = 5.0
"""And one in use is held against its name so often."""


class RawContainerWriter:
    """Fills one new container. Called by one thread at a time, but `sync`, which may run beside `append`."""

    def __init__(self, storage: Storage, path: Path, fd: int, container: ContainerId, journal: JournalId) -> None:
        """Use `create`."""
        self._storage = storage
        self._path = path
        self._fd = fd
        self.container = container
        self.journal = journal
        self.next_slot = 0
        self._appended = 0
        """Appends that are complete, and as many of them as were synced: one that is under way counts as neither."""
        self._synced = 0

    @classmethod
    def create(
        cls, storage: Storage, directory: Path, container: ContainerId, journal: JournalId
    ) -> RawContainerWriter:
        """A new, empty container; its header and its name are durable. StoreFull leaves no file; StoreFailed may."""
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
        return cls(storage, path, fd, container, journal)

    @property
    def slots_free(self) -> int:
        return SLOTS_MAX - self.next_slot

    def append(self, blocks: Sequence[Buffer], fingerprints: Sequence[bytes]) -> int:
        """Writes the blocks (4096 bytes each, at most `slots_free`) and returns the first slot. DURABLE after `sync`.

        StoreFull, StoreFailed: the slots that it was for are spent.
        """
        first = self.next_slot
        if len(blocks) != len(fingerprints) or len(blocks) > self.slots_free:
            raise ValueError(f"{len(blocks)} blocks, {len(fingerprints)} fingerprints, {self.slots_free} slots free")
        if not set(map(len, blocks)) <= {BLOCK_BYTES}:
            raise ValueError(f"a block has {BLOCK_BYTES} bytes")
        self.next_slot = first + len(blocks)
        self._storage.pwritev(self._fd, blocks, RAW_SLOTS_OFFSET + first * BLOCK_BYTES)
        table = b"".join(fingerprints)
        self._storage.pwritev(self._fd, [table], RAW_TABLE_OFFSET + first * FINGERPRINT_BYTES)
        self._appended += 1
        return first

    def sync(self) -> None:
        """Everything appended before the call is DURABLE when it returns; costs nothing when it is. StoreFailed."""
        appended = self._appended
        if appended != self._synced:
            self._storage.datasync(self._fd)
            self._synced = appended

    def close(self) -> None:
        """Gives the descriptor back. Not a sync; must not run beside one."""
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

    def begin_decoding(self, slot: int, count: int) -> Callable[[], None] | None: ...


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

    def begin_decoding(self, slot: int, count: int) -> Callable[[], None] | None:
        """What is left to do before the slots can be read at once, None where nothing of them is compressed or all of
        that is decoded. To be called once, in a thread, before `close`; until it is, who reads them waits.

        Says nothing of damage, or of slots that are not there: `read_into` does.
        """
        return self._form.begin_decoding(slot, count)

    def read_block(self, slot: int) -> bytes:
        """One slot's block, verified. Damaged."""
        block = bytearray(BLOCK_BYTES)
        self.read_into(slot, 1, memoryview(block))
        return bytes(block)

    def holds(self, slot: int, blocks: Sequence[Buffer], fingerprints: bytes) -> bool:
        """Whether the slots from `slot` on hold these very blocks, under these fingerprints. Damaged."""
        count = len(blocks)
        # The bytes that the fingerprints were made of: what equals them need not be hashed again.
        stored: bytes | bytearray
        if self.header.form is ContainerForm.RAW:
            stored = self._storage.pread(self._fd, count * BLOCK_BYTES, RAW_SLOTS_OFFSET + slot * BLOCK_BYTES)
        else:
            stored = bytearray(count * BLOCK_BYTES)
            self._form.load(slot, count, memoryview(stored))
        wanted = bytes(blocks[0]) if count == 1 else b"".join(blocks)
        return stored == wanted and self._form.fingerprints(slot, count) == fingerprints

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


def _runs(addresses: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """(start, end) of each stretch of consecutive addresses, or of holes; a hole is one of its own."""
    count = len(addresses)
    if count <= 1:
        return [(0, 1)] if count else []
    before = addresses[:-1]
    starts = [0, *(np.flatnonzero((addresses[1:] != before + np.uint64(1)) | (before == 0)) + 1).tolist()]
    return list(zip(starts, [*starts[1:], count], strict=True))


class ContainerPool:
    """Reads blocks by address through a bounded set of open containers. Safe between threads, `close` excepted.

    A container that was replaced meanwhile is read through its open descriptor, as it was, for CURRENT_SECONDS at most.
    """

    def __init__(self, storage: Storage, directory: Path, *, open_max: int = 64) -> None:
        self._storage = storage
        self._directory = directory
        self._open_max = open_max
        self._cache = GroupCache()
        self._readers: OrderedDict[int, ContainerReader] = OrderedDict()
        self._lock = threading.Lock()
        self._decoders: ThreadPoolExecutor | None = None
        self._decoding = 0

    def read_block(self, where: Address) -> bytes:
        """One block that is not a hole, verified. Damaged."""
        reader = self._borrow(where >> SLOT_BITS, True)
        try:
            return reader.read_block(where & SLOT_MASK)
        finally:
            self._give_back(reader)

    def read_addresses(self, addresses: NDArray[np.uint64], out: memoryview, *, wait: bool = True) -> None:
        """Fills `out` (4096 bytes per address) with the blocks, verified; a hole is zeros.

        Runs of consecutive addresses are one read. Damaged names file and offset. With `wait` False: WouldBlock when
        anything of it needs the disk, or a container is not open; `out` is undefined then.
        """
        for start, end in _runs(addresses):
            where = int(addresses[start])
            if where == 0:
                out[start * BLOCK_BYTES : end * BLOCK_BYTES] = ZERO_BLOCK
                continue
            reader = self._borrow(where >> SLOT_BITS, wait)
            try:
                for at in range(start, end, _RUN_BLOCKS_MAX):
                    take = min(end - at, _RUN_BLOCKS_MAX)
                    part = out[at * BLOCK_BYTES : (at + take) * BLOCK_BYTES]
                    reader.read_into((where & SLOT_MASK) + at - start, take, part, wait=wait)
            finally:
                self._give_back(reader)

    def same_each(
        self, addresses: NDArray[np.uint64], blocks: Sequence[Buffer], fingerprints: Sequence[bytes]
    ) -> list[bool]:
        """Whether the block at each address, none a hole, is this one, whose fingerprint is given.

        False says only that it was not found to be so: it may be damaged, or its container was just replaced.
        """
        order = np.argsort(addresses, kind="stable")
        ascending = addresses[order]
        edges = [0, *(np.flatnonzero(np.diff(ascending) != 1) + 1).tolist(), len(order)]
        places, wheres = order.tolist(), ascending.tolist()
        same = [False] * len(places)
        reader: ContainerReader | None = None
        try:
            for start, end in pairwise(edges):
                where = wheres[start]
                if reader is None or reader.header.container != where >> SLOT_BITS:
                    if reader is not None:
                        self._give_back(reader)
                        reader = None
                    try:
                        reader = self._borrow(where >> SLOT_BITS, True)
                    except Damaged:
                        continue  # the caller looks at each of them, and says what is wrong
                run = places[start:end]
                marks = fingerprints[run[0]] if end == start + 1 else b"".join([fingerprints[place] for place in run])
                try:
                    if reader.holds(where & SLOT_MASK, [blocks[place] for place in run], marks):
                        for place in run:
                            same[place] = True
                except Damaged:
                    continue  # the caller looks at each of them, and says what is wrong
        finally:
            if reader is not None:
                self._give_back(reader)
        return same

    def decode_ahead(self, addresses: NDArray[np.uint64]) -> None:
        """Has those of the blocks that are compressed decoded in the background, for who reads them next: of the first
        AHEAD_RUNS_MAX runs of them, in containers that are open; nothing while DECODING_MAX are being decoded.

        What is not compressed the kernel reads ahead better than this could: asked for its bytes in advance it takes
        them in page by page, at several times the cost. Says nothing of damage: who reads the blocks meets it.
        """
        for start, end in islice(_runs(addresses), AHEAD_RUNS_MAX):
            where = int(addresses[start])
            if where == 0:
                continue
            if self._decoding >= DECODING_MAX:
                return
            try:
                reader = self._borrow(where >> SLOT_BITS, False)
            except WouldBlock:
                continue
            decode = None
            try:
                decode = reader.begin_decoding(where & SLOT_MASK, end - start)
            finally:
                if decode is None:
                    self._give_back(reader)
                else:
                    self._decode(reader, decode)

    def _decode(self, reader: ContainerReader, decode: Callable[[], None]) -> None:
        """In a thread, which gives the reader back."""
        with self._lock:
            self._decoding += 1
            if self._decoders is None:
                self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._decoders.submit(self._decode_here, reader, decode)

    def _decode_here(self, reader: ContainerReader, decode: Callable[[], None]) -> None:
        try:
            decode()
        except Exception:
            log.exception("container %d could not be decoded ahead of its reader", reader.header.container)
        finally:
            self._give_back(reader)
            with self._lock:
                self._decoding -= 1

    def fingerprints(self, where: Address, count: int = 1) -> bytes:
        """The stored fingerprints of `count` slots from the address on. Damaged."""
        reader = self._borrow(where >> SLOT_BITS, True)
        try:
            return reader.fingerprints(where & SLOT_MASK, count)
        finally:
            self._give_back(reader)

    def _borrow(self, container: int, wait: bool) -> ContainerReader:
        """The container's reader, not to be closed until it is given back."""
        now = time.monotonic()
        with self._lock:
            reader = self._readers.get(container)
            if reader is not None and now - reader.looked_at >= CURRENT_SECONDS:
                reader = self._look_again(reader, now)
            if reader is not None:
                self._readers.move_to_end(container)
                reader.users += 1
                reader.used_at = now
                return reader
        if not wait:
            raise WouldBlock
        opened = ContainerReader.open(self._storage, self._directory, ContainerId(container), cache=self._cache)
        with self._lock:
            reader = self._readers.setdefault(container, opened)
            reader.users += 1
            closing = [] if reader is opened else [opened]
            closing += self._surplus()
        for idle in closing:
            idle.close()
        return reader

    def _look_again(self, reader: ContainerReader, now: float) -> ContainerReader | None:
        """The reader, if its file is still the container's; else it is forgotten. Under the lock."""
        reader.looked_at = now
        if reader.is_current():
            return reader
        del self._readers[reader.header.container]
        if reader.users == 0:
            reader.close()
        return None

    def _give_back(self, reader: ContainerReader) -> None:
        with self._lock:
            reader.users -= 1
            forgotten = reader.users == 0 and self._readers.get(reader.header.container) is not reader
        if forgotten:
            reader.close()

    def _surplus(self) -> list[ContainerReader]:
        """Takes the oldest readers out until the pool fits, and returns those that nobody uses: to be closed.

        One in use is closed by the last to give it back.
        """
        idle = []
        while len(self._readers) > self._open_max:
            _, oldest = self._readers.popitem(last=False)
            if oldest.users == 0:
                idle.append(oldest)
        return idle

    def forget(self, container: ContainerId) -> None:
        """The next read of the container opens its file anew."""
        with self._lock:
            reader = self._readers.pop(container, None)
            idle = reader is not None and reader.users == 0
        if reader is not None and idle:
            reader.close()

    def close_idle(self) -> None:
        """Closes what nobody used for IDLE_SECONDS, and what is another file by now. To be called now and then."""
        now = time.monotonic()
        with self._lock:
            for reader in [one for one in self._readers.values() if one.users == 0]:
                if self._look_again(reader, now) and now - reader.used_at >= IDLE_SECONDS:
                    del self._readers[reader.header.container]
                    reader.close()

    def close(self) -> None:
        """Closes every descriptor; nothing may be reading."""
        if self._decoders is not None:
            self._decoders.shutdown()
        while self._readers:
            self._readers.popitem()[1].close()
