"""Which regions of the source may differ from the store, kept on the source's disk: the intent log.

Before the first write to a clean region (4 MiB) its mark is made durable here; after a crash the marked regions, and
only they, are reconciled. `RegionTracker` (region_tracker.py) decides when a mark may go.

Invariants:
- acknowledged-is-kept: `is_marked` is true only for a mark that is durable, and stays true until `clear`.
- Too many marks are always safe, one too few never is: clears are persisted lazily and may be lost.
- One frame is one sync: the last frame alone may be torn, and then none of its marks was acknowledged. What is bad
  anywhere else is damage.
- After a failed write or sync nothing is appended to that file again: the next sync writes a new one.
- bounded: memory and file hold at most one bit per region of the volumes that have marks, rounded up to pages.

The file (little-endian): a header, then frames. A frame holds flags and whole pages; the last version of a page wins.

    header  magic 8 | version u32 | 0 u32 | nonce u64 | checksum u64 of the 24 bytes before
    frame   magic 4 | pages u32 | flags u32 | 0 u32 | checksum u64 | pages x page
    page    volume u32 | index u32 | 512 bytes, bit i of byte j = region index * 4096 + j * 8 + i

A frame's checksum is xxh3_64 of its first 16 bytes and its pages, seeded by the nonce and the frame's offset.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import trio
from xxhash import xxh3_64_intdigest

from dedup.errors import Damaged, RewindError, UnknownFormat
from dedup.types import VolumeId
from replication.region_tracker import REGIONS_MAX, Region
from replication.region_tracker import RegionTracker as RegionTracker
from replication.region_tracker import regions_of as regions_of

MARK_AHEAD_REGIONS: Final = 16
"""How many regions past its own a sequential writer's mark covers."""

_RECENT_MARKS: Final = 32
_PAGE_REGIONS: Final = 4096
_PAGE_BYTES: Final = _PAGE_REGIONS // 8
_MAGIC: Final = b"RWINTENT"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQ")
_FRAME_MAGIC: Final = b"RWIF"
_FRAME: Final = struct.Struct("<4sIII")
_PAGE: Final = struct.Struct("<II")
_CHECKSUM: Final = struct.Struct("<Q")
_HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size
_FRAME_BYTES: Final = _FRAME.size + _CHECKSUM.size
_COMPACT_BYTES_MIN: Final = 1 << 20
_COMPACT_FACTOR: Final = 4
_FLAG_NAMESPACE: Final = 1
_FLAG_EVERYTHING: Final = 2
_FLAGS_KNOWN: Final = _FLAG_NAMESPACE | _FLAG_EVERYTHING

_PageKey = tuple[VolumeId, int]
_Pages = dict[_PageKey, bytearray]


class IntentLogFailed(RewindError):
    """A mark could not be made durable: the write that needs it must not go to the source."""


def _set_bits(pages: _Pages, volume: VolumeId, regions: range) -> None:
    for region in regions:
        page = pages.get((volume, region // _PAGE_REGIONS))
        if page is None:
            page = pages[volume, region // _PAGE_REGIONS] = bytearray(_PAGE_BYTES)
        page[region % _PAGE_REGIONS >> 3] |= 1 << (region & 7)


def _bits_of(page: bytearray, index: int) -> Iterator[Region]:
    for place, byte in enumerate(page):
        if byte:
            for bit in range(8):
                if byte >> bit & 1:
                    yield Region(index * _PAGE_REGIONS + place * 8 + bit)


def _page_keys(volume: VolumeId, regions: range) -> Iterator[_PageKey]:
    for index in range(regions.start // _PAGE_REGIONS, (regions.stop - 1) // _PAGE_REGIONS + 1):
        yield volume, index


def _encode_header(nonce: int) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, 0, nonce)
    return head + _CHECKSUM.pack(xxh3_64_intdigest(head))


def _encode_frame(pages: _Pages, flags: int, nonce: int, offset: int) -> bytes:
    head = _FRAME.pack(_FRAME_MAGIC, len(pages), flags, 0)
    body = b"".join(_PAGE.pack(*key) + bits for key, bits in pages.items())
    checksum = xxh3_64_intdigest(head + body, seed=nonce ^ offset)
    return b"".join((head, _CHECKSUM.pack(checksum), body))


def _decode_frame(data: memoryview, nonce: int, offset: int) -> tuple[int, int] | None:
    """(flags, offset of the frame after it) of the valid frame at `offset`; None where there is none."""
    if len(data) < offset + _FRAME_BYTES:
        return None
    magic, pages, flags, _ = _FRAME.unpack_from(data, offset)
    end = offset + _FRAME_BYTES + pages * (_PAGE.size + _PAGE_BYTES)
    if magic != _FRAME_MAGIC or end > len(data):
        return None
    (checksum,) = _CHECKSUM.unpack_from(data, offset + _FRAME.size)
    content = bytes(data[offset : offset + _FRAME.size]) + bytes(data[offset + _FRAME_BYTES : end])
    return (flags, end) if xxh3_64_intdigest(content, seed=nonce ^ offset) == checksum else None


def _decode(path: Path, content: bytes) -> tuple[_Pages, int]:
    """Pages and flags of a log file's content. A torn last frame is left out.

    Raises Damaged, UnknownFormat.
    """
    data = memoryview(content)
    if len(content) < _HEADER_BYTES or content[:8] != _MAGIC:
        raise Damaged(f"{path}: no intent log header; every volume must be reconciled")
    _, version, _, nonce = _HEADER.unpack_from(content)
    if xxh3_64_intdigest(content[: _HEADER.size]) != _CHECKSUM.unpack_from(content, _HEADER.size)[0]:
        raise Damaged(f"{path}: header does not match its checksum; every volume must be reconciled")
    if version != _VERSION:
        raise UnknownFormat(f"{path}: intent log of format {version}, this version knows {_VERSION}; use a newer one")
    pages: _Pages = {}
    offset, flags = _HEADER_BYTES, 0
    while frame := _decode_frame(data, nonce, offset):
        flags, end = frame
        if flags & ~_FLAGS_KNOWN:
            raise UnknownFormat(f"{path}: unknown flags {flags:#x} at offset {offset}; use a newer version")
        for place in range(offset + _FRAME_BYTES, end, _PAGE.size + _PAGE_BYTES):
            volume, index = _PAGE.unpack_from(data, place)
            if volume < 1 or index >= REGIONS_MAX // _PAGE_REGIONS:
                raise Damaged(f"{path}: bad page at offset {place}; every volume must be reconciled")
            bits = content[place + _PAGE.size : place + _PAGE.size + _PAGE_BYTES]
            pages[VolumeId(volume), index] = bytearray(bits)
        offset = end
    if offset == _HEADER_BYTES or _valid_frame_after(content, nonce, offset):
        raise Damaged(f"{path}: bad frame at offset {offset}; every volume must be reconciled")
    return {key: bits for key, bits in pages.items() if any(bits)}, flags


def _valid_frame_after(content: bytes, nonce: int, offset: int) -> bool:
    """Whether a frame was written past the bad one at `offset`, which then had been synced: damage, not a torn end."""
    place = content.find(_FRAME_MAGIC, offset + 1)
    while place >= 0:
        if _decode_frame(memoryview(content), nonce, place):
            return True
        place = content.find(_FRAME_MAGIC, place + 1)
    return False


@dataclass(slots=True)
class _Round:
    """Marks that share one sync."""

    marks: list[tuple[VolumeId, range]] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    error: OSError | None = None


class IntentLog:
    """The marks of one source, in one file. Methods are called from one trio task tree; none blocks the loop.

    `everything` says that a reconcile of all volumes is owed whatever the marks say; it survives restarts.
    """

    def __init__(self, path: Path, pages: _Pages, flags: int) -> None:
        self._path = path
        self._pages = pages
        self._dirty: set[_PageKey] = set()
        self._recent: deque[tuple[VolumeId, int]] = deque(maxlen=_RECENT_MARKS)
        self._next = _Round()
        self._running: _Round | None = None
        self._namespace_changes = 0
        self._flags_wanted = self._flags_durable = flags
        self._found_namespace = bool(flags & _FLAG_NAMESPACE)
        self._fd = -1
        self._nonce = 0
        self._end = 0
        self._suspect = False
        self._closed = False
        self._write_new(dict(pages), flags)
        self.syncs = 0
        """How often marks were synced since it was opened."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """The log at `path`, made if absent. Blocks (it writes and syncs a file): call it in a thread or at start.

        Raises Damaged when acknowledged marks may be lost: the caller then uses `open_damaged`; UnknownFormat; OSError.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return cls(path, {}, 0)
        return cls(path, *_decode(path, content))

    @classmethod
    def open_damaged(cls, path: Path) -> Self:
        """A new log in place of a damaged one, with `everything` and the namespace flag set, durably."""
        return cls(path, {}, _FLAG_EVERYTHING | _FLAG_NAMESPACE)

    @property
    def everything(self) -> bool:
        """A reconcile of every volume is owed. Says nothing about `is_marked`, which stays exact."""
        return bool(self._flags_wanted & _FLAG_EVERYTHING)

    @property
    def found_namespace(self) -> bool:
        """When it was opened, a namespace change or resize had been under way: compare the listings."""
        return self._found_namespace

    def is_marked(self, volume: VolumeId, region: int) -> bool:
        """Whether this region's mark is durable. O(1), no IO."""
        page = self._pages.get((volume, region // _PAGE_REGIONS))
        return page is not None and bool(page[region % _PAGE_REGIONS >> 3] >> (region & 7) & 1)

    def marked(self) -> dict[VolumeId, list[Region]]:
        """All durable marks, sorted; volumes without marks are left out. A copy."""
        found: dict[VolumeId, list[Region]] = {}
        for (volume, index), page in sorted(self._pages.items()):
            if regions := list(_bits_of(page, index)):
                found.setdefault(volume, []).extend(regions)
        return found

    async def mark(self, volume: VolumeId, first_region: int, last_region: int) -> range:
        """Return when regions first..last, both included, are durably marked; at once if they are.

        Returns the regions marked: past last_region too, where the writer looks sequential. Marks that wait at the same
        time share one sync. Cancelled: the mark may become durable or not, `is_marked` tells; a caller that leads
        the shared sync leaves after it. Raises IntentLogFailed: none of the regions is claimed.
        """
        wanted = range(first_region, last_region + 1)
        if wanted.start < 0 or wanted.stop > REGIONS_MAX or not wanted:
            raise ValueError(f"regions {first_region}..{last_region} of volume {volume}")
        sequential = (volume, first_region - 1) in self._recent
        if self._all_marked(volume, wanted):
            await trio.lowlevel.checkpoint()
            return wanted
        if sequential:
            wanted = range(first_region, min(REGIONS_MAX, last_region + 1 + MARK_AHEAD_REGIONS))
        self._recent.append((volume, wanted.stop - 1))
        await self._join([(volume, wanted)])
        return wanted

    async def mark_ranges(self, ranges: Iterable[tuple[VolumeId, range]]) -> None:
        """Return when all these regions are durably marked, with one sync. Raises IntentLogFailed."""
        missing = [(volume, regions) for volume, regions in ranges if not self._all_marked(volume, regions)]
        if missing:
            await self._join(missing)
        else:
            await trio.lowlevel.checkpoint()

    def clear(self, regions: Iterable[tuple[VolumeId, int]]) -> None:
        """These regions are equal at source and store. Counts at once, reaches the disk with a later sync."""
        for volume, region in regions:
            key = (volume, region // _PAGE_REGIONS)
            if (page := self._pages.get(key)) is not None:
                page[region % _PAGE_REGIONS >> 3] &= ~(1 << (region & 7))
                self._dirty.add(key)
                if not any(page):
                    del self._pages[key]

    def volumes_gone(self, volume: VolumeId) -> None:
        """The volume was retired: its marks are worth nothing. Lazy like `clear`."""
        for key in [key for key in self._pages if key[0] == volume]:
            del self._pages[key]
            self._dirty.add(key)

    async def namespace_begin(self) -> None:
        """Return when the namespace flag is durable; call it before the source's names or sizes change.

        Nests. No sync where the flag is still set on disk. Cancelled or IntentLogFailed: it did not begin.
        """
        self._namespace_changes += 1
        try:
            await self._set_flag(_FLAG_NAMESPACE)
        except BaseException:
            self.namespace_end()
            raise

    def namespace_end(self) -> None:
        """One change's record is durable at the second appliance and the source has it: the flag of the last one falls.

        Lazy like `clear`: the flag found set without need costs a comparison of listings.
        """
        if self._namespace_changes <= 0:
            raise RuntimeError("namespace_end without namespace_begin")
        self._namespace_changes -= 1
        self._settle_namespace()

    def namespace_compared(self) -> None:
        """The listings were compared and what differed was sent: what was found set at the start is settled. Lazy."""
        self._found_namespace = False
        self._settle_namespace()

    async def mark_everything(self) -> None:
        """Return when `everything` is durable. Raises IntentLogFailed."""
        await self._set_flag(_FLAG_EVERYTHING)

    def clear_everything(self) -> None:
        """Every volume was reconciled since `mark_everything`. Marks of single regions stay. Lazy."""
        self._flags_wanted &= ~_FLAG_EVERYTHING

    async def flush(self) -> None:
        """Return when all clears so far are on disk too: for a clean end, and now and then. Raises IntentLogFailed."""
        if self._dirty or self._flags_wanted != self._flags_durable or self._running or self._suspect:
            await self._join([])
        else:
            await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Flush and close the file. Raises IntentLogFailed; the file is closed anyway."""
        try:
            await self.flush()
        finally:
            if self._running is not None:
                with trio.CancelScope(shield=True):
                    await self._running.done.wait()
            self._closed = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _all_marked(self, volume: VolumeId, regions: range) -> bool:
        return all(self.is_marked(volume, region) for region in regions)

    def _settle_namespace(self) -> None:
        if not self._namespace_changes and not self._found_namespace:
            self._flags_wanted &= ~_FLAG_NAMESPACE

    async def _set_flag(self, flag: int) -> None:
        self._flags_wanted |= flag
        # Durable before is not enough: a round under way, or one that failed, may have cleared it.
        if self._flags_durable & flag and self._running is None and not self._suspect:
            await trio.lowlevel.checkpoint()
        else:
            await self._join([])

    async def _join(self, marks: list[tuple[VolumeId, range]]) -> None:
        """Wait for the round that has not begun, leading it when no other round is under way."""
        mine = self._next
        mine.marks.extend(marks)
        while not mine.done.is_set():
            if self._closed:
                raise IntentLogFailed(f"{self._path}: the intent log is closed")
            if self._running is not None:
                await self._running.done.wait()
            else:
                # Shielded: a leader cancelled halfway must not leave a round that the others wait for.
                with trio.CancelScope(shield=True):
                    await self._lead()
        if mine.error is not None:
            raise IntentLogFailed(f"{self._path}: cannot mark: {mine.error.strerror or mine.error}") from mine.error

    async def _lead(self) -> None:
        turn = self._running = self._next
        self._next = _Round()
        flags, dirty = self._flags_wanted, self._dirty
        self._dirty = set()
        keys = dirty.union(key for volume, regions in turn.marks for key in _page_keys(volume, regions))
        full = self._suspect or self._end + len(keys) * (_PAGE.size + _PAGE_BYTES) > self._compact_bytes()
        images = {key: bytearray(self._pages.get(key, bytes(_PAGE_BYTES))) for key in keys}
        for volume, regions in turn.marks:
            _set_bits(images, volume, regions)
        if full:
            images = {key: bits for key, bits in ({**self._pages, **images}).items() if any(bits)}
            images = {key: bytearray(bits) for key, bits in images.items()}
        try:
            await trio.to_thread.run_sync(self._write_new if full else self._append, images, flags)
        except OSError as error:
            turn.error = error
            self._suspect = True
            self._dirty |= keys
        else:
            self._suspect = False
            self._flags_durable = flags
            self.syncs += 1
            for volume, regions in turn.marks:
                _set_bits(self._pages, volume, regions)
        finally:
            self._running = None
            turn.done.set()

    def _compact_bytes(self) -> int:
        live = _HEADER_BYTES + _FRAME_BYTES + len(self._pages) * (_PAGE.size + _PAGE_BYTES)
        return max(_COMPACT_BYTES_MIN, _COMPACT_FACTOR * live)

    def _append(self, pages: _Pages, flags: int) -> None:
        """Write one frame and sync it. Runs in a thread, never two at once."""
        frame = _encode_frame(pages, flags, self._nonce, self._end)
        _write_all(self._fd, frame, self._end)
        os.fdatasync(self._fd)
        self._end += len(frame)

    def _write_new(self, pages: _Pages, flags: int) -> None:
        """Write a new file and put it in place of the old one. The rename is the commit point; then the directory."""
        nonce = secrets.randbits(63)
        content = _encode_header(nonce)
        content += _encode_frame(pages, flags, nonce, len(content))
        new = self._path.with_name(self._path.name + ".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, content, 0)
            os.fsync(fd)
            os.rename(new, self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._nonce, self._end = fd, nonce, len(content)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
