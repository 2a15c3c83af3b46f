"""FAT12, FAT16 and FAT32. The library reads the boot sector and the table; chains and directories are read here: it
joins clusters that do not follow each other, runs in circles, and takes a long name for whatever comes behind it.

Owner and mode are whose mount it is. Times are local times of an unknown place: they are taken for UTC.
"""

from __future__ import annotations

import calendar
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from dissect.fat.c_fat import Fattype
from dissect.fat.fat import FATFS

from fusefs.inside.filesystem import Corrupt, Node, Status, Unsupported
from fusefs.inside.image_stream import ImageStream
from fusefs.inside.runs import Run, Runs

_ENTRY: Final = 32
_DIRECTORY_BYTES_MAX: Final = 65536 * _ENTRY
_ATTR_VOLUME, _ATTR_DIRECTORY, _ATTR_LONG = 0x08, 0x10, 0x0F
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
_DELETED, _END, _LAST_LONG = 0xE5, 0x00, 0x40
_FIRST_CLUSTER: Final = 2
_CODEPAGE: Final = "cp437"
_ROOT_NODE: Final = (0,)


@dataclass(frozen=True, slots=True)
class _Entry:
    attributes: int
    cluster: int
    size: int
    created: int
    accessed: int
    written: int


class Fat:
    """One file system. A node is where in the image its directory entry is."""

    kind = "vfat"

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream
        self._library = library = FATFS(stream)
        if not library.fat_size:
            raise Unsupported("this is no FAT12, FAT16 or FAT32")
        self._bits = {Fattype.FAT12: 12, Fattype.FAT16: 16, Fattype.FAT32: 32}[library.type]
        self._sector, self._cluster = int(library.sector_size), int(library.cluster_size)
        self._data = int(library.first_data_sector) * self._sector
        clusters = (library.total_sectors - library.first_data_sector) // library.bpb.BPB_SecPerClus
        self._end = min(clusters + _FIRST_CLUSTER, library.fat.entry_count)
        if self._end <= _FIRST_CLUSTER:
            raise Corrupt("a file system without room")
        self.unclean = "this file system was not cleanly unmounted" * self._is_unclean()
        self._entry = lru_cache(4096)(self._read_entry)
        self._chain = lru_cache(64)(self._read_chain)

    @property
    def root(self) -> Node:
        return _ROOT_NODE

    def status(self, node: Node) -> Status:
        uid, gid = os.getuid(), os.getgid()
        if node == _ROOT_NODE:
            return Status(stat.S_IFDIR | 0o755, uid, gid, 1, 0, 0, 0, 0, 0)
        entry = self._entry(node[0])
        times = (entry.accessed, entry.written, entry.created or entry.written)
        if entry.attributes & _ATTR_DIRECTORY:
            return Status(stat.S_IFDIR | 0o755, uid, gid, 1, 0, 0, *times)
        used = -(-entry.size // self._cluster) * self._cluster
        return Status(stat.S_IFREG | 0o644, uid, gid, 1, entry.size, used, *times)

    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        long: list[tuple[int, int, str]] = []
        for place in self._places(node):
            data = self._stream.read_at(place, _ENTRY)
            if data[0] == _END:
                return
            if data[0] == _DELETED:
                long = []
            elif data[11] & 0x3F == _ATTR_LONG:
                if data[0] & _LAST_LONG:
                    long = []
                text = (data[1:11] + data[14:26] + data[28:32]).decode("utf-16-le", "surrogatepass")
                long.append((data[0] & 0x3F, data[13], text))
            else:
                name = _long_name(long, data[:11]) or _short_name(data)
                long = []
                if not data[11] & _ATTR_VOLUME and data[:2] not in (b". ", b".."):
                    yield name.encode(errors="surrogatepass"), (place,)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        entry = self._entry(node[0])
        runs = self._chain(entry.cluster, entry.size) if entry.size else Runs(())
        if runs.bytes_mapped < offset + length:
            raise Corrupt("a file whose chain is shorter than it")
        return runs.read(self._stream, offset, length)

    def readlink(self, node: Node) -> bytes:
        raise Corrupt("there are no symbolic links here")

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        return {}

    def _is_unclean(self) -> bool:
        if self._bits == 12:
            return bool(self._library.bpb_ext.BS_Reserved1 & 1)
        clean = self._library.fat.get(1) >> (27 if self._bits == 32 else 15) & 1
        return not clean or bool(self._library.bpb_ext.BS_Reserved1 & 1)

    def _read_entry(self, place: int) -> _Entry:
        data = self._stream.read_at(place, _ENTRY)
        attributes, _, tenths, time, date, access, high, wtime, wdate, low, size = struct.unpack("<11x3B7HI", data)
        cluster = low | (high << 16 if self._bits == 32 else 0)
        created = _time(date, time) + tenths * 10_000_000 if date else 0
        return _Entry(attributes, cluster, size, created, _time(access, 0), _time(wdate, wtime))

    def _places(self, node: Node) -> Iterator[int]:
        """Where the entries of a directory are."""
        if node == _ROOT_NODE and self._bits != 32:
            start = self._library.bpb.BPB_RsvdSecCnt + self._library.bpb.BPB_NumFATs * self._library.fat_size
            yield from (start * self._sector + index * _ENTRY for index in range(self._library.bpb.BPB_RootEntCnt))
            return
        if node == _ROOT_NODE:
            first = int(self._library.bpb_ext.BPB_RootClus)
        else:
            entry = self._entry(node[0])
            if not entry.attributes & _ATTR_DIRECTORY:
                raise NotADirectoryError
            first = entry.cluster
        for cluster in self._clusters(first, _DIRECTORY_BYTES_MAX):
            start = self._place(cluster)
            yield from range(start, start + self._cluster, _ENTRY)

    def _place(self, cluster: int) -> int:
        return self._data + (cluster - _FIRST_CLUSTER) * self._cluster

    def _clusters(self, cluster: int, size: int) -> Iterator[int]:
        """The clusters of a chain, those of its first `size` bytes. Corrupt where it breaks."""
        ended = (1 << min(self._bits, 28)) - 8
        for _ in range(-(-size // self._cluster)):
            if not _FIRST_CLUSTER <= cluster < self._end:
                raise Corrupt(f"a chain that leads to cluster {cluster}")
            yield cluster
            cluster = int(self._library.fat.get(cluster))
            if cluster >= ended or (self._bits == 12 and cluster == 0xFF0):
                return

    def _read_chain(self, cluster: int, size: int) -> Runs:
        return Runs(
            Run(index * self._cluster, self._place(at), self._cluster)
            for index, at in enumerate(self._clusters(cluster, size))
        )


def _long_name(parts: list[tuple[int, int, str]], short: bytes) -> str:
    """The name before the entry of a short one, empty if it is none of its own."""
    checksum = 0
    for byte in short:
        checksum = ((checksum >> 1) + ((checksum & 1) << 7) + byte) & 0xFF
    if not parts or [order for order, _, _ in parts] != list(range(len(parts), 0, -1)):
        return ""
    if any(found != checksum for _, found, _ in parts):
        return ""
    # Joined before decoding would not matter: a surrogate pair cut in two is joined by the encoding as UTF-16.
    text = "".join(text for _, _, text in reversed(parts)).partition("\0")[0]
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _short_name(data: bytes) -> str:
    first = b"\xe5" if data[0] == 0x05 else data[:1]
    base = (first + data[1:8]).rstrip(b" ").decode(_CODEPAGE)
    extension = data[8:11].rstrip(b" ").decode(_CODEPAGE)
    base = base.lower() if data[12] & _LOWER_BASE else base
    extension = extension.lower() if data[12] & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def _time(date: int, time: int) -> int:
    """ns since 1970; 0 where it is no time."""
    year, month, day = 1980 + (date >> 9), date >> 5 & 15, date & 31
    if not 1 <= month <= 12 or not day:
        return 0
    seconds = calendar.timegm((year, month, day, time >> 11, time >> 5 & 63, (time & 31) * 2))
    return seconds * 1_000_000_000
