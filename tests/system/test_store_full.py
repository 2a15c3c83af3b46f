"""The store's disk fills up: writers go on, wait or fail, as the outage policy says; the store stays whole; and with
room again it recovers by itself."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedup.errors import MomentRefused
from tests.system.harness import World, image_bytes, wait_for_end

DISK_BYTES = 72 << 20
"""Room for all of the volume, once the ballast is gone, beside the store's own files and the file system's."""
ROOM_BYTES = 12 << 20
VOLUME_BYTES = 48 << 20
CHUNK = 256 << 10


@pytest.fixture
def ballast(world: World) -> Path:
    """A file that leaves little room on the disk where the store will be."""
    small = world.directory / "small.img"
    with open(small, "xb") as file:
        file.truncate(DISK_BYTES)
    world.run("mkfs.ext4", "-q", "-F", "-m", "0", small)
    disk = world.loop_mount(small)
    world.store = disk / "store"
    path = disk / "ballast"
    free = os.statvfs(disk)
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - ROOM_BYTES))
    with open(world.source / "data.img", "xb") as volume:
        volume.truncate(VOLUME_BYTES)
    return path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def fill(fd: int, dice: random.Random, total: int, start: int = 0) -> None:
    for offset in range(start, start + total, CHUNK):
        assert os.pwrite(fd, dice.randbytes(CHUNK), offset) == CHUNK


def check_whole(world: World) -> None:
    """After a clean end: the store verifies, and goes on without a gap."""
    gaps = len(world.gaps())
    world.unmount()
    assert world.json("verify", world.store, "--read-data")["ok"]
    world.mount()
    assert len(world.gaps()) == gaps
    world.check_equal()


@pytest.mark.parametrize("mode", ["async", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("sync", "batch"))])
def test_continue(world: World, ballast: Path, mode: str) -> None:
    """Writers notice nothing; what the queue cannot hold is a gap, and is brought to the store once there is room."""
    world.mount(mode, "--outage-after", "1s", "--on-outage", "continue")
    dice = random.Random(1)
    with opened(world.mnt / "data.img") as fd:
        fill(fd, dice, 1 << 20)
        mark = world.ask("bookmark", name="before")["seq"]
        before = (world.source / "data.img").read_bytes()
        fill(fd, dice, VOLUME_BYTES - (2 << 20))
        os.fsync(fd)
        (world.mnt / "new.img").write_bytes(dice.randbytes(50_000))
        os.rename(world.mnt / "new.img", world.mnt / "renamed.img")
        status = world.wait_for_state("degraded")
        assert "o space left" in status["error"]
        assert world.json("status", world.mnt)["state"] != "protected"
        ballast.unlink()
        world.wait_for_state("protected")
        world.check_equal()
        (gap,) = world.gaps()
        with world.reader() as group:
            assert image_bytes(group, "data.img", group.resolve("before").seq) == before
            assert mark < gap.first
            assert gap.last is not None
            for inside in (gap.first, gap.last):
                with pytest.raises(MomentRefused, match="gap"):
                    group.resolve(f"seq={inside}")
        fill(fd, dice, 1 << 20)
    world.check_equal()
    check_whole(world)


def test_block(world: World, ballast: Path) -> None:
    """Writers wait, for as long as it takes, and lose nothing: there is no gap."""
    world.mount("sync", "--outage-after", "1s", "--on-outage", "block")
    dice = random.Random(2)
    with opened(world.mnt / "data.img") as fd, ThreadPoolExecutor(1) as pool:
        work = pool.submit(fill, fd, dice, 20 << 20)
        try:
            status = world.wait_for_state("blocked")
            assert "o space left" in status["error"]
            assert not wait([work], 1).done
            assert os.pread(fd, 10, 0), "a reader starves behind the writers that wait"
        finally:
            ballast.unlink()
        work.result(60)
        world.wait_for_state("protected")
    world.check_equal()
    assert world.gaps() == []
    check_whole(world)


def test_fail(world: World, ballast: Path) -> None:
    """Writers get EIO, and nothing of what was refused reaches the source; nor, in the end, the store."""
    world.mount("sync", "--outage-after", "1s", "--on-outage", "fail")
    dice = random.Random(3)
    source = world.source / "data.img"
    with opened(world.mnt / "data.img") as fd:
        offset = 0
        with pytest.raises(OSError) as caught:
            for offset in range(0, VOLUME_BYTES, CHUNK):
                os.pwrite(fd, dice.randbytes(CHUNK), offset)
        assert caught.value.errno == errno.EIO
        content = source.read_bytes()
        assert content[offset:] == bytes(VOLUME_BYTES - offset)
        for _ in range(3):
            with pytest.raises(OSError) as again:
                os.pwrite(fd, b"refused", 0)
            assert again.value.errno == errno.EIO
        with pytest.raises(OSError):
            (world.mnt / "new.img").touch()
        assert source.read_bytes() == content
        assert not (world.source / "new.img").exists()
        ballast.unlink()
        world.wait_for_state("protected")
        world.check_equal()
        assert world.gaps(), "the refused write was recorded, and its moment is no recovery point"
        os.pwrite(fd, b"taken", 0)
    world.check_equal()
    check_whole(world)


@pytest.mark.slow
def test_mount_killed_while_the_disk_is_full(world: World, ballast: Path) -> None:
    pids = world.mount("async", "--outage-after", "1s")
    dice = random.Random(4)
    with opened(world.mnt / "data.img") as fd:
        fill(fd, dice, VOLUME_BYTES)
        world.wait_for_state("degraded")
    os.kill(pids.mount, 9)
    ballast.unlink()
    wait_for_end(pids.mount)
    wait_for_end(pids.second)
    world.mount("async")
    world.check_equal()
    assert len(world.gaps()) == 1
    check_whole(world)
