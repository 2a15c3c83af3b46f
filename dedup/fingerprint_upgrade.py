"""Stores of older versions have their fingerprints in LMDB: they become the first run when a writer opens the store.

It is done once: the run is DURABLE before one transaction names it and empties the database.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.fingerprint_run import write_run
from dedup.fingerprint_runs import run_name
from dedup.fingerprint_table import Rows, halves
from dedup.layout import FINGERPRINT_BYTES, FINGERPRINT_VALUE
from dedup.storage import Storage
from dedup.types import HOLE

if TYPE_CHECKING:
    from dedup.catalog import Index, Txn

log = logging.getLogger(__name__)

_OLD_FILTER: Final = b"filter"
_OLD_FILTER_NAME: Final = "filter"
_ROWS_AT_ONCE: Final = 1 << 16


def upgrade(index: Index, storage: Storage) -> None:
    """Does nothing to an index that this version made. Damaged, StoreFull, StoreFailed."""
    directory, old = Path(index.env.path()), index.db["fingerprints"]
    with index.read() as txn:
        count = txn.stat(old)["entries"]
        if count:
            log.info("%s: %d fingerprints of an older version are written anew", directory, count)
            numbers = index.fingerprint_runs()
            number = max(numbers, default=0) + 1
            run = write_run(storage, directory / run_name(number), count, _rows(index, txn))
    if count:
        with index.write() as txn:
            index.put_fingerprint_runs(txn, numbers if run is None else [number, *numbers])
            txn.drop(old, delete=False)
            txn.delete(_OLD_FILTER, db=index.db["store"])
        if run is not None:
            run.close()
    if storage.exists(directory / _OLD_FILTER_NAME):
        storage.unlink(directory / _OLD_FILTER_NAME)


def _rows(index: Index, txn: Txn) -> Iterator[Rows]:
    """All of the database, ascending as LMDB has them. What is no address of a block is left out."""
    with txn.cursor(index.db["fingerprints"]) as cursor:
        entries = iter(cursor)
        while some := list(islice(entries, _ROWS_AT_ONCE)):
            whole = [one for one in some if (len(one[0]), len(one[1])) == (FINGERPRINT_BYTES, FINGERPRINT_VALUE.size)]
            if len(whole) < len(some):
                log.warning("%d rows of the index are no fingerprints, and left out", len(some) - len(whole))
            high, low = halves(b"".join([mark for mark, _ in whole]))
            where = np.frombuffer(b"".join([value for _, value in whole]), "<u8")
            yield high[where != HOLE], low[where != HOLE], where[where != HOLE]
