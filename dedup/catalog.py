"""The catalog: what LMDB knows of each group besides pointers. Written by checkpoints only, rebuilt from the journal.

Databases (FORMAT.md, "Index"): `groups` name → id; `anchors` (group, seq) → Checkpoint; `times` (group, run, time,
seq);
`volumes` (group, volume, seq) → VolumeState; `paths`; `names` (group, name) → Snapshot; `gaps` (group, first) → Gap;
`runs` (group, run) → RunStart; `pointers` and `fingerprints` of `pointer_map` and `fingerprint_index`.

Invariants:
- the last anchor of a group is the state that the index holds: everything in the other databases is of its seq or
  older, since one transaction writes them all; LMDB never leads the journal;
- an anchor's volumes and pointers are never changed by a later checkpoint, so each anchor stays a starting point.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import lmdb
import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from dedup import layout
from dedup.bounds import within_bounds
from dedup.errors import Damaged, StoreFailed, StoreFull
from dedup.gaps import inside, is_closed, joined
from dedup.group_state import Checkpoint, GroupState
from dedup.index_file import check_length, complete
from dedup.layout import ANCHOR_KEY, GROUP_KEY, TIME_KEY, VOLUME_KEY
from dedup.metadata_journal import JournalPosition
from dedup.overlay import Overlay
from dedup.pointer_map import PointerMap
from dedup.types import (
    Address,
    ContainerId,
    Gap,
    JournalId,
    Route,
    RunStart,
    Seq,
    Snapshot,
    TimeNs,
    VolumeId,
    VolumeState,
)
from dedup.watermark import Merged, RunsNamed, Watermark

MAP_BYTES: Final = 1 << 40
"""Size of the LMDB map: address space only, the file grows as it is used. Fixed: a map cannot grow under readers."""
READERS_MAX: Final = 1024
_REBUILD: Final = "make it anew: `rewindfs verify --repair`"
_CRAMPED_BYTES: Final = 64 << 20
"""With less room than this, a checkpoint may well have met the end of the disk."""
STATES_MAX: Final = 8192
"""Volume states that are kept decoded, some 400 bytes each."""
_CHECKED: Final = b"\xc1"
_WATERMARK: Final = b"watermark"
_MERGED: Final = b"merged"
_RUNS: Final = b"runs"
_GONE: Final = b"gone"
"""First part of keys in `store`; an address follows, u64 big-endian."""
_MANIFEST: Final = b"manifest"
_ROUTE: Final = b"route"
"""First part of keys in `store`; the group's id follows."""
_DATABASES: Final = (
    "groups", "anchors", "times", "volumes", "paths", "names", "gaps", "runs", "pointers", "fingerprints", "store",
)  # fmt: skip

if TYPE_CHECKING:
    Txn = lmdb.Transaction[bytes]
else:  # generic in its type stub only
    Txn = lmdb.Transaction
_Value = TypeVar("_Value")
Runs = Iterable[tuple[VolumeId, VolumeId]]
"""(first, last) of runs of volume numbers."""
_ALL_VOLUMES: Final = ((VolumeId(0), VolumeId((1 << 32) - 1)),)


class Index:
    """The LMDB environment of a store and its databases. One writer process; readers open it read-only beside it."""

    def __init__(self, directory: Path, *, writer: bool) -> None:
        try:
            self.env = lmdb.open(
                str(directory),
                map_size=MAP_BYTES,
                max_dbs=len(_DATABASES),
                max_readers=READERS_MAX,
                readonly=not writer,
                create=writer,
                readahead=False,
                meminit=False,
                max_spare_txns=4,
            )
            if writer:
                self.env.reader_check()
            try:
                check_length(self.env, directory)
            except BaseException:
                self.env.close()
                raise
            self.db = {name: self.env.open_db(name.encode(), create=writer) for name in _DATABASES}
        except lmdb.Error as error:
            raise Damaged(
                f"{directory}: the index cannot be opened ({error}); it can be made anew from the journal: "
                "`rewindfs verify --repair`"
            ) from error

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A read transaction; lasts one request (a long one keeps old pages alive). Damaged when LMDB meets damage."""
        try:
            with self.env.begin() as txn:
                yield txn
        except lmdb.Error as error:
            raise Damaged(f"{self.env.path()}: the index is damaged ({error}); {_REBUILD}") from error

    @contextmanager
    def write(self) -> Iterator[Txn]:
        """The write transaction of a checkpoint; committed, synced, when the context ends without an error.

        StoreFull, and then nothing was written and it may be tried again; StoreFailed.
        """
        try:
            with self.env.begin(write=True) as txn:
                yield txn
            complete(self.env, Path(self.env.path()))
        except lmdb.Error as error:
            path = self.env.path()
            # LMDB calls a write that a full disk cut short EIO. Nothing was committed then, it may be tried again.
            short = error.code == errno.EIO and _free_bytes(path) < _CRAMPED_BYTES
            if short or error.code in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"{path}: no space left; free space on the store's disk") from error
            raise StoreFailed(f"{path}: the index cannot be written ({error}); open the store anew") from error

    def pointers(self, group_id: int) -> PointerMap:
        return PointerMap(self.db["pointers"], group_id)

    def close(self) -> None:
        self.env.close()

    def group_ids(self, txn: Txn) -> dict[str, int]:
        """Every group that a checkpoint has seen, by name."""
        with txn.cursor(self.db["groups"]) as cursor:
            return {_text(key): _number(value, 2) for key, value in cursor}

    def watermark(self) -> Watermark:
        """What the containers held at the last checkpoint; without one, nothing."""
        with self.read() as txn:
            value = txn.get(_WATERMARK, db=self.db["store"])
        return Watermark(ContainerId(1), {}) if value is None else _decode(value, Watermark)

    def has_watermark(self) -> bool:
        """Whether there was a checkpoint since the index was made: not in the middle of making it anew."""
        with self.read() as txn:
            return txn.get(_WATERMARK, db=self.db["store"]) is not None

    def put_watermark(self, txn: Txn, watermark: Watermark) -> None:
        txn.put(_WATERMARK, _encode(watermark), db=self.db["store"])

    def merged(self) -> Merged | None:
        """Which fingerprints are in the runs; None: all that a checkpoint covers."""
        with self.read() as txn:
            value = txn.get(_MERGED, db=self.db["store"])
        return None if value is None else _decode(value, Merged)

    def put_merged(self, txn: Txn, merged: Merged) -> None:
        txn.put(_MERGED, _encode(merged), db=self.db["store"])

    def fingerprint_runs(self) -> tuple[int, ...]:
        """The numbers of the runs that have the fingerprints, oldest first."""
        with self.read() as txn:
            value = txn.get(_RUNS, db=self.db["store"])
        return () if value is None else _decode(value, RunsNamed).numbers

    def put_fingerprint_runs(self, txn: Txn, numbers: Sequence[int]) -> None:
        txn.put(_RUNS, _encode(RunsNamed(tuple(numbers))), db=self.db["store"])

    def gone(self) -> NDArray[np.uint64]:
        """Slots whose fingerprints were removed before they were in a run, ascending."""
        with self.read() as txn, txn.cursor(self.db["store"]) as cursor:
            return np.fromiter(map(_gone_address, _keys_under(cursor, _GONE)), np.uint64)

    def put_gone(self, txn: Txn, addresses: Iterable[Address]) -> int:
        """How many of them were not there yet."""
        keys = (_GONE + where.to_bytes(8, "big") for where in addresses)
        return sum(txn.put(key, b"", db=self.db["store"], overwrite=False) for key in keys)

    def forget_gone(self, txn: Txn, whole: Watermark, most: int) -> int:
        """Those that it covers, so many at most: their tables are not looked at again. How many are still named."""
        left = 0
        with txn.cursor(self.db["store"]) as cursor:
            cursor.set_range(_GONE)
            while (key := cursor.key()).startswith(_GONE):
                if most > 0 and whole.covers(_gone_address(key)):
                    cursor.delete()  # and goes on to the next
                    most -= 1
                else:
                    left += 1
                    cursor.next()
        return left

    def forget_gone_of(self, txn: Txn, container: ContainerId) -> int:
        """All of one container; how many there were."""
        prefix = _GONE + layout.address(container, 0).to_bytes(8, "big")[: -layout.SLOT_BITS // 8]
        with txn.cursor(self.db["store"]) as cursor:
            return sum(txn.delete(key, db=self.db["store"]) for key in list(_keys_under(cursor, prefix)))

    def add_group(self, txn: Txn, name: str) -> int:
        """Gives `name` the next free id."""
        group_id = max(self.group_ids(txn).values(), default=0) + 1
        txn.put(name.encode(), group_id.to_bytes(2, "big"), db=self.db["groups"])
        return group_id


def _keys_under(cursor: lmdb.Cursor[bytes], prefix: bytes) -> Iterator[bytes]:
    if cursor.set_range(prefix):
        for key in cursor.iternext(keys=True, values=False):
            if not key.startswith(prefix):
                return
            yield key


def _gone_address(key: bytes) -> Address:
    return Address(_number(key[len(_GONE) :], 8))


def _free_bytes(path: str) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _encode(value: object) -> bytes:
    """A value between a byte that no msgpack begins with and its checksum: LMDB does not notice a byte that changed."""
    packed = _CHECKED + msgspec.msgpack.encode(value)
    return packed + layout.checksum(packed).to_bytes(layout.CHECKSUM_BYTES, "little")


def _decode(value: bytes, kind: type[_Value]) -> _Value:
    if value[:1] == _CHECKED:
        body, stored = value[: -layout.CHECKSUM_BYTES], value[-layout.CHECKSUM_BYTES :]
        if layout.checksum(body) != int.from_bytes(stored, "little"):
            raise Damaged(f"index: a {kind.__name__} does not match its checksum; rebuild the index")
        value = body[1:]
    # Else it is one of the first stores, which had no checksums, and decodes whole; or it does not.
    try:
        decoded = msgspec.msgpack.decode(value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"index: a {kind.__name__} does not decode ({error}); rebuild the index") from error
    if not within_bounds(decoded):
        raise Damaged(f"index: a {kind.__name__} says what cannot be; rebuild the index")
    return decoded


@lru_cache(STATES_MAX)
def _volume_state(value: bytes) -> VolumeState:
    """A volume that did not change is the same value at each checkpoint, and then the same object in each listing."""
    return _decode(value, VolumeState)


def _gap(value: bytes) -> Gap:
    gap = _decode(value, Gap)
    if not is_closed(gap):
        raise Damaged(f"index: the gap of seq {gap.first} has no end; rebuild the index")
    return gap


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"index: a name is no text ({error}); rebuild the index") from error


def _number(value: bytes, length: int) -> int:
    if len(value) != length:
        raise Damaged(f"index: a number has {len(value)} bytes instead of {length}; rebuild the index")
    return int.from_bytes(value, "big")


class Catalog:
    """One group's part of the index. Every method works inside a transaction that the caller makes."""

    def __init__(self, index: Index, group_id: int) -> None:
        self._db = index.db
        self.group_id = group_id
        self._prefix = GROUP_KEY.pack(group_id)
        self.pointers = index.pointers(group_id)

    def _under_prefix(self, txn: Txn, db: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with txn.cursor(self._db[db]) as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor:
                    if not key.startswith(prefix):
                        return
                    yield key, value

    def _last_at_or_before(self, txn: Txn, db: str, prefix: bytes, target: bytes) -> tuple[bytes, bytes] | None:
        with txn.cursor(self._db[db]) as cursor:
            found = cursor.set_range(target)
            if not (found and cursor.key() == target):
                found = cursor.prev() if found else cursor.last()
            return (cursor.key(), cursor.value()) if found and cursor.key().startswith(prefix) else None

    def anchor(self, txn: Txn, seq: Seq) -> Checkpoint | None:
        """The last checkpoint at or before `seq`."""
        found = self._last_at_or_before(txn, "anchors", self._prefix, ANCHOR_KEY.pack(self.group_id, seq))
        return None if found is None else _decode(found[1], Checkpoint)

    def anchor_after(self, txn: Txn, seq: Seq) -> Checkpoint | None:
        """The first checkpoint behind `seq`."""
        with txn.cursor(self._db["anchors"]) as cursor:
            found = cursor.set_range(ANCHOR_KEY.pack(self.group_id, seq + 1)) and cursor.key().startswith(self._prefix)
            return _decode(cursor.value(), Checkpoint) if found else None

    def anchor_by_time(self, txn: Txn, run: RunStart, time: TimeNs) -> Checkpoint | None:
        """The last checkpoint of clock run `run` whose last record is at or before `time`."""
        prefix = TIME_KEY.pack(self.group_id, run.run, 0, 0)[:6]
        target = TIME_KEY.pack(self.group_id, run.run, time, (1 << 64) - 1)
        found = self._last_at_or_before(txn, "times", prefix, target)
        return None if found is None else self.anchor(txn, Seq(int.from_bytes(found[0][-8:], "big")))

    def volumes(self, txn: Txn, seq: Seq, among: Runs | None = None) -> dict[VolumeId, VolumeState]:
        """The volumes that exist at checkpoint `seq`; `among` are runs of numbers that have all of them, if known."""
        found: dict[VolumeId, VolumeState] = {}
        with txn.cursor(self._db["volumes"]) as cursor:
            for first, last in _ALL_VOLUMES if among is None else among:
                volume = int(first)
                while volume <= last and cursor.set_range(VOLUME_KEY.pack(self.group_id, volume, 0)):
                    key = cursor.key()
                    if len(key) != VOLUME_KEY.size:  # over which the walk could turn back
                        raise Damaged("index: a volume's key has a bad length; rebuild the index")
                    prefix = key[:6]
                    volume = int.from_bytes(prefix[2:], "big")
                    if not prefix.startswith(self._prefix) or volume > last:
                        break
                    at = self._last_at_or_before(txn, "volumes", prefix, VOLUME_KEY.pack(self.group_id, volume, seq))
                    if at is not None:
                        state = _volume_state(at[1])
                        if state.volume != volume:
                            raise Damaged(f"index: volume {volume} says that it is another; rebuild the index")
                        if not state.retired:
                            found[state.volume] = state
                    volume += 1
        return found

    def state(self, txn: Txn, checkpoint: Checkpoint) -> GroupState:
        """The state as of an anchor."""
        return GroupState.at(checkpoint, self.volumes(txn, checkpoint.held, checkpoint.present))

    def paths(self, txn: Txn) -> set[str]:
        """Every path a volume of the group has ever had."""
        return {_text(value) for _, value in self._under_prefix(txn, "paths", self._prefix)}

    def paths_count(self, txn: Txn) -> int:
        """Grows with each path that is new, of any group: a path is never dropped."""
        return int(txn.stat(self._db["paths"])["entries"])

    def names_count(self, txn: Txn, since: Mapping[str, Snapshot | None]) -> int:
        """How many names there are, after those made (or forgotten: None) since the checkpoint."""
        made_since = {self._prefix + name.encode() for name in since}
        known = 0
        with txn.cursor(self._db["names"]) as cursor:
            for key in _keys_under(cursor, self._prefix):
                known += key not in made_since
        return known + sum(made is not None for made in since.values())

    def snapshots(self, txn: Txn, having: bytes = b"") -> dict[str, Snapshot]:
        """Every name; or at least those whose value has these bytes: the others need not be decoded."""
        return {
            _text(key[2:]): _decode(value, Snapshot)
            for key, value in self._under_prefix(txn, "names", self._prefix)
            if having in value
        }

    def snapshot(self, txn: Txn, name: str) -> Snapshot | None:
        value = txn.get(self._prefix + name.encode(), db=self._db["names"])
        return None if value is None else _decode(value, Snapshot)

    def gaps(self, txn: Txn) -> list[Gap]:
        return [_gap(value) for _, value in self._under_prefix(txn, "gaps", self._prefix)]

    def gap_from(self, txn: Txn, seq: Seq) -> Gap | None:
        """The last gap that begins at or before `seq`; it may end before it."""
        found = self._last_at_or_before(txn, "gaps", self._prefix, ANCHOR_KEY.pack(self.group_id, seq))
        return None if found is None else _gap(found[1])

    def _put_gap(self, txn: Txn, gap: Gap) -> None:
        """Keeps the gap; with those that it overlaps, corrections of writes at one time, it becomes one."""
        assert gap.last is not None
        while (other := self.gap_from(txn, gap.last)) is not None and inside(other, max(gap.first, other.first)):
            txn.delete(ANCHOR_KEY.pack(self.group_id, other.first), db=self._db["gaps"])
            gap = joined(gap, other)
            assert gap.last is not None
        txn.put(ANCHOR_KEY.pack(self.group_id, gap.first), _encode(gap), db=self._db["gaps"])

    def runs(self, txn: Txn) -> list[RunStart]:
        return [_decode(value, RunStart) for _, value in self._under_prefix(txn, "runs", self._prefix)]

    def put_pointers(self, txn: Txn, overlay: Overlay, seq: Seq) -> None:
        """Writes what the overlay says into the pointer maps, as of `seq`."""
        for volume in overlay.volumes:
            cut = overlay.cuts.get(volume)
            if cut is not None:
                self.pointers.clear_from(txn, volume, cut, seq)
            self.pointers.put_each(txn, volume, seq, *overlay.pointers(volume))

    def put(self, txn: Txn, state: GroupState, position: JournalPosition) -> None:
        """Writes all of `state` that is new since the last checkpoint; the caller commits, then `checkpointed()`."""
        self.put_anchor(txn, state, position)
        for name, snapshot in state.new_snapshots.items():
            key = self._prefix + name.encode()
            if snapshot is None:
                txn.delete(key, db=self._db["names"])
            else:
                txn.put(key, _encode(snapshot), db=self._db["names"])

    def put_anchor(self, txn: Txn, state: GroupState, position: JournalPosition) -> None:
        """The same without the names: of a checkpoint in the past, after which names may have come and gone."""
        seq = state.held
        self.put_pointers(txn, state.overlay, seq)
        for volume_state in state.new_volumes.values():
            encoded = _encode(volume_state)
            txn.put(VOLUME_KEY.pack(self.group_id, volume_state.volume, seq), encoded, db=self._db["volumes"])
        for path in map(str.encode, state.new_paths):
            # Paths are longer than an LMDB key may be.
            txn.put(self._prefix + xxhash.xxh3_128_digest(path), path, db=self._db["paths"])
        for gap in state.new_gaps:
            self._put_gap(txn, gap)
        for run in state.new_runs:
            key = self._prefix + run.run.to_bytes(4, "big")
            txn.put(key, _encode(run), db=self._db["runs"])
        for route in state.new_routes:
            key = _ROUTE + ANCHOR_KEY.pack(self.group_id, route.after)
            txn.put(key, route.journal.to_bytes(2, "big"), db=self._db["store"])
        anchor = _encode(state.checkpoint(position))
        txn.put(ANCHOR_KEY.pack(self.group_id, seq), anchor, db=self._db["anchors"])
        txn.put(TIME_KEY.pack(self.group_id, state.run, state.time, seq), b"", db=self._db["times"])

    def routes(self, txn: Txn, since: Seq = Seq(0)) -> list[Route]:
        """The switches to another data journal, by seq: the last one at or before `since`, and all behind it."""
        prefix = _ROUTE + self._prefix
        target = _ROUTE + ANCHOR_KEY.pack(self.group_id, since)
        first = self._last_at_or_before(txn, "store", prefix, target)
        found: list[Route] = []
        with txn.cursor(self._db["store"]) as cursor:
            more = cursor.set_range(target if first is None else first[0])
            while more and cursor.key().startswith(prefix):
                after = Seq(int.from_bytes(cursor.key()[-8:], "big"))
                found.append(Route(after, JournalId(_number(cursor.value(), 2))))
                more = cursor.next()
        return found

    def journal_number(self, txn: Txn) -> int:
        """The number of the manifest that the anchors, pointers and volumes here belong to."""
        value = txn.get(_MANIFEST + self._prefix, db=self._db["store"])
        return 0 if value is None else _number(value, 8)

    def put_journal_number(self, txn: Txn, number: int) -> None:
        txn.put(_MANIFEST + self._prefix, number.to_bytes(8, "big"), db=self._db["store"])

    def forget_anchors(self, txn: Txn, after: Seq, last: Seq) -> None:
        """Drops the checkpoints after..last and what is keyed by them, pointers aside: that stretch is indexed anew."""
        found: list[Checkpoint] = []
        with txn.cursor(self._db["anchors"]) as cursor:
            more = cursor.set_range(ANCHOR_KEY.pack(self.group_id, after + 1))
            while more and cursor.key().startswith(self._prefix) and cursor.key()[2:] <= last.to_bytes(8, "big"):
                found.append(_decode(cursor.value(), Checkpoint))
                more = cursor.delete() and bool(cursor.key())
        for anchor in found:
            txn.delete(TIME_KEY.pack(self.group_id, anchor.run, anchor.time, anchor.held), db=self._db["times"])
        with txn.cursor(self._db["volumes"]) as cursor:
            more = cursor.set_range(self._prefix)
            while more and cursor.key().startswith(self._prefix):
                stale = after < int.from_bytes(cursor.key()[-8:], "big") <= last
                more = (cursor.delete() and bool(cursor.key())) if stale else cursor.next()

    def move_anchor(self, txn: Txn, begin: Checkpoint) -> bool:
        """Makes the checkpoint of that seq say `begin`, which has its volumes and pointers, if it said that the journal
        goes on in that segment. Whether there is one that did."""
        key = ANCHOR_KEY.pack(self.group_id, begin.held)
        value = txn.get(key, db=self._db["anchors"])
        if value is None or _decode(value, Checkpoint).position.segment != begin.position.segment:
            return False
        return txn.put(key, _encode(begin), db=self._db["anchors"])

    def forget_gaps(self, txn: Txn, last: Seq) -> None:
        """Drops the gaps that end at or before `last`: before the first recovery point there are none."""
        for gap in self.gaps(txn):
            if gap.last is not None and gap.last <= last:
                txn.delete(ANCHOR_KEY.pack(self.group_id, gap.first), db=self._db["gaps"])
