"""Stores of older versions have their fingerprints in LMDB: they become the first run when a writer opens the store.

It is done once: the run is DURABLE before one transaction names it and empties the database.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.errors import StoreFull
from dedup.fingerprint_run import write_run
from dedup.fingerprint_runs import run_name
from dedup.fingerprint_table import Rows, halves
from dedup.layout import FINGERPRINT_BYTES, FINGERPRINT_VALUE
from dedup.storage import Storage
from dedup.types import HOLE, Address

if TYPE_CHECKING:
    from dedup.catalog import Index, Txn

log = logging.getLogger(__name__)

_OLD_FILTER: Final = b"filter"
_OLD_FILTER_NAME: Final = "filter"
_ROWS_AT_ONCE: Final = 1 << 16
_ROWS_PER_MESSAGE: Final = 1 << 24


def upgrade(index: Index, storage: Storage) -> bool:
    """Does nothing to an index that this version made. Damaged, StoreFailed.

    False: the disk is too full for it. The old fingerprints stay where they are, and nobody looks there: what is
    removed meanwhile has to be removed by `forget_old`.
    """
    try:
        _upgrade(index, storage)
    except StoreFull as error:
        log.warning("fingerprints of an older version are done without until the store is opened anew: %s", error)
        return False
    return True


def _upgrade(index: Index, storage: Storage) -> None:
    directory, old = Path(index.env.path()), index.db["fingerprints"]
    with index.read() as txn:
        count = txn.stat(old)["entries"]
        if count:
            log.info("%s: %d fingerprints of an older version are written anew", directory, count)
            numbers = index.fingerprint_runs()
            if numbers:
                # What was removed since by an older version, or by this one on a full disk, may be in one of the two.
                log.warning("%s: an older version wrote here: runs of before cost space once more", directory)
            number = max(numbers, default=0) + 1
            run = write_run(storage, directory / run_name(number), count, _rows(index, txn))
    if count:
        try:
            with index.write() as txn:
                index.put_fingerprint_runs(txn, [] if run is None else [number])
                txn.drop(old, delete=False)
                txn.delete(_OLD_FILTER, db=index.db["store"])
        finally:
            if run is not None:
                run.close()
    if storage.exists(directory / _OLD_FILTER_NAME):
        storage.unlink(directory / _OLD_FILTER_NAME)


def forget_old(index: Index, txn: Txn, entries: Iterable[tuple[bytes, Address]]) -> None:
    """Takes out, in the caller's write transaction, each old fingerprint that has that address."""
    old = index.db["fingerprints"]
    for mark, where in entries:
        if txn.get(mark, db=old) == FINGERPRINT_VALUE.pack(where):
            txn.delete(mark, db=old)


def _rows(index: Index, txn: Txn) -> Iterator[Rows]:
    """All of the database, ascending as LMDB has them. What is no address of a block is left out."""
    with txn.cursor(index.db["fingerprints"]) as cursor:
        entries, done = iter(cursor), 0
        while some := list(islice(entries, _ROWS_AT_ONCE)):
            whole = [one for one in some if (len(one[0]), len(one[1])) == (FINGERPRINT_BYTES, FINGERPRINT_VALUE.size)]
            if len(whole) < len(some):
                log.warning("%d rows of the index are no fingerprints, and left out", len(some) - len(whole))
            high, low = halves(b"".join([mark for mark, _ in whole]))
            where = np.frombuffer(b"".join([value for _, value in whole]), "<u8")
            done += len(some)
            if done % _ROWS_PER_MESSAGE == 0:
                log.info("%s: %d fingerprints are written", index.env.path(), done)
            yield high[where != HOLE], low[where != HOLE], where[where != HOLE]
