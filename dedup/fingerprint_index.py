"""The fingerprint index: fingerprint → address of a block that may be the same. A hit is a candidate, never a proof.

Four layers, looked through in this order: `recent` (noted since the last checkpoint began), `frozen` (being committed
by it), `unmerged` (of older checkpoints, in memory) and LMDB, unless its filter says that it is not there. Losing any
of it costs deduplication, never data.

Fingerprints are random: each one put into LMDB changes a page of its own, and in a store with a long history that is as
many bytes as the block has. So they gather in memory, where they are found again from the tables of the containers when
the store is opened, and go into LMDB by slices: UNMERGED_MAX of them touch each page some times, and not once each.

Invariants:
- in each layer the first address noted for a fingerprint stays: a later one, of a block that merely collides or of one
  that was stored anew since the first was damaged, is found in memory only, if at all;
- LMDB never leads the containers: `commit` is called only after they are synced;
- a fingerprint is out of memory only when the read transaction sees it in LMDB;
- what `Merged` says is in LMDB is there, but what was removed; what it does not say is in the containers' tables, and
  what was removed of that is named under `gone` until `Merged` says it, or the table does not have it any more;
- what is named under `gone` counts as what is in memory does: neither grows without rounds that end it.

Called by one thread at a time. `lookup` of a stored fingerprint costs about 1 µs, of an unknown one less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import lmdb
import numpy as np

from dedup.errors import Damaged
from dedup.fingerprint_filter import FILTER_NAME, FingerprintFilter
from dedup.fingerprint_table import SLICE_BITS, SLICES, U64, FingerprintTable, halves
from dedup.layout import FINGERPRINT_BYTES, FINGERPRINT_VALUE
from dedup.storage import Storage
from dedup.types import Address, ContainerId
from dedup.watermark import Merged, Watermark

if TYPE_CHECKING:
    from dedup.catalog import Index, Txn

UNMERGED_MAX: Final = 1 << 20
"""Fingerprints that stay out of LMDB at most: those of 4 GiB of blocks, 24 MB of memory. The removed ones among them
that have to be named count, too."""
_SLICES_PER_COMMIT: Final = 4
_FORGOTTEN_PER_ROUND: Final = 1 << 16
"""Of those; ingest waits meanwhile."""
_CONTAINERS_AT_ONCE: Final = 8
"""Of those that are read when the store is opened: adding each alone would copy the whole as often."""
_MANY: Final = 16
_ROW: Final = np.dtype(f"V{FINGERPRINT_BYTES}")
_VALUE_BYTES: Final = FINGERPRINT_VALUE.size


class FingerprintIndex:
    """Over the index that the caller opened and closes (after `close`)."""

    def __init__(self, index: Index, storage: Storage) -> None:
        self._index = index
        self._storage = storage
        self._filter_path = Path(index.env.path()) / FILTER_NAME
        tag = index.filter_tag()
        self._filter = None if tag is None else FingerprintFilter.open(storage, self._filter_path, tag)
        self._db = index.db["fingerprints"]
        self._recent: dict[bytes, Address] = {}
        self._frozen: dict[bytes, Address] = {}
        self._unmerged = FingerprintTable()
        self.merged = index.merged()
        """As LMDB says it; None: everything committed is there."""
        self._covered = index.watermark()
        """What was appended by then is in `_unmerged` or in LMDB."""
        self._gone_count = 0
        """How many slots are named under `gone`; more than there are, where a transaction that named some failed."""
        self._next: tuple[Merged | None, Watermark, int] | None = None
        """What `merged`, `_covered` and `_gone_count` become once the caller's transaction is committed."""
        self._txn: Txn | None = None
        self._cursor: lmdb.Cursor[bytes] | None = None

    @property
    def pending_count(self) -> int:
        """Fingerprints that no checkpoint covers, about 200 bytes each."""
        return len(self._recent) + len(self._frozen)

    @property
    def unmerged_count(self) -> int:
        """Fingerprints that checkpoints cover and LMDB does not have yet, 24 bytes each."""
        return len(self._unmerged)

    def load(self, containers: Iterable[tuple[bytes, U64]]) -> None:
        """When the store is opened: fingerprints and ascending addresses of containers that `merged` does not cover
        whole."""
        if self.merged is None:
            return
        gone = self._index.gone()
        self._gone_count = len(gone)
        marks: list[bytes] = []
        places: list[U64] = []
        for fingerprints, addresses in containers:
            wanted = self._covered.covers_each(addresses) & ~self.merged.has_each(fingerprints, addresses)
            if len(addresses):
                first, end = np.searchsorted(gone, addresses[0]), np.searchsorted(gone, addresses[-1], "right")
                wanted &= ~np.isin(addresses, gone[first:end])
            marks.append(np.frombuffer(fingerprints, _ROW)[wanted].tobytes())
            places.append(addresses[wanted])
            if len(places) == _CONTAINERS_AT_ONCE:
                self._unmerged.add(b"".join(marks), np.concatenate(places))
                marks, places = [], []
        if places:
            self._unmerged.add(b"".join(marks), np.concatenate(places))

    def lookup(self, fingerprints: Sequence[bytes]) -> list[Address | None]:
        """The candidate for each fingerprint, in their order. Damaged when LMDB holds something else."""
        recent, frozen = self._recent, self._frozen
        if frozen:
            found: list[Address | None] = [recent.get(mark) or frozen.get(mark) for mark in fingerprints]
        else:
            found = list(map(recent.get, fingerprints))
        unknown = [mark for mark, where in zip(fingerprints, found, strict=True) if where is None]
        if not unknown:
            return found
        stored: dict[bytes, Address] = {}
        if len(self._unmerged):
            stored = self._unmerged.find(unknown)
            if stored:
                unknown = [mark for mark in unknown if mark not in stored]
        if self._filter is not None and unknown:
            maybe = self._filter.may_have(*halves(b"".join(unknown)))
            unknown = [unknown[at] for at in np.flatnonzero(maybe).tolist()]
        if unknown and (cursor := self._reading()) is not None:
            stored |= _addresses(cursor.getmulti(unknown))
        if stored:
            return [
                stored.get(mark) if where is None else where for mark, where in zip(fingerprints, found, strict=True)
            ]
        return found

    def note(self, fingerprint: bytes, where: Address) -> None:
        """From now on `lookup` finds it, unless the fingerprint has an address already."""
        if fingerprint not in self._frozen:
            self._recent.setdefault(fingerprint, where)

    def note_each(self, fingerprints: Sequence[bytes], addresses: Sequence[int]) -> None:
        """`note` of each, all unknown to `lookup` or to be told from what it found."""
        if len(addresses) == 1:
            self.note(fingerprints[0], Address(addresses[0]))
            return
        noted = dict(zip(fingerprints, map(Address, addresses), strict=True))
        if self._frozen or not self._recent.keys().isdisjoint(noted):
            for mark, where in noted.items():
                self.note(mark, where)
        else:
            self._recent.update(noted)

    def forget_recent(self) -> None:
        """Drops what was noted since `freeze`: for blocks that turned out not to be kept."""
        self._recent.clear()

    def freeze(self) -> None:
        """Begins a checkpoint: what was noted so far is what `commit` writes. After a failed one, that and what is new.

        The caller has synced the containers, and stores nothing more before `commit`.
        """
        if self._frozen:
            for fingerprint, where in self._recent.items():
                self._frozen.setdefault(fingerprint, where)
        else:
            self._frozen = self._recent
        self._recent = {}

    def commit(self, txn: Txn, watermark: Watermark | None = None) -> None:
        """Puts what is due into the caller's write transaction; it counts when that is committed.

        `watermark` is what it covers; without one (a rebuild of the index) everything goes into LMDB.
        """
        gone = self._gone_count
        if watermark is None or self.merged is None:
            if self._filter is not None:
                self._filter.forget()
            for number in range(SLICES):
                self._put(txn, self._unmerged.slice(number))
            self._put(txn, sorted(self._frozen.items()))
            merged = None if watermark is None else Merged(watermark, watermark, 0)
        else:
            excess = len(self._unmerged) + len(self._frozen) + gone - UNMERGED_MAX
            merged, gone = self._merge(txn, self.merged, excess)
        self._next = merged, watermark or self._covered, gone
        if merged is not None and merged != self.merged:
            self._index.put_merged(txn, merged)

    def _merge(self, txn: Txn, merged: Merged, excess: int) -> tuple[Merged, int]:
        """The next slices, until so many fingerprints are in; how many slots are named under `gone` after that."""
        gone = self._gone_count
        for _ in range(_SLICES_PER_COMMIT):
            if excess <= 0:
                break
            if merged.slices == 0:
                merged = Merged(merged.whole, self._covered, 0)
            part = self._unmerged.slice(merged.slices)
            self.announce(txn, merged.slices, b"".join([mark for mark, _ in part]))
            self._put(txn, part)
            excess -= len(part)
            merged = Merged(merged.whole, merged.round, merged.slices + 1)
            if merged.slices == SLICES:
                merged = Merged(merged.round, merged.round, 0)
                gone = self._index.forget_gone(txn, merged.whole, _FORGOTTEN_PER_ROUND)
        return merged, gone

    def announce(self, txn: Txn, number: int, fingerprints: bytes) -> None:
        """Those of one slice that are put into LMDB by the caller's write transaction: the filter must let them by."""
        if self._filter is None:
            self._filter = FingerprintFilter.make(self._storage, self._filter_path)
        self._index.put_filter_tag(txn, self._filter.tag)
        self._filter.add(number, fingerprints, self._stored(txn, number))

    def _stored(self, txn: Txn, number: int) -> Iterator[bytes]:
        """What LMDB has of a slice."""
        with txn.cursor(self._db) as cursor:
            if cursor.set_range(bytes([number << (8 - SLICE_BITS)])):
                for key in cursor.iternext(keys=True, values=False):
                    if key[0] >> (8 - SLICE_BITS) != number:
                        return
                    yield key

    def _put(self, txn: Txn, entries: Sequence[tuple[bytes, Address]]) -> None:
        pack = FINGERPRINT_VALUE.pack
        if entries:
            txn.cursor(self._db).putmulti([(mark, pack(where)) for mark, where in entries], overwrite=False)

    def committed(self) -> None:
        """The caller's transaction is committed: forgets what LMDB holds now, and reads it there."""
        assert self._next is not None, "commit comes first"
        self._end_reading()
        (now, covered, self._gone_count), before, self._next = self._next, self.merged, None
        if now is None or before is None:
            self._unmerged = FingerprintTable()
        else:
            number = before.slices
            while number != now.slices:
                self._unmerged.drop_slice(number)
                number = (number + 1) % SLICES
            if self._frozen:
                addresses = np.fromiter(self._frozen.values(), np.uint64, len(self._frozen))
                self._unmerged.add(b"".join(self._frozen), addresses)
        self._frozen = {}
        self.merged, self._covered = now or before, covered

    def remove(self, txn: Txn, entries: Iterable[tuple[bytes, Address]]) -> None:
        """Takes out, in the caller's write transaction, each fingerprint that still stands for that address.

        Nobody may look up until the caller has ended the transaction and called `reread`.
        """
        entries = list(entries)
        self._unmerged.drop(entries)
        cursor = txn.cursor(self._db)
        for fingerprint, where in entries:
            for layer in (self._recent, self._frozen):
                if layer.get(fingerprint) == where:
                    del layer[fingerprint]
            if cursor.set_key(fingerprint) and _address(cursor.value()) == where:
                cursor.delete()
        if self.merged is not None and entries:
            addresses = np.array([where for _, where in entries], np.uint64)
            had = self.merged.has_each(b"".join([mark for mark, _ in entries]), addresses)
            gone = [where for (_, where), one in zip(entries, had, strict=True) if not one]
            self._gone_count += self._index.put_gone(txn, gone)

    def forget_gone(self, container: ContainerId) -> None:
        """What was removed is out of the container's table, durably: it is not named any more, durably neither.
        StoreFull, StoreFailed."""
        if self._gone_count:
            with self._index.write() as txn:
                forgotten = self._index.forget_gone_of(txn, container)
            self._gone_count -= forgotten

    def reread(self) -> None:
        """The next lookup sees what LMDB holds then."""
        self._end_reading()

    def close(self) -> None:
        """Ends the read transaction. What is pending is dropped."""
        self._end_reading()
        if self._filter is not None:
            self._filter.close()
            self._filter = None

    def _reading(self) -> lmdb.Cursor[bytes] | None:
        """The cursor of the long-lived read transaction, begun when it is first needed; None where LMDB has nothing."""
        if self._txn is None:
            self._txn = self._index.env.begin(db=self._db)
            if self._txn.stat(self._db)["entries"]:
                self._cursor = self._txn.cursor(self._db)
        return self._cursor

    def _end_reading(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
        if self._txn is not None:
            self._txn.abort()
        self._cursor = self._txn = None


def _addresses(pairs: Sequence[tuple[bytes, bytes]]) -> dict[bytes, Address]:
    """What LMDB has for each fingerprint that it knows. Damaged."""
    if len(pairs) < _MANY:
        return {mark: _address(value) for mark, value in pairs}
    marks, values = zip(*pairs, strict=True)
    if set(map(len, values)) != {_VALUE_BYTES}:
        return {mark: _address(value) for mark, value in pairs}  # says which, and what is wrong with it
    addresses: list[Address] = np.frombuffer(b"".join(values), "<u8").tolist()
    return dict(zip(marks, addresses, strict=True))


def _address(value: bytes | memoryview) -> Address:
    if len(value) != _VALUE_BYTES:
        raise Damaged(f"fingerprint index: a value of {len(value)} bytes is not an address; rebuild the index")
    return Address(int.from_bytes(value, "little"))
