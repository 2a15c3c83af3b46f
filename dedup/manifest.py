"""The manifest of a group's journal: which consolidated segments stand for its beginning.

What it names comes first, in its order; after that come the raw segments behind `last`. Without one, nothing was
consolidated yet. To replace it is the sole commit of a consolidation.

Invariants:
- rows follow each other without a hole, from seq 1 on;
- every file that a manifest names is complete and durable before the manifest is;
- `number` grows by one with each manifest; a file's `generation` is the number of the first manifest that named it, so
  no two files of a group's life have one name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dedup.errors import Damaged
from dedup.layout import (
    CHECKSUM_BYTES,
    FORMAT_VERSION,
    MANIFEST_HEADER,
    MANIFEST_MAGIC,
    MANIFEST_NAME,
    MANIFEST_ROW,
    MANIFEST_ROWS_MAX,
    TEMPORARY_SUFFIX,
    check_version,
    checksum,
    know_version,
)
from dedup.storage import Storage
from dedup.types import JournalId, Seq, TimeNs


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """A consolidated segment: seqs first..last, one recovery point per `window_ns` (0: each that there was).

    One of generation 0 is a raw segment that was left as it was between others.

    `journal` is the data journal that its records were routed to, `newest` the time of its last one; `bytes` is the
    size of its file.
    """

    first: Seq
    last: Seq
    generation: int
    window_ns: int
    newest: TimeNs
    bytes: int
    journal: JournalId


@dataclass(frozen=True, slots=True)
class Manifest:
    """The consolidated part of a journal."""

    number: int = 0
    rows: tuple[SegmentRow, ...] = ()

    @property
    def last(self) -> Seq:
        """The last seq that it stands for, 0 for none."""
        return self.rows[-1].last if self.rows else Seq(0)


_KNOWN_MAX = 16
_known: dict[Path, tuple[bytes, Manifest]] = {}
"""The manifests read last, each with its file's digest: who finds a moment does not pay for every row anew."""


def pack_manifest(manifest: Manifest) -> bytes:
    """Its bytes. ValueError for one that is not well made."""
    if (fault := _fault(manifest)) is not None:
        raise ValueError(f"manifest {manifest.number} is not well made: {fault}")
    parts = [MANIFEST_HEADER.struct.pack(MANIFEST_MAGIC, FORMAT_VERSION, 0, len(manifest.rows), manifest.number)]
    for row in manifest.rows:
        parts.append(
            MANIFEST_ROW.struct.pack(
                row.first, row.last, row.generation, row.window_ns, row.newest, row.bytes, row.journal, 0, 0
            )
        )
    body = b"".join(parts)
    return body + checksum(body).to_bytes(CHECKSUM_BYTES, "little")


def unpack_manifest(data: bytes, path: Path) -> Manifest:
    """Inverse of `pack_manifest`. Damaged, UnknownFormat; `path` is for their messages."""
    _, rows, number = _header(data, path)
    check_version(data, len(data), path, "the manifest")
    body = data[:-CHECKSUM_BYTES]
    if len(body) != MANIFEST_HEADER.size + rows * MANIFEST_ROW.size:
        raise Damaged(f"{path}: offset 0: the manifest does not match its checksum")
    manifest = Manifest(number, tuple(_rows(body)))
    if (fault := _fault(manifest)) is not None:
        raise Damaged(f"{path}: offset 0: {fault}")
    return manifest


def _header(data: bytes, path: Path) -> tuple[int, int, int]:
    """Of which version, how many rows, and the number."""
    if len(data) < MANIFEST_HEADER.size:
        raise Damaged(f"{path}: offset {len(data)}: the manifest is cut short")
    magic, version, _, rows, number = MANIFEST_HEADER.struct.unpack_from(data)
    if magic != MANIFEST_MAGIC:
        raise Damaged(f"{path}: offset 0: not a manifest")
    return version, rows, number


def _rows(body: bytes) -> Iterable[SegmentRow]:
    for row in MANIFEST_ROW.struct.iter_unpack(body[MANIFEST_HEADER.size :]):
        first, last, generation, window_ns, newest, size, journal, _, _ = row
        yield SegmentRow(Seq(first), Seq(last), generation, window_ns, TimeNs(newest), size, JournalId(journal))


def _fault(manifest: Manifest) -> str | None:
    follows = 1
    if len(manifest.rows) > MANIFEST_ROWS_MAX:
        return f"{len(manifest.rows)} rows are more than {MANIFEST_ROWS_MAX}"
    for row in manifest.rows:
        if row.first != follows or row.last < row.first:
            return f"its row of seq {row.first}..{row.last} does not follow seq {follows - 1}"
        if not 0 <= row.generation <= manifest.number:
            return f"its row of seq {row.first} has generation {row.generation}"
        follows = row.last + 1
    return None


def read_manifest(storage: Storage, directory: Path) -> Manifest:
    """The manifest of the journal in `directory`; without a file, an empty one. Damaged, UnknownFormat."""
    path = directory / MANIFEST_NAME
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Manifest()
    try:
        size = min(storage.size(fd), MANIFEST_HEADER.size + MANIFEST_ROWS_MAX * MANIFEST_ROW.size + CHECKSUM_BYTES)
        data = storage.pread(fd, size, 0)
    finally:
        storage.close(fd)
    digest = xxhash.xxh3_128_digest(data)
    known = _known.get(path)
    if known is None or known[0] != digest:
        if len(_known) >= _KNOWN_MAX:
            _known.clear()
        known = _known[path] = digest, unpack_manifest(data, path)
    return known[1]


def read_number(storage: Storage, directory: Path) -> int:
    """The number of the journal's manifest, 0 without one, at a price that does not depend on its rows.

    Tells whether it was replaced, no more: nothing else of it is looked at. Damaged, UnknownFormat.
    """
    path = directory / MANIFEST_NAME
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        header = storage.pread(fd, MANIFEST_HEADER.size, 0)
    finally:
        storage.close(fd)
    version, _, number = _header(header, path)
    know_version(version, path)
    return number


def write_manifest(storage: Storage, directory: Path, manifest: Manifest) -> None:
    """Replaces the manifest, durably: after a crash the old one or this one is there. StoreFull, StoreFailed."""
    path = directory / MANIFEST_NAME
    temporary = directory / (MANIFEST_NAME + TEMPORARY_SUFFIX)
    packed = pack_manifest(manifest)
    fd = storage.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        storage.pwritev(fd, [packed], 0)
        storage.datasync(fd)
    finally:
        storage.close(fd)
    storage.replace(temporary, path)
