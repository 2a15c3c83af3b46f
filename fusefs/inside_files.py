"""What files/ shows below a version of a volume: asked of the process that reads the image, one for each image.

Invariants:
- `immutable`: as the image, what is inside it never changes;
- bounded: PROCESSES_MAX of them beside those in use, each with its own limits (`inside.worker`); WAITING_MAX requests
  wait for them, so that the mount has others left for the rest of its tree;
- an image that holds no file system is an empty directory that says why; one that is not read or whose bytes cannot be
  had is an error: who copies it must not take it for empty.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio
from pyfuse3 import EntryAttributes

from dedup.errors import MomentGone
from dedup.history import PastImage
from dedup.types import BLOCK_BYTES
from fusefs.inside.filesystem import Node as InnerNode
from fusefs.inside.image_process import ImageProcess, ImageUnreadable
from fusefs.inside.messages import READ_BYTES_MAX, Entries, Entry, Opened
from fusefs.snapshot_tree import ALWAYS_SECONDS, ImageDirectory, Inside, InsideNode

log = logging.getLogger("rewindfs.files")

PROCESSES_MAX: Final = 4
"""Kept when nobody asks them anything, some 20 to 60 MiB each."""
IDLE_SECONDS: Final = 60.0
WAITING_MAX: Final = 192
THREADS_MAX: Final = 16
NAMES_SAID_MAX: Final = 5
_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Running:
    process: ImageProcess
    users: int = 0
    used: float = 0.0
    turn: trio.Lock = field(default_factory=trio.Lock)
    """An image that takes long keeps one thread waiting, not all."""


class InsideFiles:
    """The files inside images. Methods raise ImageUnreadable, which names volume, moment and path; or what a store's
    image raises."""

    def __init__(self, image: Callable[[ImageDirectory], Awaitable[PastImage]]) -> None:
        """`image` makes the bytes of an image; MomentGone."""
        self._image = image
        self._running: OrderedDict[object, _Running] = OrderedDict()
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self._waiting = 0

    async def open(self, image: ImageDirectory) -> Opened:
        """What an image holds. NothingInside where that is no file system."""
        running = self._running.get(image.key)
        if running is not None and running.process.opened is not None:
            return running.process.opened
        return await self._ask(image, "", ImageProcess.open)

    async def lookup(self, directory: Inside, name: bytes) -> InsideNode | None:
        """What has that name in a directory, if anything has."""
        inner = await self._directory(directory)
        entries = await self._ask(image_of(directory), _path(directory, name), ImageProcess.lookup, inner, name)
        if not entries.entries:
            return None
        node = self._node(directory, entries.entries[0])
        if node is None:
            raise _unreadable(await self.label(directory), _path(directory, name), entries.entries[0].why)
        return node

    async def entries(self, directory: Inside, start: int) -> list[tuple[bytes, InsideNode | None]]:
        """Some names of a directory from the `start`th on, None for those that cannot be read; none at the end.

        ImageUnreadable in the place of the end, where the directory has names that cannot be shown.
        """
        inner = await self._directory(directory)
        page: Entries = await self._ask(image_of(directory), _path(directory), ImageProcess.list, inner, start)
        if not page.entries and page.unusable:
            what = f"{page.unusable} names in this directory cannot be shown: twice there, or none that Linux allows"
            raise _unreadable(await self.label(directory), _path(directory), what)
        return [(entry.name, self._node(directory, entry)) for entry in page.entries]

    async def left_out(self, directory: Inside, names: Collection[bytes]) -> ImageUnreadable:
        """The error that says which names of a directory could not be listed."""
        shown = ", ".join(os.fsdecode(name) for name in sorted(names)[:NAMES_SAID_MAX])
        more = f" and {len(names) - NAMES_SAID_MAX} more" if len(names) > NAMES_SAID_MAX else ""
        what = f"not listed, because they cannot be read: {shown}{more}"
        return _unreadable(await self.label(directory), _path(directory), what)

    async def read(self, node: InsideNode, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end."""
        parts = []
        for at in range(offset, offset + length, READ_BYTES_MAX):
            count = min(READ_BYTES_MAX, offset + length - at)
            data = await self._ask(node.image, node.path, ImageProcess.read, node.inner, at, count)
            parts.append(data)
            if len(data) < count:
                break
        return b"".join(parts)

    async def readlink(self, node: InsideNode) -> bytes:
        """Where a symbolic link leads to."""
        return await self._ask(node.image, node.path, ImageProcess.readlink, node.inner)

    async def xattrs(self, node: InsideNode) -> dict[bytes, bytes]:
        """Extended attributes that it has in the image."""
        return await self._ask(node.image, node.path, ImageProcess.xattrs, node.inner)

    async def label(self, node: Inside) -> str:
        """Volume and moment of an image, for messages."""
        image = image_of(node)
        running = self._running.get(image.key)
        return (await self._image(image)).label if running is None else running.process.label

    async def close_idle_ones(self) -> None:
        """Ends the processes that nobody has asked for a while, until it is cancelled."""
        while True:
            await trio.sleep(IDLE_SECONDS)
            before = time.monotonic() - IDLE_SECONDS
            await self._end([running for running in self._running.values() if running.used < before])

    async def close(self) -> None:
        """Ends all processes."""
        with trio.CancelScope(shield=True):
            await self._end(list(self._running.values()))

    # Processes

    async def _ask(self, image: ImageDirectory, path: str, question: Callable[..., _T], *args: object) -> _T:
        """The answer of the image's process."""
        try:
            return await self._ask_once(image, path, question, *args)
        except MomentGone:
            # Its image was made before the moment was held, and history was thinned out since. One made now is right.
            return await self._ask_once(image, path, question, *args)

    async def _ask_once(self, image: ImageDirectory, path: str, question: Callable[..., _T], *args: object) -> _T:
        async with self._process(image) as process:
            try:
                return await trio.to_thread.run_sync(question, process, *args, limiter=self._threads)
            except ImageUnreadable as error:
                raise _unreadable(process.label, path, str(error), type(error)) from error

    @asynccontextmanager
    async def _process(self, image: ImageDirectory) -> AsyncIterator[ImageProcess]:
        """The process of an image while the block runs; it is not ended meanwhile."""
        if self._waiting >= WAITING_MAX:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self._waiting += 1
        try:
            running = self._running.get(image.key)
            if running is None:
                bytes_of = await self._image(image)
                # Another task may have come here as well meanwhile.
                running = self._running.get(image.key) or _Running(ImageProcess(bytes_of))
                self._running[image.key] = running
            running.users += 1
            self._running.move_to_end(image.key)
            try:
                async with running.turn:
                    yield running.process
            except MomentGone:
                if self._running.get(image.key) is running:
                    del self._running[image.key]
                await trio.to_thread.run_sync(running.process.close)
                raise
            finally:
                running.users -= 1
                running.used = time.monotonic()
        finally:
            self._waiting -= 1
        idle = [running for running in self._running.values() if not running.users]
        await self._end(idle[: max(0, len(self._running) - PROCESSES_MAX)])

    async def _end(self, processes: list[_Running]) -> None:
        ending = [key for key, running in self._running.items() if running in processes and not running.users]
        for process in [self._running.pop(key).process for key in ending]:
            await trio.to_thread.run_sync(process.close)

    # Nodes

    async def _directory(self, directory: Inside) -> InnerNode:
        if isinstance(directory, InsideNode):
            if not stat.S_ISDIR(directory.status.mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return directory.inner
        return (await self.open(directory)).root

    def _node(self, directory: Inside, entry: Entry) -> InsideNode | None:
        if entry.status is None:
            return None
        return InsideNode(image_of(directory), entry.node, entry.status, _path(directory, entry.name))


def fill(entry: EntryAttributes, node: InsideNode) -> None:
    """The attributes of what is inside an image."""
    status = node.status
    entry.attr_timeout = ALWAYS_SECONDS
    entry.st_mode, entry.st_uid, entry.st_gid = status.mode, status.uid, status.gid
    entry.st_size, entry.st_blocks = status.size, -(-status.used_bytes // 512)
    entry.st_nlink, entry.st_blksize = max(1, status.links), BLOCK_BYTES
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = status.atime, status.mtime, status.ctime


def image_of(node: Inside) -> ImageDirectory:
    """The image that something is in."""
    return node.image if isinstance(node, InsideNode) else node


def _path(directory: Inside, name: bytes = b"") -> str:
    above = directory.path if isinstance(directory, InsideNode) else ""
    return "/".join(filter(None, [above, os.fsdecode(name)]))


def _unreadable(label: str, path: str, what: str, kind: type[ImageUnreadable] = ImageUnreadable) -> ImageUnreadable:
    where = f"{label}: /{path}" if path else label
    return kind(f"{where}: {what}".encode(errors="backslashreplace").decode())
