"""What a second mount finds: a clean end, a file changed behind the mount, a store that is not the one it left."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dedup.errors import MomentRefused
from tests.system.harness import Pids, World, image_bytes, wait_for_end

BLOCK = 4096


@pytest.fixture
def day_one(world: World) -> World:
    """Two volumes, a bookmark `monday`, some writes after it, and a clean end."""
    dice = random.Random(0)
    for name in ("a.img", "b.img"):
        (world.source / name).write_bytes(dice.randbytes(1 << 20))
    world.mount()
    world.ask("bookmark", name="monday")
    with open(world.mnt / "a.img", "r+b") as file:
        file.write(b"after the bookmark")
    world.unmount()
    return world


def start(world: World, *options: str) -> str:
    """Mounts; returns what the log says of it."""
    log = world.directory / "mount.log"
    before = log.stat().st_size
    world.mount("sync", *options)
    return log.read_text()[before:]


def store_state(world: World) -> dict[str, Any]:
    with world.reader() as group:
        return {"held": group.held, "volumes": {path: v.volume for path, v in group.volumes_at(group.held).items()}}


def wait_for_both(pids: Pids) -> None:
    wait_for_end(pids.mount)
    wait_for_end(pids.second)


def check_monday(world: World) -> None:
    dice = random.Random(0)
    with world.reader() as group:
        seq = group.resolve("monday").seq
        for name in ("a.img", "b.img"):
            assert image_bytes(group, name, seq) == dice.randbytes(1 << 20)


def test_clean_end_and_start_leave_no_trace(day_one: World) -> None:
    before = store_state(day_one)
    used = day_one.json("status", day_one.store)["store"]["bytes"]
    said = start(day_one)
    assert "a clean start" in said and "bytes were sent" not in said
    assert day_one.ask("status")["seq"] >= before["held"] + 1
    assert day_one.gaps() == []
    with day_one.reader() as group:
        group.resolve(f"seq={before['held']}")
        group.resolve(f"seq={before['held'] + 1}")
    day_one.check_equal()
    assert day_one.json("status", day_one.store)["store"]["bytes"] < used + 64 * BLOCK
    check_monday(day_one)


def test_file_changed_behind_the_mount(day_one: World) -> None:
    """Only that volume is compared, only what differs is sent, and the time of it is a gap."""
    before = store_state(day_one)
    with open(day_one.source / "b.img", "r+b") as file:
        file.seek(100 * BLOCK)
        file.write(os.urandom(3 * BLOCK))
    said = start(day_one)
    assert "everything=False, created=(), retired=(), changed=('b.img',), regions={}" in said
    assert f"{3 * BLOCK} bytes were sent" in said
    (gap,) = day_one.gaps()
    with day_one.reader() as group:
        assert gap.first == before["held"] + 1
        with pytest.raises(MomentRefused, match="gap"):
            group.resolve(f"seq={gap.first}")
        group.resolve(f"seq={gap.first - 1}")
    day_one.check_equal()
    check_monday(day_one)


def test_size_and_mode_changed_behind_the_mount(day_one: World) -> None:
    os.truncate(day_one.source / "a.img", 5000)
    os.truncate(day_one.source / "b.img", 3 << 20)
    os.chmod(day_one.source / "b.img", 0o600)
    start(day_one)
    day_one.check_equal()
    check_monday(day_one)


def test_files_come_go_and_are_renamed_behind_the_mount(day_one: World) -> None:
    before = store_state(day_one)
    (day_one.source / "new.img").write_bytes(os.urandom(10_000))
    os.rename(day_one.source / "a.img", day_one.source / "renamed.img")
    (day_one.source / "b.img").unlink()
    said = start(day_one)
    assert "created=('new.img', 'renamed.img')" in said
    day_one.check_equal()
    assert len(day_one.gaps()) == 1
    after = store_state(day_one)["volumes"]
    assert not set(after.values()) & set(before["volumes"].values()), "ids are never given twice"
    check_monday(day_one)


def test_file_replaced_behind_the_mount(day_one: World) -> None:
    """Same size, same times: the inode tells."""
    old = (day_one.source / "b.img").stat()
    (day_one.source / "other").write_bytes(os.urandom(old.st_size))
    os.replace(day_one.source / "other", day_one.source / "b.img")
    os.utime(day_one.source / "b.img", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert "changed=('b.img',)" in start(day_one)
    day_one.check_equal()
    check_monday(day_one)


def copy_of(store: Path) -> Path:
    """A copy as `cp -a` makes it, sparse; of a store at rest."""
    copy = store.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", store, copy], check=True)
    return copy


def put_back(copy: Path, store: Path) -> None:
    shutil.rmtree(store)
    copy.rename(store)


@pytest.mark.parametrize("killed", [False, True])
def test_store_put_back_to_an_older_state(day_one: World, killed: bool) -> None:
    """It is said, everything is compared, and what it lost is a gap: nothing is merged in silence."""
    copy = copy_of(day_one.store)
    held = store_state(day_one)["held"]
    pids = day_one.mount()
    with open(day_one.mnt / "a.img", "r+b") as file:
        file.seek(50 * BLOCK)
        file.write(os.urandom(20 * BLOCK))
    if killed:
        # Cleanly ended once more, so that no mark is left of what the older store does not know; then killed.
        day_one.unmount()
        pids = day_one.mount()
        os.kill(pids.mount, 9)
        wait_for_both(pids)
    else:
        day_one.unmount()
    put_back(copy, day_one.store)
    said = start(day_one)
    assert "put back to an older state" in said
    assert "everything=True" in said and f"{20 * BLOCK} bytes were sent" in said
    (gap,) = day_one.gaps()
    assert gap.first == held + 1
    day_one.check_equal()
    check_monday(day_one)


def test_store_put_back_under_a_running_mount(day_one: World) -> None:
    """The second appliance comes back with an older store: ordered replication is over, and that is said."""
    copy = copy_of(day_one.store)
    pids = day_one.mount("async")
    with open(day_one.mnt / "a.img", "r+b") as file:
        file.seek(50 * BLOCK)
        file.write(os.urandom(20 * BLOCK))
    day_one.ask("durable")
    shutil.rmtree(day_one.store)
    copy.rename(day_one.store)
    os.kill(pids.second, 9)
    status = day_one.wait_for_status(lambda status: status["link"] == "lost", "the loss")
    assert status["state"] == "degraded" and "kept nowhere" in status["error"]
    # Writers of an async mount go on; what they write is for the next mount to bring to the store.
    with open(day_one.mnt / "b.img", "r+b") as file:
        file.write(os.urandom(5 * BLOCK))
    day_one.run("fusermount3", "-u", day_one.mnt)
    wait_for_both(pids)
    said = start(day_one)
    assert f"{25 * BLOCK} bytes were sent" in said
    assert len(day_one.gaps()) == 1
    day_one.check_equal()
    check_monday(day_one)


def test_another_store_gets_everything(day_one: World) -> None:
    day_one.store = day_one.directory / "other-store"
    assert "everything=True" in start(day_one)
    day_one.check_equal()
    day_one.unmount()
    day_one.store = day_one.directory / "store"
    assert "everything=True" in start(day_one)
    day_one.check_equal()
    check_monday(day_one)


def test_lost_state_directory(day_one: World) -> None:
    """It is another agent now. Nothing tells what changed since: everything is compared, and nothing differs."""
    shutil.rmtree(day_one.source / ".rewindfs")
    assert "--take-over" in day_one.refused("mount", day_one.source, day_one.mnt, "--store", day_one.store)
    said = start(day_one, "--take-over")
    assert "everything=True" in said and " 0 bytes were sent" in said
    day_one.check_equal()
    assert len(day_one.gaps()) == 1
    check_monday(day_one)
