"""How much a container holds and takes, from its header and its size alone: 4 KiB are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dedup.layout import CONTAINER_PAGE_BYTES, RAW_SLOTS_OFFSET, SLOTS_MAX, container_path, unpack_container_header
from dedup.sealed_layout import unpack_sealed_header
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId


@dataclass(frozen=True, slots=True)
class ContainerSize:
    """`slots` filled: exact for a sealed container, at most so many for a raw one. `stored_bytes` is what their blocks
    take, in the form they have; `disk_bytes` what the file does, as the disk counts."""

    form: ContainerForm
    slots: int
    stored_bytes: int
    disk_bytes: int
    written_ns: int


def examine(storage: Storage, directory: Path, container: ContainerId) -> ContainerSize:
    """FileNotFoundError; Damaged and UnknownFormat for one whose header is not right."""
    path = container_path(directory, container)
    fd = storage.open(path, os.O_RDONLY)
    try:
        status = storage.stat(fd)
        page = storage.pread(fd, CONTAINER_PAGE_BYTES, 0)
    finally:
        storage.close(fd)
    form = unpack_container_header(page, path).form
    if form is ContainerForm.RAW:
        slots = min(SLOTS_MAX, max(0, status.st_size - RAW_SLOTS_OFFSET) // BLOCK_BYTES)
        stored = slots * BLOCK_BYTES
    else:
        sealed = unpack_sealed_header(page, path)
        slots = sealed.slots
        stored = max(0, status.st_size - sealed.table_end)
    return ContainerSize(form, slots, stored, status.st_blocks * 512, status.st_mtime_ns)
