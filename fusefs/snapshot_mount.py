"""The snapshot mount: every recovery point of a group as a read-only file.

Invariants:
- `immutable`: an inode of a file is (volume, moment), and its bytes and attributes never change; so the kernel may keep
  its pages and attributes for as long as it likes. What changes is which inode a name leads to. The one exception is
  st_blocks, which is looked up when a file is first opened: until then the file counts as full;
- `no-wrong-bytes`: a read that cannot be answered in full gives EIO; a short one is the end of the file only;
- the moments of open files and directories are held: what is open is read to its end, whatever is thinned out. One
  that is gone when it is opened gives ESTALE, and the kernel looks its name up again;
- one thread at a time uses the reader of the group (`_take_turns`);
- bounded: REFUSALS_MAX reasons, whatever is open, what `snapshot_images`, `known_names` and `inside_files` are bounded
  by. An open file has no image of its own.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from dedup.errors import BadTime, Damaged, MomentGone, MomentRefused, UnknownName
from dedup.history import History, PastImage
from dedup.types import BLOCK_BYTES, NAME_BYTES_MAX, Seq
from fusefs.errors import fuse_error, handler
from fusefs.inside.image_process import ImageUnreadable, NothingInside
from fusefs.inside_files import InsideFiles, fill
from fusefs.known_names import KnownNames
from fusefs.moment_xattrs import XATTR_PREFIX, moment_xattrs
from fusefs.read_only_operations import ReadOnlyOperations, refuse_change
from fusefs.snapshot_images import Coming, SnapshotImages
from fusefs.snapshot_inodes import SnapshotInodes
from fusefs.snapshot_tree import (
    ALWAYS_SECONDS,
    Directory,
    Found,
    ImageDirectory,
    Inside,
    InsideNode,
    MomentDirectory,
    Node,
    SnapshotFile,
    SnapshotTree,
)

log = logging.getLogger("rewindfs.snapshot_mount")

REFUSALS_MAX: Final = 256
"""Directories that remember why they refused a name."""
NAMES_MAX: Final = 8
"""Names of a damaged moment that a log line has."""
DIRECTORY_SECONDS: Final = 1.0
"""For how long the kernel may keep a directory's attributes."""
TURN_SECONDS: Final = 0.02
"""For how long a listing uses the reader before it lets others do so; a single step may take longer."""
REFUSED_XATTR: Final = b"user.rewindfs.refused"
"""Of a directory: why the last TIME looked up there was refused, or why not all of an image is shown."""
DIRTY_XATTR: Final = b"user.rewindfs.dirty"
"""Of an image: why its file system may lack some of what was written to it, or want a check."""

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Listing:
    """An open directory, with the entries it had when its listing began."""

    directory: Directory | Inside
    held: Seq | None
    entries: list[tuple[str, Found]] = field(default_factory=list)
    page: list[tuple[bytes, InsideNode | None]] = field(default_factory=list)
    page_start: int = 0
    """Inside an image: the entries that are being given."""
    unreadable: set[bytes] = field(default_factory=set)
    """Names that were left out."""


class SnapshotMount(ReadOnlyOperations):
    """The handlers of the snapshot mount, over the reader of one group; the caller closes the store afterwards."""

    supports_dot_lookup = False

    def __init__(
        self,
        reader: History,
        store_statvfs: Callable[[], os.statvfs_result],
        *,
        files: bool = False,
        forget_attributes: Callable[[int], None] | None = None,
    ) -> None:
        """`store_statvfs` tells of the disk that `df` is to show; called in a thread. `files`: show files/ as well.

        `forget_attributes` has the kernel ask for those of an inode anew, and never waits; by default it is the call
        of pyfuse3 that does so.
        """
        super().__init__()
        self._reader = reader
        self._tree = SnapshotTree(reader, clock=time.monotonic, files=files)
        self.inside = InsideFiles(partial(self._take_turns, _image_of, reader))
        self._store_statvfs = store_statvfs
        self._forget_attributes = forget_attributes or partial(pyfuse3.invalidate_inode, attr_only=True)
        self._inodes = SnapshotInodes()
        self._one_turn = trio.CapacityLimiter(1)
        self._one_entry = trio.CapacityLimiter(1)
        self._images = SnapshotImages(partial(self._take_turns, _image_of, reader))
        self._refusals: OrderedDict[Directory | ImageDirectory, str] = OrderedDict()
        self._open_files: dict[int, SnapshotFile | InsideNode] = {}
        self._known_names = KnownNames(partial(pyfuse3.invalidate_entry_async, ignore_enoent=True))
        self._unclean: OrderedDict[ImageDirectory, str] = OrderedDict()
        self._listings: dict[int, _Listing] = {}
        self._next_handle = 1
        self._damaged = Seq(0), ""
        """The moment in which damage was met last, and its names."""

    # Reading

    async def read(self, fh: int, off: int, size: int) -> bytes:
        # No await behind what `read_now` and `read` gave: pyfuse3 hands it to the kernel before another task runs.
        try:
            node = self._open_files[fh]
            if isinstance(node, InsideNode):
                return await self.inside.read(node, off, size)
            part = self._images.read_now(node, off, size)
            if isinstance(part, memoryview):
                return part  # type: ignore[return-value]  # pyfuse3 takes any buffer
            return await self._read_waiting(node, off, size, part)  # type: ignore[return-value]
        except Exception as error:  # noqa: BLE001 - must become an errno
            raise fuse_error("read", error) from None

    async def _read_waiting(self, node: SnapshotFile, off: int, size: int, coming: Coming | None) -> bytes | memoryview:
        try:
            return await self._images.read(node, off, size, coming)
        except Damaged as damage:
            names = await self._names_of(node.moment.seq)
            raise Damaged(f"snapshot {names}: {damage}" if names else str(damage)) from damage

    async def _names_of(self, seq: Seq) -> str:
        """The names that a person may know a damaged moment by; those of the last one asked for are kept."""
        known, names = self._damaged
        if known != seq:
            found = await self._take_turns(self._tree.names_of, seq)
            names = ", ".join(found[:NAMES_MAX])
            self._damaged = seq, names
        return names

    def _file(self, number: int) -> SnapshotFile | InsideNode:
        node = self._inodes.node(number)
        if isinstance(node, SnapshotFile) or (isinstance(node, InsideNode) and stat.S_ISREG(node.status.mode)):
            return node
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            refuse_change()
        node = self._file(inode)
        await self._hold(node.moment.seq)
        try:
            if isinstance(node, SnapshotFile):
                await self._images.ready(node)
                await self._look_up_allocated(inode, node)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._take_turns(self._reader.release, node.moment.seq)
            raise
        handle = self._new_handle()
        self._open_files[handle] = node
        return FileInfo(fh=handle, keep_cache=True, direct_io=False)

    async def _look_up_allocated(self, inode: int, node: SnapshotFile) -> None:
        """So that fstat(2) after open(2) tells `cp` and its like whether to look for holes."""
        if self._inodes.allocated(inode) is not None:
            return
        allocated = await self._images.allocated(node)
        self._inodes.set_allocated(inode, allocated)
        if allocated < node.state.size:
            self._forget_attributes(inode)

    def _new_handle(self) -> int:
        handle = self._next_handle
        self._next_handle += 1
        return handle

    async def _hold(self, seq: Seq) -> None:
        """The moment stays until `release`. MomentGone."""
        if self._reader.hold_again(seq):
            return
        # Whoever waits for the writer, which is changing history, has no turn meanwhile.
        await trio.to_thread.run_sync(self._reader.enter, limiter=self._one_entry)
        try:
            await self._take_turns(self._reader.hold, seq)
        finally:
            self._reader.leave()

    async def flush(self, fh: int) -> None:
        """Nothing was written."""

    @handler
    async def release(self, fh: int) -> None:
        node = self._open_files.pop(fh)
        await self._take_turns(self._reader.release, node.moment.seq)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing was written."""

    # Names

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        directory = self._directory(parent_inode)
        if isinstance(directory, Inside):
            return await self._lookup_inside(parent_inode, directory, name)
        try:
            found = await self._take_turns(_lookup, self._tree, directory, name.decode(), ctx.pid)
        except (FileNotFoundError, UnicodeDecodeError):
            raise FUSEError(errno.ENOENT) from None
        except (MomentRefused, BadTime, UnknownName) as refusal:
            self._refused(directory, "no such moment", str(refusal))
            raise FUSEError(errno.ENOENT) from None
        return self._referred(found)

    def _referred(self, found: Found) -> EntryAttributes:
        number = self._inodes.number(found.node)
        self._inodes.refer(number)
        return self._entry(number, found.node, found.seconds)

    async def _lookup_inside(self, parent: int, directory: Inside, name: bytes) -> EntryAttributes:
        node = await self.inside.lookup(directory, name) if await self._holds_files(directory) else None
        if node is None:
            raise FUSEError(errno.ENOENT)
        if not stat.S_ISDIR(node.status.mode):
            self._known_names.add(parent, name)
        return self._referred(Found(node, ALWAYS_SECONDS))

    async def _holds_files(self, directory: Inside) -> bool:
        """Whether there is a file system below; if not, or not all is shown, it is said where a person finds it.

        ImageUnreadable where there is one that is not read: that is no empty directory.
        """
        if isinstance(directory, InsideNode):
            return True
        try:
            opened = await self.inside.open(directory)
        except NothingInside as refusal:
            self._refused(directory, "no files are shown", str(refusal))
            return False
        except ImageUnreadable as refusal:
            self._keep_refusal(directory, str(refusal))
            raise
        label = await self.inside.label(directory)
        if opened.unclean and self._unclean.get(directory) != opened.unclean:
            log.warning(
                "%s: %s; what was written last may be missing: clone it and repair the clone", label, opened.unclean
            )
            self._unclean[directory] = opened.unclean
            if len(self._unclean) > REFUSALS_MAX:
                self._unclean.popitem(last=False)
        if opened.refused:
            self._refused(directory, "not all partitions are shown", f"{label}: {opened.refused}")
        return True

    def _refused(self, directory: Directory | ImageDirectory, what: str, reason: str) -> None:
        """Keeps the reason where a person finds it. A program that asks again and again is one line in the log."""
        if self._refusals.get(directory) != reason:
            log.warning("%s: %s", what, reason)
        self._keep_refusal(directory, reason)

    def _keep_refusal(self, directory: Directory | ImageDirectory, reason: str) -> None:
        self._refusals[directory] = reason
        self._refusals.move_to_end(directory)
        if len(self._refusals) > REFUSALS_MAX:
            self._refusals.popitem(last=False)

    def _directory(self, number: int) -> Directory | Inside:
        node = self._inodes.node(number)
        if isinstance(node, SnapshotFile) or (isinstance(node, InsideNode) and not stat.S_ISDIR(node.status.mode)):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return node

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            self._inodes.forget(number, lookups)

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        directory = self._directory(inode)
        seq = directory.moment.seq if isinstance(directory, MomentDirectory | Inside) else None
        if seq is not None:
            await self._hold(seq)
        handle = self._new_handle()
        self._listings[handle] = _Listing(directory, seq)
        return handle

    @handler
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings[fh]
        if isinstance(listing.directory, Inside):
            await self._list_inside(listing, listing.directory, start_id, token)
            return
        if start_id == 0:
            listing.entries = await self._list(listing.directory)
        for index in range(start_id, len(listing.entries)):
            name, found = listing.entries[index]
            number = self._inodes.number(found.node)
            entry = self._entry(number, found.node, found.seconds)
            if not pyfuse3.readdir_reply(token, name.encode(), entry, index + 1):
                self._inodes.forget(number)
                return
            self._inodes.refer(number)

    async def _list_inside(self, listing: _Listing, directory: Inside, start: int, token: ReaddirToken) -> None:
        """A part of a listing. Names whose inode is damaged are left out, and instead of the end there is an error."""
        if not await self._holds_files(directory):
            return
        replied = False
        while not replied:
            if not listing.page_start <= start < listing.page_start + len(listing.page):
                listing.page_start, listing.page = start, await self.inside.entries(directory, start)
            if not listing.page:
                break
            for name, node in listing.page[start - listing.page_start :]:
                start += 1
                if node is None:
                    listing.unreadable.add(name)
                    continue
                number = self._inodes.number(node)
                if not pyfuse3.readdir_reply(token, name, self._entry(number, node, ALWAYS_SECONDS), start):
                    self._inodes.forget(number)
                    return
                self._inodes.refer(number)
                if not stat.S_ISDIR(node.status.mode):
                    self._known_names.add(self._inodes.number(directory), name)
                replied = True
        if not replied and listing.unreadable:
            raise await self.inside.left_out(directory, listing.unreadable)

    async def _list(self, directory: Directory) -> list[tuple[str, Found]]:
        """All of a listing, leaving turns to others in between."""
        entries: list[tuple[str, Found]] = []
        steps, more = self._tree.listing(directory), True
        while more:
            more = await self._take_turns(_list_some, steps, entries)
        return entries

    @handler
    async def releasedir(self, fh: int) -> None:
        listing = self._listings.pop(fh)
        if listing.held is not None:
            await self._take_turns(self._reader.release, listing.held)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing was written."""

    # Attributes

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(inode, self._inodes.node(inode), 0)

    def _entry(self, number: int, node: Node, seconds: float) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = number
        entry.entry_timeout = seconds
        entry.st_blksize = BLOCK_BYTES
        if isinstance(node, InsideNode):
            fill(entry, node)
            return entry
        if isinstance(node, SnapshotFile):
            state, moment = node.state, node.moment.time
            entry.attr_timeout = ALWAYS_SECONDS
            entry.st_mode = stat.S_IFREG | stat.S_IMODE(state.mode)
            entry.st_uid, entry.st_gid = state.uid, state.gid
            entry.st_size = state.size
            allocated = self._inodes.allocated(number)
            entry.st_blocks = -(-(state.size if allocated is None else allocated) // 512)
            entry.st_nlink = 1
        else:
            fixed = isinstance(node, MomentDirectory | ImageDirectory)
            moment = node.moment.time if isinstance(node, MomentDirectory | ImageDirectory) else self._tree.time
            entry.attr_timeout = ALWAYS_SECONDS if fixed else DIRECTORY_SECONDS
            entry.st_mode = stat.S_IFDIR | 0o555
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
            if isinstance(node, ImageDirectory):
                # Who may not read the image may not see into it either.
                readable = node.state.mode & 0o444
                entry.st_mode = stat.S_IFDIR | readable | readable >> 2
                entry.st_uid, entry.st_gid = node.state.uid, node.state.gid
            # Not a count of subdirectories: programs that count on one would stop looking too early.
            entry.st_nlink = 1
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = moment
        return entry

    @handler
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        node = self._inodes.node(inode)
        if isinstance(node, InsideNode):
            # Programs ask for others on each file that they see; none of those is kept.
            value = (await self.inside.xattrs(node)).get(name) if name.startswith(b"user.") else None
        else:
            if isinstance(node, ImageDirectory) and name in (REFUSED_XATTR, DIRTY_XATTR):
                with suppress(ImageUnreadable):  # the answer says so
                    await self._holds_files(node)
            # `ls -l` asks for two of other names of each file.
            value = self._attributes(node).get(name) if name.startswith(XATTR_PREFIX) else None
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        node = self._inodes.node(inode)
        return list(await self.inside.xattrs(node) if isinstance(node, InsideNode) else self._attributes(node))

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        node = self._inodes.node(inode)
        if not isinstance(node, InsideNode) or not stat.S_ISLNK(node.status.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return await self.inside.readlink(node)

    def _attributes(self, node: Directory | SnapshotFile | ImageDirectory) -> dict[bytes, bytes]:
        attributes: dict[bytes, bytes] = {}
        if isinstance(node, SnapshotFile | MomentDirectory | ImageDirectory):
            attributes = moment_xattrs(node.moment)
        if not isinstance(node, SnapshotFile) and node in self._refusals:
            attributes[REFUSED_XATTR] = self._refusals[node].encode(errors="surrogateescape")
        if isinstance(node, ImageDirectory) and node in self._unclean:
            attributes[DIRTY_XATTR] = self._unclean[node].encode()
        return attributes

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        status = await trio.to_thread.run_sync(self._store_statvfs)
        result = StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(result, f"f_{name}", getattr(status, f"f_{name}"))
        result.f_namemax = NAME_BYTES_MAX
        return result

    async def _take_turns(self, function: Callable[..., _T], *args: object) -> _T:
        """Runs what uses the group's reader in a thread, one at a time."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._one_turn)


def _lookup(tree: SnapshotTree, directory: Directory, name: str, who: int) -> Found:
    return tree.lookup(directory, name, who=who)


def _image_of(reader: History, node: SnapshotFile | ImageDirectory) -> PastImage:
    """MomentGone where history has nothing of exactly that moment."""
    image = reader.image(node.state.volume, node.moment.seq)
    reader.require(node.moment.seq)
    if image.time != node.moment.time:
        raise MomentGone(f"{image.label} is another moment now, in another copy of the store; look it up again")
    return image


def _list_some(steps: Iterator[tuple[str, Found] | None], entries: list[tuple[str, Found]]) -> bool:
    """Adds to `entries` for one turn; True when there is more."""
    end = time.monotonic() + TURN_SECONDS
    for entry in steps:
        if entry is not None:
            entries.append(entry)
        if time.monotonic() >= end:
            return True
    return False
