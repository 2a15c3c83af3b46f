"""The main job end to end, as a person does it: protect, browse, restore with cp; in each mode."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

import pytest

from tests.system.harness import World, digest, wait_for_end

MODES = ("sync", "async", "batch")
ROWS = 500
INSERT = f"""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})
             INSERT INTO orders SELECT i, 'item ' || i FROM n;"""


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def orders(world: World, image: Path) -> str:
    """Checks the restored image and its database, and returns what it says the table holds."""
    place = world.loop_mount(image)
    assert world.sql(place / "shop.db", "PRAGMA integrity_check;") == "ok"
    done = world.run("sqlite3", place / "shop.db", "SELECT count(*), sum(id) FROM orders", check=False)
    world.loop_unmount(place)
    world.run("e2fsck", "-fn", image)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("mode", MODES)
def test_dropped_table_comes_back(world: World, source: Path, mode: str) -> None:
    world.mount(mode)
    disk = world.loop_mount(world.mnt / "disk.img")
    before_all = now()
    world.sql(disk / "shop.db", "CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT);" + INSERT)
    (disk / "letter.txt").write_text("Dear customers\n")
    world.run("sync", "-f", disk)
    world.rewindfs("bookmark", world.mnt, "before-the-mistake")
    moment = now()

    world.sql(disk / "shop.db", "DROP TABLE orders; VACUUM;")
    (disk / "letter.txt").unlink()
    world.run("sync", "-f", disk)
    world.rewindfs("snapshot", "create", world.store, "--name", "after")

    names = {snapshot["name"]: snapshot for snapshot in world.json("snapshot", "list", world.store)}
    assert {"before-the-mistake", "after"} <= names.keys()
    assert names["before-the-mistake"]["seq"] < names["after"]["seq"]
    assert names["before-the-mistake"]["volumes"][0]["volume"] == "disk.img"
    points = world.json("points", world.store)
    (mark,) = points["bookmarks"]
    assert mark["name"] == "before-the-mistake"
    assert points["gaps"] == []

    versions = world.browse() / "volumes" / "disk.img"
    listed = os.listdir(versions)
    assert {"before-the-mistake", "after"} <= set(listed)
    assert not any(name.startswith("@") for name in listed)
    size = (source / "disk.img").stat().st_size
    assert all((versions / name).stat().st_size == size for name in listed)

    found = {}
    for name in ("@before-the-mistake", f"@seq={mark['seq']}", f"@{moment}", "@latest", "after", f"@{before_all}"):
        restored = world.directory / "restored.img"
        world.run("cp", versions / name, restored)
        if name == f"@{before_all}":
            world.check_ext4(restored)
        else:
            found[name] = orders(world, restored)
    there = f"{ROWS}|{ROWS * (ROWS + 1) // 2}"
    assert [found[name] for name in ("@before-the-mistake", f"@seq={mark['seq']}", f"@{moment}")] == [there] * 3
    assert all("no such table: orders" in found[name] for name in ("@latest", "after"))

    world.loop_unmount(disk)
    world.unmount()
    world.check_equal()


def test_point_tells_what_it_is(world: World, source: Path) -> None:
    world.mount()
    world.rewindfs("bookmark", world.mnt, "here")
    whole = world.browse() / "points" / "here" / "disk.img"
    (mark,) = world.json("points", world.store)["bookmarks"]
    for file in (whole, world.snap / "volumes/disk.img/here", world.snap / "volumes/disk.img/@here"):
        assert os.getxattr(file, "user.rewindfs.kind") == b"bookmark"
        assert int(os.getxattr(file, "user.rewindfs.seq")) == mark["seq"]
        assert os.getxattr(file, "user.rewindfs.time").decode() == mark["time"]
        assert digest(file) == digest(source / "disk.img")
        with pytest.raises(OSError):
            open(file, "r+b").close()


def test_snapshots_are_made_listed_and_deleted(world: World, source: Path) -> None:
    world.mount()
    world.rewindfs("snapshot", "create", world.store, "--name", "one")
    world.rewindfs("snapshot", "create", world.store)
    names = [snapshot["name"] for snapshot in world.json("snapshot", "list", world.store)]
    assert "one" in names
    assert any(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{6}Z", name) for name in names)
    world.rewindfs("snapshot", "delete", world.store, "one")
    assert "one" not in [snapshot["name"] for snapshot in world.json("snapshot", "list", world.store)]
    assert "one" in world.refused("snapshot", "delete", world.store, "one")


def test_status_tells_the_truth(world: World, source: Path) -> None:
    world.mount("sync")
    for mode in MODES:
        world.rewindfs("mode", world.mnt, mode)
        status = world.json("status", world.mnt)
        assert (status["mode"], status["state"], status["gaps"]) == (mode, "protected", 0)
        assert status["store"]["path"] == str(world.store)
        world.ask("bookmark", name=f"mark-{mode}")
        assert world.ask("status")["durable_seq"] > status["seq"]
    assert world.rewindfs("status", world.mnt).stdout
    assert world.json("status", world.store)["group"] == status["group"]


def test_fio_verifies_on_the_mount(world: World, source: Path) -> None:
    world.mount("async")
    world.fio(world.mnt / "fio.img", "--fsync=64")
    world.unmount()
    assert digest(world.browse() / "volumes/fio.img/@latest") == digest(source / "fio.img")


def test_unmounting_by_hand_is_as_safe(world: World, source: Path) -> None:
    pids = world.mount("batch")
    (world.mnt / "late.img").write_bytes(os.urandom(3 << 20))
    world.run("fusermount3", "-u", world.mnt)
    for pid in (pids.mount, pids.second):
        wait_for_end(pid)
    assert digest(world.browse() / "volumes/late.img/@latest") == digest(source / "late.img")


def test_second_day_goes_on_where_the_first_ended(world: World, source: Path) -> None:
    world.mount()
    world.rewindfs("bookmark", world.mnt, "monday")
    monday = digest(source / "disk.img")
    world.unmount()
    world.mount()
    with open(world.mnt / "disk.img", "r+b") as file:
        file.write(b"tuesday" * 1000)
    world.unmount()
    versions = world.browse() / "volumes/disk.img"
    assert digest(versions / "@monday") == monday
    assert digest(versions / "@latest") == digest(source / "disk.img") != monday
    assert world.json("points", world.store)["gaps"] == []


def test_killed_mount_is_explained_and_mounted_again(world: World, source: Path) -> None:
    pids = world.mount()
    os.kill(pids.mount, 9)
    wait_for_end(pids.mount)
    with pytest.raises(OSError, match="not connected|abort"):
        os.listdir(world.mnt)
    assert "died" in world.refused("status", world.mnt)
    done = world.rewindfs(
        "mount", world.source, world.mnt, "--store", world.store, "--wait-base", "--log-file", "again.log"
    )
    assert "cleaned a stale mount" in done.stderr
    with open(world.mnt / "disk.img", "r+b") as file:
        file.write(b"again")
    world.unmount()
    assert digest(world.browse() / "volumes/disk.img/@latest") == digest(source / "disk.img")
