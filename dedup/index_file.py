"""The index's file as LMDB maps it: its length, which LMDB does not look at.

LMDB maps the file and believes what its header says of it. A page that the file has been cut short of would not be an
error but a signal that ends the process (SIGBUS). So its length is held against the header when it is opened, and the
writer sees that the two agree: a page that was taken and given back within one transaction may never have been written.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import lmdb

from dedup.errors import Damaged, StoreFailed

DATA_NAME: Final = "data.mdb"
_LOOKS: Final = 5
_PAUSE_SECONDS: Final = 0.05
"""Between a writer's commit and its `complete` the file may be short: a reader looks again."""


def check_length(env: lmdb.Environment, directory: Path) -> None:
    """Damaged when the file ends before the last page that its header names."""
    for look in range(_LOOKS):
        if os.stat(directory / DATA_NAME).st_size >= _bytes_named(env):
            return
        if look < _LOOKS - 1:
            time.sleep(_PAUSE_SECONDS)
    raise Damaged(
        f"{directory / DATA_NAME}: the index is cut short; it can be made anew from the journal: "
        "`rewindfs verify --repair`"
    )


def complete(env: lmdb.Environment, directory: Path) -> None:
    """Makes the file as long as its header says, after a commit. StoreFailed, of a full disk, too: the commit is done,
    and whoever tried it again would not know."""
    path, length = directory / DATA_NAME, _bytes_named(env)
    try:
        if os.stat(path).st_size < length:
            os.truncate(path, length)
    except OSError as error:
        what = f"{path}: cannot be made {length} bytes long: {error.strerror}; open the store anew"
        raise StoreFailed(what) from error


def _bytes_named(env: lmdb.Environment) -> int:
    pages: int = env.info()["last_pgno"] + 1
    return pages * int(env.stat()["psize"])
