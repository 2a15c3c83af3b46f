"""`rewindfs restore --in-place`: what differs and no more is written, through the mount, and it can be undone."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dedup.errors import RewindError
from fusefs.in_place import InPlaceRestore
from fusefs.mountpoint import unmount
from fusefs.restore_cli import restore as restore_command
from fusefs.restore_plan import VolumeChange
from tests.system.commands_here import document, invoke, refusal
from tests.system.harness import World, volumes_in, wait_for_end

BLOCK = 4096
SIZE = 300 * BLOCK + 1234
MODES = [pytest.param("sync", marks=pytest.mark.slow), pytest.param("async", marks=pytest.mark.slow), "batch"]


@pytest.fixture
def dice() -> random.Random:
    return random.Random(5)


@pytest.fixture
def volumes(world: World, dice: random.Random) -> World:
    """Three volumes, one of them in a directory, none a multiple of a block long."""
    (world.source / "db").mkdir()
    for name in ("disk.img", "db/app.db", "other.img"):
        (world.source / name).write_bytes(dice.randbytes(SIZE))
    (world.source / "disk.img").chmod(0o640)
    return world


def contents(world: World) -> dict[str, tuple[bytes, int]]:
    """Every volume of the source: its bytes and its mode."""
    found = volumes_in(world.source)
    return {str(file.relative_to(world.source)): (file.read_bytes(), file.stat().st_mode) for file in found}


def write_blocks(file: Path, dice: random.Random, count: int) -> None:
    with open(file, "r+b") as opened:
        for _ in range(count):
            opened.seek(dice.randrange(SIZE // BLOCK) * BLOCK)
            opened.write(dice.randbytes(BLOCK))


def words(world: World, place: str, at: str, *options: str) -> tuple[str | Path, ...]:
    return world.store, place, "--at", at, "--in-place", world.mnt, *options


def restore(world: World, place: str, at: str, *options: str) -> dict[str, Any]:
    return document(restore_command, *words(world, place, at, *options))


def different_bytes(old: bytes, new: bytes) -> int:
    return sum(
        min(BLOCK, len(new) - at)
        for at in range(0, len(new), BLOCK)
        if old[at : at + BLOCK].ljust(BLOCK, b"\0") != new[at : at + BLOCK].ljust(BLOCK, b"\0")
    )


def logical_bytes(world: World) -> int:
    """What the store was ever sent."""
    with world.reader() as group:
        return group.state.logical_bytes


@pytest.mark.parametrize("mode", MODES)
def test_restored_and_undone_byte_for_byte(volumes: World, dice: random.Random, mode: str) -> None:
    world = volumes
    world.mount(mode)
    write_blocks(world.mnt / "disk.img", dice, 20)
    world.ask("bookmark", name="then")
    then = contents(world)
    write_blocks(world.mnt / "disk.img", dice, 30)
    os.truncate(world.mnt / "disk.img", 100 * BLOCK + 7)
    os.truncate(world.mnt / "db/app.db", SIZE + 3 * BLOCK)
    os.chmod(world.mnt / "disk.img", 0o600)
    (world.mnt / "db/app.db-wal").write_bytes(dice.randbytes(5000))
    os.rename(world.mnt / "other.img", world.mnt / "renamed.img")
    world.ask("durable")
    now = contents(world)
    preview = restore(world, ".", "then", "--dry-run")
    assert contents(world) == now
    told = logical_bytes(world)

    report = restore(world, ".", "then")
    assert contents(world) == then
    assert report["removed"] == ["db/app.db-wal", "renamed.img"] and report["made"] == ["other.img"]
    wanted = sum(different_bytes(now.get(path, (b"", 0))[0], data) for path, (data, _) in then.items())
    assert report["bytes_written"] == preview["bytes_written"] == wanted
    assert report["ranges"] == preview["ranges"] == len(preview["differing"])
    cut = SIZE % BLOCK  # of the last block of db/app.db, which the store itself cuts
    assert logical_bytes(world) - told == wanted + cut
    world.check_equal()

    back = restore(world, ".", report["bookmark"])
    assert contents(world) == now
    assert back["made"] == report["removed"] and back["removed"] == report["made"]
    world.check_equal()
    assert world.gaps() == []
    assert world.ask("status")["half_restored"] == []


def test_one_volume_is_restored_while_the_others_are_written(volumes: World, dice: random.Random) -> None:
    world = volumes
    world.mount("sync")
    world.ask("bookmark", name="then")
    then = contents(world)
    write_blocks(world.mnt / "disk.img", dice, 30)
    write_blocks(world.mnt / "other.img", dice, 30)
    others = contents(world)["other.img"]
    with open(world.mnt / "other.img", "r+b", buffering=0) as other:
        report = restore(world, "disk.img", "then")
        other.write(b"still here")
    found = contents(world)
    assert found["disk.img"] == then["disk.img"]
    assert found["other.img"][0] == b"still here" + others[0][10:]
    again = restore(world, "disk.img", "then")
    assert (again["bytes_written"], again["bookmark"], again["undo"]) == (0, None, None)
    assert report["undo"].split()[1:5] == ["restore", str(world.store), "disk.img", "--at"]
    world.check_equal()


def test_who_has_it_open_is_named(volumes: World, dice: random.Random) -> None:
    world = volumes
    world.mount("async")
    world.ask("bookmark", name="then")
    then = contents(world)["disk.img"]
    write_blocks(world.mnt / "disk.img", dice, 3)
    with open(world.mnt / "disk.img", "rb") as file:
        holder = subprocess.Popen(["sleep", "1000"], stdin=file, env=world.environment)
    try:
        now = contents(world)
        told = world.refused("restore", *words(world, "disk.img", "then"))
        assert f"{world.mnt}/disk.img is in use: process {holder.pid} (sleep 1000)" in told and "--force" in told
        assert contents(world) == now
        assert restore(world, "disk.img", "then", "--dry-run")["bytes_written"] > 0
        restore(world, "disk.img", "then", "--force")
        assert contents(world)["disk.img"] == then
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("option", ["", pytest.param("--writeback", marks=pytest.mark.slow)])
def test_what_a_mapping_has_not_written_yet_is_restored_too(volumes: World, option: str) -> None:
    world = volumes
    world.mount("async", *option.split())
    world.ask("bookmark", name="then")
    then = contents(world)["disk.img"]
    with open(world.mnt / "disk.img", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[7 * BLOCK : 8 * BLOCK] = b"x" * BLOCK
        report = restore(world, "disk.img", "then", "--force")
        assert (report["bytes_written"], contents(world)["disk.img"]) == (BLOCK, then)
    assert contents(world)["disk.img"] == then
    restore(world, "disk.img", report["bookmark"])
    assert contents(world)["disk.img"][0][7 * BLOCK : 8 * BLOCK] == b"x" * BLOCK


@pytest.mark.slow
def test_loop_device_is_named(world: World) -> None:
    world.ext4_image("ext4.img", 8)
    world.mount("async")
    world.ask("bookmark", name="then")
    place = world.loop_mount(world.mnt / "ext4.img")
    (place / "file").write_text("new")
    told = refusal(restore_command, *words(world, "ext4.img", "then"))
    assert "/dev/loop" in told and f"(mounted at {place})" in told
    world.loop_unmount(place)
    restore(world, "ext4.img", "then")
    world.check_ext4(world.source / "ext4.img")
    world.check_equal()


def test_what_is_being_restored_others_leave_alone(volumes: World) -> None:
    world = volumes
    world.mount("async")
    owner = subprocess.Popen(["sleep", "1000"], env=world.environment)
    disk, database = world.mnt / "disk.img", world.mnt / "db/app.db"
    try:
        world.ask("restore.start", place="db", pid=owner.pid, force=False)
        with open(disk, "r+b"), open(database, "rb"):
            pass
        changes = (
            lambda: open(database, "r+b").close(),
            lambda: open(database, "wb").close(),
            lambda: os.truncate(database, 3),
            lambda: os.unlink(database),
            lambda: os.rename(database, world.mnt / "away"),
            lambda: os.rename(disk, database),
            lambda: os.rename(world.mnt / "db", world.mnt / "away"),
            lambda: (world.mnt / "db/new").write_bytes(b""),
        )
        for change in changes:
            with pytest.raises(OSError) as raised:
                change()
            assert raised.value.errno == errno.EBUSY
        told = refusal(restore_command, *words(world, "disk.img", "latest"))
        assert f"another restore is under way, by process {owner.pid}" in told
    finally:
        owner.kill()
        owner.wait()
    with open(database, "r+b"):
        pass  # a claim ends with its process
    number = world.ask("restore.start", place="db", pid=os.getpid(), force=False)["id"]
    with open(database, "r+b"):
        pass  # and does not hold up its own
    world.ask("restore.end", id=number)
    with pytest.raises(RewindError, match="that restore is over"):
        world.ask("restore.begin", id=number, place="db", seq=3, bookmark="")
    with pytest.raises(RewindError, match=f"process {owner.pid} is not seen"):
        world.ask("restore.start", place="db", pid=owner.pid, force=False)
    with subprocess.Popen(["sleep", "1000"], env=world.environment) as forced:
        world.ask("restore.start", place="db", pid=forced.pid, force=True)
        with open(database, "r+b"):
            pass
        forced.kill()


def begin_large_restore(world: World, dice: random.Random) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """A volume with thousands of differing blocks: the command that restores it, and the contents then and now."""
    world.ask("bookmark", name="then")
    then = contents(world)
    with open(world.mnt / "large.img", "r+b") as file:
        for at in range(0, LARGE, 2 * BLOCK):
            file.seek(at)
            file.write(dice.randbytes(BLOCK))
    (world.mnt / "new.img").write_bytes(b"of the future")
    world.ask("durable")
    command = [sys.executable, "-m", "fusefs", "restore", str(world.store), ".", "--at", "then"]
    return [*command, "--in-place", str(world.mnt)], then, contents(world)


LARGE = 4000 * BLOCK


@contextmanager
def in_the_middle(world: World, command: list[str], then: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """The command, while some of it is done and some is not."""
    process = subprocess.Popen(
        command, env=world.environment, cwd=world.directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    begun = world.wait_for_status(lambda status: status["half_restored"] != [], "a restore that has begun")
    world.wait_for_status(lambda status: status["seq"] > begun["seq"] + 10, "its first writes")
    assert process.poll() is None
    yield process


def check_half(world: World, then: dict[str, Any], now: dict[str, Any]) -> None:
    large = contents(world)["large.img"]
    assert large not in (then["large.img"], now["large.img"])


@pytest.fixture
def large(world: World, dice: random.Random) -> World:
    (world.source / "large.img").write_bytes(dice.randbytes(LARGE))
    return world


def test_killed_command_is_repeated_and_undone(large: World, dice: random.Random) -> None:
    world = large
    world.mount("sync")
    command, then, now = begin_large_restore(world, dice)
    with in_the_middle(world, command, then) as process:
        process.kill()
        process.communicate()
    check_half(world, then, now)
    (half,) = world.json("status", world.mnt)["half_restored"]
    assert half["place"] == "." and half["bookmark"].startswith("before-restore-")
    assert f". is half restored: restore it to seq={half['seq']} again" in world.rewindfs("status", world.mnt).stdout
    report = json.loads(world.run(*command, "--json").stdout)
    assert contents(world) == then
    assert 0 < report["bytes_written"] < LARGE // 2
    assert report["bookmark"] == half["bookmark"], "the undo leads to before the first try"
    restore(world, ".", half["bookmark"])
    assert contents(world) == now
    world.check_equal()


def test_mount_cannot_be_left_while_it_is_restored(
    volumes: World, dice: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = volumes
    world.mount("async")
    world.ask("bookmark", name="then")
    then = contents(world)
    for path in then:
        write_blocks(world.mnt / path, dice, 1)
    original, refusals = InPlaceRestore._restore, []

    def unmounted_between_two(self: InPlaceRestore, change: VolumeChange) -> None:
        with pytest.raises(RewindError) as refused:
            unmount(world.mnt)
        refusals.append(str(refused.value))
        original(self, change)

    monkeypatch.setattr(InPlaceRestore, "_restore", unmounted_between_two)
    restore(world, ".", "then")
    assert contents(world) == then
    assert len(refusals) == 3 and all("files are still open there" in told for told in refusals)


@pytest.mark.slow
def test_interrupted_command_says_how_it_goes_on(large: World, dice: random.Random) -> None:
    world = large
    world.mount("sync")
    command, then, now = begin_large_restore(world, dice)
    with in_the_middle(world, command, then) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert ". is half restored" in said and "--at before-restore-" in said and "interrupted" in said
    check_half(world, then, now)
    world.run(*command)
    assert contents(world) == then


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "batch"])
def test_killed_mount_is_mounted_again_and_the_restore_repeated(large: World, dice: random.Random, mode: str) -> None:
    world = large
    pids = world.mount(mode)
    command, then, now = begin_large_restore(world, dice)
    with in_the_middle(world, command, then) as process:
        os.kill(pids.mount, signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("rewindfs: error: ") and ". is half restored: `rewindfs restore" in line
    wait_for_end(pids.mount)
    check_half(world, then, now)
    world.mount(mode)
    assert world.ask("status")["half_restored"] != []
    report = json.loads(world.run(*command, "--json").stdout)
    assert contents(world) == then
    restore(world, ".", report["bookmark"])
    assert contents(world) == now
    assert world.ask("status")["half_restored"] == []
    world.check_equal()


@pytest.mark.slow
def test_what_is_refused_before_anything_is_claimed(volumes: World) -> None:
    world = volumes
    world.mount("async")
    other = world.directory / "other-store"
    world.run("cp", "-r", world.store, other)
    world.run(sys.executable, "-c", NEW_UUID.format(store=str(other)))
    points = world.json("points", world.store)
    place = ("--at", "latest", "--in-place", world.mnt)
    told = refusal(restore_command, other, "disk.img", *place)
    assert f"{world.mnt} feeds group source of {world.store}, which is not the store {other}" in told
    told = refusal(restore_command, world.store, "disk.img", "--group", "g2", *place)
    assert "mount of group source, not of group g2" in told
    told = refusal(restore_command, world.store, "nothing.img", *place)
    assert "no volume 'nothing.img'" in told and "disk.img" in told
    told = refusal(restore_command, world.store, "disk.img", "--at", "latest", "--in-place", world.store)
    assert "not the mountpoint of a source mount" in told
    assert invoke(restore_command, world.store, "../x", *place).exit_code == 2
    assert [world.json("points", world.store)[key] for key in ("bookmarks", "flushes")] == [
        points["bookmarks"],
        points["flushes"],
    ]


def service_of(world: World) -> int:
    """The one second appliance that runs."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in world.processes()}
    (service,) = (pid for pid, words in commands.items() if b"second" in words)
    return service


@pytest.mark.slow
def test_a_mount_without_its_link_is_left_alone(volumes: World) -> None:
    world = volumes
    address = f"unix:{world.directory}/second.sock"
    words = ("appliance", "second", "--store", world.store, "--listen", address)
    world.rewindfs(*words, "--log-file", world.directory / "second.log")
    world.target = ("--store", address)
    world.mount("async", "--outage-after", "60s")
    os.kill(service_of(world), signal.SIGKILL)
    world.wait_for_status(lambda status: status["link"] == "down", "a link that is down")
    told = refusal(restore_command, world.store, "disk.img", "--at", "latest", "--in-place", world.mnt)
    assert f"its link to {address} is down" in told
    world.rewindfs(*words, "--log-file", world.directory / "second.log")
    world.wait_for_status(lambda status: status["link"] == "connected", "a link")
    world.unmount()
    os.kill(service_of(world), signal.SIGTERM)


NEW_UUID = """
from pathlib import Path
from dedup.marker import write_marker
from dedup.storage import Storage
write_marker(Storage(), Path({store!r}))
"""


def test_copy_of_the_store_is_not_taken_for_it(volumes: World, dice: random.Random) -> None:
    world = volumes
    world.mount("async")
    world.ask("bookmark", name="then")
    then = contents(world)["disk.img"]
    copy = world.directory / "copy"
    world.run("cp", "-r", world.store, copy)
    write_blocks(world.mnt / "disk.img", dice, 3)
    now = contents(world)["disk.img"]
    for option in ("--no-bookmark", "--dry-run"):
        told = refusal(restore_command, copy, "disk.img", "--at", "then", "--in-place", world.mnt, option)
        assert f"{copy} ends at seq=" in told and "it is a copy of that store" in told
    assert contents(world)["disk.img"] == now
    restore(world, "disk.img", "then", "--no-bookmark")
    assert contents(world)["disk.img"] == then


def test_what_is_in_the_way_is_found_before_anything_is_changed(volumes: World) -> None:
    world = volumes
    world.mount("async")
    world.ask("bookmark", name="then")
    then = contents(world)
    for path in ("disk.img", "db/app.db"):
        os.unlink(world.mnt / path)
    os.rmdir(world.mnt / "db")
    (world.mnt / "db").write_bytes(b"a volume")
    inside = world.mnt / "disk.img/of/the/future"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"a volume")
    link = world.mnt / "disk.img/of/link"
    os.symlink(world.directory, link)
    now, names = contents(world), world.json("points", world.store)["bookmarks"]
    told = refusal(restore_command, *words(world, "db/app.db", "then"))
    assert f"{world.mnt}/db is in the way of {world.mnt}/db/app.db" in told
    told = refusal(restore_command, *words(world, ".", "then"))
    assert f"{link} is in the way: {world.mnt}/disk.img was a volume" in told
    assert contents(world) == now and world.json("points", world.store)["bookmarks"] == names
    assert world.ask("status")["half_restored"] == []
    os.unlink(link)
    report = restore(world, ".", "then")
    assert contents(world) == then
    restore(world, ".", report["bookmark"])
    assert contents(world) == now


def test_damage_in_the_store_changes_nothing(volumes: World, dice: random.Random) -> None:
    world = volumes
    world.mount("async")
    world.ask("bookmark", name="then")
    then = contents(world)["disk.img"][0]
    for at in range(0, SIZE, 100 * BLOCK):
        with open(world.mnt / "disk.img", "r+b") as file:
            file.seek(at)
            file.write(dice.randbytes(BLOCK))
    os.unlink(world.mnt / "other.img")
    world.ask("durable")
    damage(world, then[200 * BLOCK : 201 * BLOCK])
    now, names = contents(world), world.json("points", world.store)["bookmarks"]
    told = refusal(restore_command, *words(world, ".", "then"))
    assert "disk.img at seq=" in told and "half restored" not in told
    assert contents(world) == now and world.json("points", world.store)["bookmarks"] == names
    assert world.ask("status")["half_restored"] == []
    told = refusal(restore_command, *words(world, ".", "then", "--no-check"))
    assert ". is half restored" in told
    assert [note["place"] for note in world.ask("status")["half_restored"]] == ["."]
    (undo,) = (note["bookmark"] for note in world.ask("status")["half_restored"])
    told = refusal(restore_command, *words(world, ".", "then", "--no-check", "--no-bookmark"))
    assert f"--at {undo} " in told, "the moment before the first try is still the one to go back to"
    assert [note["bookmark"] for note in world.ask("status")["half_restored"]] == [undo]
    restore(world, ".", undo)
    assert contents(world) == now


def damage(world: World, block: bytes) -> None:
    """Flips a byte of that block in the store."""
    for container in (world.store / "containers").iterdir():
        place = container.read_bytes().find(block)
        if place >= 0:
            with open(container, "r+b") as file:
                file.seek(place + 9)
                file.write(bytes([block[9] ^ 1]))
            return
    raise AssertionError("no container has the block")


@pytest.mark.slow
def test_nothing_outside_is_written_through_a_symbolic_link(volumes: World) -> None:
    world = volumes
    world.mount("async")
    world.ask("bookmark", name="then")
    os.unlink(world.mnt / "db/app.db")
    os.rmdir(world.mnt / "db")
    outside = world.directory / "outside"
    outside.mkdir()
    os.symlink(outside, world.mnt / "db")
    told = refusal(restore_command, *words(world, "db/app.db", "then"))
    assert "a symbolic link leads away from there" in told
    assert list(outside.iterdir()) == []
    os.unlink(world.mnt / "db")
    report = restore(world, "db", "then", "--no-bookmark")
    assert report["made"] == ["db/app.db"] and report["bookmark"] is None and "--at seq=" in report["undo"]
    world.check_equal()
