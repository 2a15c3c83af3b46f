"""Salvage: a container's file is written anew from what is left of it, so that only blocks that are lost are lost.

What a slot must hold is known from the journal, which names each block by its fingerprint; so nothing of the damaged
file has to be believed. The new file is raw, whatever the old one was: a slot whose block is lost keeps its fingerprint
there, reads as damaged, and can be healed in place once its bytes turn up again.

Invariants:
- `no-wrong-bytes`: a slot of the new file is filled only with bytes that match its fingerprint;
- the new file is durable before it takes the old one's name; at any instant the name stands for one of the two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

import zstandard

from dedup.container import ContainerReader
from dedup.errors import Damaged
from dedup.layout import (
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    RAW_SLOTS_OFFSET,
    RAW_TABLE_BYTES,
    RAW_TABLE_OFFSET,
    SLOTS_MAX,
    TEMPORARY_SUFFIX,
    ContainerHeader,
    checksum,
    container_path,
    fingerprint,
    pack_container_header,
    unpack_container_header,
)
from dedup.sealed_layout import (
    SEALED_GROUP,
    SEALED_GROUP_BLOCKS,
    SEALED_GROUP_BLOCKS_MAX,
    SEALED_HEADER,
    SEALED_HEADER_OFFSET,
    SEALED_TABLE_OFFSET,
    SealedHeader,
    sealed_header_said,
)
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId, JournalId, TimeNs

Fingerprints = Mapping[int, bytes]
"""Slot → fingerprint of what it must hold."""
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_READ_BLOCKS: Final = 256


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What became of a container's slots: `kept` from its own file, `healed` from elsewhere, `lost`."""

    kept: int
    healed: int
    lost: int


def salvage(
    storage: Storage,
    directory: Path,
    container: ContainerId,
    journal: JournalId,
    expected: Fingerprints,
    elsewhere: Callable[[bytes], bytes | None],
    before_replacing: Callable[[Path], object],
) -> Salvaged:
    """Writes the container anew with the `expected` slots. `journal` is for its header, should that be unreadable.

    `elsewhere` gives the block of a fingerprint when another slot has it. `before_replacing` may keep the old file.
    Nothing may append to the container. DURABLE when it returns. StoreFull, StoreFailed, and UnknownFormat, which is no
    damage: the old file is still there.
    """
    path = container_path(directory, container)
    temporary = path.with_name(f"{path.name}.salvage{TEMPORARY_SUFFIX}")
    wanted = _by_fingerprint(expected)
    kept = healed = 0
    header = _old_header(storage, path, ContainerHeader(container, journal, ContainerForm.RAW, TimeNs(time.time_ns())))
    fd = storage.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        storage.pwritev(fd, [pack_container_header(header)], 0)
        for block in _blocks_of(storage, directory, container):
            for slot in wanted.pop(fingerprint(block), ()):
                storage.pwritev(fd, [block], RAW_SLOTS_OFFSET + slot * BLOCK_BYTES)
                kept += 1
            if not wanted:
                break
        for mark in list(wanted):
            found = elsewhere(mark)
            if found is not None and fingerprint(found) == mark:
                for slot in wanted.pop(mark):
                    storage.pwritev(fd, [found], RAW_SLOTS_OFFSET + slot * BLOCK_BYTES)
                    healed += 1
        table = bytearray(RAW_TABLE_BYTES)
        for slot, mark in expected.items():
            table[slot * FINGERPRINT_BYTES : (slot + 1) * FINGERPRINT_BYTES] = mark
        storage.pwritev(fd, [table], RAW_TABLE_OFFSET)
        storage.truncate(fd, RAW_SLOTS_OFFSET + (max(expected, default=-1) + 1) * BLOCK_BYTES)
        storage.datasync(fd)
    finally:
        storage.close(fd)
    if storage.exists(path):
        before_replacing(path)
    storage.replace(temporary, path)
    return Salvaged(kept, healed, sum(map(len, wanted.values())))


def found_in(storage: Storage, directory: Path, container: ContainerId, wanted: set[bytes]) -> set[bytes]:
    """Which of the fingerprints have their block somewhere in the container's file, damaged as that may be.

    UnknownFormat.
    """
    return {mark for block in _blocks_of(storage, directory, container) if (mark := fingerprint(block)) in wanted}


def _by_fingerprint(expected: Fingerprints) -> dict[bytes, list[int]]:
    slots: dict[bytes, list[int]] = {}
    for slot, mark in expected.items():
        slots.setdefault(mark, []).append(slot)
    return slots


def _old_header(storage: Storage, path: Path, otherwise: ContainerHeader) -> ContainerHeader:
    """The old file's header as a raw container's, if it can be read."""
    if not storage.exists(path):
        return otherwise
    fd = storage.open(path, os.O_RDONLY)
    try:
        old = unpack_container_header(storage.pread(fd, CONTAINER_PAGE_BYTES, 0), path)
    except Damaged:
        return otherwise
    finally:
        storage.close(fd)
    if old.container != otherwise.container:
        return otherwise
    return ContainerHeader(old.container, old.journal, ContainerForm.RAW, old.created)


# -- what is left of a file --------------------------------------------------------------------------------------------


def _blocks_of(storage: Storage, directory: Path, container: ContainerId) -> Iterator[bytes]:
    """Every block that the file may hold, each perhaps more than once; none of them is known to be sound."""
    path = container_path(directory, container)
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        yield from _opened(storage, directory, container)
        size = storage.size(fd)
        yield from _as_raw(storage, fd, size)
        if size <= _SEALED_BYTES_MAX:
            yield from _as_sealed(storage, fd, size)
    finally:
        storage.close(fd)


def _opened(storage: Storage, directory: Path, container: ContainerId) -> Iterator[bytes]:
    """The blocks that the container gives out when it opens at all; what it says is damaged is left out."""
    try:
        reader = ContainerReader.open(storage, directory, container)
    except Damaged:
        return
    try:
        if reader.header.form is ContainerForm.RAW:
            return  # as it lies in the file, which is looked at anyway
        for slot in reader.slots():
            try:
                yield reader.read_block(slot)
            except Damaged:
                continue
    finally:
        reader.close()


def _as_raw(storage: Storage, fd: int, size: int) -> Iterator[bytes]:
    for slot in range(0, SLOTS_MAX, _READ_BLOCKS):
        offset = RAW_SLOTS_OFFSET + slot * BLOCK_BYTES
        if offset >= size:
            return
        for data in _read_what_can_be(storage, fd, offset):
            for at in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
                yield data[at : at + BLOCK_BYTES]


def _read_what_can_be(storage: Storage, fd: int, offset: int) -> Iterator[bytes]:
    """A stretch of blocks in one piece; where the disk refuses that, block by block, without those it refuses."""
    try:
        yield storage.pread(fd, _READ_BLOCKS * BLOCK_BYTES, offset)
    except Damaged:
        for at in range(_READ_BLOCKS):
            try:
                yield storage.pread(fd, BLOCK_BYTES, offset + at * BLOCK_BYTES)
            except Damaged:
                continue


_SEALED_BYTES_MAX: Final = 80 << 20
"""No sealed container is larger; a larger file is none, and is not read whole."""


def _as_sealed(storage: Storage, fd: int, size: int) -> Iterator[bytes]:
    """Walks the groups one after the other, as they lie: each is a zstd frame, or stored and then of full length."""
    try:
        data = storage.pread(fd, size, 0)
    except Damaged:
        return
    header = _sealed_header(data)
    if header is None:
        return
    group_bytes = header.blocks_a_group * BLOCK_BYTES
    at = header.table_end
    while at < len(data):
        frame = _frame(data, at, group_bytes)
        if frame is None:
            group, after = data[at : at + group_bytes], at + group_bytes
            following = data.find(_ZSTD_MAGIC, at + 1)
            # A frame that does not decode ends where the next one that does begins.
            if data.startswith(_ZSTD_MAGIC, at) and following > 0:
                group, after = b"", following
        else:
            group, after = frame
        for start in range(0, len(group) - BLOCK_BYTES + 1, BLOCK_BYTES):
            yield group[start : start + BLOCK_BYTES]
        at = after


def _frame(data: bytes, at: int, group_bytes: int) -> tuple[bytes, int] | None:
    """The content of the zstd frame there, and where it ends."""
    if not data.startswith(_ZSTD_MAGIC, at):
        return None
    frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    try:
        if zstandard.frame_content_size(data[at : at + 32]) > group_bytes:
            return None
        content = frame.decompress(data[at : at + 2 * group_bytes])
    except zstandard.ZstdError:
        return None
    if not frame.eof:
        return None
    return content, min(len(data), at + 2 * group_bytes) - len(frame.unused_data)


def _sealed_header(data: bytes) -> SealedHeader | None:
    """One by which the table matches its checksum, near what the sealed header says; without one, what that says.

    What is possible is not yet right: another count may make as many groups.
    """
    if len(data) < SEALED_TABLE_OFFSET:
        return None
    slots, group_blocks, groups, stored, _ = SEALED_HEADER.struct.unpack_from(data, SEALED_HEADER_OFFSET)
    sizes = {SEALED_GROUP_BLOCKS, SEALED_GROUP_BLOCKS_MAX, min(group_blocks, SEALED_GROUP_BLOCKS_MAX)} - {0}
    near = [(slots, size) for size in sizes]
    near += [(count, size) for size in sizes for count in range(max(0, groups - 1) * size + 1, groups * size + 1)]
    said = sealed_header_said(data)
    if found := _matching(data, stored, near):
        return found
    # Numbers that contradict each other: more than one of them is wrong. Else it is the table, or its checksum.
    return said or _matching(data, stored, product(range(SLOTS_MAX + 1), sizes))


def _matching(data: bytes, stored: int, candidates: Iterable[tuple[int, int]]) -> SealedHeader | None:
    """The first of these (slots, blocks of a group) by which the table is what its checksum and its rows say."""
    for slots, size in candidates:
        header = SealedHeader.of(slots, stored, size)
        if slots > SLOTS_MAX or header.table_end > len(data):
            continue
        if checksum(memoryview(data)[SEALED_TABLE_OFFSET : header.table_end]) != stored:
            continue
        # Two sizes may make as many groups: the first group's row says how many blocks it has.
        if not slots or SEALED_GROUP.struct.unpack_from(data, header.groups_offset)[2] == min(slots, size):
            return header
    return None
