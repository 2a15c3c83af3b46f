"""What must be refused, with one line that says what, where and what to do; and leaves everything as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusefs.mountpoint import mount_at
from tests.system.harness import World, digest, wait_for_end


def test_store_inside_its_own_source(world: World, source: Path) -> None:
    before = sorted(os.listdir(source))
    line = world.refused("mount", source, world.mnt, "--store", source / "deep" / "store")
    assert str(source / "deep" / "store") in line and "source" in line
    assert sorted(os.listdir(source)) == before
    assert mount_at(world.mnt) is None


def test_source_inside_its_store(world: World) -> None:
    world.store.mkdir()
    inner = world.store / "source"
    inner.mkdir()
    assert "source" in world.refused("mount", inner, world.mnt, "--store", world.store)


def test_second_mount_of_one_source(world: World, source: Path) -> None:
    world.mount()
    other = world.directory / "other"
    other.mkdir()
    line = world.refused("mount", source, other, "--store", world.directory / "other-store")
    assert str(source) in line
    assert mount_at(other) is None
    assert world.json("status", world.mnt)["state"] == "protected"


def test_second_writer_of_one_store(world: World, source: Path) -> None:
    world.mount()
    address = f"unix:{world.directory / 'second.socket'}"
    assert str(world.store) in world.refused("appliance", "second", "--store", world.store, "--listen", address)
    other = world.directory / "other"
    other.mkdir()
    (world.directory / "other-source").mkdir()
    line = world.refused("mount", world.directory / "other-source", other, "--store", world.store)
    assert str(world.store) in line
    assert mount_at(other) is None
    assert world.json("status", world.mnt)["state"] == "protected"


def test_store_of_an_unknown_version(world: World, source: Path) -> None:
    world.mount()
    world.unmount()
    marker = world.store / "STORE"
    content = marker.read_bytes()
    # The version is the u16 behind the 8 bytes of magic, in every version there will be.
    marker.write_bytes(content[:8] + (99).to_bytes(2, "little") + content[10:])
    for command in (("mount", source, world.mnt, "--store", world.store), ("browse", world.store, world.snap)):
        assert "99" in world.refused(*command)
    marker.write_bytes(content)
    world.mount()


def test_directory_that_is_no_store(world: World, source: Path) -> None:
    world.store.mkdir()
    (world.store / "thesis.txt").write_text("do not touch")
    assert str(world.store) in world.refused("mount", source, world.mnt, "--store", world.store)
    assert str(world.store) in world.refused("browse", world.store, world.snap)
    assert os.listdir(world.store) == ["thesis.txt"]


def test_mountpoint_that_is_not_empty(world: World, source: Path) -> None:
    (world.mnt / "file").touch()
    line = world.refused("mount", source, world.mnt, "--store", world.store)
    assert str(world.mnt) in line and "not empty" in line
    assert not world.store.exists()


def test_times_that_are_no_recovery_points(world: World, source: Path) -> None:
    world.mount()
    world.rewindfs("bookmark", world.mnt, "mark")
    versions = world.browse() / "volumes/disk.img"
    points = world.json("points", world.store)
    newest = points["newest"]["seq"]
    for wrong in ("2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z", "seq=0", f"seq={newest + 10**6}", "1000d"):
        line = world.refused("snapshot", "create", world.store, "--at", wrong, "--name", "x")
        assert wrong in line
        with pytest.raises(FileNotFoundError):
            os.stat(versions / f"@{wrong}")
    for wrong in ("2026-99-01T00:00:00Z", "yesterday", "seq=minus", "", "~flush", "5m5"):
        world.refused("snapshot", "create", world.store, "--at", wrong, "--name", "x")
        with pytest.raises(FileNotFoundError):
            os.stat(versions / f"@{wrong}")
    assert "x" not in [snapshot["name"] for snapshot in world.json("snapshot", "list", world.store)]


def test_names_that_are_refused(world: World, source: Path) -> None:
    world.mount()
    for name in ("..", "../up", "a/b", "@at", ".hidden", "latest", "5m", "seq=3", "2026-11-22T10-15-30Z"):
        world.refused("bookmark", world.mnt, name)
        world.refused("snapshot", "create", world.store, "--name", name)
    points, snapshots = world.json("points", world.store), world.json("snapshot", "list", world.store)
    assert points["bookmarks"] == []
    assert [snapshot["name"] for snapshot in snapshots] == ["base"]


def test_names_that_exist(world: World, source: Path) -> None:
    world.mount()
    world.rewindfs("bookmark", world.mnt, "taken")
    assert "taken" in world.refused("bookmark", world.mnt, "taken")
    assert "taken" in world.refused("snapshot", "create", world.store, "--name", "taken")


def test_volumes_are_looked_up_never_walked_to(world: World, source: Path) -> None:
    world.mount()
    for wrong in ("../source/disk.img", "..", "/etc/passwd", "missing.img"):
        assert wrong in world.refused("snapshot", "create", world.store, "--volume", wrong, "--name", "x")
        assert wrong in world.refused("points", world.store, wrong)


def test_unmount_of_what_is_no_mount(world: World) -> None:
    assert str(world.mnt) in world.refused("unmount", world.mnt)
    assert str(world.mnt) in world.refused("bookmark", world.mnt, "x")


def room_left(directory: Path) -> int:
    return os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize


def test_full_disk_under_the_store(world: World, source: Path) -> None:
    """Async goes on without the store and says so; with room again the store is whole and equal."""
    small = world.directory / "small.img"
    with open(small, "xb") as file:
        file.truncate(24 << 20)
    world.run("mkfs.ext4", "-q", "-F", small)
    disk = world.loop_mount(small)
    ballast = disk / "ballast"
    world.store = disk / "store"
    pids = world.mount("async", "--outage-after", "1s")
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, room_left(disk) - (4 << 20))))
    data = os.urandom(8 << 20)
    (world.mnt / "new.img").write_bytes(data)
    assert (world.mnt / "new.img").read_bytes() == data
    ballast.unlink()
    world.rewindfs("bookmark", world.mnt, "room-again")
    assert digest(world.browse() / "volumes/new.img/@room-again") == digest(source / "new.img")
    world.run("fusermount3", "-u", world.snap)
    world.rewindfs("unmount", world.mnt)
    wait_for_end(pids.mount)
    assert world.json("verify", world.store)["ok"] is True
