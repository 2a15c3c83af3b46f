"""Settling: what a writer that has ended left in memory only is on the disk before recovery calls it durable.

Invariants:
- everything past the last checkpoint is synced before it is read: a block, an entry, a name;
- it is then read from the disk, not from memory: after a sync that failed the kernel calls dropped pages clean, and
  neither a read nor another sync would tell.

The cost is bounded by what one checkpoint covers, and nothing after a clean close.
"""

from __future__ import annotations

import os
from pathlib import Path

from dedup import layout
from dedup.catalog import Catalog, Index
from dedup.journal_reader import segments
from dedup.pointer_map import SEQ_MAX
from dedup.storage import Storage
from dedup.types import Seq
from dedup.watermark import Watermark


def settle(storage: Storage, path: Path, index: Index, watermark: Watermark) -> None:
    """Settles the store at `path`, of which the index holds what was durable at the last checkpoint. StoreFailed."""
    containers = path / layout.CONTAINERS_NAME
    storage.sync_directory(containers)
    for name in storage.listdir(containers):
        container = layout.container_named(name)
        if container is not None and (container >= watermark.next_container or container in watermark.open):
            _settle_file(storage, containers / name)
    with index.read() as txn:
        anchors = {name: Catalog(index, group).anchor(txn, SEQ_MAX) for name, group in index.group_ids(txn).items()}
    for name in storage.listdir(path / layout.GROUPS_NAME):
        journal = path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        anchor = anchors.get(name)
        first = Seq(1) if anchor is None else anchor.position.segment
        for segment in segments(storage, journal):
            if segment >= first:
                _settle_file(storage, layout.segment_path(journal, segment))


def _settle_file(storage: Storage, path: Path) -> None:
    fd = storage.open(path, os.O_RDONLY)
    try:
        storage.datasync(fd)
        storage.forget_cached(fd)
    finally:
        storage.close(fd)
