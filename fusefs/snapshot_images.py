"""The images that a snapshot mount reads, those of the files used last, and the buffers that their bytes go through.

Invariants:
- an image that was made before its moment was held, and has been thinned out since, is made anew and not read on;
- a buffer belongs to one reply, until pyfuse3 has handed that to the kernel, which it does before another task runs;
- bounded: IMAGES_MAX images and READERS_MAX buffers and threads, however many files are open.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import trio

from dedup.errors import Damaged, MomentGone, OnItsWay, WouldBlock
from dedup.history import PastImage
from dedup.image import room_for
from fusefs.request_wait import let_others
from fusefs.snapshot_tree import SnapshotFile

READERS_MAX: Final = 16
"""Reads that wait for disks at one time."""
IMAGES_MAX: Final = 32
"""Images kept for reading, each at most some 4 MiB of decoded pointers and the overlay of its moment."""
SOON_SECONDS: Final = 0.0002
"""For so long a disk is looked at again and again before a thread waits for it, which costs about as much by itself."""
SOON_BYTES_MAX: Final = 128 << 10
"""More comes in pieces: to look at them again and again costs more than a thread does."""
READ_BYTES_MAX: Final = 1 << 20
"""Largest read request of the kernel: 256 pages."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Coming:
    """Bytes that are not here yet, but on their way."""

    work: Future[Any] | None = None
    """Of the thread that is at it; None: the disk was asked."""


@dataclass(frozen=True, slots=True)
class _Kept:
    image: PastImage
    turn: trio.Lock = field(default_factory=trio.Lock)
    """Of large reads that wait for the disk."""


class SnapshotImages:
    """Reads files whose moments are held."""

    def __init__(self, make: Callable[[SnapshotFile], Awaitable[PastImage]]) -> None:
        """`make` looks an image up. MomentGone."""
        self._make = make
        self._images: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._readers = trio.CapacityLimiter(READERS_MAX)
        self._buffer = _new_buffer()
        self._spare_buffers: list[memoryview] = []

    async def ready(self, node: SnapshotFile) -> None:
        """Sees to it that there is an image. MomentGone."""
        await self._image(node)

    def read_now(self, node: SnapshotFile, off: int, size: int) -> memoryview | Coming | None:
        """The bytes, in the one buffer of all such reads: no await before they are given away. Else `read` them, and
        say whether they are coming."""
        kept = self._images.get(node.key)
        if kept is None or size > READ_BYTES_MAX:
            return None
        self._images.move_to_end(node.key)
        if size > SOON_BYTES_MAX and kept.turn.locked():
            return Coming()
        return self._now(kept.image, off, size)

    def _now(self, image: PastImage, off: int, size: int) -> memoryview | Coming | None:
        try:
            return image.read_into(off, size, self._buffer, wait=False)
        except OnItsWay as on_its_way:
            # Not the exception itself: it would keep what the work gives until garbage is collected.
            return Coming(on_its_way.work)
        except (WouldBlock, MomentGone, Damaged):
            return None

    async def read(self, node: SnapshotFile, off: int, size: int, coming: Coming | None = None) -> bytes | memoryview:
        """The bytes, fewer past the end; may wait. No await before they are given away. Damaged, MomentGone.

        What is `coming` from the disk is looked at again and again, and others have their turn in between: a disk is
        often quicker than a thread would be to begin waiting for it. What a thread is at is waited for here.
        Large reads of one image wait for each other: side by side they would look like jumps to the kernel, which reads
        ahead of who reads on.
        """
        kept = self._images.get(node.key)
        if kept is None or coming is None:
            return await self._read_waiting(node, off, size)
        if size <= SOON_BYTES_MAX:
            return await self._read_coming(kept, node, off, size, coming)
        async with kept.turn:
            return await self._read_coming(kept, node, off, size, coming)

    async def _read_coming(
        self, kept: _Kept, node: SnapshotFile, off: int, size: int, coming: Coming
    ) -> bytes | memoryview:
        end = time.perf_counter() + SOON_SECONDS
        while True:
            if coming.work is not None:
                await _ended(coming.work)
            elif size <= SOON_BYTES_MAX:
                await let_others()
            part = self._now(kept.image, off, size)
            if isinstance(part, memoryview):
                return part
            if part is None or (part.work is None and (size > SOON_BYTES_MAX or time.perf_counter() >= end)):
                return await self._read_waiting(node, off, size)
            coming = part

    async def _read_waiting(self, node: SnapshotFile, off: int, size: int) -> bytes | memoryview:
        return await self._with_image(node, lambda image: self._read_image(image, off, size))

    async def allocated(self, node: SnapshotFile) -> int:
        """As `PastImage.allocated`."""
        return await self._with_image(node, _allocated)

    async def _with_image(self, node: SnapshotFile, use: Callable[[PastImage], Awaitable[_T]]) -> _T:
        """`use` may be called twice."""
        try:
            return await use(await self._image(node))
        except MomentGone:
            # Made before the moment was held, and history was thinned out in between. One made now is right.
            self._images.pop(node.key, None)
            return await use(await self._image(node))

    async def _read_image(self, image: PastImage, off: int, size: int) -> bytes | memoryview:
        async with self._readers:
            buffer = self._spare_buffers.pop() if self._spare_buffers else _new_buffer()
            if size > READ_BYTES_MAX:
                return await trio.to_thread.run_sync(image.read, off, size)
            try:
                return await trio.to_thread.run_sync(image.read_into, off, size, buffer)
            finally:
                # Nobody takes it before the reply is out: that needs another task to run.
                self._spare_buffers.append(buffer)

    async def _image(self, node: SnapshotFile) -> PastImage:
        kept = self._images.get(node.key)
        if kept is None:
            kept = _Kept(await self._make(node))
            # Two tasks may both have come here: the later image stays, both are right.
            self._images[node.key] = kept
            if len(self._images) > IMAGES_MAX:
                self._images.popitem(last=False)
        return kept.image


async def _ended(work: Future[Any]) -> None:
    """Waits for what a thread is at, however that ends."""
    ended = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def tell(_: Future[Any]) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)

    work.add_done_callback(tell)
    await ended.wait()


async def _allocated(image: PastImage) -> int:
    return await trio.to_thread.run_sync(image.allocated)


def _new_buffer() -> memoryview:
    return memoryview(bytearray(room_for(READ_BYTES_MAX)))
