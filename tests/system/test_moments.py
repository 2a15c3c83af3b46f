"""The promise itself: at any moment, the restored image is sound and holds every commit that had returned by then.

SQLite commits in an ext4 file system on a loop device over the mount; each commit is known with the time it began and
the time it returned. Images of random moments are copied with `cp` from the snapshot mount.
"""

from __future__ import annotations

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from dedup.moment import rfc3339
from dedup.types import TimeNs
from tests.system.harness import World

Commit = tuple[int, int, int]
"""(number, begun ns, returned ns)"""


def commit_for_a_while(database: Path, commits: int) -> list[Commit]:
    done: list[Commit] = []
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        # FULL does not sync the directory after the rollback journal is unlinked: the last commit may come undone.
        connection.execute("PRAGMA synchronous=EXTRA")
        connection.execute("CREATE TABLE deed (number INTEGER PRIMARY KEY, filler BLOB)")
        for number in range(commits):
            filler = random.randbytes(random.randrange(100, 20_000))
            begun = time.time_ns()
            connection.execute("INSERT INTO deed VALUES (?, ?)", (number, filler))
            done.append((number, begun, time.time_ns()))
    return done


def check_moment(world: World, moment: int, commits: list[Commit]) -> None:
    restored = world.directory / "restored.img"
    name = f"@{rfc3339(TimeNs(moment))}"
    world.run("cp", "--sparse=always", world.snap / "volumes" / "disk.img" / name, restored)
    world.check_ext4(restored)
    place = world.loop_mount(restored)
    database = place / "deeds.db"
    if any(returned < moment for _, _, returned in commits):
        assert database.exists(), f"{name}: commits had returned, and there is no database"
    if database.exists():
        assert world.sql(database, "PRAGMA integrity_check;") == "ok"
        table = world.sql(database, "SELECT name FROM sqlite_master WHERE name = 'deed';")
        rows = world.sql(database, "SELECT number FROM deed;").split() if table else []
        held = {int(row) for row in rows}
        assert held >= {number for number, _, returned in commits if returned < moment}, name
        assert held <= {number for number, begun, _ in commits if begun <= moment}, name
    world.loop_unmount(place)
    restored.unlink()


def play(world: World, mode: str, mebibytes: int, commits: int, moments: int) -> None:
    world.ext4_image(mebibytes=mebibytes)
    world.mount(mode)
    based = time.time_ns()
    place = world.loop_mount(world.mnt / "disk.img")
    done = commit_for_a_while(place / "deeds.db", commits)
    world.browse()
    for moment in random.Random(mebibytes).sample(range(based, done[-1][2]), moments):
        check_moment(world, moment, done)
    world.loop_unmount(place)
    world.unmount()
    world.run("fusermount3", "-u", world.snap)
    assert world.json("verify", world.store, "--read-data")["ok"]


@pytest.mark.parametrize("mode", ["sync", "async", "batch"])
def test_random_moments(world: World, mode: str) -> None:
    play(world, mode, mebibytes=32, commits=40, moments=4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async", "batch"])
def test_twenty_moments_of_a_large_image(world: World, mode: str) -> None:
    play(world, mode, mebibytes=1024, commits=200, moments=20)
