"""What people put on volumes, on a loop device over the mount: file systems and databases, while appliances die."""

from __future__ import annotations

import os
import signal
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.system.harness import World, wait_for_end

COMMITS = 60


@pytest.mark.parametrize("mode", ["sync", "batch", pytest.param("async", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_fio_mixes(world: World, mode: str, seconds: int) -> None:
    """fio verifies what it reads while it goes on writing; then the store holds the same."""
    world.mount(mode)
    mix = ("--rw=randrw", "--rwmixread=40", "--verify_backlog=64", f"--runtime={seconds}", "--time_based")
    world.fio(world.mnt / "mix.img", *mix, "--fsync=100", mebibytes=8)
    world.fio(world.mnt / "direct.img", "--direct=1", "--ioengine=libaio", "--iodepth=8", mebibytes=4)
    world.fio(world.mnt / "mapped.img", "--ioengine=mmap", "--bs=4k", mebibytes=2)
    world.check_equal()
    assert world.gaps() == []


def restored(world: World, name: str) -> Path:
    copy = world.directory / f"restored-{name.strip('@')}.img"
    world.run("cp", "--sparse=always", world.snap / "volumes" / "disk.img" / name, copy)
    return copy


def test_file_tree_on_ext4(world: World, source: Path) -> None:
    """Unpacked, changed and deleted on the loop device; what was bookmarked is there, whole, in a sound file system."""
    world.mount("async")
    disk = world.loop_mount(world.mnt / "disk.img")
    archive = world.directory / "tree.tar"
    with tarfile.open(archive, "w") as tar:
        for package in ("dedup", "replication"):
            tar.add(Path(__file__).parent.parent.parent / package, package)
    world.run("tar", "-xf", archive, "-C", disk)
    os.sync()
    world.rewindfs("bookmark", world.mnt, "unpacked")
    world.run("rm", "-r", disk / "dedup")
    world.run("sync", "-f", disk)
    world.browse()
    copy = restored(world, "@unpacked")
    world.loop_unmount(disk)
    world.check_equal()

    world.check_ext4(copy)
    place = world.loop_mount(copy)
    compared = world.run("tar", "-df", archive, "-C", place, check=False)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    world.loop_unmount(place)
    world.check_ext4(restored(world, "@latest"))


class Commits:
    """Commits numbered rows, one by one, and knows the last."""

    def __init__(self, database: Path) -> None:
        self.connection = sqlite3.connect(database, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
        self.last = 0

    def commit(self) -> None:
        """Has returned when the commit is on the disk."""
        self.last += 1
        self.connection.execute("INSERT INTO rows VALUES (?, ?)", (self.last, "x" * 700))

    def close(self) -> None:
        self.connection.close()


def another_second(world: World, old: int) -> int:
    status = world.wait_for_status(lambda status: status["pids"]["second"] not in (None, old), "another appliance")
    return int(status["pids"]["second"])


@pytest.mark.parametrize("mode", ["sync", "async", pytest.param("batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("commits", [COMMITS, pytest.param(20 * COMMITS, marks=pytest.mark.slow)])
def test_commits_survive_the_second_appliance(world: World, source: Path, mode: str, commits: int) -> None:
    """SQLite commits while the second appliance is killed: each bookmark holds what had been committed, and no more."""
    pids = world.mount(mode, "--outage-after", "60s")
    disk = world.loop_mount(world.mnt / "disk.img")
    with closing(Commits(disk / "rows.db")) as database:
        bookmarks: dict[str, int] = {}
        second = pids.second
        for turn in range(1, commits + 1):
            database.commit()
            if turn % (commits // 3):
                continue
            world.ask("bookmark", name=f"after-{turn}")
            bookmarks[f"after-{turn}"] = database.last
            os.kill(second, signal.SIGKILL)
            database.commit()
            wait_for_end(second)
            second = another_second(world, second)
        last = database.last
    world.loop_unmount(disk)
    world.ask("durable")
    assert world.gaps() == []

    world.browse()
    for name, had in {**bookmarks, "latest": last}.items():
        copy = restored(world, f"@{name}")
        world.check_ext4(copy)
        place = world.loop_mount(copy)
        assert world.sql(place / "rows.db", "PRAGMA integrity_check") == "ok"
        assert world.sql(place / "rows.db", "SELECT count(*), max(id) FROM rows") == f"{had}|{had}", name
        world.loop_unmount(place)
    world.check_equal()
