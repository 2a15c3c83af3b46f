"""Pointer maps: for each volume, which address each block had, at every checkpoint, in LMDB.

A map is versions, not a tree: key (group, volume, leaf, seq), where a leaf is LEAF_BLOCKS blocks and seq is the
checkpoint that wrote it. The value is either the whole leaf, run-coded, or only the pointers that changed since the
version before it (at most DELTAS_MAX deltas lie on a whole leaf). A moment's pointer is found by one seek backward.

Invariants:
- a version says so when its bytes, or those of its key, are not what was written (`no-wrong-bytes`);
- a version, once committed, is never changed (`pointers-resolve`), but goes with the checkpoint that wrote it when
  its stretch of history is consolidated: `forget` and `put` within one transaction;
- the oldest version of a leaf is whole, so a walk backward always ends;
- a block with no version at or before a seq is a hole at that seq.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from dedup.errors import Damaged
from dedup.layout import (
    CHECKSUM_BYTES,
    LEAF_BLOCKS,
    POINTER_DELTA,
    POINTER_KEY,
    POINTER_RUN,
    POINTER_WHOLE,
    checksum,
)
from dedup.types import HOLE, Seq, VolumeId

if TYPE_CHECKING:
    import lmdb

Addresses = npt.NDArray[np.uint64]
Leaves = npt.NDArray[np.int64]
"""Numbers of leaves: eight bytes each, 4 MiB for a volume of 1 TiB."""
LeafKey = tuple[VolumeId, int]
FIRST_LEAF: Final[LeafKey] = (VolumeId(0), 0)

DELTAS_MAX: Final = 8
"""Deltas on one whole leaf: a read walks at most this many versions back."""
DELTA_POINTERS_MAX: Final = LEAF_BLOCKS // 4
"""Past this many changed pointers a whole leaf is about as small as the delta, and quicker to read."""
SEQ_MAX: Final = Seq((1 << 64) - 1)
POINTER_RUN_DTYPE: Final = np.dtype(list(POINTER_RUN))
_FEW_POINTERS: Final = 16
_RUN: Final = Struct("<HQ")
"""POINTER_RUN_DTYPE, for one run."""
_POINTER_BYTES: Final = POINTER_RUN_DTYPE.itemsize
"""Of a run, and of a delta's pointer with its index: versions have 2 bytes and some of these, then the checksum."""
_PLACES: Final[Addresses] = np.arange(LEAF_BLOCKS, dtype=np.uint64)
_ADDRESS_MAX: Final = np.uint64((1 << 64) - 1)


def encode_whole(addresses: Addresses) -> bytes:
    """A whole leaf, run-coded: runs of holes, and runs of consecutive addresses."""
    steps = np.diff(addresses)
    continues = np.where(addresses[1:] == HOLE, addresses[:-1] == HOLE, (steps == 1) & (addresses[:-1] != HOLE))
    starts = np.concatenate(([0], np.flatnonzero(~continues) + 1))
    runs = np.empty(len(starts), dtype=POINTER_RUN_DTYPE)
    runs["count"] = np.diff(np.concatenate((starts, [len(addresses)])))
    runs["address"] = addresses[starts]
    return bytes((POINTER_WHOLE, 0)) + runs.tobytes()


def _encode_few(indexes: npt.NDArray[np.uint16], addresses: Addresses) -> bytes:
    """As encode_whole, of a leaf of holes but for these: numpy costs more than few of them."""
    runs: list[tuple[int, int]] = []
    at = 0
    for index, where in zip(indexes.tolist(), addresses.tolist(), strict=True):
        if where == HOLE:
            continue
        if index > at:
            runs.append((index - at, HOLE))
        if index == at and runs and where == sum(runs[-1]) and runs[-1][1] != HOLE:
            runs[-1] = runs[-1][0] + 1, runs[-1][1]
        else:
            runs.append((1, where))
        at = index + 1
    if at < LEAF_BLOCKS:
        runs.append((LEAF_BLOCKS - at, HOLE))
    return bytes((POINTER_WHOLE, 0)) + b"".join([_RUN.pack(*run) for run in runs])


def decode_whole(value: bytes) -> Addresses:
    """Inverse of encode_whole; Damaged when the runs do not make one leaf."""
    body = value[2:]
    if not body or len(body) % POINTER_RUN_DTYPE.itemsize:
        raise Damaged("index: a pointer-map leaf has a bad length; rebuild the index with `rewindfs verify --repair`")
    runs = np.frombuffer(body, dtype=POINTER_RUN_DTYPE)
    counts, addresses = runs["count"].astype(np.int64), runs["address"]
    holes = addresses == HOLE
    starts = np.cumsum(counts) - counts
    if int(counts.sum()) != LEAF_BLOCKS or (~holes & (addresses > _ADDRESS_MAX - counts.astype(np.uint64))).any():
        raise Damaged("index: a pointer-map leaf has a bad run; rebuild the index with `rewindfs verify --repair`")
    # An address less its place in the leaf may wrap around: adding the places back wraps it again.
    result: Addresses = np.repeat(addresses - starts.astype(np.uint64), counts) + _PLACES
    if holes.any():
        result[np.repeat(holes, counts)] = HOLE
    return result


def encode_delta(indexes: npt.NDArray[np.uint16], addresses: Addresses, depth: int) -> bytes:
    """The pointers that changed: `depth` is this delta's number on its whole leaf, from 1."""
    head = bytes((POINTER_DELTA, depth))
    return head + indexes.astype("<u2", copy=False).tobytes() + addresses.astype("<u8", copy=False).tobytes()


def _decode_delta(value: bytes) -> tuple[npt.NDArray[np.uint16], Addresses]:
    count, rest = divmod(len(value) - 2, 10)
    if rest or not count:
        raise Damaged("index: a pointer-map delta has a bad length; rebuild with `rewindfs verify --repair`")
    indexes = np.frombuffer(value, dtype="<u2", count=count, offset=2)
    if int(indexes.max()) >= LEAF_BLOCKS:
        raise Damaged("index: a pointer-map delta has a bad index; rebuild with `rewindfs verify --repair`")
    return indexes, np.frombuffer(value, dtype="<u8", count=count, offset=2 + 2 * count)


def _is_whole(value: bytes) -> bool:
    """Which of the two sorts of version it is. Damaged when it is neither."""
    if len(value) < 2 or value[0] not in (POINTER_WHOLE, POINTER_DELTA):
        raise Damaged("index: a pointer-map version is of no known sort; rebuild with `rewindfs verify --repair`")
    return value[0] == POINTER_WHOLE


def _checked(key: bytes, value: bytes) -> bytes:
    """The value with the checksum over its key and itself that `_opened` looks at."""
    return value + checksum(key + value).to_bytes(CHECKSUM_BYTES, "little")


def _opened(key: bytes, value: bytes) -> bytes:
    """The value without its checksum. Damaged when that is another: the value changed, or belongs to another key.

    The length says whether there is one: indexes of the first stores have none.
    """
    if (len(value) - 2) % _POINTER_BYTES != CHECKSUM_BYTES:
        return value
    body = value[:-CHECKSUM_BYTES]
    if checksum(key + body) != int.from_bytes(value[-CHECKSUM_BYTES:], "little"):
        raise Damaged("index: a pointer-map version has a bad checksum; rebuild with `rewindfs verify --repair`")
    return body


def named_by(value: bytes, key: bytes | None = None) -> Addresses:
    """Every address that one version names itself, holes among them. Damaged; with its key, a changed one is, too."""
    if key is not None:
        value = _opened(key, value)
    elif (len(value) - 2) % _POINTER_BYTES == CHECKSUM_BYTES:
        value = value[:-CHECKSUM_BYTES]
    return decode_whole(value) if _is_whole(value) else _decode_delta(value)[1]


def distinct_leaves(*leaves: Iterable[int]) -> Leaves:
    """Each leaf once, ascending."""
    return np.unique(np.fromiter(itertools.chain(*leaves), dtype=np.int64))


def split_key(key: bytes) -> tuple[int, VolumeId, int, Seq]:
    """Group, volume, leaf and seq of a key. Damaged for one of another length, over which a walk could turn back."""
    if len(key) != POINTER_KEY.size:
        raise Damaged("index: a pointer-map key has a bad length; rebuild with `rewindfs verify --repair`")
    group_id, volume, leaf, seq = POINTER_KEY.unpack(key)
    return group_id, volume, leaf, seq


class PointerMap:
    """The pointer maps of one group, read and written within transactions that the caller makes."""

    def __init__(self, db: lmdb._Database, group_id: int) -> None:
        self._db = db
        self._group_id = group_id
        self._all_leaves: tuple[VolumeId, int, Leaves] | None = None

    def leaf(self, txn: lmdb.Transaction[bytes], volume: VolumeId, leaf: int, seq: Seq) -> Addresses | None:
        """The leaf as of `seq`: LEAF_BLOCKS addresses, or None where there is no version (all holes)."""
        with txn.cursor(self._db) as cursor:
            return self._leaf(cursor, POINTER_KEY.pack(self._group_id, volume, leaf, 0)[:-8], seq)

    def _leaf(self, cursor: lmdb.Cursor[bytes], prefix: bytes, seq: Seq) -> Addresses | None:
        deltas: list[tuple[npt.NDArray[np.uint16], Addresses]] = []
        found = self._seek_back(cursor, prefix, seq)
        while found:
            value = _opened(cursor.key(), cursor.value())
            if _is_whole(value):
                addresses = decode_whole(value)
                for indexes, changed in reversed(deltas):
                    addresses[indexes] = changed
                return addresses
            deltas.append(_decode_delta(value))
            found = cursor.prev() and cursor.key().startswith(prefix)
        if deltas:
            raise Damaged("index: a pointer-map leaf lacks its whole version; rebuild with `rewindfs verify --repair`")
        return None

    @staticmethod
    def _seek_back(cursor: lmdb.Cursor[bytes], prefix: bytes, seq: Seq) -> bool:
        """Stands on the last key with `prefix` at or before `seq`; False when there is none."""
        target = prefix + seq.to_bytes(8, "big")
        if cursor.set_range(target):
            if cursor.key() == target:
                return True
            return cursor.prev() and cursor.key().startswith(prefix)
        return cursor.last() and cursor.key().startswith(prefix)

    def put(
        self,
        txn: lmdb.Transaction[bytes],
        volume: VolumeId,
        leaf: int,
        seq: Seq,
        indexes: npt.NDArray[np.uint16],
        addresses: Addresses,
    ) -> None:
        """Writes the version of checkpoint `seq`: `indexes` (within the leaf, distinct) now have `addresses`.

        Later versions may exist, of checkpoints behind a stretch that is indexed anew: they say what they said.
        """
        prefix = POINTER_KEY.pack(self._group_id, volume, leaf, 0)[:-8]
        with txn.cursor(self._db) as cursor:
            cursor.put(*self._version(cursor, prefix, seq, indexes, addresses))

    def put_each(
        self,
        txn: lmdb.Transaction[bytes],
        volume: VolumeId,
        seq: Seq,
        blocks: npt.NDArray[np.int64],
        addresses: Addresses,
    ) -> None:
        """`put` for every leaf of `blocks`, which ascend and now have `addresses`."""
        leaf_of = blocks // LEAF_BLOCKS
        starts = np.flatnonzero(np.diff(leaf_of, prepend=-1))
        indexes = (blocks % LEAF_BLOCKS).astype(np.uint16)
        edges = itertools.pairwise([*starts.tolist(), len(blocks)])
        volume_prefix = POINTER_KEY.pack(self._group_id, volume, 0, 0)[:-12]
        with txn.cursor(self._db) as cursor:
            versions = [
                self._version(
                    cursor, volume_prefix + leaf.to_bytes(4, "big"), seq, indexes[start:end], addresses[start:end]
                )
                for leaf, (start, end) in zip(leaf_of[starts].tolist(), edges, strict=True)
            ]
            cursor.putmulti(versions)

    def _version(
        self,
        cursor: lmdb.Cursor[bytes],
        prefix: bytes,
        seq: Seq,
        indexes: npt.NDArray[np.uint16],
        addresses: Addresses,
    ) -> tuple[bytes, bytes]:
        """Key and value of a leaf's version of checkpoint `seq`."""
        key = prefix + seq.to_bytes(8, "big")
        depth = DELTAS_MAX
        found = self._seek_back(cursor, prefix, seq)
        # A version of this very checkpoint (a cut, just before) cannot carry a delta: both have one key.
        if found and cursor.key() != key:
            value = _opened(cursor.key(), cursor.value())
            depth = 0 if _is_whole(value) else value[1]
        if depth < DELTAS_MAX and len(indexes) <= DELTA_POINTERS_MAX:
            encoded = encode_delta(indexes, addresses, depth + 1)
        elif not found and len(indexes) <= _FEW_POINTERS:
            encoded = _encode_few(indexes, addresses)
        else:
            whole = self._leaf(cursor, prefix, seq)
            if whole is None:
                whole = np.zeros(LEAF_BLOCKS, dtype=np.uint64)
            whole[indexes] = addresses
            encoded = encode_whole(whole)
        return key, _checked(key, encoded)

    def leaves(self, txn: lmdb.Transaction[bytes], volume: VolumeId, first: int = 0) -> Iterator[int]:
        """The numbers of all leaves of `volume`, from `first` on, that have any version, ascending."""
        prefix = POINTER_KEY.pack(self._group_id, volume, 0, 0)[:6]
        leaf = first
        with txn.cursor(self._db) as cursor:
            while cursor.set_range(POINTER_KEY.pack(self._group_id, volume, leaf, 0)):
                key = cursor.key()
                if not key.startswith(prefix):
                    return
                _, _, leaf, _ = split_key(key)
                yield leaf
                leaf += 1

    def all_leaves(self, txn: lmdb.Transaction[bytes], volume: VolumeId) -> Leaves:
        """As `leaves`, in an array that is kept: the next call costs nothing while nothing is committed. Not to be
        changed; not for a transaction that has written to the map."""
        kept, commit = self._all_leaves, txn.id()
        if kept is None or kept[:2] != (volume, commit):
            kept = self._all_leaves = volume, commit, distinct_leaves(self.leaves(txn, volume))
        return kept[2]

    def changed_leaves(self, txn: lmdb.Transaction[bytes], volume: VolumeId, after: Seq, last: Seq) -> Iterator[int]:
        """The leaves of `volume` with a version of a checkpoint in after+1..last, ascending: a look at each leaf."""
        with txn.cursor(self._db) as cursor:
            for leaf in self.leaves(txn, volume):
                prefix = POINTER_KEY.pack(self._group_id, volume, leaf, 0)[:-8]
                if self._seek_back(cursor, prefix, last) and int.from_bytes(cursor.key()[-8:], "big") > after:
                    yield leaf

    def forget(self, txn: lmdb.Transaction[bytes], volume: VolumeId, leaf: int, after: Seq, last: Seq) -> None:
        """Drops the leaf's versions of checkpoints after..last; the caller writes, in this transaction, what still has
        to be known of them: at `last` the leaf must be what it was."""
        prefix = POINTER_KEY.pack(self._group_id, volume, leaf, 0)[:-8]
        with txn.cursor(self._db) as cursor:
            more = cursor.set_range(prefix + Seq(after + 1).to_bytes(8, "big"))
            while more and cursor.key().startswith(prefix) and int.from_bytes(cursor.key()[-8:], "big") <= last:
                more = cursor.delete() and bool(cursor.key())

    def settle(self, txn: lmdb.Transaction[bytes], volume: VolumeId, leaf: int, last: Seq) -> None:
        """After `forget` and what was put in its place: the oldest version is whole again, if it lies after `last`."""
        prefix = POINTER_KEY.pack(self._group_id, volume, leaf, 0)[:-8]
        with txn.cursor(self._db) as cursor:
            if self._seek_back(cursor, prefix, last) or not cursor.set_range(prefix):
                return
            key = cursor.key()
            if not key.startswith(prefix):
                return
            value = _opened(key, cursor.value())
            if not _is_whole(value):
                whole = np.zeros(LEAF_BLOCKS, dtype=np.uint64)
                indexes, changed = _decode_delta(value)
                whole[indexes] = changed
                cursor.put(key, _checked(key, encode_whole(whole)))

    def clear_from(self, txn: lmdb.Transaction[bytes], volume: VolumeId, block: int, seq: Seq) -> None:
        """From `block` on, everything is a hole as of checkpoint `seq` (the volume was cut there)."""
        for leaf in list(self.leaves(txn, volume, block // LEAF_BLOCKS)):
            start = max(0, block - leaf * LEAF_BLOCKS)
            current = self.leaf(txn, volume, leaf, seq)
            if current is None or not current[start:].any():
                continue
            indexes = np.arange(start, LEAF_BLOCKS, dtype=np.uint16)
            self.put(txn, volume, leaf, seq, indexes, np.zeros(len(indexes), dtype=np.uint64))
