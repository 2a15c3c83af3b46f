"""The fingerprint index: fingerprint → address of a block that may be the same. A hit is a candidate, never a proof.

Three layers, looked through in this order: `recent` (noted since the last checkpoint began), `frozen` (being committed
by it) and LMDB. Losing any of it costs deduplication, never data.

Invariants:
- the first address noted for a fingerprint stays; a later one, of a block that merely collides, is not kept;
- LMDB never leads the containers: `commit` is called only after they are synced;
- a fingerprint is out of `frozen` only when the read transaction sees it in LMDB.

Called by one thread at a time. `lookup` of a stored fingerprint costs about 1 µs, of an unknown one less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import lmdb

from dedup.errors import Damaged
from dedup.layout import FINGERPRINT_VALUE
from dedup.types import Address

_VALUE_BYTES: Final = FINGERPRINT_VALUE.size


class FingerprintIndex:
    """Over a database of an LMDB environment that the caller opened and closes (after `close`)."""

    def __init__(self, env: lmdb.Environment, db: lmdb._Database) -> None:
        self._env = env
        self._db = db
        self._recent: dict[bytes, Address] = {}
        self._frozen: dict[bytes, Address] = {}
        self._txn: lmdb.Transaction | None = None
        self._cursor: lmdb.Cursor | None = None

    @property
    def pending_count(self) -> int:
        """Fingerprints held in memory only, about 200 bytes each: what makes a checkpoint due."""
        return len(self._recent) + len(self._frozen)

    def lookup(self, fingerprints: Sequence[bytes]) -> list[Address | None]:
        """The candidate for each fingerprint, in their order. Damaged when LMDB holds something else."""
        recent, frozen = self._recent, self._frozen
        found: list[Address | None] = []
        unknown: list[bytes] = []
        for fingerprint in fingerprints:
            where = recent.get(fingerprint)
            if where is None:
                where = frozen.get(fingerprint)
                if where is None:
                    unknown.append(fingerprint)
            found.append(where)
        if not unknown:
            return found
        stored = dict(self._reading().getmulti(unknown))
        if not stored:
            return found
        for index, where in enumerate(found):
            if where is None:
                value = stored.get(fingerprints[index])
                if value is not None:
                    found[index] = _address(value)
        return found

    def note(self, fingerprint: bytes, where: Address) -> None:
        """From now on `lookup` finds it, unless the fingerprint has an address already."""
        if fingerprint not in self._frozen:
            self._recent.setdefault(fingerprint, where)

    def forget_recent(self) -> None:
        """Drops what was noted since `freeze`: for blocks that turned out not to be kept."""
        self._recent.clear()

    def freeze(self) -> None:
        """Begins a checkpoint: what was noted so far is what `commit` writes. After a failed one, that and what is new.

        The caller syncs the containers after this and before `commit`.
        """
        if self._frozen:
            for fingerprint, where in self._recent.items():
                self._frozen.setdefault(fingerprint, where)
        else:
            self._frozen = self._recent
        self._recent = {}

    def commit(self, txn: lmdb.Transaction) -> None:
        """Puts what is frozen into the caller's write transaction; it counts when that is committed."""
        pack = FINGERPRINT_VALUE.pack
        items = [(fingerprint, pack(where)) for fingerprint, where in sorted(self._frozen.items())]
        if items:
            txn.cursor(self._db).putmulti(items, overwrite=False)

    def committed(self) -> None:
        """The caller's transaction is committed: forgets what was frozen, and reads what LMDB holds now."""
        self._end_reading()
        self._frozen = {}

    def remove(self, txn: lmdb.Transaction, entries: Iterable[tuple[bytes, Address]]) -> None:
        """Takes out, in the caller's write transaction, each fingerprint that still stands for that address.

        Nobody may look up until the caller has ended the transaction and called `reread`.
        """
        cursor = txn.cursor(self._db)
        for fingerprint, where in entries:
            if self._recent.get(fingerprint) == where:
                del self._recent[fingerprint]
            if self._frozen.get(fingerprint) == where:
                del self._frozen[fingerprint]
            if cursor.set_key(fingerprint) and _address(cursor.value()) == where:
                cursor.delete()

    def reread(self) -> None:
        """The next lookup sees what LMDB holds then."""
        self._end_reading()

    def close(self) -> None:
        """Ends the read transaction. What is pending is dropped."""
        self._end_reading()

    def _reading(self) -> lmdb.Cursor:
        """The cursor of the long-lived read transaction, begun when it is first needed."""
        if self._cursor is None:
            self._txn = self._env.begin(db=self._db)
            self._cursor = self._txn.cursor(self._db)
        return self._cursor

    def _end_reading(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
        if self._txn is not None:
            self._txn.abort()
        self._cursor = self._txn = None


def _address(value: bytes | memoryview) -> Address:
    if len(value) != _VALUE_BYTES:
        raise Damaged(f"fingerprint index: a value of {len(value)} bytes is not an address; rebuild the index")
    return Address(int.from_bytes(value, "little"))
