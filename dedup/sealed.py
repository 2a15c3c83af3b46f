"""Sealing: a container's live slots, compressed, in a new file that takes the old one's name.

Invariants:
- `pointers-resolve`: every block is verified as it is read, and the new file is durable before the rename, so no
  instant exists at which the container's name stands for less than its live slots;
- the old file stays readable through descriptors that are open;
- a file NAME.tmp is no container: what a crash leaves of one is overwritten by the next seal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from dedup.container import ContainerReader
from dedup.layout import TEMPORARY_SUFFIX, container_path
from dedup.sealed_form import write_sealed
from dedup.sealed_layout import SEALED_GROUP_BLOCKS
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId

__all__ = ["seal"]


def seal(
    storage: Storage,
    directory: Path,
    container: ContainerId,
    live: Iterable[int] | None,
    *,
    breathe: Callable[[], None] = lambda: None,
) -> int:
    """Replaces the container, raw or sealed, by a sealed one with the `live` slots (None: all). Returns its bytes.

    DURABLE when it returns. Damaged (a live slot is missing or unsound), StoreFull, StoreFailed: the container is what
    it was before, except that a failed directory sync leaves open which of the two is found after a power cut.
    Nothing may append to the container. Not cancellable; reads and writes at most one group at a time, and calls
    `breathe` before each.
    """
    path = container_path(directory, container)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    reader = ContainerReader.open(storage, directory, container)
    try:
        slots = reader.slots() if live is None else sorted(set(live))
        runs = list(_runs(slots))
        fingerprints = b"".join([reader.fingerprints(slot, count) for slot, count in runs])
        fd = storage.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            header = replace(reader.header, form=ContainerForm.SEALED)
            size = write_sealed(storage, fd, header, slots, fingerprints, _groups(reader, slots, breathe))
            storage.datasync(fd)
        except BaseException:
            storage.unlink(temporary)
            raise
        finally:
            storage.close(fd)
        storage.replace(temporary, path)
        return size
    finally:
        reader.close()


def _runs(slots: list[int]) -> Iterator[tuple[int, int]]:
    """(first slot, slots) of each stretch of consecutive slots."""
    start = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            yield slots[start], index - start
            start = index


def _groups(reader: ContainerReader, slots: list[int], breathe: Callable[[], None]) -> Iterator[memoryview]:
    """The slots' blocks, verified, a group's at a time; the buffer is used again for the next."""
    buffer = memoryview(bytearray(SEALED_GROUP_BLOCKS * BLOCK_BYTES))
    for first in range(0, len(slots), SEALED_GROUP_BLOCKS):
        breathe()
        members = slots[first : first + SEALED_GROUP_BLOCKS]
        at = 0
        for slot, count in _runs(members):
            reader.read_into(slot, count, buffer[at : at + count * BLOCK_BYTES])
            at += count * BLOCK_BYTES
        yield buffer[:at]
