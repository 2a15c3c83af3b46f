"""Reads of the snapshot mount: at once from memory, soon from a quick disk, in a thread from anything slower."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future

import pytest
import trio
import trio.testing

from dedup.errors import Damaged, MomentGone, OnItsWay, WouldBlock
from dedup.image import room_for
from dedup.types import BLOCK_BYTES, Moment, PointKind, Seq, TimeNs, VolumeId, VolumeState
from fusefs import snapshot_images
from fusefs.snapshot_images import READ_BYTES_MAX, SOON_BYTES_MAX, SnapshotImages
from fusefs.snapshot_tree import SnapshotFile

CONTENT = bytes(range(256)) * 64
NODE = SnapshotFile(
    VolumeState(VolumeId(1), "data", len(CONTENT), 0o644, 0, 0), Moment("g", Seq(5), TimeNs(1), PointKind.CRASH)
)


class DiskImage:
    """A past image whose reads without waiting end as `answers` say, one after the other; None is bytes."""

    size, time, label = len(CONTENT), TimeNs(1), "bytes"

    def __init__(self, *answers: type[Exception] | Exception | None) -> None:
        self.answers = list(answers)
        self.waited = 0

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        return bytes(self.read_into(offset, length, memoryview(bytearray(room_for(length))), wait=wait))

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        if wait:
            assert threading.current_thread() is not threading.main_thread()
            self.waited += 1
        elif self.answers and (answer := self.answers.pop(0)) is not None:
            raise answer
        part = CONTENT[offset : offset + length]
        buffer[: len(part)] = part
        return buffer[: len(part)]

    def next_data(self, offset: int) -> int:
        return offset

    def allocated(self) -> int:
        return self.size


async def images_of(image: DiskImage) -> SnapshotImages:
    async def make(node: SnapshotFile) -> DiskImage:
        return image

    images = SnapshotImages(make)
    await images.ready(NODE)
    return images


async def read(images: SnapshotImages, off: int, size: int) -> bytes:
    """As the handler does it."""
    part = images.read_now(NODE, off, size)
    return bytes(part if isinstance(part, memoryview) else await images.read(NODE, off, size, part))


@pytest.mark.parametrize(
    ("answers", "waited"),
    [
        ((), 0),
        ((OnItsWay,), 0),
        ((OnItsWay, OnItsWay, OnItsWay), 0),
        ((WouldBlock,), 1),
        ((OnItsWay, WouldBlock), 1),
        ((OnItsWay, MomentGone), 1),
        ((Damaged,), 1),
    ],
)
async def test_who_waits_for_what(
    answers: tuple[type[Exception], ...], waited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_images, "SOON_SECONDS", 10.0)
    image = DiskImage(*answers)
    images = await images_of(image)
    assert await read(images, 100, BLOCK_BYTES) == CONTENT[100 : 100 + BLOCK_BYTES]
    assert (image.waited, image.answers) == (waited, [])


async def test_a_disk_that_is_not_quick_is_waited_for_in_a_thread() -> None:
    image = DiskImage(*[OnItsWay] * 100_000)
    images = await images_of(image)
    assert await read(images, 0, BLOCK_BYTES) == CONTENT[:BLOCK_BYTES]
    assert image.waited == 1
    assert await images.read(NODE, 0, READ_BYTES_MAX + 1) == CONTENT


@pytest.mark.parametrize("size", [BLOCK_BYTES, SOON_BYTES_MAX + 1])
@pytest.mark.parametrize("ending", [None, Damaged("rot")])
async def test_a_thread_that_is_at_it_is_waited_for_without_another(size: int, ending: Exception | None) -> None:
    """However it ends; and as often as there is one."""
    works: list[Future[None]] = [Future(), Future()]
    image = DiskImage(*map(OnItsWay, works))
    images = await images_of(image)
    got = b""

    async def reader() -> None:
        nonlocal got
        got = await read(images, 0, size)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        for work in works:
            await trio.testing.wait_all_tasks_blocked()
            assert not got
            if ending is None:
                work.set_result(None)
            else:
                work.set_exception(ending)
    assert got == CONTENT[:size]
    assert image.waited == 0


class WorkImage(DiskImage):
    """Two threads are at what it has."""

    works: list[Future[None]]

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        if self.works and not wait:
            raise OnItsWay(self.works.pop())
        return super().read_into(offset, length, buffer, wait=wait)


async def test_what_a_thread_gave_is_given_up_at_once() -> None:
    """It is a MiB: not left for the next collection of garbage."""
    image = WorkImage()
    image.works = [Future(), Future()]
    for work in image.works:
        work.set_result(None)
    given_up = [weakref.ref(work) for work in image.works]
    del work
    images = await images_of(image)
    gc.collect()
    gc.disable()
    try:
        assert await read(images, 0, READ_BYTES_MAX) == CONTENT
        assert [found() for found in given_up] == [None, None]
    finally:
        gc.enable()


class LateImage(DiskImage):
    """Its beginning comes when other bytes were read."""

    others_came = False

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        if offset == 0 and not self.others_came and not wait:
            raise OnItsWay
        return super().read_into(offset, length, buffer, wait=wait)


async def test_others_run_while_one_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And have the buffer to themselves: the bytes of either are its own."""
    monkeypatch.setattr(snapshot_images, "SOON_SECONDS", 10.0)
    image = LateImage()
    images = await images_of(image)
    got: dict[int, bytes] = {}

    async def reader(off: int) -> None:
        got[off] = await read(images, off, BLOCK_BYTES)
        image.others_came |= len(got) == 2

    offsets = [0, BLOCK_BYTES, 2 * BLOCK_BYTES]
    async with trio.open_nursery() as nursery:
        for off in offsets:
            nursery.start_soon(reader, off)
    assert got == {off: CONTENT[off : off + BLOCK_BYTES] for off in offsets}
    assert list(got)[-1] == 0
    assert image.waited == 0
