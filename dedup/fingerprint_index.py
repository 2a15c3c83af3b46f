"""The fingerprint index: fingerprint → address of a block that may be the same. A hit is a candidate, never a proof.

Four layers, looked through in this order: `recent` (noted since the last checkpoint began), `frozen` (being committed
by it), `unmerged` (of older checkpoints, in memory) and the runs, files beside LMDB. Losing any of it costs
deduplication, never data.

Fingerprints are random: each one put into a tree changes a page of its own, and in a store with a long history that is
as many bytes as the block has. So they gather in memory, where they are found again from the tables of the containers
when the store is opened, and UNMERGED_MAX of them become a run, written front to back (see `fingerprint_runs`).

Invariants:
- in each layer the first address noted for a fingerprint stays: a later one, of a block that merely collides or of one
  that was stored anew since the first was damaged, is found, if at all, until the runs that have the two are merged;
- LMDB, which names the runs, never leads the containers: `commit` is called only after they are synced;
- what `Merged` says is in the runs is there, but what was removed; what it does not say is in the containers' tables,
  and what was removed of that is named under `gone` until `Merged` says it, or the table does not have it any more;
- what is named under `gone` counts as what is in memory does: neither grows without a run that ends it.

Called by one thread at a time, but `merge` and `give_room`. Of 256 at a time, `lookup` of a fingerprint that a run has
costs some 1.5 µs, a read of its page among them, and of one that none of seven runs has 0.1.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from dedup.errors import StoreFull
from dedup.fingerprint_runs import FingerprintRuns
from dedup.fingerprint_table import U64, FingerprintTable, halves, halves_of_one
from dedup.fingerprint_upgrade import forget_old, upgrade
from dedup.layout import FINGERPRINT_BYTES
from dedup.storage import Storage
from dedup.types import HOLE, Address, ContainerId
from dedup.watermark import Merged, Watermark

if TYPE_CHECKING:
    from dedup.catalog import Index, Txn

log = logging.getLogger(__name__)

UNMERGED_MAX: Final = 1 << 20
"""Fingerprints that stay out of the runs at most: those of 4 GiB of blocks, 24 MB of memory. The removed ones among
them that have to be named count, too."""
_FORGOTTEN_PER_RUN: Final = 1 << 16
"""Of those, when a run is made; ingest waits meanwhile."""
_CONTAINERS_AT_ONCE: Final = 8
"""Of those that are read when the store is opened: adding each alone would copy the whole as often."""
_FEW: Final = 8
"""Up to so many are sought one by one: numpy costs some microseconds before it begins."""
_ROW: Final = np.dtype(f"V{FINGERPRINT_BYTES}")


@dataclass(frozen=True, slots=True)
class _Next:
    """What becomes true once the caller's transaction is committed."""

    named: list[int]
    merged: Merged | None
    covered: Watermark
    gone_count: int
    is_run: bool
    """What was `unmerged` is in a run."""
    is_all: bool
    """And so is what was `frozen`."""


class FingerprintIndex:
    """Over the index that the caller opened and closes (after `close`)."""

    def __init__(self, index: Index, storage: Storage) -> None:
        self._index = index
        self._has_old = not upgrade(index, storage)
        named = list(index.fingerprint_runs())
        self._runs = FingerprintRuns(storage, Path(index.env.path()), named)
        self._named: list[int] | None = named
        """The runs that LMDB names, None when it is not known."""
        try:
            self._unname_lost()
        except BaseException:
            self._runs.close()
            raise
        self._recent: dict[bytes, Address] = {}
        self._frozen: dict[bytes, Address] = {}
        self._unmerged = FingerprintTable()
        self.merged = index.merged()
        """As LMDB says it; None: everything committed is in the runs."""
        self._covered = index.watermark()
        """What was appended by then is in `_unmerged` or in the runs."""
        self._gone_count = 0
        """How many slots are named under `gone`; more than there are, where a transaction that named some failed."""
        self._next: _Next | None = None

    def _unname_lost(self) -> None:
        """One that can be read again some day has what was removed meanwhile."""
        there = {*self._runs.numbers, *self._runs.unopened}
        kept = [number for number in self._named or () if number in there]
        if kept != self._named:
            self._named = None
            try:
                with self._index.write() as txn:
                    self._index.put_fingerprint_runs(txn, kept)
            except StoreFull as error:
                log.warning("runs that are lost stay named until the next commit: %s", error)
            else:
                self._named = kept

    @property
    def pending_count(self) -> int:
        """Fingerprints that no checkpoint covers, about 200 bytes each."""
        return len(self._recent) + len(self._frozen)

    @property
    def unmerged_count(self) -> int:
        """Fingerprints that checkpoints cover and no run has yet, 24 bytes each."""
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
        """The candidate for each fingerprint, in their order."""
        recent, frozen = self._recent, self._frozen
        if frozen:
            found: list[Address | None] = [recent.get(mark) or frozen.get(mark) for mark in fingerprints]
        else:
            found = list(map(recent.get, fingerprints))
        if len(found) > _FEW and found.count(None) == len(found):
            addresses = self._find(b"".join(fingerprints))
            if addresses.all():
                found = addresses.tolist()
            elif addresses.any():
                found = [where or None for where in addresses.tolist()]
            return found
        unknown = [at for at, where in enumerate(found) if where is None]
        if len(unknown) <= _FEW:
            for at in unknown:
                found[at] = self._find_one(fingerprints[at]) or None
        else:
            addresses = self._find(b"".join([fingerprints[at] for at in unknown]))
            for at, where in zip(unknown, addresses.tolist(), strict=True):
                found[at] = where or None
        return found

    def _find_one(self, fingerprint: bytes) -> Address:
        high, low = halves_of_one(fingerprint)
        return self._unmerged.find_one(high, low) or self._runs.find_one(high, low)

    def _find(self, fingerprints: bytes) -> U64:
        """The address of each, HOLE for those that neither memory nor a run has."""
        high, low = halves(fingerprints)
        found = self._unmerged.find(high, low)
        rest = np.flatnonzero(found == HOLE)
        if len(rest) == len(found):
            return self._runs.find(high, low)
        if len(rest):
            found[rest] = self._runs.find(high[rest], low[rest])
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
        if self._frozen:
            for mark, where in zip(fingerprints, addresses, strict=True):
                self.note(mark, Address(where))
        else:
            # In C, and not `Address` of each: this is done for every new block.
            places = cast("Sequence[Address]", addresses)
            deque(map(self._recent.setdefault, fingerprints, places), maxlen=0)

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
        """Puts what is due into runs, and names them in the caller's write transaction; it counts when that is
        committed. StoreFull, StoreFailed.

        `watermark` is what it covers; there is none in the middle of a rebuild of the index. What a rebuild that is
        killed had not yet put into a run is found by no later one.
        """
        merged, gone = self.merged, self._gone_count
        is_run = len(self._unmerged) + len(self._frozen) + gone > UNMERGED_MAX
        is_all = is_run if watermark is None else merged is None
        is_run = is_run or is_all
        if is_all:
            self._gather()
        numbers = self._runs.prepare(self._unmerged if is_run else None)
        named = [*self._runs.unopened, *numbers]
        if named != self._named:
            self._index.put_fingerprint_runs(txn, named)
        if watermark is not None and is_run:
            whole = watermark if is_all else self._covered
            merged = Merged(whole, whole, 0)
            self._index.put_merged(txn, merged)
            gone = self._index.forget_gone(txn, whole, _FORGOTTEN_PER_RUN)
        self._next = _Next(named, merged, watermark or self._covered, gone, is_run, is_all)

    def committed(self) -> None:
        """The caller's transaction is committed: forgets what the runs have now."""
        assert self._next is not None, "commit comes first"
        done, self._next = self._next, None
        self._runs.settle()
        if done.is_run:
            self._unmerged = FingerprintTable()
        if not done.is_all:
            self._gather()
        self._frozen = {}
        self._named = done.named
        self.merged, self._covered, self._gone_count = done.merged, done.covered, done.gone_count

    def _gather(self) -> None:
        """What is frozen joins what is in memory already; twice is once."""
        if self._frozen:
            addresses = np.fromiter(self._frozen.values(), np.uint64, len(self._frozen))
            self._unmerged.add(b"".join(self._frozen), addresses)

    def merge(self) -> bool:
        """A piece of the work on the runs, some ten milliseconds; any thread may call it, beside everything else.
        False: there is none until the next commit."""
        return self._runs.merge()

    def give_room(self) -> None:
        """The disk is full: what nothing names yet goes from it. Waits for nothing; any thread."""
        self._runs.give_room()

    def remove(self, txn: Txn, entries: Iterable[tuple[bytes, Address]]) -> None:
        """Takes out, in the caller's write transaction, each fingerprint that still stands for that address.

        What memory and the runs have of them is gone, DURABLY, even if that fails; but for runs that cannot be read:
        those are not named any more in that transaction.
        """
        entries = list(entries)
        self._unmerged.drop(entries)
        self._runs.drop(entries)
        self._runs.unopened.clear()
        if self._runs.numbers != self._named:
            self._named = None  # until a commit has said it
            self._index.put_fingerprint_runs(txn, self._runs.numbers)
        if self._has_old:
            forget_old(self._index, txn, entries)
        for fingerprint, where in entries:
            for layer in (self._recent, self._frozen):
                if layer.get(fingerprint) == where:
                    del layer[fingerprint]
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

    def close(self) -> None:
        """What is pending is dropped."""
        self._runs.close()
