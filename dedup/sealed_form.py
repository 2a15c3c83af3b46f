"""The sealed form of a container: how its bytes lie in the file, and how to get at a slot's block.

Groups of up to 32 blocks, in slot order, each compressed as one or stored as it is, each under its own checksum; a
table of the slots that are there with their fingerprints. What says whether a block is right is not here but in
`container.ContainerReader`.

Invariants:
- the table is read and verified once, when the form is opened; a sealed file never changes (a new one replaces it);
- decoded groups live in a `GroupCache` of bounded bytes, keyed by this object, not by the container's number.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import zstandard

from dedup.errors import Damaged
from dedup.layout import (
    CODING_STORED,
    CODING_ZSTD,
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    SEALED_GROUP,
    SEALED_GROUP_BLOCKS,
    SEALED_HEADER_OFFSET,
    SEALED_SLOT_BYTES,
    SEALED_TABLE_OFFSET,
    SLOTS_MAX,
    ContainerHeader,
    SealedHeader,
    checksum,
    pack_container_header,
    pack_sealed_header,
    padded,
    unpack_sealed_header,
)
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES

ZSTD_LEVEL: Final = 1
CACHE_BYTES_MAX: Final = 32 << 20
"""Decoded groups that a pool keeps: 256 of them, so that random reads within tens of MiB decode each once."""
GROUP_BYTES_MAX: Final = SEALED_GROUP_BLOCKS * BLOCK_BYTES
_WORTHWHILE: Final = 15 / 16
"""A group that does not get smaller than this part of itself is stored as it is: reading it costs no decoding."""


class GroupCache:
    """Decoded groups, the least recently used dropped first. Shared by the readers of a pool and between threads."""

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._groups: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> bytes | None:
        with self._lock:
            found = self._groups.get(key)
            if found is not None:
                self._groups.move_to_end(key)
            return found

    def put(self, key: tuple[int, int], group: bytes) -> None:
        with self._lock:
            if key in self._groups:
                return
            self._groups[key] = group
            self._bytes += len(group)
            while self._bytes > self._bytes_max:
                self._bytes -= len(self._groups.popitem(last=False)[1])


_threads = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: one serves one thread at a time, and readers shall not wait for each other's groups."""
    found: zstandard.ZstdDecompressor | None = getattr(_threads, "decompressor", None)
    if found is None:
        found = _threads.decompressor = zstandard.ZstdDecompressor()
    return found


class SealedForm:
    """An open sealed file. Owned by its `ContainerReader`, which closes the descriptor; safe between threads."""

    _serials = itertools.count()

    def __init__(self, storage: Storage, path: Path, fd: int, page: bytes, cache: GroupCache) -> None:
        """Reads the table. Damaged."""
        self._storage = storage
        self._path = path
        self._fd = fd
        self._cache = cache
        self._serial = next(self._serials)
        header = unpack_sealed_header(page, path)
        table = storage.pread(fd, header.table_end - SEALED_TABLE_OFFSET, SEALED_TABLE_OFFSET)
        if checksum(table) != header.table_checksum:
            raise Damaged(f"{path}: offset {SEALED_TABLE_OFFSET}: the slot table does not match its checksum")
        self._slots = np.frombuffer(table, dtype="<u2", count=header.slots).astype(np.int64)
        groups_at = header.groups_offset - SEALED_TABLE_OFFSET
        self._fingerprints = table[header.fingerprints_offset - SEALED_TABLE_OFFSET : groups_at]
        self._groups = list(SEALED_GROUP.struct.iter_unpack(table[groups_at:]))
        self._check_table(header)

    def _check_table(self, header: SealedHeader) -> None:
        ascending = bool((np.diff(self._slots) > 0).all()) and (header.slots == 0 or int(self._slots[-1]) < SLOTS_MAX)
        blocks = [min(SEALED_GROUP_BLOCKS, header.slots - i * SEALED_GROUP_BLOCKS) for i in range(header.groups)]
        begin, end = header.table_end, header.table_end + header.groups * GROUP_BYTES_MAX
        sound = all(
            row[2] == expected
            and begin <= row[0] <= end
            and row[1] <= GROUP_BYTES_MAX
            and row[3] in (CODING_STORED, CODING_ZSTD)
            for row, expected in zip(self._groups, blocks, strict=True)
        )
        if not ascending or not sound:
            raise Damaged(f"{self._path}: offset {SEALED_TABLE_OFFSET}: the slot table says what cannot be")

    def slots(self) -> list[int]:
        """The slots that are there, ascending."""
        slots: list[int] = self._slots.tolist()
        return slots

    def offset_of(self, slot: int) -> int:
        """For messages: where the bytes of the slot's group start, 0 when it is not there."""
        index = int(np.searchsorted(self._slots, slot))
        if index == len(self._slots) or self._slots[index] != slot:
            return 0
        offset: int = self._groups[index // SEALED_GROUP_BLOCKS][0]
        return offset

    def fingerprints(self, slot: int, count: int, *, wait: bool = True) -> bytes:
        """16 bytes for each of the slots. Damaged when one is not there."""
        index = self._index(slot, count)
        return self._fingerprints[index * FINGERPRINT_BYTES : (index + count) * FINGERPRINT_BYTES]

    def refresh(self) -> bool:
        """Whether the fingerprints may differ now from those given before: never."""
        return False

    def load(self, slot: int, count: int, out: memoryview, *, wait: bool = True) -> None:
        """Puts the slots' bytes into `out`. Damaged, WouldBlock."""
        index = self._index(slot, count)
        number, start = divmod(index, SEALED_GROUP_BLOCKS)
        last = (index + count - 1) // SEALED_GROUP_BLOCKS
        done = 0
        for group in self._decoded(number, last, wait):
            take = min(count - done, SEALED_GROUP_BLOCKS - start)
            part = memoryview(group)[start * BLOCK_BYTES : (start + take) * BLOCK_BYTES]
            out[done * BLOCK_BYTES : (done + take) * BLOCK_BYTES] = part
            done += take
            start = 0

    def prefetch(self, slot: int, count: int) -> None:
        """Has the disk bring the slots' groups into memory. Says nothing of slots that are not there."""
        start, end = np.searchsorted(self._slots, (slot, slot + count)).tolist()
        if start < end:
            first, last = self._groups[start // SEALED_GROUP_BLOCKS], self._groups[(end - 1) // SEALED_GROUP_BLOCKS]
            self._storage.prefetch(self._fd, first[0], max(0, last[0] + last[1] - first[0]))

    def _index(self, slot: int, count: int) -> int:
        """Where the slot is in the table; the following ones come after it."""
        index = int(np.searchsorted(self._slots, slot))
        # Ascending slots: the run is whole when its last one is where it must be.
        last = index + count - 1
        if last >= len(self._slots) or self._slots[index] != slot or self._slots[last] != slot + count - 1:
            missing = sorted(set(range(slot, slot + count)) - set(self._slots[index : last + 1].tolist()))
            raise Damaged(f"{self._path}: offset {SEALED_TABLE_OFFSET}: slot {missing[0]} is not in the container")
        return index

    def _decoded(self, first: int, last: int, wait: bool) -> Iterator[bytes]:
        """The groups first..last; those that are not in the cache and lie side by side are one read."""
        found = [self._cache.get((self._serial, number)) for number in range(first, last + 1)]
        number = first
        while number <= last:
            group = found[number - first]
            if group is not None:
                yield group
                number += 1
                continue
            end = number
            while end < last and found[end + 1 - first] is None:
                end += 1
            for group in self._read_groups(number, end, wait):
                self._cache.put((self._serial, number), group)
                yield group
                number += 1

    def _read_groups(self, first: int, last: int, wait: bool) -> Iterator[bytes]:
        start = self._groups[first][0]
        end = self._groups[last][0] + self._groups[last][1]
        if not 0 <= end - start <= (last - first + 1) * GROUP_BYTES_MAX:
            raise Damaged(f"{self._path}: offset {SEALED_TABLE_OFFSET}: the slot table says what cannot be")
        stored = memoryview(bytearray(end - start))
        have = self._storage.pread_into(self._fd, [stored], start, wait=wait)
        for offset, stored_bytes, blocks, coding, expected in self._groups[first : last + 1]:
            if not start <= offset <= offset + stored_bytes <= start + have:
                raise Damaged(f"{self._path}: offset {offset}: the group is cut short")
            coded = stored[offset - start : offset - start + stored_bytes]
            if checksum(coded) != expected:
                raise Damaged(f"{self._path}: offset {offset}: the group does not match its checksum")
            yield self._decode(coded, offset, blocks * BLOCK_BYTES, coding)

    def _decode(self, coded: memoryview, offset: int, length: int, coding: int) -> bytes:
        if coding == CODING_ZSTD:
            try:
                # What a frame says of its length is what would be allocated for it.
                said = zstandard.frame_content_size(coded)
                if said != length:
                    raise Damaged(f"{self._path}: offset {offset}: the group has {said} bytes, not {length}")
                group = _decompressor().decompress(coded, max_output_size=length)
            except zstandard.ZstdError as error:
                raise Damaged(f"{self._path}: offset {offset}: the group cannot be decoded: {error}") from error
        else:
            group = bytes(coded)
        if len(group) != length:
            raise Damaged(f"{self._path}: offset {offset}: the group has {len(group)} bytes, not {length}")
        return group


def write_sealed(
    storage: Storage,
    fd: int,
    header: ContainerHeader,
    slots: list[int],
    fingerprints: bytes,
    groups: Iterable[bytes | bytearray | memoryview],
) -> int:
    """Writes a sealed container into an empty file and returns its size. Not durable. StoreFull, StoreFailed.

    `slots` ascending, `fingerprints` 16 bytes each; `groups` gives their blocks, 32 at a time, as it is asked to. The
    header is written last: a file without it is nothing.
    """
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False, write_content_size=True)
    sealed = SealedHeader(len(slots), -(-len(slots) // SEALED_GROUP_BLOCKS), 0)
    rows = []
    offset = sealed.table_end
    for group in groups:
        coded: bytes | bytearray | memoryview = compressor.compress(group)
        coding = CODING_ZSTD
        if len(coded) > len(group) * _WORTHWHILE:
            coded, coding = group, CODING_STORED
        storage.pwritev(fd, [coded], offset)
        rows.append(SEALED_GROUP.struct.pack(offset, len(coded), len(group) // BLOCK_BYTES, coding, checksum(coded)))
        offset += len(coded)
    numbers = np.array(slots, dtype="<u2").tobytes()
    numbers += bytes(padded(len(slots) * SEALED_SLOT_BYTES) - len(numbers))
    table = b"".join([numbers, fingerprints, *rows])
    if len(rows) != sealed.groups or len(table) != sealed.table_end - SEALED_TABLE_OFFSET:
        raise ValueError(f"{len(slots)} slots, {len(fingerprints)} bytes of fingerprints, {len(rows)} groups")
    page = bytearray(CONTAINER_PAGE_BYTES)
    packed = pack_container_header(header)
    page[: len(packed)] = packed
    packed = pack_sealed_header(SealedHeader(sealed.slots, sealed.groups, checksum(table)))
    page[SEALED_HEADER_OFFSET : SEALED_HEADER_OFFSET + len(packed)] = packed
    storage.pwritev(fd, [page, table], 0)
    return offset
