"""The sealed form of a container: how its bytes lie in the file, and how to get at a slot's block.

Groups of blocks, in slot order, as many in each as the header says, each compressed as one or stored as it is, each
under its own checksum; a table of the slots that are there with their fingerprints. What says whether a block is right
is not here but in `container.ContainerReader`.

Invariants:
- the table is read and verified once, when the form is opened; a sealed file never changes (a new one replaces it);
- a group that is stored as it is is not checked as one, and not kept: only its blocks that are asked for are read;
- decoded groups live in a `GroupCache` of bounded bytes, keyed by this object, not by the container's number.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import zstandard

from dedup.errors import Damaged
from dedup.layout import (
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    SLOTS_MAX,
    ContainerHeader,
    checksum,
    pack_container_header,
    padded,
)
from dedup.sealed_layout import (
    CODING_STORED,
    CODING_ZSTD,
    SEALED_GROUP,
    SEALED_GROUP_BLOCKS,
    SEALED_HEADER_OFFSET,
    SEALED_SLOT_BYTES,
    SEALED_TABLE_OFFSET,
    SealedHeader,
    pack_sealed_header,
    unpack_sealed_header,
)
from dedup.storage import Buffer, Storage
from dedup.types import BLOCK_BYTES

ZSTD_LEVEL: Final = 6
"""A twelfth smaller than with level 1, and decoded in half the time; made in a child process, at 130 MiB/s."""
CACHE_BYTES_MAX: Final = 32 << 20
"""Decoded groups that a pool keeps: 512 of them, so that random reads within tens of MiB decode each once."""
PLACE_BYTES: Final = SEALED_GROUP_BLOCKS * BLOCK_BYTES
"""Of a group in the cache, as they are sealed now."""
TOGETHER_MAX: Final = 16
"""Compressed groups that are read and decoded in one call: 1 MiB, as they are sealed now."""
_WORTHWHILE: Final = 15 / 16
"""A group that does not get smaller than this part of itself is stored as it is: reading it costs no decoding."""


class GroupCache:
    """Decoded groups, the least recently used dropped first. Shared by the readers of a pool and between threads.

    They lie in one piece of memory, so that it takes what it says and no more: allocated one by one by as many threads,
    they would take twice that. A group that is larger than PLACE_BYTES takes several places.
    """

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX) -> None:
        """Has `bytes_max` // PLACE_BYTES places, and takes no memory for those that hold nothing yet."""
        self._memory = memoryview(mmap.mmap(-1, bytes_max, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._places: OrderedDict[tuple[int, int, int], int] = OrderedDict()
        """By the group's key and the number of the part of it."""
        self._free = [place * PLACE_BYTES for place in reversed(range(bytes_max // PLACE_BYTES))]
        self._lock = threading.Lock()

    def read(self, key: tuple[int, int], start: int, out: memoryview) -> bool:
        """Fills `out` with the group's bytes from `start` on; False, and `out` undefined, when they are not here."""
        done = 0
        with self._lock:
            while done < len(out):
                number, at = divmod(start + done, PLACE_BYTES)
                part = *key, number
                place = self._places.get(part)
                if place is None:
                    return False
                self._places.move_to_end(part)
                take = min(PLACE_BYTES - at, len(out) - done)
                out[done : done + take] = self._memory[place + at : place + at + take]
                done += take
        return True

    def put(self, key: tuple[int, int], group: memoryview) -> None:
        with self._lock:
            for number, start in enumerate(range(0, len(group), PLACE_BYTES)):
                part = *key, number
                if part in self._places:
                    self._places.move_to_end(part)
                    continue
                place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
                content = group[start : start + PLACE_BYTES]
                self._memory[place : place + len(content)] = content
                self._places[part] = place


_threads = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: one serves one thread at a time, and readers shall not wait for each other's groups."""
    found: zstandard.ZstdDecompressor | None = getattr(_threads, "decompressor", None)
    if found is None:
        found = _threads.decompressor = zstandard.ZstdDecompressor()
    return found


def _decode(coded: memoryview, out: memoryview) -> int:
    """Fills `out` with the contents of frames that lie one right behind the other. Returns how much they gave: no more
    than that is looked at. ZstdError."""
    with _decompressor().stream_reader(coded, read_across_frames=True, closefd=False) as frames:
        return frames.readinto(out)


class _Group(NamedTuple):
    """A row of the table of groups."""

    offset: int
    stored_bytes: int
    blocks: int
    coding: int
    checksum: int


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
        slots = np.frombuffer(table, dtype="<u2", count=header.slots)
        self._slots = memoryview(slots.astype(np.uint16).tobytes()).cast("H")
        self._table = memoryview(table)
        self._group_blocks = header.blocks_a_group
        self._fingerprints_at = header.fingerprints_offset - SEALED_TABLE_OFFSET
        self._groups_at = header.groups_offset - SEALED_TABLE_OFFSET
        self._check_table(header)

    def _check_table(self, header: SealedHeader) -> None:
        size = self._group_blocks
        slots = np.array(self._slots, np.int64)
        ascending = bool((np.diff(slots) > 0).all()) and (header.slots == 0 or int(slots[-1]) < SLOTS_MAX)
        blocks = [min(size, header.slots - i * size) for i in range(header.groups)]
        begin, end = header.table_end, header.table_end + header.groups * size * BLOCK_BYTES
        sound = all(
            row[2] == expected
            and begin <= row[0] <= end
            and row[1] <= size * BLOCK_BYTES
            and (row[3] == CODING_ZSTD or (row[3] == CODING_STORED and row[1] == expected * BLOCK_BYTES))
            for row, expected in zip(
                SEALED_GROUP.struct.iter_unpack(self._table[self._groups_at :]), blocks, strict=True
            )
        )
        if not ascending or not sound:
            raise Damaged(f"{self._path}: offset {SEALED_TABLE_OFFSET}: the slot table says what cannot be")

    def _group(self, number: int) -> _Group:
        return _Group(
            *SEALED_GROUP.struct.unpack_from(self._table, self._groups_at + number * SEALED_GROUP.struct.size)
        )

    def slots(self) -> list[int]:
        """The slots that are there, ascending."""
        return self._slots.tolist()

    def offset_of(self, slot: int) -> int:
        """For messages: where the bytes of the slot's group start, 0 when it is not there."""
        index = bisect_left(self._slots, slot)
        if index == len(self._slots) or self._slots[index] != slot:
            return 0
        return self._group(index // self._group_blocks).offset

    def fingerprints(self, slot: int, count: int, *, wait: bool = True) -> bytes:
        """16 bytes for each of the slots. Damaged when one is not there."""
        index = self._index(slot, count)
        at = self._fingerprints_at + index * FINGERPRINT_BYTES
        return bytes(self._table[at : at + count * FINGERPRINT_BYTES])

    def refresh(self) -> bool:
        """Whether the fingerprints may differ now from those given before: never."""
        return False

    def load(self, slot: int, count: int, out: memoryview, *, wait: bool = True) -> None:
        """Puts the slots' bytes into `out`. Damaged, WouldBlock."""
        index = self._index(slot, count)
        done = 0
        while done < count:
            number, start = divmod(index + done, self._group_blocks)
            group = self._group(number)
            rest = out[done * BLOCK_BYTES : count * BLOCK_BYTES]
            if group.coding == CODING_STORED:
                take = self._load_stored(number, start, group, rest, wait)
            elif start == 0 and group.blocks <= count - done:
                take = self._load_whole(number, group, rest, wait)
            else:
                take = min(count - done, group.blocks - start)
                self._load_part(number, start * BLOCK_BYTES, group, rest[: take * BLOCK_BYTES], wait)
            done += take

    def _load_stored(self, number: int, start: int, group: _Group, out: memoryview, wait: bool) -> int:
        """Blocks of a group that is stored as it is, from its block `start` on, and of such groups right behind it, as
        far as `out` goes: one read of just these. Returns how many. Each will be held against its own fingerprint."""
        wanted = len(out) // BLOCK_BYTES
        take = min(wanted, group.blocks - start)
        end = group
        while take < wanted:
            number += 1
            following = self._group(number)
            if following.coding != CODING_STORED or following.offset != end.offset + end.stored_bytes:
                break
            take, end = min(wanted, take + following.blocks), following
        offset = group.offset + start * BLOCK_BYTES
        length = take * BLOCK_BYTES
        if self._storage.pread_into(self._fd, [out[:length]], offset, wait=wait) != length:
            raise Damaged(f"{self._path}: offset {offset}: the group is cut short")
        return take

    def is_compressed(self, slot: int) -> bool:
        """As the one of `ContainerReader`."""
        index = bisect_left(self._slots, slot)
        return index < len(self._slots) and self._group(index // self._group_blocks).coding == CODING_ZSTD

    def _index(self, slot: int, count: int) -> int:
        """Where the slot is in the table; the following ones come after it."""
        index = bisect_left(self._slots, slot)
        # Ascending slots: the run is whole when its last one is where it must be.
        last = index + count - 1
        if last >= len(self._slots) or self._slots[index] != slot or self._slots[last] != slot + count - 1:
            missing = sorted(set(range(slot, slot + count)) - set(self._slots[index : last + 1].tolist()))
            raise Damaged(f"{self._path}: offset {SEALED_TABLE_OFFSET}: slot {missing[0]} is not in the container")
        return index

    def _load_whole(self, number: int, group: _Group, out: memoryview, wait: bool) -> int:
        """A group that is compressed, and such groups right behind it, as far as `out` goes with whole ones: one read
        and one decoding, beside the cache. Returns how many blocks."""
        together, blocks = [group], group.blocks
        while blocks * BLOCK_BYTES < len(out) and len(together) < TOGETHER_MAX:
            number += 1
            following = self._group(number)
            apart = following.offset != group.offset + group.stored_bytes
            if apart or following.coding != CODING_ZSTD or (blocks + following.blocks) * BLOCK_BYTES > len(out):
                break
            together.append(following)
            group, blocks = following, blocks + following.blocks
        self._read_together(together, out[: blocks * BLOCK_BYTES], wait)
        return blocks

    def _load_part(self, number: int, start: int, group: _Group, out: memoryview, wait: bool) -> None:
        """Bytes of a group that is compressed, from its byte `start` on. All of it is kept for who reads the rest."""
        key = self._serial, number
        if not self._cache.read(key, start, out):
            decoded = memoryview(bytearray(group.blocks * BLOCK_BYTES))
            self._read_together([group], decoded, wait)
            self._cache.put(key, decoded)
            out[:] = decoded[start : start + len(out)]

    def _read_together(self, groups: list[_Group], out: memoryview, wait: bool) -> None:
        """Fills `out` with groups that are compressed and lie one right behind the other. Damaged, WouldBlock."""
        first = groups[0].offset
        coded = memoryview(bytearray(sum([group.stored_bytes for group in groups])))
        if self._storage.pread_into(self._fd, [coded], first, wait=wait) != len(coded):
            raise Damaged(f"{self._path}: offset {first}: the group is cut short")
        for group in groups:
            self._check_frame(group, coded[group.offset - first :][: group.stored_bytes])
        try:
            length = _decode(coded, out)
        except zstandard.ZstdError as error:
            raise Damaged(f"{self._path}: offset {first}: the group cannot be decoded: {error}") from error
        if length != len(out):
            raise Damaged(f"{self._path}: offset {first}: the group has {length} bytes, not {len(out)}")

    def _check_frame(self, group: _Group, frame: Buffer) -> None:
        if checksum(frame) != group.checksum:
            raise Damaged(f"{self._path}: offset {group.offset}: the group does not match its checksum")
        try:
            # Where one ends the next one begins, in what is decoded together.
            said = zstandard.frame_content_size(frame)
        except zstandard.ZstdError as error:
            raise Damaged(f"{self._path}: offset {group.offset}: the group cannot be decoded: {error}") from error
        if said != group.blocks * BLOCK_BYTES:
            raise Damaged(
                f"{self._path}: offset {group.offset}: the group has {said} bytes, not {group.blocks * BLOCK_BYTES}"
            )


def write_sealed(
    storage: Storage,
    fd: int,
    header: ContainerHeader,
    slots: list[int],
    fingerprints: bytes,
    groups: Iterable[bytes | bytearray | memoryview],
) -> int:
    """Writes a sealed container into an empty file and returns its size. Not durable. StoreFull, StoreFailed.

    `slots` ascending, `fingerprints` 16 bytes each; `groups` gives their blocks, SEALED_GROUP_BLOCKS at a time, as it
    is asked to. The header is written last: a file without it is nothing.
    """
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False, write_content_size=True)
    sealed = SealedHeader.of(len(slots))
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
    packed = pack_sealed_header(replace(sealed, table_checksum=checksum(table)))
    page[SEALED_HEADER_OFFSET : SEALED_HEADER_OFFSET + len(packed)] = packed
    storage.pwritev(fd, [page, table], 0)
    return offset
