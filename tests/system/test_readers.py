"""Many programs read moments while applications go on writing, and while what they read is deleted."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.harness import END_SECONDS_MAX, World

BLOCK = 4096
BLOCKS = 512
READERS = 4


class Rounds:
    """Writes 1, 2, 3, … to one block after the other, round and round: a past image tells up to which number."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.last = 0
        self.moved = threading.Condition()
        self.stop = threading.Event()

    def write(self, count: int) -> None:
        with open(self.file, "r+b", buffering=0) as file:
            for _ in range(count):
                if self.stop.is_set():
                    return
                number = self.last + 1
                os.pwrite(file.fileno(), self.block(number), (number % BLOCKS) * BLOCK)
                with self.moved:
                    self.last = number
                    self.moved.notify_all()

    @staticmethod
    def block(number: int) -> bytes:
        return number.to_bytes(8, "big") * (BLOCK // 8)

    @classmethod
    def image(cls, last: int) -> bytes:
        """After that number was written."""
        blocks = [bytes(BLOCK)] * BLOCKS
        for number in range(max(1, last - BLOCKS + 1), last + 1):
            blocks[number % BLOCKS] = cls.block(number)
        return b"".join(blocks)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Writes meanwhile, and is seen to."""
        thread = threading.Thread(target=self.write, args=(1 << 30,))
        thread.start()
        begun = self.last
        try:
            yield
            with self.moved:
                assert self.moved.wait_for(lambda: self.last > begun, END_SECONDS_MAX), "the writer stands still"
        finally:
            self.stop.set()
            thread.join()
            self.stop.clear()


def copies(world: World, name: str) -> list[bytes]:
    """What READERS processes copy, all at once."""
    source = world.snap / "volumes" / "disk.img" / name
    targets = [world.directory / f"copy{number}" for number in range(READERS)]
    running = [subprocess.Popen(["cp", source, target], stderr=subprocess.PIPE) for target in targets]
    for process in running:
        _, said = process.communicate(timeout=END_SECONDS_MAX)
        assert process.returncode == 0, said
    return [target.read_bytes() for target in targets]


def check(image: bytes, since: int, until: int) -> None:
    """It is the one after some number in since..until."""
    last = max(int.from_bytes(image[at : at + 8], "big") for at in range(0, len(image), BLOCK))
    assert since <= last <= until
    assert image == Rounds.image(last), f"the image after {last} is another one"


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_readers_beside_a_writer(world: World, mode: str) -> None:
    (world.source / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    world.mount(mode)
    rounds = Rounds(world.mnt / "disk.img")
    marks = {}
    for name in ("first", "second"):
        rounds.write(BLOCKS + 100)
        world.ask("bookmark", name=name)
        marks[name] = rounds.last
    world.browse()
    path = world.snap / "volumes" / "disk.img" / "second"
    with open(path, "rb", buffering=0) as opened, rounds.going_on():
        read = opened.read(BLOCK * BLOCKS // 2)
        for name, number in (("first", marks["first"]), ("@second", marks["second"])):
            assert all(image == Rounds.image(number) for image in copies(world, name)), name
        world.rewindfs("snapshot", "delete", world.store, "second")
        world.rewindfs("gc", world.store)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while part := opened.read(BLOCK * 7):
            read += part
        assert read == Rounds.image(marks["second"])
        assert not path.exists()
        since = rounds.last if mode == "sync" else marks["second"]
        for image in copies(world, "@latest"):
            check(image, since, rounds.last + 1)
    world.unmount()
    world.check_equal()
