"""The store reaches its hard limit under a real mount: writes wait or are refused as its policy says; the store stays
below the limit and whole; and once the limit is raised it recovers by itself, or when it is opened again."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedup.space import used_bytes
from tests.system.harness import World, image_bytes, wait_for_end

HARD = 64 << 20
CHUNK = 256 << 10
VOLUME_BYTES = 96 << 20


@pytest.fixture
def volume(world: World) -> Path:
    """A sparse volume in the source that has more room than the store."""
    with open(world.source / "data.img", "xb") as file:
        file.truncate(VOLUME_BYTES)
    return world.source / "data.img"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def fill(fd: int, dice: random.Random, total: int) -> None:
    for offset in range(0, total, CHUNK):
        assert os.pwrite(fd, dice.randbytes(CHUNK), offset) == CHUNK


def check_at_limit(world: World) -> None:
    """It is said, and the store is not above it."""
    space = world.json("status", world.mnt)["space"]
    assert (space["state"], space["hard_limit"]) == ("hard", HARD)
    assert space["used"] <= HARD
    assert "no space left below the hard limit" in world.logs()
    assert used_bytes(world.store) <= HARD


def check_whole(world: World) -> None:
    """After a clean end: the store verifies, and goes on without a gap."""
    gaps = len(world.gaps())
    world.unmount()
    assert world.json("verify", world.store, "--read-data")["ok"]
    world.mount()
    assert len(world.gaps()) == gaps
    world.check_equal()


def test_block(world: World, volume: Path) -> None:
    """Writers wait, readers and commands do not; nothing is lost when the limit is raised, there is no gap."""
    world.mount("sync", "--outage-after", "1s")
    soft = HARD // 4
    world.rewindfs("retention", "set", world.store, "--hard-limit", str(HARD), "--soft-limit", str(soft))
    with opened(world.mnt / "data.img") as fd, ThreadPoolExecutor(1) as pool:
        work = pool.submit(fill, fd, random.Random(1), 80 << 20)
        try:
            world.wait_for_state("blocked")
            check_at_limit(world)
            assert world.logs().count("above its soft limit") == 1
            assert not wait([work], 1).done
            assert os.pread(fd, 10, 0), "a reader starves behind the writers that wait"
            world.rewindfs("snapshot", "create", world.store, "--name", "at-the-limit")
            assert used_bytes(world.store) <= HARD
        finally:
            world.rewindfs("retention", "set", world.store, "--hard-limit", "none", "--soft-limit", "none")
        work.result(60)
        world.wait_for_state("protected")
    world.check_equal()
    assert world.gaps() == []
    world.unmount()
    assert world.json("verify", world.store, "--read-data")["ok"]


def test_fail(world: World, volume: Path) -> None:
    """The agent's outage policy is met: EIO here, and nothing of what was refused reaches the source."""
    world.mount("sync", "--outage-after", "1s", "--on-outage", "fail")
    world.rewindfs("retention", "set", world.store, "--hard-limit", str(HARD), "--at-limit", "fail")
    dice = random.Random(2)
    with opened(world.mnt / "data.img") as fd:
        offset = 0
        with pytest.raises(OSError) as caught:
            for offset in range(0, VOLUME_BYTES, CHUNK):
                os.pwrite(fd, dice.randbytes(CHUNK), offset)
        assert caught.value.errno == errno.EIO
        content = volume.read_bytes()
        assert content[offset:] == bytes(VOLUME_BYTES - offset)
        check_at_limit(world)
        with pytest.raises(OSError):
            os.pwrite(fd, b"refused", 0)
        assert volume.read_bytes() == content
        world.rewindfs("retention", "set", world.store, "--hard-limit", "1G")
        world.wait_for_state("protected")
        world.check_equal()
        os.pwrite(fd, b"taken", 0)
    world.check_equal()
    world.unmount()
    assert world.json("verify", world.store, "--read-data")["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("at_limit", ["block", "fail"])
def test_continue(world: World, volume: Path, at_limit: str) -> None:
    """An asynchronous mount goes on without the store, as in any outage: a gap, and the store catches up later."""
    world.mount("async", "--outage-after", "1s")
    world.rewindfs("retention", "set", world.store, "--hard-limit", str(HARD), "--at-limit", at_limit)
    with opened(world.mnt / "data.img") as fd:
        fill(fd, random.Random(3), VOLUME_BYTES)
        world.wait_for_state("degraded")
        check_at_limit(world)
        world.rewindfs("retention", "set", world.store, "--hard-limit", "none")
        world.wait_for_state("protected")
    world.check_equal()
    assert len(world.gaps()) == 1
    check_whole(world)


@pytest.mark.slow
def test_killed_at_the_limit(world: World, volume: Path) -> None:
    """All processes die while a write waits; the limit is raised with none running; opened again, nothing is lost."""
    pids = world.mount("sync", "--outage-after", "1s")
    world.rewindfs("retention", "set", world.store, "--hard-limit", str(HARD))
    with ThreadPoolExecutor(1) as pool:
        fd = os.open(world.mnt / "data.img", os.O_RDWR)
        work = pool.submit(fill, fd, random.Random(4), 80 << 20)
        try:
            world.wait_for_state("blocked")
        finally:
            os.kill(pids.second, 9)
            os.kill(pids.mount, 9)
        with pytest.raises(OSError):
            work.result(60)
        with pytest.raises(OSError):
            os.close(fd)
    wait_for_end(pids.mount)
    wait_for_end(pids.second)
    world.rewindfs("retention", "set", world.store, "--hard-limit", "1G")
    world.mount("sync")
    world.check_equal()
    check_whole(world)


@pytest.mark.slow
def test_unmounted_at_the_limit(world: World, volume: Path) -> None:
    """What cannot be drained is said; the next mount finds the regions, and the limit is as it was."""
    world.mount("async", "--outage-after", "1s", "--on-outage", "continue")
    world.rewindfs("retention", "set", world.store, "--hard-limit", str(HARD))
    with opened(world.mnt / "data.img") as fd:
        fill(fd, random.Random(5), VOLUME_BYTES)
        world.wait_for_state("degraded")
    pids = world.pids()
    world.rewindfs("unmount", world.mnt, "--drain-timeout", "2s", check=False)
    world.run("fusermount3", "-u", world.mnt, check=False)
    wait_for_end(pids.mount)
    wait_for_end(pids.second)
    assert used_bytes(world.store) <= HARD
    world.mount("async", "--outage-after", "1s", "--on-outage", "continue", wait_base=False)
    world.wait_for_status(lambda _: world.json("status", world.store)["space"]["state"] == "hard", "the hard limit")
    world.rewindfs("retention", "set", world.store, "--hard-limit", "none")
    world.wait_for_state("protected")
    world.check_equal()
    check_whole(world)


@pytest.mark.slow
def test_thin(world: World, volume: Path) -> None:
    """One region is written again and again, several stores full of it: history makes room for it, and nothing else is
    lost: not what is there now, nor what has a name."""
    world.mount("sync", "--outage-after", "1s")
    hard, region = 4 * HARD, 16 << 20  # several containers: the one in use cannot be collected
    tiers = ("--every-write", "4s", "--minutes", "0", "--hours", "0", "--days", "0")
    world.rewindfs("retention", "set", world.store, "--hard-limit", str(hard), "--at-limit", "thin", *tiers)
    dice = random.Random(6)
    with opened(world.mnt / "data.img") as fd, ThreadPoolExecutor(1) as pool:
        fill(fd, dice, region)
        world.ask("bookmark", name="named")
        named = volume.read_bytes()
        try:
            for _ in range(30):
                pool.submit(fill, fd, dice, region).result(120)
                assert used_bytes(world.store) <= hard
        finally:
            world.rewindfs("retention", "set", world.store, "--hard-limit", "none")
    world.check_equal()
    assert world.gaps() == []
    with world.reader() as group:
        assert image_bytes(group, "data.img", group.resolve("named").seq) == named
    assert "thinning history" in world.logs()
    check_whole(world)
