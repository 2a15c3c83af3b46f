"""Many writers at once, in each other's way: afterwards source and `@latest` are equal, byte for byte, for every file.

Nothing else would show that seqs and source calls have one order: overlapping writes whose order differs at the two
ends leave different bytes there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dedup.errors import MomentRefused
from tests.system.harness import World

BLOCK = 4096
RENAME_EXCHANGE = 2
MODES = ("sync", "async", "batch")
modes = pytest.mark.parametrize("mode", ["sync", "batch", pytest.param("async", marks=pytest.mark.slow)])
turns = pytest.mark.parametrize("turns", [60, pytest.param(1500, marks=pytest.mark.slow)])


def together(works: Iterable[Callable[[], None]]) -> None:
    """Runs them in a thread each, and raises what the first to fail has raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a writer hangs"
    if failures:
        raise failures[0]


def direct_writer(path: Path, seed: int, turns: int, blocks: int) -> Callable[[], None]:
    """Writes runs of blocks past the page cache, so that nothing puts an order into overlapping writes before us."""

    def work() -> None:
        dice = random.Random(seed)
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        buffer = mmap.mmap(-1, 64 << 10)
        try:
            for _ in range(turns):
                length = BLOCK * dice.randint(1, 16)
                buffer[:length] = dice.randbytes(length)
                os.pwrite(fd, memoryview(buffer)[:length], BLOCK * dice.randrange(blocks))
        finally:
            buffer.close()
            os.close(fd)

    return work


def ragged_writer(path: Path, seed: int, turns: int, size: int) -> Callable[[], None]:
    """Writes through the page cache at any offset: partial blocks."""

    def work() -> None:
        dice = random.Random(seed)
        fd = os.open(path, os.O_RDWR)
        try:
            for _ in range(turns):
                os.pwrite(fd, dice.randbytes(dice.randint(1, 20_000)), dice.randrange(size))
        finally:
            os.close(fd)

    return work


def appender(path: Path, seed: int, turns: int) -> Callable[[], None]:
    def work() -> None:
        dice = random.Random(seed)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            for turn in range(turns):
                line = f"{seed}:{turn}:".encode() + dice.randbytes(dice.randint(1, 6000)).hex().encode() + b"\n"
                assert os.write(fd, line) == len(line)
        finally:
            os.close(fd)

    return work


def truncater(path: Path, seed: int, turns: int) -> Callable[[], None]:
    def work() -> None:
        dice = random.Random(seed)
        for _ in range(turns):
            if dice.random() < 0.3:
                os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
            else:
                os.truncate(path, dice.randrange(200_000))

    return work


@modes
@turns
def test_overlapping_writers(world: World, mode: str, turns: int) -> None:
    blocks = 64
    (world.source / "data.img").write_bytes(bytes(BLOCK * blocks))
    world.mount(mode)
    file = world.mnt / "data.img"
    works = [direct_writer(file, seed, turns, blocks) for seed in range(4)]
    works += [ragged_writer(file, seed, turns, BLOCK * blocks) for seed in range(4, 6)]
    together(works)
    world.check_equal()
    assert world.gaps() == []


@turns
def test_overlapping_writers_in_processes(world: World, turns: int) -> None:
    world.mount("async")
    (world.mnt / "data.img").write_bytes(bytes(4 << 20))
    # An odd block size at an odd offset each, so that no two writers agree on where a block begins.
    options = ("--ioengine=psync", "--rw=randwrite", "--randrepeat=0", "--norandommap", "--numjobs=3", "--size=4M")
    world.run(
        *("fio", "--name=odd", f"--filename={world.mnt / 'data.img'}", *options, "--bs=5k-40k", "--bs_unaligned"),
        f"--number_ios={turns}",
    )
    world.run(
        *("fio", "--name=direct", f"--filename={world.mnt / 'data.img'}", *options, "--bs=4k-64k", "--direct=1"),
        f"--number_ios={turns}",
    )
    world.check_equal()
    assert world.gaps() == []


@modes
@turns
def test_appends_and_truncates(world: World, mode: str, turns: int) -> None:
    (world.source / "log.txt").touch()
    world.mount(mode)
    file = world.mnt / "log.txt"
    together(
        [appender(file, seed, turns) for seed in range(3)]
        + [truncater(file, seed, turns) for seed in range(3, 5)]
        + [ragged_writer(file, 5, turns, 100_000)]
    )
    world.check_equal()
    assert world.gaps() == []


def test_appends_alone_lose_nothing(world: World) -> None:
    (world.source / "log.txt").touch()
    world.mount("batch")
    together(appender(world.mnt / "log.txt", seed, 40) for seed in range(4))
    lines = (world.source / "log.txt").read_bytes().splitlines()
    assert sorted(line.rsplit(b":", 1)[0] for line in lines) == sorted(
        f"{seed}:{turn}".encode() for seed in range(4) for turn in range(40)
    )
    world.check_equal()


@modes
@turns
def test_names_change_while_files_are_written(world: World, mode: str, turns: int) -> None:
    world.mount(mode)
    names = [world.mnt / name for name in ("one", "two", "three", "sub/four")]
    (world.mnt / "sub").mkdir()
    rename = ctypes.CDLL(None, use_errno=True).renameat2

    def writer(seed: int) -> Callable[[], None]:
        def work() -> None:
            dice = random.Random(seed)
            for _ in range(turns):
                flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if dice.random() < 0.2 else 0)
                try:
                    fd = os.open(dice.choice(names), flags, 0o640)
                except FileNotFoundError:
                    continue
                try:
                    for _ in range(3):
                        os.pwrite(fd, dice.randbytes(dice.randint(1, 9000)), dice.randrange(60_000))
                finally:
                    os.close(fd)

        return work

    def namer(seed: int) -> Callable[[], None]:
        def work() -> None:
            dice = random.Random(seed)
            for _ in range(turns):
                one, other = dice.sample(names, 2)
                match dice.randrange(5):
                    case 0:
                        one.unlink(missing_ok=True)
                    case 1:
                        rename(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE)
                    case 2 if dice.random() < 0.3:
                        # The directory with whatever lies in it, and back.
                        for old, new in (("sub", "moved"), ("moved", "sub")):
                            os.rename(world.mnt / old, world.mnt / new)
                    case _:
                        try:
                            os.rename(one, other)
                        except FileNotFoundError:
                            continue

        return work

    together([writer(seed) for seed in range(4)] + [namer(10)])
    world.check_equal()
    assert world.gaps() == []


# -- a source that fills up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async", "batch"])
def test_source_that_fills_up(world: World, mode: str) -> None:
    """ENOSPC and short writes under several writers; then room again."""
    small = world.directory / "small.img"
    with open(small, "xb") as file:
        file.truncate(24 << 20)
    world.run("mkfs.ext4", "-q", "-F", small)
    world.source = world.loop_mount(small)
    (world.source / "lost+found").rmdir()
    ballast = world.source / "ballast"
    free = os.statvfs(world.source)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - (2 << 20)))
    (world.source / "data.img").touch()
    world.mount(mode)

    refused = []

    def writer(seed: int) -> Callable[[], None]:
        def work() -> None:
            dice = random.Random(seed)
            fd = os.open(world.mnt / "data.img", os.O_RDWR)
            try:
                for _ in range(60):
                    length = dice.randint(1, 100_000)
                    try:
                        written = os.pwrite(fd, dice.randbytes(length), dice.randrange(6 << 20))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        refused.append(seed)
                    else:
                        if written < length:
                            refused.append(seed)
            finally:
                os.close(fd)

        return work

    together(writer(seed) for seed in range(4))
    assert refused, "the source did not fill up"
    world.check_equal()
    gaps = world.gaps()
    assert gaps and {gap.reason for gap in gaps} == {"a write that the source refused"}
    with world.reader() as group:
        for gap in gaps:
            assert gap.last is not None
            with pytest.raises(MomentRefused, match="refused"):
                group.resolve(f"seq={gap.first}")
            group.resolve(f"seq={gaps[-1].last + 1}")  # type: ignore[operator]
    (world.mnt / "ballast").unlink()
    (world.mnt / "data.img").write_bytes(os.urandom(3 << 20))
    world.check_equal()
    assert world.ask("status")["state"] == "protected"
