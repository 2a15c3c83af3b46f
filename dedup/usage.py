"""What a store occupies, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dedup import layout
from dedup.storage import Storage


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
            unique += max(0, status.st_size - layout.RAW_SLOTS_OFFSET)
            stored += max(0, status.st_size - layout.RAW_SLOTS_OFFSET)
    return StoreUsage(
        used,
        logical_bytes,
        round(logical_bytes / unique, 3) if unique else 1.0,
        round(unique / stored, 3) if stored else 1.0,
        count,
        snapshots,
    )
