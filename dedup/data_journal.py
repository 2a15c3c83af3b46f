"""A data journal: the chain of containers that receives the blocks of new IOs.

Invariants:
- blocks go to one open container at a time; a new one is begun when it is full, when an append to it failed, after
  `rotate`, and after the store was opened: never is a container of an earlier life appended to;
- a container that is no longer appended to stays open until a `sync` that covers it has succeeded;
- nothing is appended or synced after a sync has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dedup.container import RawContainerWriter
from dedup.errors import StoreFailed
from dedup.layout import SLOT_BITS
from dedup.storage import Buffer, Storage
from dedup.sync_log import Unsynced
from dedup.types import ContainerId, JournalId


class DataJournal:
    """`next_container` gives numbers that no container of the store has, or will be given again. What is appended is
    noted in `unsynced`.

    Called by one thread at a time, but `sync`, which may run beside the others.
    """

    def __init__(
        self,
        storage: Storage,
        directory: Path,
        journal: JournalId,
        name: str,
        next_container: Callable[[], ContainerId],
        unsynced: Unsynced | None = None,
    ) -> None:
        self._storage = storage
        self._unsynced = unsynced or Unsynced()
        self._directory = directory
        self.journal = journal
        self.name = name
        self._next_container = next_container
        self._open: RawContainerWriter | None = None
        self._left: list[RawContainerWriter] = []
        """Containers that get no more blocks and were not synced since their last."""
        self._failed: str | None = None
        self._sync_lock = threading.Lock()
        """Held while containers are synced and closed."""
        self._change_lock = threading.Lock()
        """Guards `_open` and `_left` for as long as it takes to look at both."""

    @property
    def container(self) -> ContainerId | None:
        """The container that takes the next block, None before there is one."""
        return None if self._open is None else self._open.container

    @property
    def slots_used(self) -> int:
        """Slots of `container` that are spent."""
        return 0 if self._open is None else self._open.next_slot

    def append(
        self, blocks: Sequence[Buffer], fingerprints: Sequence[bytes], whole: Sequence[Buffer] | None = None
    ) -> NDArray[np.uint64]:
        """Writes the blocks (4096 bytes each) and returns the address of each. DURABLE after `sync`. `whole`: the same
        bytes in larger pieces, which are quicker to write.

        StoreFull, StoreFailed: none of the blocks has an address that counts; the next append uses a new container.
        """
        self._check_usable()
        writer = self._open
        if writer is not None and len(blocks) <= writer.slots_free:
            return self._append_to(writer, whole or blocks, fingerprints)
        addresses = np.empty(len(blocks), dtype="<u8")
        done = 0
        while done < len(blocks):
            writer = self._writer()
            end = min(len(blocks), done + writer.slots_free)
            addresses[done:end] = self._append_to(writer, blocks[done:end], fingerprints[done:end])
            done = end
        return addresses

    def let_pass(self) -> None:
        """`RawContainerWriter.let_pass`, of the container that takes the next block."""
        if self._open is not None:
            self._open.let_pass()

    def _append_to(
        self, writer: RawContainerWriter, blocks: Sequence[Buffer], fingerprints: Sequence[bytes]
    ) -> NDArray[np.uint64]:
        was_empty = writer.next_slot == 0
        try:
            first = writer.append(blocks, fingerprints)
        except BaseException:
            self._abandon(writer, is_empty=was_empty)
            raise
        where = (writer.container << SLOT_BITS) + first
        return np.arange(where, where + len(fingerprints), dtype=np.uint64)

    def _writer(self) -> RawContainerWriter:
        """The open container, a new one when there is none with room."""
        if self._open is not None and self._open.slots_free == 0:
            self.rotate()
        if self._open is None:
            self._open = RawContainerWriter.create(
                self._storage, self._directory, self._next_container(), self.journal, self._unsynced
            )
        return self._open

    def _abandon(self, writer: RawContainerWriter, *, is_empty: bool) -> None:
        """No more is appended to the container. One without a block goes: a full disk must not gather them."""
        self.rotate()
        if is_empty:
            with self._sync_lock:
                if writer in self._left:
                    self._left.remove(writer)
                    writer.discard()

    def rotate(self) -> None:
        """The next append begins a new container. The one so far is synced and closed by the next `sync`."""
        with self._change_lock:
            if self._open is not None:
                self._left.append(self._open)
                self._open = None

    def sync(self) -> None:
        """Every block appended before the call is DURABLE when it returns. Callable from any thread. StoreFailed."""
        with self._sync_lock:
            self._check_usable()
            with self._change_lock:
                left, current = list(self._left), self._open
            try:
                for writer in left:
                    writer.sync()
                if current is not None:
                    current.sync()
            except StoreFailed as error:
                self._failed = str(error)
                raise
            with self._change_lock:
                del self._left[: len(left)]
            for writer in left:
                writer.close()

    def close(self) -> None:
        """Gives the descriptors back. Not a sync."""
        with self._sync_lock:
            self.rotate()
            self._failed = self._failed or f"data journal {self.name} is closed"
            while self._left:
                self._left.pop().close()

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise StoreFailed(self._failed)
