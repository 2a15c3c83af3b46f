"""The byte layouts of the store, but for sealed containers (`sealed_layout`): magic numbers, structs, offsets, names of
files. FORMAT.md says the same in prose.

Files are little-endian; keys of LMDB are big-endian, so that their order is the order of what they name. Nothing here
touches a disk. A header is checked in this order: magic, version (an unknown one may have another shape), checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from dedup.errors import Damaged, NotAStore, UnknownFormat
from dedup.types import BLOCK_BYTES, Address, ContainerForm, ContainerId, JournalId, Seq, TimeNs

FORMAT_VERSION: Final = 1
CHECKSUM_BYTES: Final = 8


class Fields:
    """A struct whose fields have names, so that FORMAT.md's tables can be held against it. Little-endian, no padding.

    `struct` is the plain `struct.Struct` for hot paths; fields whose name starts with `reserved` are zero on disk.
    """

    __slots__ = ("fields", "name", "size", "struct")

    def __init__(self, name: str, *fields: tuple[str, str]) -> None:
        self.name = name
        self.fields = fields
        self.struct = struct.Struct("<" + "".join(code for _, code in fields))
        self.size = self.struct.size

    def table(self) -> list[tuple[int, int, str]]:
        """(offset, bytes, field) of each field, in order."""
        rows = []
        offset = 0
        for field, code in self.fields:
            length = struct.calcsize("<" + code)
            rows.append((offset, length, field))
            offset += length
        return rows


def checksum(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """The checksum of every header, table, group and entry: xxh3_64 of `data`."""
    return xxhash.xxh3_64_intdigest(data, seed)


# ---- names of files --------------------------------------------------------------------------------------------------

STORE_MARKER_NAME: Final = "STORE"
LOCK_NAME: Final = "lock"
INDEX_NAME: Final = "index"
CONTAINERS_NAME: Final = "containers"
GROUPS_NAME: Final = "groups"
JOURNAL_NAME: Final = "journal"
READERS_NAME: Final = "readers"
QUARANTINE_NAME: Final = "quarantine"
POLICY_NAME: Final = "policy"

CONTAINER_SUFFIX: Final = ".rwc"
SEGMENT_SUFFIX: Final = ".rwj"
TEMPORARY_SUFFIX: Final = ".tmp"
"""What a file is called until it is complete and synced; left behind by a crash it is nothing and may be unlinked."""
_CONTAINER_DIGITS: Final = 16
_SEGMENT_DIGITS: Final = 20
_GENERATION_DIGITS: Final = 10
MANIFEST_NAME: Final = "MANIFEST"
RAW_GENERATION: Final = 0
"""The generation of a segment as ingest wrote it; a consolidated one has the number of the manifest that first named
it."""


def container_name(container: ContainerId) -> str:
    return f"{container:0{_CONTAINER_DIGITS}d}{CONTAINER_SUFFIX}"


def container_path(directory: Path, container: ContainerId) -> Path:
    return directory / container_name(container)


def container_named(name: str) -> ContainerId | None:
    """The container a file name stands for, None when it is no container's name."""
    number = number_named(name, CONTAINER_SUFFIX, _CONTAINER_DIGITS)
    return None if number is None else ContainerId(number)


def segment_name(first: Seq, generation: int = RAW_GENERATION) -> str:
    stem = f"{first:0{_SEGMENT_DIGITS}d}"
    return (
        f"{stem}{SEGMENT_SUFFIX}"
        if generation == RAW_GENERATION
        else f"{stem}.{generation:0{_GENERATION_DIGITS}d}{SEGMENT_SUFFIX}"
    )


def segment_path(directory: Path, first: Seq, generation: int = RAW_GENERATION) -> Path:
    return directory / segment_name(first, generation)


def segment_named(name: str) -> Seq | None:
    """The first seq of the raw journal segment a file name stands for, None when it is no such segment's name."""
    number = number_named(name, SEGMENT_SUFFIX, _SEGMENT_DIGITS)
    return None if number is None else Seq(number)


def consolidated_named(name: str) -> tuple[Seq, int] | None:
    """First seq and generation of the consolidated segment a file name stands for, None when it is none's."""
    first, _, rest = name.partition(".")
    generation = number_named(rest, SEGMENT_SUFFIX, _GENERATION_DIGITS)
    if generation is None or len(first) != _SEGMENT_DIGITS or not (first.isascii() and first.isdigit()):
        return None
    return Seq(int(first)), generation


def number_named(name: str, suffix: str, digits: int) -> int | None:
    """The number that so many decimal digits of a file name are, before its suffix; None when it is no such name."""
    stem = name.removesuffix(suffix)
    if stem == name or len(stem) != digits or not (stem.isascii() and stem.isdigit()):
        return None
    return int(stem)


# ---- addresses and blocks --------------------------------------------------------------------------------------------

SLOT_BITS: Final = 16
SLOT_MASK: Final = (1 << SLOT_BITS) - 1
SLOTS_MAX: Final = 16384
"""Slots of one container: 64 MiB of blocks."""
CONTAINER_MAX: Final = (1 << 48) - 1
FINGERPRINT_BYTES: Final = 16
ZERO_BLOCK: Final = bytes(BLOCK_BYTES)
ZERO_FINGERPRINT: Final = bytes(FINGERPRINT_BYTES)
"""Stands in journal entries beside the address HOLE, and in a raw container's table for a slot never filled."""


def fingerprint(block: bytes | bytearray | memoryview) -> bytes:
    """The 16 bytes that name a block's content: xxh3_128, big-endian digest."""
    return xxhash.xxh3_128_digest(block)


def address(container: ContainerId, slot: int) -> Address:
    return Address(container << SLOT_BITS | slot)


def container_of(where: Address) -> ContainerId:
    return ContainerId(where >> SLOT_BITS)


def slot_of(where: Address) -> int:
    return where & SLOT_MASK


def block_span(offset: int, length: int) -> tuple[int, int]:
    """(first block, blocks) that `length` bytes at `offset` touch; no blocks when `length` is 0."""
    first = offset // BLOCK_BYTES
    if length == 0:
        return first, 0
    return first, -(-(offset + length) // BLOCK_BYTES) - first


# ---- STORE marker ----------------------------------------------------------------------------------------------------

STORE_MAGIC: Final = b"rwSTORE\n"
STORE_MARKER: Final = Fields(
    "STORE marker",
    ("magic", "8s"),
    ("version", "H"),
    ("reserved", "H"),
    ("block_bytes", "I"),
    ("uuid", "16s"),
    ("created", "Q"),
    ("checksum", "Q"),
)


@dataclass(frozen=True, slots=True)
class StoreMarker:
    """What the STORE file says: the 16 bytes that name the store, and when it was made."""

    uuid: bytes
    created: TimeNs


def pack_store_marker(marker: StoreMarker) -> bytes:
    return checked(
        STORE_MARKER.struct.pack(STORE_MAGIC, FORMAT_VERSION, 0, BLOCK_BYTES, marker.uuid, marker.created, 0)
    )


def unpack_store_marker(data: bytes, path: Path) -> StoreMarker:
    """Raises NotAStore, UnknownFormat or Damaged; `path` is for their messages."""
    if data[: len(STORE_MAGIC)] != STORE_MAGIC:
        raise NotAStore(f"{path}: not a rewindfs store: no marker at its start")
    if len(data) < STORE_MARKER.size:
        raise Damaged(f"{path}: offset {len(data)}: the marker is cut short")
    _, _, _, block_bytes, uuid, created, _ = STORE_MARKER.struct.unpack_from(data)
    check_version(data, STORE_MARKER.size, path, "the marker")
    if block_bytes != BLOCK_BYTES:
        raise UnknownFormat(
            f"{path}: blocks of {block_bytes} bytes are not known here (only of {BLOCK_BYTES}); {USE_A_NEWER}"
        )
    return StoreMarker(uuid, TimeNs(created))


def checked(packed: bytes) -> bytes:
    """`packed` with its last 8 bytes replaced by the checksum of those before."""
    body = packed[:-CHECKSUM_BYTES]
    return body + struct.pack("<Q", checksum(body))


def know_version(version: int, path: Path) -> None:
    """UnknownFormat for a version of the format that this program does not know; `path` is for its message."""
    if version != FORMAT_VERSION:
        raise UnknownFormat(
            f"{path}: format version {version} is not known here (this is version {FORMAT_VERSION}); {USE_A_NEWER}"
        )


def check_version(data: bytes, end: int, path: Path, what: str) -> None:
    """UnknownFormat, Damaged: unless the first `end` bytes, that begin with a magic of 8 and the version and end with
    their checksum, are of this version, and whole. Damaged as well where nothing but the version is wrong."""
    ours = data[:_VERSION_OFFSET] + FORMAT_VERSION.to_bytes(2, "little") + data[_VERSION_OFFSET + 2 : end]
    version = int.from_bytes(data[_VERSION_OFFSET : _VERSION_OFFSET + 2], "little")
    if version != FORMAT_VERSION and checked(ours) == ours:
        raise Damaged(f"{path}: offset {_VERSION_OFFSET}: the version {version} of {what} does not match its checksum")
    know_version(version, path)
    check_header(data, 0, end, path, what)


USE_A_NEWER: Final = "use a newer version of rewindfs"
_VERSION_OFFSET: Final = 8


def check_header(data: bytes, start: int, end: int, path: Path, what: str) -> None:
    """Damaged unless the last of the bytes start..end are the checksum of the others; the rest is for its message."""
    stored = int.from_bytes(data[end - CHECKSUM_BYTES : end], "little")
    if checksum(data[start : end - CHECKSUM_BYTES]) != stored:
        raise Damaged(f"{path}: offset {start}: {what} does not match its checksum")


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return -(-length // 8) * 8


# ---- containers ------------------------------------------------------------------------------------------------------

CONTAINER_MAGIC: Final = b"rwCNTNR\n"
CONTAINER_HEADER: Final = Fields(
    "container header",
    ("magic", "8s"),
    ("version", "H"),
    ("form", "H"),
    ("journal", "H"),
    ("reserved", "H"),
    ("container", "Q"),
    ("created", "Q"),
    ("checksum", "Q"),
)
CONTAINER_PAGE_BYTES: Final = 4096
"""The header's page; the rest of it is zeros, or the sealed header."""

RAW_TABLE_OFFSET: Final = CONTAINER_PAGE_BYTES
RAW_TABLE_BYTES: Final = SLOTS_MAX * FINGERPRINT_BYTES
RAW_SLOTS_OFFSET: Final = RAW_TABLE_OFFSET + RAW_TABLE_BYTES


@dataclass(frozen=True, slots=True)
class ContainerHeader:
    container: ContainerId
    journal: JournalId
    form: ContainerForm
    created: TimeNs


def pack_container_header(header: ContainerHeader) -> bytes:
    return checked(
        CONTAINER_HEADER.struct.pack(
            CONTAINER_MAGIC,
            FORMAT_VERSION,
            header.form,
            header.journal,
            0,
            header.container,
            header.created,
            0,
        )
    )


def unpack_container_header(page: bytes, path: Path) -> ContainerHeader:
    """Raises Damaged or UnknownFormat; `path` is for their messages."""
    if len(page) < CONTAINER_HEADER.size:
        raise Damaged(f"{path}: offset {len(page)}: the container's header is cut short")
    magic, _, form, journal, _, container, created, _ = CONTAINER_HEADER.struct.unpack_from(page)
    if magic != CONTAINER_MAGIC:
        raise Damaged(f"{path}: offset 0: not a container")
    check_version(page, CONTAINER_HEADER.size, path, "the container's header")
    if form not in ContainerForm.__members__.values():
        raise UnknownFormat(f"{path}: container form {form} is not known here; {USE_A_NEWER}")
    return ContainerHeader(ContainerId(container), JournalId(journal), ContainerForm(form), TimeNs(created))


# ---- metadata journal ------------------------------------------------------------------------------------------------

SEGMENT_MAGIC: Final = b"rwJRNAL\n"
SEGMENT_HEADER: Final = Fields(
    "segment header",
    ("magic", "8s"),
    ("version", "H"),
    ("reserved", "H"),
    ("reserved_more", "I"),
    ("first_seq", "Q"),
    ("seed", "Q"),
    ("created", "Q"),
    ("checksum", "Q"),
)
SEGMENT_HEADER_BYTES: Final = SEGMENT_HEADER.size
SEGMENT_BYTES_MAX: Final = 8 << 20
"""A segment that has reached this takes no further entry: 80,000 writes, which one commit of a consolidation has to
index."""

ENTRY_HEADER: Final = Fields(
    "entry header",
    ("checksum", "Q"),
    ("length", "I"),
    ("kind", "B"),
    ("flags", "B"),
    ("journal", "H"),
    ("seq", "Q"),
    ("first_seq", "Q"),
    ("time", "Q"),
    ("run", "I"),
    ("extents", "I"),
)
ENTRY_HEADER_BYTES: Final = ENTRY_HEADER.size
ENTRY_BYTES_MAX: Final = 8 << 20
"""Largest entry, header and padding included: more than any record the protocol can carry needs."""
ENTRY_PADDING_MASK: Final = 7
"""The bits of `flags` that hold the number of padding bytes at the entry's end; the others are 0."""
EXTENT_HEADER: Final = Fields(
    "extent header",
    ("volume", "I"),
    ("reserved", "I"),
    ("offset", "Q"),
    ("length", "I"),
    ("blocks", "I"),
)
EXTENT_HEADER_BYTES: Final = EXTENT_HEADER.size
ADDRESS_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """`seed` is drawn at random for each segment: bytes left over from another file never pass for entries."""

    first_seq: Seq
    seed: int
    created: TimeNs


def pack_segment_header(header: SegmentHeader) -> bytes:
    return checked(
        SEGMENT_HEADER.struct.pack(
            SEGMENT_MAGIC, FORMAT_VERSION, 0, 0, header.first_seq, header.seed, header.created, 0
        )
    )


def unpack_segment_header(data: bytes, path: Path) -> SegmentHeader:
    """Raises Damaged or UnknownFormat; `path` is for their messages."""
    if len(data) < SEGMENT_HEADER.size:
        raise Damaged(f"{path}: offset {len(data)}: the segment's header is cut short")
    magic, _, _, _, first_seq, seed, created, _ = SEGMENT_HEADER.struct.unpack_from(data)
    if magic != SEGMENT_MAGIC:
        raise Damaged(f"{path}: offset 0: not a journal segment")
    check_version(data, SEGMENT_HEADER.size, path, "the segment's header")
    return SegmentHeader(Seq(first_seq), seed, TimeNs(created))


# ---- manifest of a group's journal -----------------------------------------------------------------------------------

MANIFEST_MAGIC: Final = b"rwMANIF\n"
MANIFEST_HEADER: Final = Fields(
    "manifest header",
    ("magic", "8s"),
    ("version", "H"),
    ("reserved", "H"),
    ("rows", "I"),
    ("number", "Q"),
)
MANIFEST_ROW: Final = Fields(
    "manifest row",
    ("first", "Q"),
    ("last", "Q"),
    ("generation", "Q"),
    ("window", "Q"),
    ("newest", "Q"),
    ("bytes", "Q"),
    ("journal", "H"),
    ("reserved", "H"),
    ("reserved_more", "I"),
)
MANIFEST_ROWS_MAX: Final = 1 << 20

# ---- pins of readers -------------------------------------------------------------------------------------------------

BARRIER_NAME: Final = "barrier"
PINS_SUFFIX: Final = ".pins"
PINS_MAGIC: Final = b"rwREADR\n"
PINS_HEADER: Final = Fields(
    "pins header",
    ("magic", "8s"),
    ("version", "H"),
    ("everything", "H"),
    ("reserved", "I"),
    ("checksum", "Q"),
)
PIN: Final = Fields("pin", ("seq", "Q"), ("group", "64s"), ("checksum", "Q"))
PINS_MAX: Final = 4096
"""Pins of one reader; one that needs more pins everything."""

# ---- index (LMDB): fingerprints --------------------------------------------------------------------------------------

FINGERPRINT_VALUE: Final = struct.Struct("<Q")
"""Value of the fingerprint index: the address. The key is the fingerprint, 16 bytes."""

# ---- index (LMDB): pointer maps and catalog --------------------------------------------------------------------------

LEAF_BLOCKS: Final = 512
"""Blocks of one leaf of a pointer map: 2 MiB of a volume."""

POINTER_KEY: Final = struct.Struct(">HIIQ")
"""Key of `pointers`: group, volume, leaf, seq of the checkpoint that wrote the version."""
POINTER_WHOLE: Final = 0
POINTER_DELTA: Final = 1
"""First byte of a pointer-map value. WHOLE: a zero byte, then POINTER_RUN runs that make up the leaf. DELTA: its
number on the whole leaf (u8), then n indexes (u16), then n addresses (u64)."""
POINTER_RUN: Final = (("count", "<u2"), ("address", "<u8"))
"""`count` blocks: holes if `address` is HOLE, else consecutive addresses from it."""

GROUP_KEY: Final = struct.Struct(">H")
"""Prefix of every other key of a group: its id in this index. Then: a name (`names`), 16 bytes of xxh3_128 of the path
(`paths`), the run (u32, `runs`)."""
ANCHOR_KEY: Final = struct.Struct(">HQ")
"""Key of `anchors` (group, seq) and of `gaps` (group, first refused seq)."""
TIME_KEY: Final = struct.Struct(">HIQQ")
"""Key of `times`: group, clock run, time, seq of a checkpoint; the value is empty."""
VOLUME_KEY: Final = struct.Struct(">HIQ")
"""Key of `volumes`: group, volume, seq of the checkpoint that wrote the state."""
