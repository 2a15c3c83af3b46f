"""An image, or a partition of it, as a file that is sought and read; and another with some blocks replaced.

Invariant: a read gives as many bytes as there are up to the end, or raises what the source of the bytes raised.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

from fusefs.inside.filesystem import Corrupt

CACHE_BLOCK_BYTES: Final = 32 << 10
CACHE_BLOCKS_MAX: Final = 512
READ_BYTES_MAX: Final = 64 << 20
"""Of one read: no file system asks for more unless it is misled."""


class ImageBytes:
    """The bytes of an image through a cache of small reads; large ones pass it by."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        """`fetch` gives exactly the bytes offset..offset+length, which lie inside, or raises."""
        self.size = size
        self._fetch = fetch
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; Corrupt past the end."""
        if length > READ_BYTES_MAX:
            raise Corrupt(f"{length} bytes wanted at once")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Corrupt(f"bytes {offset} to {offset + length} lie outside of an image of {self.size}")
        if length >= CACHE_BLOCK_BYTES:
            return self._fetch(offset, length)
        first, last = offset // CACHE_BLOCK_BYTES, (offset + max(length, 1) - 1) // CACHE_BLOCK_BYTES
        data = b"".join(self._block(index) for index in range(first, last + 1))
        start = offset - first * CACHE_BLOCK_BYTES
        return data[start : start + length]

    def _block(self, index: int) -> bytes:
        block = self._blocks.get(index)
        if block is None:
            start = index * CACHE_BLOCK_BYTES
            block = self._blocks[index] = self._fetch(start, min(CACHE_BLOCK_BYTES, self.size - start))
            if len(self._blocks) > CACHE_BLOCKS_MAX:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(index)
        return block


class ImageStream(io.RawIOBase):
    """`size` bytes of an image from `start` on; with `replaced`, blocks of it that another place holds."""

    def __init__(self, image: ImageBytes, start: int = 0, size: int | None = None) -> None:
        super().__init__()
        self._image = image
        self._start = start
        self.size = max(0, image.size - start) if size is None else size
        if start < 0 or self.size < 0:
            raise Corrupt("a partition that lies outside of its image")
        self._position = 0
        self._block_bytes = 1
        self._replaced: Mapping[int, Callable[[], bytes]] = {}

    def replacing(self, block_bytes: int, blocks: Mapping[int, Callable[[], bytes]]) -> ImageStream:
        """The same with some blocks, numbered from the start, given by functions."""
        other = ImageStream(self._image, self._start, self.size)
        other._block_bytes, other._replaced = block_bytes, blocks
        return other

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; Corrupt past the end."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Corrupt(f"bytes {offset} to {offset + length} lie outside of a file system of {self.size}")
        data = self._image.read_at(self._start + offset, length)
        if not self._replaced or not length:
            return data
        changed = bytearray(data)
        for block in range(offset // self._block_bytes, (offset + length - 1) // self._block_bytes + 1):
            newer = self._replaced.get(block)
            if newer is not None:
                at = block * self._block_bytes
                start, stop = max(offset, at), min(offset + length, at + self._block_bytes)
                changed[start - offset : stop - offset] = newer()[start - at : stop - at]
        return bytes(changed)

    # As the libraries use a file.

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise Corrupt("a place before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        data = self.read_at(self._position, count) if count else b""
        self._position += count
        return data
