"""The claim, word by word, with real mounts: a base snapshot, IOs into a first data journal, a second snapshot that is
only pointers into both, then IOs into a second data journal of another granularity while the first still receives.

`tests/dedup/test_claim.py` plays the same at the store, with its reads and writes counted.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dedup.types import Seq
from tests.system.harness import World, check_same, image_bytes

BLOCK = 4096
BLOCKS = 16
FIRST, LATER = range(4), range(8, BLOCKS)
"""Blocks that are written before the second snapshot, and those written after it; others are as they were at first."""
EDGE_POINTS = 15
"""Points that are restored at each side of a switch."""
IN_ACCESS, IN_OPEN = 0x1, 0x20
EVENT = struct.Struct("iIII")


@contextmanager
def watching_reads(directory: Path) -> Iterator[Callable[[], int]]:
    """Gives a function that tells how often a file in the directory has been opened or read, since it last told."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(directory), IN_ACCESS | IN_OPEN) >= 0

    def reads() -> int:
        count = 0
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return count
            at = 0
            while at < len(data):
                _, _, _, name_bytes = EVENT.unpack_from(data, at)
                at += EVENT.size + name_bytes
                count += name_bytes > 0

    try:
        yield reads
    finally:
        os.close(fd)


class Volume:
    """A file of the source, written through the mount by one thread, and its every version."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.path = world.mnt / name
        self._random = random.Random(name)
        self.versions = [self._random.randbytes(BLOCKS * BLOCK)]
        (world.source / name).write_bytes(self.versions[0])

    def write(self, count: int, blocks: range) -> None:
        with open(self.path, "r+b", buffering=0) as file:
            for _ in range(count):
                block, data = self._random.choice(blocks), self._random.randbytes(BLOCK)
                before = self.versions[-1]
                self.versions.append(before[: block * BLOCK] + data + before[(block + 1) * BLOCK :])
                os.pwrite(file.fileno(), data, block * BLOCK)


def places(world: World, volume: str, at: str) -> dict[str, int]:
    """How many bytes lie in the base and in each data journal."""
    found: dict[str, int] = {}
    document = world.json("snapshot", "map", world.store, volume, "--at", at)
    for one in document["ranges"]:
        assert (one["kind"] == "base") == (one["journal"] == "base")
        found[one["journal"]] = found.get(one["journal"], 0) + one["length"]
    assert sum(found.values()) == BLOCKS * BLOCK
    return found


def containers(world: World) -> dict[str, tuple[int, int, int]]:
    """Every container, as it is on the disk."""
    found = {file.name: file.stat() for file in (world.store / "containers").iterdir()}
    return {name: (status.st_size, status.st_blocks, status.st_mtime_ns) for name, status in found.items()}


def test_the_claim_word_by_word(world: World) -> None:
    volumes = [Volume(world, "one.img"), Volume(world, "two.img")]

    # The initial backup snapshot.
    world.mount("sync")
    for volume in volumes:
        assert places(world, volume.name, "base") == {"base": BLOCKS * BLOCK}

    # IOs into the first data journal, which keeps every write.
    for volume in volumes:
        volume.write(20, FIRST)
    world.ask("durable")

    # A second snapshot: not a byte of the source is read, not a block is written.
    with watching_reads(world.source) as reads:
        before = containers(world)
        world.rewindfs("snapshot", "create", world.store, "--name", "second")
        maps = [places(world, volume.name, "second") for volume in volumes]
        assert containers(world) == before
        assert reads() == 0
        (world.source / "one.img").read_bytes()
        assert reads() > 0, "a read would have been seen"
    assert all(found.keys() == {"base", "fine"} for found in maps)
    second = [volume.versions[-1] for volume in volumes]

    # More IOs into a second data journal of another granularity, while the first still receives.
    created = world.json("journal", "create", world.store, "minutes", "--granularity", "60s")
    assert (created["granularity"], created["in_use"]) == ("1m", False)
    ended, written = threading.Event(), threading.Semaphore(0)

    def load(volume: Volume) -> None:
        while not ended.wait(0.005):
            volume.write(1, LATER)
            written.release()

    writers = [threading.Thread(target=load, args=(volume,)) for volume in volumes]
    for writer in writers:
        writer.start()
    try:
        for name in ("minutes", "fine", "minutes", "fine", "minutes"):
            used = world.json("journal", "use", world.store, name)
            assert (used["name"], used["in_use"]) == (name, True)
            while written.acquire(blocking=False):
                pass
            for _ in range(40):
                assert written.acquire(timeout=60), "the writers go on"
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    world.ask("durable")
    after = containers(world)
    assert len(after) == len(before) + 1, "one chain for the second data journal; the first goes on where it was"
    listed = world.json("journal", "list", world.store)
    assert [(one["name"], one["granularity"], one["in_use"]) for one in listed] == [
        ("fine", "every-write", False),
        ("minutes", "1m", True),
    ]

    # A third snapshot, with pointers into all of them.
    world.rewindfs("snapshot", "create", world.store, "--name", "third")
    for volume in volumes:
        assert places(world, volume.name, "third").keys() == {"base", "fine", "minutes"}
    ranges = world.json("points", world.store)["ranges"]
    told = [(one["journal"], one["granularity"]) for one in ranges]
    assert told == [("fine", "every-write"), ("minutes", "1m")] * 3

    # The restores are what was written, at the snapshots and at every point of an every-write stretch.
    snapshots = world.browse() / "points"
    for volume, content in zip(volumes, second, strict=True):
        check_same((snapshots / "second" / volume.name).read_bytes(), content, f"{volume.name} at second")
        check_same((snapshots / "third" / volume.name).read_bytes(), volume.versions[-1], f"{volume.name} at third")
    check_points(world, volumes, ranges)
    world.run("fusermount3", "-u", world.snap)
    world.unmount()
    assert world.json("verify", world.store, "--read-data")["ok"]
    world.check_equal()


def check_points(world: World, volumes: list[Volume], ranges: list[dict[str, Any]]) -> None:
    """Each record is a point, also right where a switch was: from one to the next one volume at most has changed, by
    one write."""
    numbers = [{version: number for number, version in enumerate(volume.versions)} for volume in volumes]
    with world.reader() as group:
        last = 0
        for one in ranges:
            first, before = one["from"]["seq"], last
            last = one["to"]["seq"]
            assert not before or first == before + 1, "no record is without a point"
            edges = {*range(first, first + EDGE_POINTS), *range(last - EDGE_POINTS, last + 1)}
            found: dict[int, list[int]] = {}
            for seq in sorted(seq for seq in edges if first <= seq <= last):
                assert group.resolve(f"seq={seq}").seq == seq
                images = [image_bytes(group, volume.name, Seq(seq)) for volume in volumes]
                found[seq] = [known[image] for known, image in zip(numbers, images, strict=True)]
                if seq - 1 in found:
                    steps = [now - then for then, now in zip(found[seq - 1], found[seq], strict=True)]
                    assert sorted(steps) in ([0, 0], [0, 1]), f"seq={seq}: {steps}"
