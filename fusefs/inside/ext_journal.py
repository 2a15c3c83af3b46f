"""What the journal of an ext3 or ext4 holds and its file system does not yet: what the kernel would replay.

As the kernel's recovery does it: transactions count from the journal's start up to the first that is not complete; a
block is what the last of them wrote, unless it was revoked by that or a later one. Nothing is written and no block is
kept: the result says where in the journal the newer bytes are.

    journal superblock, descriptor (tags) block…, revoke, commit, descriptor block…, commit, …

Invariant: whatever the journal holds, the scan ends after as many blocks as it has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from dissect.util.hash import crc32c

from fusefs.inside.filesystem import Corrupt, Unsupported

MAGIC: Final = b"\xc0\x3b\x39\x98"
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_V1, _SUPERBLOCK_V2, _REVOKE = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST_TAG = 1, 2, 8
_COMPAT_CHECKSUM: Final = 0x1
_REVOKES, _BITS64, _ASYNC_COMMIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
_KNOWN: Final = _REVOKES | _BITS64 | _ASYNC_COMMIT | _CSUM_V2 | _CSUM_V3
_TAIL_BYTES: Final = 4
BLOCKS_MAX: Final = 1 << 20
"""Of a journal: 4 GiB of 4 KiB blocks, four times the largest that mkfs makes."""


@dataclass(frozen=True, slots=True)
class NewerBlock:
    """Block `place` of the journal holds a block's newer bytes; `escaped` if its first four were replaced."""

    place: int
    escaped: bool
    checksum: int


@dataclass(slots=True)
class _Transaction:
    sequence: int
    blocks: dict[int, NewerBlock] = field(default_factory=dict)
    revoked: set[int] = field(default_factory=set)


class Journal:
    """Of one file system, found inside it."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, block_bytes: int, last_block: int) -> None:
        """`read` gives the bytes offset..offset+length of the journal's file of `size` bytes.

        `block_bytes` and `last_block` are of the file system. Corrupt, Unsupported.
        """
        self._read = read
        self._block_bytes = block_bytes
        self._last_block = last_block
        header = read(0, 1024)
        magic, kind, _, self._bytes, self._end, self._first, self._sequence, self._start = struct.unpack_from(
            ">4s7I", header
        )
        if magic != MAGIC or kind not in (_SUPERBLOCK_V1, _SUPERBLOCK_V2):
            raise Corrupt("its journal has no superblock")
        compat, incompat = struct.unpack_from(">2I", header, 36) if kind == _SUPERBLOCK_V2 else (0, 0)
        if incompat & ~_KNOWN or compat & _COMPAT_CHECKSUM:
            what = "fast commits" if incompat & _FAST_COMMIT else "features that are not known here"
            raise Unsupported(f"its journal was not replayed and has {what}")
        if self._bytes != block_bytes or not 0 < self._first < self._end <= min(BLOCKS_MAX, size // block_bytes):
            raise Corrupt("its journal has impossible limits")
        if self._start and not self._first <= self._start < self._end:
            raise Corrupt("its journal starts outside of itself")
        self._wide = bool(incompat & _BITS64)
        self._v3 = bool(incompat & _CSUM_V3)
        self._checked = self._v3 or bool(incompat & _CSUM_V2)
        self._seed = _crc(0xFFFFFFFF, header[48:64])
        if self._checked and _crc(0xFFFFFFFF, _zeroed(header, 252)) != int.from_bytes(header[252:256]):
            raise Corrupt("its journal's superblock does not match its checksum")

    def newer_blocks(self) -> dict[int, NewerBlock]:
        """Block of the file system → its newer bytes, each checked against its checksum. Corrupt."""
        transactions = list(self._committed())
        revoked: dict[int, int] = {}
        for index, transaction in enumerate(transactions):
            revoked.update(dict.fromkeys(transaction.revoked, index))
        newer: dict[int, tuple[NewerBlock, int]] = {}
        for index, transaction in enumerate(transactions):
            for number, block in transaction.blocks.items():
                if index > revoked.get(number, -1):
                    newer[number] = block, transaction.sequence
        for number, (block, sequence) in newer.items():
            if number > self._last_block:
                raise Corrupt(f"its journal holds a block {number}, which the file system has not")
            self._check_data(block, sequence)
        return {number: block for number, (block, _) in newer.items()}

    def bytes_of(self, block: NewerBlock) -> bytes:
        """What the file system's block would hold."""
        data = self._block(block.place)
        return MAGIC + data[4:] if block.escaped else data

    def _block(self, place: int) -> bytes:
        return self._read(place * self._block_bytes, self._block_bytes)

    def _committed(self) -> Iterator[_Transaction]:
        """The complete transactions, in order."""
        place, left = self._start, self._end - self._first
        transaction = _Transaction(self._sequence)
        last_commit, doubtful = 0, False
        while place and left > 0:
            block = self._block(place)
            magic, kind, sequence = struct.unpack_from(">4s2I", block)
            if magic != MAGIC or sequence != transaction.sequence:
                return
            place, left = self._after(place), left - 1
            if kind == _DESCRIPTOR:
                doubtful |= not self._tail_fits(block)
                for number, escaped, checksum in self._tags(block):
                    transaction.blocks[number] = NewerBlock(place, escaped, checksum)
                    place, left = self._after(place), left - 1
            elif kind == _REVOKE:
                doubtful |= not self._tail_fits(block)
                if not doubtful:
                    transaction.revoked.update(self._revokes(block))
            elif kind == _COMMIT:
                # Blocks that do not fit their checksum are left from before the journal was last made, or damaged.
                commit = int.from_bytes(block[48:56])
                if doubtful and commit >= last_commit:
                    raise Corrupt(f"its journal's transaction {sequence} does not match its checksum")
                if doubtful or (self._checked and not self._commit_fits(block)):
                    return
                yield transaction
                last_commit = commit
                transaction = _Transaction((sequence + 1) & 0xFFFFFFFF)
            else:
                return

    def _after(self, place: int) -> int:
        return place + 1 if place + 1 < self._end else self._first

    def _tags(self, block: bytes) -> Iterator[tuple[int, bool, int]]:
        """Number, whether escaped, checksum of each block that follows a descriptor."""
        tag_bytes = 16 if self._v3 else 8 + (2 if self._checked else 0) + (4 if self._wide else 0)
        at, end = 12, len(block) - (_TAIL_BYTES if self._checked else 0)
        while at + tag_bytes <= end:
            number, checksum, flags = struct.unpack_from(">IHH", block, at)
            if self._v3:
                checksum = int.from_bytes(block[at + 12 : at + 16])
            if self._wide:
                number |= int.from_bytes(block[at + 8 : at + 12]) << 32
            yield number, bool(flags & _ESCAPED), checksum
            if flags & _LAST_TAG:
                return
            at += tag_bytes + (0 if flags & _SAME_UUID else 16)

    def _revokes(self, block: bytes) -> Iterator[int]:
        end, size = int.from_bytes(block[12:16]), 8 if self._wide else 4
        if end > len(block) - (_TAIL_BYTES if self._checked else 0):
            raise Corrupt("its journal has a revoke block that is too long")
        for at in range(16, end - size + 1, size):
            yield int.from_bytes(block[at : at + size])

    def _tail_fits(self, block: bytes) -> bool:
        at = len(block) - _TAIL_BYTES
        return not self._checked or _crc(self._seed, _zeroed(block, at)) == int.from_bytes(block[at:])

    def _commit_fits(self, block: bytes) -> bool:
        return _crc(self._seed, _zeroed(block, 16)) == int.from_bytes(block[16:20])

    def _check_data(self, newer: NewerBlock, sequence: int) -> None:
        if not self._checked:
            return
        found = _crc(_crc(self._seed, sequence.to_bytes(4)), self._block(newer.place))
        if newer.checksum != (found if self._v3 else found & 0xFFFF):
            raise Corrupt(f"block {newer.place} of its journal does not match its checksum")


def _crc(seed: int, data: bytes) -> int:
    """As the kernel counts it: no inversion, neither before nor after."""
    return int(crc32c.update(seed ^ 0xFFFFFFFF, data)) ^ 0xFFFFFFFF


def _zeroed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(4) + data[at + 4 :]
