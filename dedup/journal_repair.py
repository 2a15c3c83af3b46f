"""The repairs of a group's journal: a manifest that was lost, and, when asked for, a history that ends at its damage.

Invariants:
- whatever is cut off or replaced is in quarantine before;
- the journal is without a hole at any instant: the last segment goes first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dedup.errors import Damaged
from dedup.journal_reader import JournalPosition, SegmentFile, scan_segment, segments
from dedup.layout import (
    MANIFEST_NAME,
    RAW_GENERATION,
    SEGMENT_HEADER_BYTES,
    TEMPORARY_SUFFIX,
    consolidated_named,
    segment_path,
)
from dedup.manifest import Manifest, SegmentRow, read_manifest, write_manifest
from dedup.quarantine import Quarantine
from dedup.storage import Storage
from dedup.types import JournalId, Seq, TimeNs

Done = tuple[str, Path]


# -- the manifest ------------------------------------------------------------------------------------------------------


def restore_manifest(storage: Storage, directory: Path, quarantine: Quarantine) -> str | None:
    """Makes a lost or damaged manifest anew, where the segments leave no doubt. What was done, None: nothing.

    UnknownFormat.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest: Manifest | None = read_manifest(storage, directory)
        there = set(_consolidated(storage, directory))
        named = {SegmentFile(row.first, row.generation) for row in manifest.rows} if manifest is not None else set()
        if named <= there and (named or not there):
            return None
        why = "it names segments that are not there" if named else "segments are there that only a manifest can name"
    except Damaged as error:
        why = str(error)
    manifest = _manifest_of(storage, directory)
    if manifest is None:
        return None  # `verify` names what is missing
    if storage.exists(path):
        quarantine.keep(path, why)
    if manifest.rows:
        write_manifest(storage, directory, manifest)
    elif storage.exists(path):
        storage.unlink(path)
        storage.sync_directory(directory)
    else:
        return None
    return f"the manifest was made anew from {len(manifest.rows)} consolidated segments: {why}"


def _consolidated(storage: Storage, directory: Path) -> list[SegmentFile]:
    found = (consolidated_named(name) for name in storage.listdir(directory))
    return [SegmentFile(*one) for one in found if one is not None]


def _manifest_of(storage: Storage, directory: Path) -> Manifest | None:
    """A chain of whole segments from seq 1 on: consolidated ones, the newest where several are of one stretch, then raw
    ones up to the last. None where there is no such chain."""
    ends = _raw_ends(storage, directory)
    if 1 in ends:
        return Manifest()  # nothing was consolidated yet, or not all of it was committed
    rows: dict[Seq, list[SegmentRow]] = {}
    newest = 0
    for segment in sorted(_consolidated(storage, directory), key=lambda one: -one.generation):
        newest = max(newest, segment.generation)
        row = _row_of(storage, directory, segment)
        if row is not None:
            rows.setdefault(row.first, []).append(row)
    found = _chained(rows, Seq(1), ends)
    return None if found is None else Manifest(newest + 1, tuple(found))


def _raw_ends(storage: Storage, directory: Path) -> set[Seq]:
    """The raw segments from each of which on the raw ones follow each other to the last."""
    ends: set[Seq] = set()
    following: Seq | None = None
    for first in reversed(segments(storage, directory)):
        if following is not None:
            row = _row_of(storage, directory, SegmentFile(first))
            if row is None or row.last + 1 != following:
                break
        ends.add(first)
        following = first
    return ends


def _chained(rows: dict[Seq, list[SegmentRow]], first: Seq, ends: set[Seq]) -> list[SegmentRow] | None:
    """Depth first without recursion: a chain that meets one of `ends`."""
    paths: list[tuple[SegmentRow, ...]] = [(row,) for row in reversed(rows.get(first, []))]
    dead: set[Seq] = set()
    while paths:
        path = paths.pop()
        following = Seq(path[-1].last + 1)
        if following in ends:
            return list(path)
        if following not in dead:
            dead.add(following)
            paths += [(*path, row) for row in reversed(rows.get(following, []))]
    return None


def _row_of(storage: Storage, directory: Path, segment: SegmentFile) -> SegmentRow | None:
    """What the manifest would say of a consolidated segment; None when it is not whole."""
    journals: Counter[JournalId] = Counter()
    last, newest = Seq(segment.first - 1), TimeNs(0)
    size = storage.file_bytes(segment.path(directory))
    try:
        for scanned in scan_segment(storage, directory, segment):
            journals[scanned.journal] += 1
            last, newest = scanned.seq, max(newest, scanned.time)
    except Damaged:
        return None
    if last < segment.first:
        return None
    # Its window is not known any more: 0 stands for every point there was, so the next plan looks at it again.
    return SegmentRow(segment.first, last, segment.generation, 0, newest, size, journals.most_common(1)[0][0])


# -- the end of history ------------------------------------------------------------------------------------------------


def cut_journal(storage: Storage, directory: Path, end: JournalPosition, quarantine: Quarantine) -> Iterator[Done]:
    """Ends the journal at `end`, which is between two entries. Everything behind it goes to quarantine; durable.

    Gives each step once it is done. The index does not fit any more after it.
    """
    why = f"the journal was cut at seq {end.segment}'s segment, offset {end.offset}: what follows is damaged"
    manifest = _readable_manifest(storage, directory)
    for first in reversed([first for first in segments(storage, directory) if first > max(end.segment, manifest.last)]):
        path = segment_path(directory, first)
        yield f"history was cut off; it is now {quarantine.move(path, why).name} there", path
    if end.generation != RAW_GENERATION:
        yield from _cut_consolidated(storage, directory, end, manifest, quarantine, why)
        return
    path = segment_path(directory, end.segment)
    if not storage.exists(path):
        return
    if end.offset <= SEGMENT_HEADER_BYTES:
        # Not one entry of it can be kept; what is before it is where the journal goes on.
        yield f"history was cut off; it is now {quarantine.move(path, why).name} there", path
        return
    fd = storage.open(path, os.O_RDWR)
    try:
        if storage.size(fd) > end.offset:
            kept = quarantine.keep_copy(path, why)
            storage.truncate(fd, end.offset)
            storage.datasync(fd)
            yield f"history was cut off at offset {end.offset}; what there was is {kept.name} there", path
    finally:
        storage.close(fd)


def _readable_manifest(storage: Storage, directory: Path) -> Manifest:
    try:
        return read_manifest(storage, directory)
    except Damaged:
        return Manifest()


def _cut_consolidated(
    storage: Storage, directory: Path, end: JournalPosition, manifest: Manifest, quarantine: Quarantine, why: str
) -> Iterator[Done]:
    """What is whole of a consolidated segment becomes a raw one, the last; the manifest names those before."""
    source = SegmentFile(end.segment, end.generation)
    rows = tuple(row for row in manifest.rows if row.last < end.segment)
    if end.offset > SEGMENT_HEADER_BYTES:
        raw = segment_path(directory, end.segment)
        temporary = raw.with_name(raw.name + TEMPORARY_SUFFIX)
        _copy_head(storage, source.path(directory), temporary, end.offset)
        storage.replace(temporary, raw)
    before = [(row.first, row.generation) for row in manifest.rows[len(rows) :]]
    quarantine.keep(directory / MANIFEST_NAME, why)
    write_manifest(storage, directory, replace(manifest, number=manifest.number + 1, rows=rows))
    yield f"history was cut off at seq {end.segment}'s segment, offset {end.offset}", directory / MANIFEST_NAME
    for first, generation in reversed(before):
        path = segment_path(directory, first, generation)
        if storage.exists(path):
            yield f"history was cut off; it is now {quarantine.move(path, why).name} there", path


def _copy_head(storage: Storage, source: Path, target: Path, length: int) -> None:
    read = storage.open(source, os.O_RDONLY)
    try:
        write = storage.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            for at in range(0, length, _COPY_BYTES):
                storage.pwritev(write, [storage.pread(read, min(_COPY_BYTES, length - at), at)], at)
            storage.datasync(write)
        finally:
            storage.close(write)
    finally:
        storage.close(read)


_COPY_BYTES = 1 << 20
