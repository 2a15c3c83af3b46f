"""What a store occupies, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dedup import layout
from dedup.container_size import examine
from dedup.errors import StoreError
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Bytes on disk; bytes that records brought (`logical`); how many times they were larger than what was kept of
    them before compression (`dedup_ratio`), and by compression."""

    bytes: int
    logical_bytes: int
    dedup_ratio: float
    compression_ratio: float
    containers: int
    snapshots: int


def measure(path: Path, logical_bytes: int, snapshots: int) -> StoreUsage:
    """Walks the store's files; a writer may be at work meanwhile. Blocks for as long as that takes."""
    used = unique = stored = count = 0
    containers = path / layout.CONTAINERS_NAME
    for file, status in Storage().walk(path):
        used += status.st_blocks * 512
        if file.parent == containers:
            count += 1
            slots, taken = _blocks(file, status.st_ino, status.st_size, status.st_mtime_ns)
            unique += slots * BLOCK_BYTES
            stored += taken
    return StoreUsage(
        used,
        logical_bytes,
        round(logical_bytes / unique, 3) if unique else 1.0,
        round(unique / stored, 3) if stored else 1.0,
        count,
        snapshots,
    )


@lru_cache(maxsize=1 << 16)
def _blocks(file: Path, inode: int, size: int, written_ns: int) -> tuple[int, int]:
    """(blocks, bytes that they take) of a container, looked at once per version of its file; of another file, none."""
    container = layout.container_named(file.name)
    if container is None:
        return 0, 0
    try:
        found = examine(Storage(), file.parent, container)
    except (FileNotFoundError, StoreError):
        return 0, 0
    return found.slots, found.stored_bytes
