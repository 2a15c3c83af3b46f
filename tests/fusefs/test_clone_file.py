"""A file of a clone against a model that is just bytes: writes, truncations, full disks, in any order."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.errors import Damaged, WouldBlock
from dedup.image import room_for
from dedup.types import BLOCK_BYTES
from fusefs.clone_file import CloneFile
from fusefs.overlay_room import OverlayRoom
from fusefs.written_map import WrittenMap

PAST_MAX = 9 * BLOCK_BYTES


class BytesImage:
    """A past image that is some bytes. `damaged` blocks cannot be read, and at times it does not answer at once."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.label = "bytes"
        self.damaged: set[int] = set()
        self.slow = False

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        return bytes(self.read_into(offset, length, memoryview(bytearray(room_for(length))), wait=wait))

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        if self.slow and not wait:
            raise WouldBlock
        part = self.content[offset : offset + length]
        blocks = range(offset // BLOCK_BYTES, -(-(offset + len(part)) // BLOCK_BYTES))
        if self.damaged.intersection(blocks):
            raise Damaged("as the test wants")
        skip = offset % BLOCK_BYTES
        buffer[skip : skip + len(part)] = part
        return buffer[skip : skip + len(part)]

    def next_data(self, offset: int) -> int:
        return offset


class Cloned:
    """A clone of some bytes in a temporary file."""

    def __init__(self, content: bytes, limit_bytes: int = 0) -> None:
        self.image = BytesImage(content)
        self.room = OverlayRoom(limit_bytes)
        self.file = CloneFile(self.room, lambda wait: self.image, len(content))
        self.fd = os.memfd_create("overlay")
        os.ftruncate(self.fd, len(content))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.file.read(self.fd, offset, length))

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def cloned(content: bytes, limit_bytes: int = 0) -> Iterator[Cloned]:
    clone = Cloned(content, limit_bytes)
    try:
        yield clone
    finally:
        clone.close()


def content_of(size: int) -> bytes:
    return bytes(1 + at // 7 % 255 for at in range(size))


@contextmanager
def disk_with(free_bytes: int) -> Iterator[None]:
    """A disk that takes so many bytes more, and writes short where they end: no real one stops at every byte."""
    left, pwritev = free_bytes, os.pwritev

    def short(fd: int, buffers: Sequence[Any], offset: int) -> int:
        nonlocal left
        data = b"".join(buffers)[:left]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return pwritev(fd, [data], offset)

    with mock.patch.object(os, "pwritev", short):
        yield


places = st.one_of(
    st.integers(0, 12 * BLOCK_BYTES),
    st.builds(lambda block, by: max(0, block * BLOCK_BYTES + by), st.integers(0, 12), st.integers(-2, 2)),
)
lengths = st.one_of(st.integers(1, 3 * BLOCK_BYTES), st.sampled_from([1, BLOCK_BYTES - 1, BLOCK_BYTES]))
writes = st.tuples(st.just("write"), places, lengths)
appends = st.tuples(st.just("append"), places, lengths)
resizes = st.tuples(st.just("resize"), places, st.just(0))
failing = st.tuples(st.just("full"), places, lengths, st.integers(0, 3 * BLOCK_BYTES))
steps = st.lists(st.one_of(writes, writes, appends, resizes, failing), max_size=12)


@given(past=st.integers(0, PAST_MAX), steps=steps, view=st.tuples(places, lengths))
def test_it_reads_as_bytes_would(past: int, steps: list[tuple[Any, ...]], view: tuple[int, int]) -> None:
    model = bytearray(content_of(past))
    with cloned(bytes(model)) as clone:
        for number, (kind, at, *numbers) in enumerate(steps):
            if kind == "resize":
                clone.file.resize(clone.fd, at)
                model[at:] = bytes(max(0, at - len(model)))
            else:
                if kind == "append":
                    at = max(at, len(model))
                data = bytes([200 + number]) * numbers[0]
                count = write(clone, at, data, numbers[1] if kind == "full" else None, append=kind == "append")
                if kind == "append":
                    at = len(model)
                if count:
                    model.extend(bytes(max(0, at - len(model))))
                    model[at : at + count] = data[:count]
            assert os.fstat(clone.fd).st_size == len(model)
            assert clone.read(*view) == model[view[0] : view[0] + view[1]]
        assert clone.read(0, len(model) + 1) == model
        used = clone.room.used_bytes
        assert used <= -(-len(model) // BLOCK_BYTES) * BLOCK_BYTES
        clone.file.gone()
        assert clone.room.used_bytes == 0


def write(clone: Cloned, at: int, data: bytes, free_bytes: int | None, *, append: bool) -> int:
    if free_bytes is None:
        return clone.file.write(clone.fd, at, data, append=append)
    with disk_with(free_bytes):
        try:
            return clone.file.write(clone.fd, at, data, append=append)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9000), st.integers(0, 9000)), max_size=12))
def test_the_map_is_a_set(steps: list[tuple[bool, int, int]]) -> None:
    blocks, model = WrittenMap(), set[int]()
    for add, one, other in steps:
        first, stop = sorted((one, other))
        if add:
            blocks.add(first, stop)
            model.update(range(first, stop))
        else:
            gone = {block for block in model if block >= other}
            assert blocks.cut(other) == len(gone)
            model -= gone
        assert blocks.count == len(model)
        assert blocks.count_in(first, stop) == len(model.intersection(range(first, stop)))
        runs = list(blocks.runs(first, stop))
        assert [block for start, end, written in runs if written for block in range(start, end)] == sorted(
            model.intersection(range(first, stop))
        )
        assert all(start < end for start, end, _ in runs)
        assert [start for start, _, _ in runs[1:]] == [end for _, end, _ in runs[:-1]]
        assert not runs or (runs[0][0], runs[-1][1]) == (first, stop)
        assert (first in blocks) == (first in model)


def test_what_is_written_over_need_not_be_readable() -> None:
    """A damaged block gives an error where the past is needed, and nowhere else; nothing is changed by the error."""
    with cloned(content_of(4 * BLOCK_BYTES)) as clone:
        clone.image.damaged = {1}
        with pytest.raises(Damaged):
            clone.read(0, 2 * BLOCK_BYTES)
        with pytest.raises(Damaged):
            clone.file.write(clone.fd, BLOCK_BYTES + 1, b"needs the rest of the block")
        assert clone.room.used_bytes == 0
        clone.file.write(clone.fd, BLOCK_BYTES, b"x" * BLOCK_BYTES)
        assert clone.read(0, 3 * BLOCK_BYTES) == (
            content_of(BLOCK_BYTES) + b"x" * BLOCK_BYTES + content_of(3 * BLOCK_BYTES)[2 * BLOCK_BYTES :]
        )
        clone.image.damaged = {3}
        clone.file.resize(clone.fd, 3 * BLOCK_BYTES)
        clone.file.resize(clone.fd, 4 * BLOCK_BYTES)
        assert clone.read(3 * BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)


def test_who_must_not_wait_changes_nothing() -> None:
    with cloned(content_of(2 * BLOCK_BYTES)) as clone:
        clone.image.slow = True
        with pytest.raises(WouldBlock):
            clone.file.read(clone.fd, 0, 10, wait=False)
        with pytest.raises(WouldBlock):
            clone.file.write(clone.fd, 1, b"a", wait=False)
        assert clone.room.used_bytes == 0
        assert clone.file.write(clone.fd, BLOCK_BYTES, b"b" * BLOCK_BYTES, wait=False) == BLOCK_BYTES
        assert clone.read(BLOCK_BYTES - 1, 2) == content_of(BLOCK_BYTES)[-1:] + b"b"


def test_the_quota_counts_blocks_once_and_gives_them_back() -> None:
    with cloned(content_of(8 * BLOCK_BYTES), limit_bytes=3 * BLOCK_BYTES) as clone:
        clone.file.write(clone.fd, 0, b"a" * 2 * BLOCK_BYTES)
        clone.file.write(clone.fd, 1, b"again")
        clone.file.write(clone.fd, 5 * BLOCK_BYTES, b"b")
        for offset, length in [(3 * BLOCK_BYTES, 1), (5 * BLOCK_BYTES, BLOCK_BYTES + 1), (9 * BLOCK_BYTES, 1)]:
            with pytest.raises(OSError) as error:
                clone.file.write(clone.fd, offset, b"c" * length)
            assert error.value.errno == errno.ENOSPC
        assert clone.read(0, 1 << 20)[6 * BLOCK_BYTES :] == content_of(8 * BLOCK_BYTES)[6 * BLOCK_BYTES :]
        clone.file.resize(clone.fd, 4 * BLOCK_BYTES)
        assert clone.room.used_bytes == 2 * BLOCK_BYTES
        clone.file.write(clone.fd, 3 * BLOCK_BYTES, b"c")


class CutMeanwhile(WrittenMap):
    """Somebody else truncates the file just before a reader looks at the map, and perhaps makes it longer again."""

    def __init__(self, cut: Callable[[], None]) -> None:
        super().__init__()
        self._cut = cut

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        self._cut()
        return super().runs(first, stop)


@pytest.mark.parametrize("sizes", [(0,), (0, 5 * BLOCK_BYTES), (BLOCK_BYTES + 7, 5 * BLOCK_BYTES)])
def test_what_was_overwritten_does_not_come_back_while_it_is_truncated(sizes: tuple[int, ...]) -> None:
    past = content_of(5 * BLOCK_BYTES)
    with cloned(past) as clone:

        def cut() -> None:
            for size in sizes:
                clone.file.resize(clone.fd, size)

        clone.file._written = CutMeanwhile(cut)
        clone.file.write(clone.fd, BLOCK_BYTES, b"\xff" * (3 * BLOCK_BYTES))
        found = clone.read(0, 5 * BLOCK_BYTES)
        # A byte is what it was before or what it is afterwards, and the end may be in either place.
        before = past[:BLOCK_BYTES] + b"\xff" * (3 * BLOCK_BYTES) + past[4 * BLOCK_BYTES :]
        after = before[: sizes[0]] + bytes(max(0, sizes[-1] - sizes[0]))
        assert len(found) in (len(before), len(after))
        assert all(byte in (before[at], after[at] if at < len(after) else 0) for at, byte in enumerate(found))
