"""A file of a clone: bytes of a past image, and over them what was written since, in a sparse file of the overlay.

Invariants:
- the past counts below `_past_end` only, and there only in blocks that are not in `_written`; everything else is in the
  overlay's file, which has the size of the clone's file and reads as zeros where nothing was written;
- `_past_end` is never above the file's size and never rises: what was truncated away reads as zeros afterwards. It is
  lowered before `_written` is cut, and read after it by who reads meanwhile: what was overwritten never comes back;
- a block is in `_written` only when all of its bytes below `_past_end` are in the overlay's file. Until then it reads
  as it was, also after a write that failed in the middle;
- what is in `_written` has been taken from the overlay's room, and nothing else of the file has.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from dedup.errors import WouldBlock
from dedup.history import PastImage
from dedup.image import room_for
from dedup.types import BLOCK_BYTES, Moment
from fusefs.overlay_room import OverlayRoom
from fusefs.written_map import WrittenMap

ImageOf = Callable[[bool], PastImage]
"""The past image; if told not to wait, WouldBlock where it would have to be made first."""


class CloneFile:
    """What all openers of one file share. Each call is given a descriptor of the overlay's file. Any thread.

    With wait=False a call raises WouldBlock, having done nothing, instead of waiting for a disk, for a network or for
    another thread.
    """

    def __init__(
        self, room: OverlayRoom, image: ImageOf | None = None, past_end: int = 0, moment: Moment | None = None
    ) -> None:
        """Of a new file, or of a volume at `moment` whose size was `past_end` then, which its descriptors' file has."""
        self.moment: Final = moment
        self._room = room
        self._image = image
        self._past_end = past_end
        self._written = WrittenMap()
        self._turn = threading.Lock()
        """For whoever changes the file."""

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, fd: int, offset: int, length: int, *, wait: bool = True) -> bytes | memoryview:
        """The bytes offset..offset+length, fewer past the end. Damaged and its like as `PastImage.read`."""
        parts: list[bytes | memoryview] = []
        for start, stop, past in self._runs(offset, min(offset + length, os.fstat(fd).st_size)):
            if past:
                parts.append(self._past(start, stop, wait))
                continue
            part = _pread(fd, start, stop - start, wait)
            parts.append(part)
            if len(part) < stop - start:
                break  # truncated meanwhile
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """offset..end in pieces (start, stop, whether the past has it); none is empty."""
        past_end = min(end, self._past_end)
        if offset < past_end:
            for first, stop, written in self._written.runs(offset // BLOCK_BYTES, -(-past_end // BLOCK_BYTES)):
                start, until = max(offset, first * BLOCK_BYTES), min(past_end, stop * BLOCK_BYTES)
                if not written and until > self._past_end:
                    # Truncated since: these blocks may have been written, and are not in the map any more.
                    past_end = max(start, self._past_end)
                    if start < past_end:
                        yield start, past_end, True
                    break
                yield start, until, not written
        if max(offset, past_end) < end:
            yield max(offset, past_end), end, False

    def _past(self, start: int, stop: int, wait: bool) -> memoryview:
        assert self._image is not None, "only a volume has a past"
        length = stop - start
        part = self._image(wait).read_into(start, length, memoryview(bytearray(room_for(length))), wait=wait)
        if len(part) != length:
            raise OSError(errno.EIO, f"the image ends before {stop}")
        return part

    # -- changing ----------------------------------------------------------------------------------------------------

    def write(self, fd: int, offset: int, data: bytes, *, append: bool = False, wait: bool = True) -> int:
        """Writes at `offset`, or at the end where `append` and `offset` is not within the file; as pwrite(2).

        ENOSPC when the overlay is full; a disk's errors. Then the bytes behind what was written are as they were.
        """
        if not self._turn.acquire(blocking=wait):
            raise WouldBlock
        try:
            size = os.fstat(fd).st_size
            if append:
                offset = min(offset, size)
            end = offset + len(data)
            first, stop = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
            head, tail = self._rest_of_blocks(offset, end, wait)
            new = stop - first - self._written.count_in(first, stop)
            self._room.take(new)
            before = self._written.count
            try:
                done, error = self._put(fd, offset, head, data, tail)
            finally:
                self._room.give_back(new - (self._written.count - before))
            if error is not None:
                # What is not seen of a failed write must not make the file longer.
                os.ftruncate(fd, max(size, offset + done if done else 0))
                if not done:
                    raise error
            return done
        finally:
            self._turn.release()

    def _rest_of_blocks(self, start: int, end: int, wait: bool) -> tuple[bytes | memoryview, bytes | memoryview]:
        """What goes before and behind start..end so that no block is left half in the past."""
        head: bytes | memoryview = b""
        tail: bytes | memoryview = b""
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        head_start, tail_end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, self._past_end)
        if head_start < min(start, self._past_end) and first not in self._written:
            head = self._past(head_start, min(start, self._past_end), wait)
            if start > self._past_end:
                head = bytes(head) + bytes(start - self._past_end)
        if end < tail_end and last not in self._written:
            tail = self._past(end, tail_end, wait)
        return head, tail

    def _put(
        self, fd: int, offset: int, head: bytes | memoryview, data: bytes, tail: bytes | memoryview
    ) -> tuple[int, OSError | None]:
        """How many bytes of `data` are in the file, and why not all of them."""
        end, at = offset + len(data), offset - len(head)
        count, error = _pwrite(fd, at, (head, data, tail))
        if error is None:
            self._written.add(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES))
            return len(data), None
        if not count:
            return 0, error
        reached = at + count
        if reached >= self._past_end:
            whole, seen = -(-reached // BLOCK_BYTES), reached
        else:
            whole = reached // BLOCK_BYTES
            # The block that the disk stopped in has its new bytes only where it was written before.
            seen = reached if whole in self._written else whole * BLOCK_BYTES
        self._written.add(offset // BLOCK_BYTES, whole)
        return max(0, min(seen, end) - offset), error

    def resize(self, fd: int, size: int) -> None:
        """Sets the size; what it gains reads as zeros. May wait."""
        with self._turn:
            os.ftruncate(fd, size)
            # Before the map forgets them: a block below `_past_end` that is not in it is taken for one of the past.
            self._past_end = min(self._past_end, size)
            self._room.give_back(self._written.cut(-(-size // BLOCK_BYTES)))

    def gone(self) -> None:
        """What it took is given back: its last name has gone, and nobody has it open. More than once is no harm."""
        with self._turn:
            room, self._room = self._room, OverlayRoom(0)
            room.give_back(self._written.count)


def _pread(fd: int, offset: int, length: int, wait: bool) -> bytes | memoryview:
    if wait:
        return os.pread(fd, length, offset)
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, (buffer,), offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise WouldBlock from None
        raise
    if count < length:
        raise WouldBlock  # what is not in the page cache yet, or the file's end: who waits will know
    return memoryview(buffer)


def _pwrite(fd: int, offset: int, parts: Sequence[bytes | memoryview]) -> tuple[int, OSError | None]:
    """Writes all of them in a row; how many bytes it were, and why not all."""
    left = [memoryview(part) for part in parts if len(part)]
    done = 0
    while left:
        try:
            count = os.pwritev(fd, left, offset + done)
        except OSError as error:
            return done, error
        done += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]
    return done, None
