"""The byte layout of what is in a sealed container and in no other. FORMAT.md says the same in prose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup.errors import Damaged, UnknownFormat
from dedup.layout import (
    CONTAINER_PAGE_BYTES,
    FINGERPRINT_BYTES,
    SLOTS_MAX,
    USE_A_NEWER,
    Fields,
    check_header,
    checked,
    padded,
)

SEALED_HEADER_OFFSET: Final = 64
SEALED_HEADER: Final = Fields(
    "sealed header",
    ("slots", "H"),
    ("group_blocks", "H"),
    ("groups", "I"),
    ("table_checksum", "Q"),
    ("checksum", "Q"),
)
SEALED_TABLE_OFFSET: Final = CONTAINER_PAGE_BYTES
SEALED_GROUP: Final = Fields(
    "sealed group",
    ("offset", "Q"),
    ("stored_bytes", "I"),
    ("blocks", "H"),
    ("coding", "H"),
    ("checksum", "Q"),
)
SEALED_GROUP_BLOCKS: Final = 16
"""Of a group but the last, in what is sealed now: 64 KiB. Half of it costs a twentieth more room and makes reading on a
sixth slower; twice as much makes a read of a single block, for which all of it is decoded, twice as slow."""
SEALED_GROUP_BLOCKS_MAX: Final = 32
"""In any sealed container; and in those whose header says 0: the first ones had no other, and did not say."""
SEALED_SLOT_BYTES: Final = 2
CODING_STORED: Final = 0
CODING_ZSTD: Final = 1


@dataclass(frozen=True, slots=True)
class SealedHeader:
    slots: int
    groups: int
    table_checksum: int
    group_blocks: int = SEALED_GROUP_BLOCKS
    """As on the disk; what it stands for is `blocks_a_group`."""

    @classmethod
    def of(cls, slots: int, table_checksum: int = 0, group_blocks: int = SEALED_GROUP_BLOCKS) -> SealedHeader:
        """With as many groups as these slots make."""
        return cls(slots, -(-slots // (group_blocks or SEALED_GROUP_BLOCKS_MAX)), table_checksum, group_blocks)

    @property
    def blocks_a_group(self) -> int:
        """Of every group but the last, which may have fewer."""
        return self.group_blocks or SEALED_GROUP_BLOCKS_MAX

    @property
    def fingerprints_offset(self) -> int:
        """Where the fingerprints start: after the slot numbers, rounded up to 8 bytes."""
        return SEALED_TABLE_OFFSET + padded(self.slots * SEALED_SLOT_BYTES)

    @property
    def groups_offset(self) -> int:
        return self.fingerprints_offset + self.slots * FINGERPRINT_BYTES

    @property
    def table_end(self) -> int:
        """Where the groups' bytes start."""
        return self.groups_offset + self.groups * SEALED_GROUP.size


def pack_sealed_header(header: SealedHeader) -> bytes:
    fields = header.slots, header.group_blocks, header.groups, header.table_checksum
    return checked(SEALED_HEADER.struct.pack(*fields, 0))


def unpack_sealed_header(page: bytes, path: Path) -> SealedHeader:
    """Raises Damaged or UnknownFormat; `path` is for their messages. The counts fit a container when it returns."""
    end = SEALED_HEADER_OFFSET + SEALED_HEADER.size
    if len(page) < end:
        raise Damaged(f"{path}: offset {len(page)}: the sealed header is cut short")
    check_header(page, SEALED_HEADER_OFFSET, end, path, "the sealed header")
    _, group_blocks, *_ = SEALED_HEADER.struct.unpack_from(page, SEALED_HEADER_OFFSET)
    if group_blocks > SEALED_GROUP_BLOCKS_MAX:
        raise UnknownFormat(f"{path}: groups of {group_blocks} blocks are not known here; {USE_A_NEWER}")
    header = sealed_header_said(page)
    if header is None:
        raise Damaged(f"{path}: offset {SEALED_HEADER_OFFSET}: the sealed header says what cannot be")
    return header


def sealed_header_said(page: bytes) -> SealedHeader | None:
    """What the sealed header of a page that is long enough says, whatever its checksum; None where that cannot be."""
    slots, group_blocks, groups, table_checksum, _ = SEALED_HEADER.struct.unpack_from(page, SEALED_HEADER_OFFSET)
    header = SealedHeader.of(slots, table_checksum, group_blocks)
    possible = slots <= SLOTS_MAX and group_blocks <= SEALED_GROUP_BLOCKS_MAX and groups == header.groups
    return header if possible else None
