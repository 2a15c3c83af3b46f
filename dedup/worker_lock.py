"""The lock of those who replace containers: sealing and the sweep of a collection, one process at a time.

A child of an appliance that was killed may still be at it while the next writer of the store has begun: what it does
is harmless to that writer, but two must not write one NAME.tmp.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dedup.errors import StoreBusy
from dedup.layout import CONTAINER_SUFFIX, CONTAINERS_NAME, TEMPORARY_SUFFIX
from dedup.storage import Storage

WORKER_LOCK_NAME: Final = "worker.lock"
WAIT_SECONDS: Final = 60.0
_STEP_SECONDS: Final = 0.05


@contextmanager
def worker_lock(storage: Storage, store: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Holds it; what one before left half-made is removed first. StoreBusy when another does not give it up."""
    fd = storage.open(store / WORKER_LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        until = time.monotonic() + wait_seconds
        while not storage.lock(fd):
            if time.monotonic() >= until:
                raise StoreBusy(f"{store}: another process seals or collects; try again when it is done")
            time.sleep(_STEP_SECONDS)
        _remove_half_made(storage, store / CONTAINERS_NAME)
        yield
    finally:
        storage.close(fd)


def _remove_half_made(storage: Storage, directory: Path) -> None:
    for name in storage.listdir(directory):
        if name.endswith(CONTAINER_SUFFIX + TEMPORARY_SUFFIX):
            storage.unlink(directory / name)
