"""Blocks of a store elsewhere that were read before, on a disk here, by their address.

An address is permanent and a slot is never used twice, so a block is right for every moment that names its address: of
the next snapshot only what changed is fetched. The oldest goes when there is no room.

Invariants:
- `no-wrong-bytes`: no block leaves that does not match the fingerprint that it came with, whatever the disk here did;
- a block is used in the session in which it came; in a later one only once the store has said that the address still
  has this fingerprint (`confirm`): a store may be put back to an older copy, whose slots were filled anew since;
- bounded: `bytes_max` on the disk, and some 40 bytes of memory for each block. A full disk makes the cache smaller.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from dedup.errors import RewindError, WouldBlock
from dedup.pointer_map import Addresses
from dedup.types import BLOCK_BYTES, HOLE
from replication.messages import FINGERPRINT_BYTES

log = logging.getLogger("rewindfs.history")

CACHE_BYTES: Final = 1 << 30
CACHE_BYTES_MIN: Final = 64 << 20
"""Room for what is fetched ahead, and some more."""
CACHE_BYTES_MAX: Final = 8 << 30
"""Of which some 80 MB are in memory."""
_WAYS: Final = 8
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_NOT_NOW: Final = (errno.EAGAIN, errno.EOPNOTSUPP)

Mask = npt.NDArray[np.bool_]
Marks = npt.NDArray[np.void]
"""Fingerprints, an element each."""


class CacheFailed(RewindError):
    """No cache can be made where it is to be."""


def default_cache_directory() -> Path:
    """On a disk, and not in memory as /tmp may be."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


class BlockCache:
    """One store's blocks in a file without a name. Any thread may use it; what reads or writes the file may wait."""

    def __init__(self, directory: Path, bytes_max: int = CACHE_BYTES) -> None:
        """CacheFailed."""
        if not CACHE_BYTES_MIN <= bytes_max <= CACHE_BYTES_MAX:
            raise CacheFailed(
                f"a cache of {bytes_max} bytes: choose between {CACHE_BYTES_MIN >> 20}M and {CACHE_BYTES_MAX >> 30}G"
            )
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise CacheFailed(
                f"no cache can be made in {directory}: {error.strerror}; choose another directory with TMPDIR, or with "
                "--cache where the command has it"
            ) from error
        self._directory = directory
        self._slots = bytes_max // BLOCK_BYTES
        self._owner: Addresses = np.zeros(self._slots + 1, dtype=np.uint64)
        """Slot → the address whose block it has; HOLE for none, and always of the last one, which is no slot."""
        self._marks: Marks = np.zeros(self._slots, dtype=f"V{FINGERPRINT_BYTES}")
        self._generation = np.zeros(self._slots, dtype=np.uint32)
        bits = max(4, (2 * self._slots // _WAYS - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._index = np.full((1 << bits, _WAYS), self._slots, dtype=np.uint32)
        """Set of addresses → slots, of which those count that have such an address; none is there twice."""
        self._next = 0
        self._lock = threading.Lock()
        self._full = False

    def close(self) -> None:
        """Nothing may be reading."""
        self._file.close()

    def read(self, addresses: Addresses, out: memoryview, generation: int, *, wait: bool = True) -> Mask:
        """Fills `out` (4096 bytes per address) where the cache can, holes with zeros. True where it could not.

        With `wait` False WouldBlock, when anything is missing or needs the disk.
        """
        with self._lock:
            slots = self._find(addresses)
            usable = (slots >= 0) & (self._generation[slots] == generation)
            marks = self._marks[slots]
        missing: Mask = ~usable & (addresses != HOLE)
        if not wait and missing.any():
            raise WouldBlock
        for first, count in _runs(addresses == HOLE, np.zeros(len(addresses), dtype=np.int64)):
            out[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES] = bytes(count * BLOCK_BYTES)
        steps = slots - np.arange(len(slots))
        for first, count in _runs(usable, steps):
            part = out[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES]
            whole = self._read_slots(int(slots[first]), part, wait)
            for index in range(count):
                block = part[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                if not whole or xxhash.xxh3_128_digest(block) != marks[first + index].tobytes():
                    missing[first + index] = True
                    self._forget(int(slots[first + index]), addresses[first + index])
        if not wait and missing.any():
            raise WouldBlock
        return missing

    def lacks(self, addresses: Addresses, generation: int) -> Mask:
        """True where `read` would miss, the file's own faults apart."""
        with self._lock:
            slots = self._find(addresses)
            missing: Mask = ~((slots >= 0) & (self._generation[slots] == generation)) & (addresses != HOLE)
        return missing

    def unconfirmed(self, addresses: Addresses, generation: int) -> Mask:
        """True for what came in another session."""
        with self._lock:
            slots = self._find(addresses)
            old: Mask = (slots >= 0) & (self._generation[slots] != generation)
        return old

    def confirm(self, addresses: Addresses, marks: Marks, generation: int) -> None:
        """The session's store has these fingerprints at these addresses: what is here of them may be used, or goes."""
        with self._lock:
            slots = self._find(addresses)
            known = slots >= 0
            same = known & (self._marks[slots] == marks)
            self._generation[slots[same]] = generation
            self._owner[slots[known & ~same]] = HOLE

    def insert(self, addresses: Addresses, marks: Marks, data: memoryview, generation: int) -> None:
        """Keeps these blocks, none of a hole. The caller has checked them against their fingerprints."""
        _, first = np.unique(addresses, return_index=True)
        first.sort()
        count = len(first)
        if not 0 < count <= self._slots:
            return
        blocks = [data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] for index in first.tolist()]
        with self._lock:
            slots = (self._next + np.arange(count)) % self._slots
            self._next = (self._next + count) % self._slots
            self._owner[slots] = HOLE
        if not self._write_slots(slots, blocks):
            return
        with self._lock:
            known = self._find(addresses[first])
            self._owner[known[known >= 0]] = HOLE  # came meanwhile, or in another session
            self._marks[slots] = marks[first]
            self._generation[slots] = generation
            self._enter(addresses[first], slots)

    def _enter(self, addresses: Addresses, slots: npt.NDArray[np.int64]) -> None:
        """Gives the slots, which have no owner, to the addresses. In the index each takes the place of its slot's own
        entry, of one that counts no more, or, where there is none in its set, of another."""
        sets = self._sets(addresses)
        while len(sets):
            # Those of one set one after the other, or they would take the same place.
            _, first = np.unique(sets, return_index=True)
            some, mine = sets[first], slots[first]
            row = self._index[some]
            owners = self._owner[row]
            counts = (owners != HOLE) & (self._sets(owners) == some[:, None])
            rank = np.where(row == mine[:, None], -1, counts)
            place = np.where(counts.all(axis=1), mine % _WAYS, rank.argmin(axis=1))
            self._index[some, place] = mine
            self._owner[mine] = addresses[first]
            sets, slots = np.delete(sets, first), np.delete(slots, first)
            addresses = np.delete(addresses, first)

    def _sets(self, addresses: Addresses) -> Addresses:
        found: Addresses = (addresses * _GOLDEN) >> self._shift
        return found

    def _find(self, addresses: Addresses) -> npt.NDArray[np.int64]:
        """The slots of the addresses; -1 where there is none."""
        candidates = self._index[self._sets(addresses)]
        match = self._owner[candidates] == addresses[:, None]
        chosen = candidates[np.arange(len(addresses)), match.argmax(axis=1)]
        found: npt.NDArray[np.int64] = chosen.astype(np.int64)
        found[~match.any(axis=1) | (addresses == HOLE)] = -1
        return found

    def _forget(self, slot: int, address: np.uint64) -> None:
        """What the file gave back is not what was written, or the slot was just taken for another block."""
        with self._lock:
            if self._owner[slot] != address:
                return
            self._owner[slot] = HOLE
        log.warning("a cached block in %s is not what was written: it is fetched again", self._directory)

    def _read_slots(self, slot: int, out: memoryview, wait: bool) -> bool:
        """Whether the file gave all of it."""
        try:
            count = os.preadv(self._file.fileno(), [out], slot * BLOCK_BYTES, 0 if wait else os.RWF_NOWAIT)
        except OSError as error:
            if not wait and error.errno in _NOT_NOW:
                raise WouldBlock from error
            log.error("the cache in %s cannot be read: %s", self._directory, error.strerror)
            return False
        if count < len(out) and not wait:
            raise WouldBlock
        return count == len(out)

    def _write_slots(self, slots: npt.NDArray[np.int64], blocks: list[memoryview]) -> bool:
        try:
            for first, count in _runs(np.ones(len(slots), dtype=np.bool_), slots - np.arange(len(slots))):
                some = blocks[first : first + count]
                if os.pwritev(self._file.fileno(), some, int(slots[first]) * BLOCK_BYTES) != count * BLOCK_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._full:
                log.warning("the cache in %s keeps no more blocks: %s", self._directory, error.strerror)
            self._full = True
            return False
        if self._full:
            log.info("the cache in %s keeps blocks again", self._directory)
        self._full = False
        return True


def _runs(wanted: Mask, steps: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of positions that are wanted and have equal steps."""
    if not wanted.any():
        return
    begins = wanted.copy()
    begins[1:] &= ~(wanted[:-1] & (steps[1:] == steps[:-1]))
    ends = wanted.copy()
    ends[:-1] &= ~(wanted[1:] & ~begins[1:])
    for first, last in zip(np.flatnonzero(begins).tolist(), np.flatnonzero(ends).tolist(), strict=True):
        yield first, last - first + 1
