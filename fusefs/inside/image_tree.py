"""An image as one tree: the file system in it; or p1, p2, … where it has a partition table.

Nodes are () for the root of an image with partitions, otherwise the number of a partition (0: the whole image) and what
its file system calls the inode.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from typing import Final

from dissect.volume.disk import Disk
from dissect.volume.disk.schemes import GPT

from fusefs.inside.filesystem import (
    SHOWN_TYPES,
    Corrupt,
    Filesystem,
    ImageError,
    Node,
    NoFilesystem,
    Status,
    Unsupported,
)
from fusefs.inside.image_stream import ImageBytes, ImageStream

PARTITIONS_MAX: Final = 128
SIZE_MAX: Final = (1 << 63) - 1
TIME_MAX: Final = (1 << 34) * 1_000_000_000
"""ns before and after 1970: what ext4 has room for."""
ENTRIES_MAX: Final = 1_000_000
"""Of one directory."""
NAME_BYTES_MAX: Final = 255
LISTINGS_MAX: Final = 8
"""Directories whose names are kept."""
LISTED_NAMES_MAX: Final = 1_500_000
"""Names kept of all of them."""
ERROR_CHARACTERS_MAX: Final = 500
_SECTOR: Final = 512
_U32: Final = 0xFFFFFFFF
_FIRST_LOGICAL: Final = 5
_ROOT_STATUS: Final = Status(stat.S_IFDIR | 0o555, 0, 0, 1, 0, 0, 0, 0, 0)


@dataclass(slots=True)
class _Listing:
    """The names of a directory; `unusable` counts those that cannot be shown."""

    names: dict[bytes, Node] = field(default_factory=dict)
    unusable: int = 0


class ImageTree:
    """What one image holds. NoFilesystem, Unsupported, Corrupt, or whatever a library met."""

    def __init__(self, image: ImageBytes) -> None:
        self._image = image
        self._listings: OrderedDict[Node, _Listing] = OrderedDict()
        whole = ImageStream(image)
        opener = _opener(whole)
        self._partitions: dict[int, Filesystem] = {}
        self._unreadable: dict[int, Exception] = {}
        """Partitions that hold something: their names are shown, and each use of them is this error."""
        self.refused: dict[bytes, str] = {}
        """Partitions of which nothing is shown, and why."""
        if opener is not None:
            self._partitions[0] = opener(whole)
            self.root: Node = _plain(0, self._partitions[0].root)
            return
        self.root = ()
        places = _partitions(whole)
        if not places:
            raise NoFilesystem("there is no file system that is known, nor a partition table")
        for number, (start, size) in sorted(places.items()):
            try:
                stream = ImageStream(image, start, size)
                opener = _opener(stream)
                if opener is None:
                    raise NoFilesystem("no file system that is known")
                self._partitions[number] = opener(stream)
            except Exception as error:  # noqa: BLE001 - one partition's damage is not another's
                self.refused[b"p%d" % number] = said(error)
                if not isinstance(error, NoFilesystem):
                    self._unreadable[number] = error
        if not self._partitions and not self._unreadable:
            raise NoFilesystem("; ".join(f"{name.decode()}: {why}" for name, why in self.refused.items()))

    @property
    def unclean(self) -> str:
        """Why something here may be older than what was written; empty if nothing is."""
        reasons = [
            f"p{number}: {system.unclean}" if number else system.unclean
            for number, system in self._partitions.items()
            if system.unclean
        ]
        return "; ".join(reasons)

    def status(self, node: Node) -> Status:
        if not node:
            return _ROOT_STATUS
        raw = self._system(node).status(node[1:])
        # The libraries' numbers are not all plain ones.
        mode, uid, gid, links, size, used, *times = (int(value) for value in astuple(raw))
        if not 0 <= size <= SIZE_MAX or stat.S_IFMT(mode) not in SHOWN_TYPES or mode >> 16:
            raise Corrupt(f"an inode of mode {mode:o} and size {size}")
        times = [max(-TIME_MAX, min(time, TIME_MAX)) for time in times]
        return Status(mode, uid & _U32, gid & _U32, links & _U32, size, min(max(0, used), SIZE_MAX), *times)

    def lookup(self, node: Node, name: bytes) -> Node | None:
        """The node of that name in a directory."""
        return self._listing(node).names.get(name)

    def names(self, node: Node, start: int, count: int) -> list[tuple[bytes, Node]]:
        """Names from the `start`th on; always in the same order."""
        return list(self._listing(node).names.items())[start : start + count]

    def unusable(self, node: Node) -> int:
        """How many names of a directory cannot be shown here."""
        return self._listing(node).unusable

    def read(self, node: Node, offset: int, length: int) -> bytes:
        """Fewer bytes than wanted are the end of the file."""
        size = self.status(node).size
        length = max(0, min(length, size - offset))
        data = self._system(node).read(node[1:], offset, length) if length else b""
        if len(data) != length:
            raise Corrupt(f"{len(data)} bytes instead of {length}")
        return data

    def readlink(self, node: Node) -> bytes:
        target = self._system(node).readlink(node[1:])
        if not target or b"\0" in target:
            raise Corrupt("a symbolic link without a target")
        return target

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        return self._system(node).xattrs(node[1:]) if node else {}

    def _system(self, node: Node) -> Filesystem:
        if node[0] in self._unreadable:
            raise self._unreadable[node[0]]
        return self._partitions[node[0]]

    def _listing(self, node: Node) -> _Listing:
        listing = self._listings.get(node)
        if listing is None:
            listing = self._listings[node] = self._list(node)
            while len(self._listings) > 1 and (
                len(self._listings) > LISTINGS_MAX
                or sum(len(kept.names) for kept in self._listings.values()) > LISTED_NAMES_MAX
            ):
                self._listings.popitem(last=False)
        self._listings.move_to_end(node)
        return listing

    def _list(self, node: Node) -> _Listing:
        listing = _Listing()
        if not node:
            for number, system in self._partitions.items():
                listing.names[b"p%d" % number] = _plain(number, system.root)
            listing.names.update((b"p%d" % number, (number,)) for number in self._unreadable)
            return listing
        for name, inner in self._system(node).entries(node[1:]):
            if (
                not name
                or name in (b".", b"..")
                or b"/" in name
                or b"\0" in name
                or len(name) > NAME_BYTES_MAX
                or name in listing.names
            ):
                listing.unusable += 1
            else:
                listing.names[name] = _plain(node[0], inner)
            if len(listing.names) + listing.unusable > ENTRIES_MAX:
                raise Corrupt(f"a directory of more than {ENTRIES_MAX} names")
        return listing


def _plain(partition: int, inner: Node) -> Node:
    return (partition, *(int(number) for number in inner))


def said(error: Exception) -> str:
    """In one line; with its type where that may say more than the text."""
    text = " ".join(str(error).split())[:ERROR_CHARACTERS_MAX]
    return text if isinstance(error, ImageError) and text else f"{type(error).__name__} {text}".strip()


def _opener(stream: ImageStream) -> Callable[[ImageStream], Filesystem] | None:
    """Who reads what is there, by its magic number. Each library is loaded when it is needed."""

    def holds(offset: int, magic: bytes) -> bool:
        return offset + len(magic) <= stream.size and stream.read_at(offset, len(magic)) == magic

    if holds(1080, b"\x53\xef"):
        from fusefs.inside.ext import Ext

        return Ext
    if holds(0, b"XFSB"):
        from fusefs.inside.xfs import Xfs

        return Xfs
    if holds(65600, b"_BHRfS_M"):
        from fusefs.inside.btrfs import Btrfs

        return Btrfs
    if holds(3, b"NTFS    "):
        from fusefs.inside.ntfs import Ntfs

        return Ntfs
    if holds(3, b"EXFAT   "):
        raise Unsupported("exfat is not read here")
    if holds(510, b"\x55\xaa") and (holds(54, b"FAT") or holds(82, b"FAT32")):
        from fusefs.inside.fat import Fat

        return Fat
    return None


def _partitions(stream: ImageStream) -> dict[int, tuple[int, int]]:
    """Number → offset and size in bytes, as Linux numbers them; none where there is no table."""
    if stream.size < 2 * _SECTOR or stream.read_at(510, 2) != b"\x55\xaa":
        return {}
    found: dict[int, tuple[int, int]] = {}
    logical = _FIRST_LOGICAL
    scheme = Disk(stream).scheme
    for partition in scheme.partitions:
        if isinstance(scheme, GPT):
            number = partition.number
            # The library leaves out the last sector.
            size = partition.size if isinstance(partition.type, int) else partition.size + _SECTOR
        else:
            primary = [raw for raw in getattr(getattr(scheme, "mbr", None), "part", ()) if raw is partition.raw]
            number, size = partition.number, partition.size
            if not primary and hasattr(scheme, "mbr"):
                number, logical = logical, logical + 1
        found.setdefault(int(number), (int(partition.offset), int(size)))
        if len(found) > PARTITIONS_MAX:
            raise Corrupt("a partition table without end")
    return found


def walk(tree: ImageTree) -> Iterator[tuple[bytes, Node]]:
    """Every path below the root with its node, directories before what is in them."""
    waiting: list[tuple[bytes, Node]] = [(b"", tree.root)]
    while waiting:
        path, node = waiting.pop()
        for name, inner in tree.names(node, 0, ENTRIES_MAX):
            below = path + b"/" + name if path else name
            yield below, inner
            if stat.S_ISDIR(tree.status(inner).mode):
                waiting.append((below, inner))
