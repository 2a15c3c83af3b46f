"""NTFS, by its library. Owner and mode are whose mount it is; the system's own files are left out.

Directories are walked here along their tree: the library takes every block of an index, given up ones as well. And it
does not know that bytes past a stream's valid length are zeros.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from dissect.ntfs.c_ntfs import ATTRIBUTE_TYPE_CODE
from dissect.ntfs.index import Index
from dissect.ntfs.mft import MftRecord
from dissect.ntfs.ntfs import NTFS
from dissect.ntfs.util import segment_reference

from fusefs.inside.filesystem import LINK_BYTES_MAX, Corrupt, Node, NotReplayed, Status, Unsupported
from fusefs.inside.image_stream import ImageStream

_ROOT: Final = 5
_VOLUME: Final = 3
_LOG: Final = 2
_LOG_BYTES: Final = 1 << 17
"""More than its two restart pages."""
_LOG_NO_CLIENT, _LOG_CLEAN_FLAG = 0xFFFF, 0x2
_FIRST_OWN: Final = 16
"""Records before it are of the system."""
_DOS_NAME: Final = 2
_DEPTH_MAX: Final = 32
_DIRECTORY, _IN_USE = 2, 1
_SYSTEM_ATTRIBUTE: Final = 0x4
_COMPRESSED, _ENCRYPTED = 0xFF, 0x4000
_SYMLINK_TAG, _MOUNT_POINT_TAG = 0xA000000C, 0xA0000003
_INTERIX_LINK: Final = b"IntxLNK\x01"
_EPOCH: Final = 116_444_736_000_000_000
"""1970, in units of 100 ns since 1601."""


class Ntfs:
    """One file system. A node is a record and how often that was used."""

    kind = "ntfs"

    def __init__(self, stream: ImageStream) -> None:
        self._library = NTFS(stream)
        information = self._library.mft.get(_VOLUME).attributes[ATTRIBUTE_TYPE_CODE.VOLUME_INFORMATION]
        flags = int.from_bytes(information[0].data()[10:12], "little")
        if not log_is_clean(self._library.mft.get(_LOG).open().read(_LOG_BYTES)):
            raise NotReplayed(self.kind)
        self.unclean = "this ntfs is marked as one that has to be checked" if flags & 1 else ""
        self._record = lru_cache(1024)(self._find_record)
        self._open = lru_cache(16)(self._open_file)

    @property
    def root(self) -> Node:
        return (_ROOT, int(self._library.mft.get(_ROOT).header.SequenceNumber))

    def status(self, node: Node) -> Status:
        record = self._record(node)
        standard = record.attributes[ATTRIBUTE_TYPE_CODE.STANDARD_INFORMATION][0].attribute.attr
        size = used = 0
        target = self._link(node)
        if target is not None:
            mode, size = stat.S_IFLNK | 0o777, len(target)
        elif record.header.Flags & _DIRECTORY:
            mode = stat.S_IFDIR | 0o755
        else:
            mode, size = stat.S_IFREG | 0o644, int(record.size())
            used = int(record.size(allocated=True) or size)
        times = (standard.LastAccessTime, standard.LastModificationTime, standard.LastChangeTime)
        links = max(1, len(record.filenames(ignore_dos=True)))
        return Status(mode, os.getuid(), os.getgid(), links, size, used, *((time - _EPOCH) * 100 for time in times))

    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        record = self._record(node)
        if not record.header.Flags & _DIRECTORY:
            raise NotADirectoryError
        index = Index(record, "$I30")
        for entry in self._index_entries(index, index.root.entries(), 0):
            reference = entry.header.FileReference
            number = segment_reference(reference)
            if entry.attribute.flags != _DOS_NAME and number >= _FIRST_OWN:
                yield entry.attribute.file_name.encode(errors="surrogatepass"), (number, reference.SequenceNumber)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        file, valid = self._open(node)
        count = max(0, min(length, valid - offset))
        file.seek(offset)
        data: bytes = file.read(count)
        if len(data) != count:
            raise Corrupt(f"only {len(data)} of {count} bytes are there at {offset}")
        return data + bytes(length - count)

    def readlink(self, node: Node) -> bytes:
        target = self._link(node)
        if target is None or not 0 < len(target) <= LINK_BYTES_MAX:
            raise Corrupt("a symbolic link without a target")
        return target

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        return {}

    def _find_record(self, node: Node) -> MftRecord:
        number, sequence = node
        record = self._library.mft.get(number)
        if not record.header.Flags & _IN_USE or record.header.SequenceNumber != sequence:
            raise Corrupt(f"record {number} is not in use as it was")
        return record

    def _index_entries(self, index: Index, entries: Iterator[Any], depth: int) -> Iterator[Any]:
        if depth > _DEPTH_MAX:
            raise Corrupt("a directory that is too deep")
        for entry in entries:
            if entry.is_node:
                # Unlike the library, in whose eyes a missing block is an empty one.
                yield from self._index_entries(index, index.index_buffer(entry.node_vcn).entries(), depth + 1)
            if entry.is_end:
                return
            yield entry
        raise Corrupt("a directory whose end is missing")

    def _link(self, node: Node) -> bytes | None:
        """Where a symbolic link leads to, as a path here; None of what is no link."""
        record = self._record(node)
        reparse = record.attributes[ATTRIBUTE_TYPE_CODE.REPARSE_POINT]
        if reparse:
            if reparse[0].attribute.attr.ReparseTag not in (_SYMLINK_TAG, _MOUNT_POINT_TAG):
                return None
            name: str = reparse[0].attribute.print_name or reparse[0].attribute.substitute_name
            return name.replace("\\", "/").encode(errors="surrogatepass")
        standard = record.attributes[ATTRIBUTE_TYPE_CODE.STANDARD_INFORMATION][0].attribute.attr
        if record.header.Flags & _DIRECTORY or not standard.FileAttributes & _SYSTEM_ATTRIBUTE:
            return None
        size = int(record.size())
        if not len(_INTERIX_LINK) < size <= len(_INTERIX_LINK) + 2 * LINK_BYTES_MAX:
            return None
        data = self.read(node, 0, size)
        if not data.startswith(_INTERIX_LINK):
            return None
        return data.removeprefix(_INTERIX_LINK).decode("utf-16-le").encode()

    def _open_file(self, node: Node) -> tuple[Any, int]:
        """The stream of a file, and up to where it was ever written."""
        record = self._record(node)
        if record.attributes[ATTRIBUTE_TYPE_CODE.REPARSE_POINT]:
            raise Unsupported("Windows keeps its bytes in another form or place")
        attributes = record.attributes.find("", ATTRIBUTE_TYPE_CODE.DATA)
        if not attributes:
            raise Corrupt("a file without a data stream")
        first = min(attributes, key=lambda attribute: attribute.header.lowest_vcn or 0).header
        if first.flags & _ENCRYPTED:
            raise Unsupported("it is encrypted")
        file = attributes.open()
        if first.resident:
            return file, int(first.size)
        clusters = sum(count for _, count in attributes.dataruns())
        if clusters * self._library.cluster_size < first.size:
            raise Corrupt("a file some of whose extents are missing")
        return file, int(first.header.Form.Nonresident.ValidDataLength)


def log_is_clean(start: bytes) -> bool:
    """Whether a $LogFile that begins so says that nothing has to be replayed."""
    if not start.strip(b"\xff"):
        return True  # emptied
    newest, clean = -1, False
    page = 0
    for _ in range(2):
        if start[page : page + 4] != b"RSTR":
            break
        size, _, at = struct.unpack_from("<2IH", start, page + 16)
        sequence, client, flags = struct.unpack_from("<Q4x2H", start, page + at)
        if sequence > newest:
            newest, clean = sequence, client == _LOG_NO_CLIENT or bool(flags & _LOG_CLEAN_FLAG)
        page += size
    return clean
