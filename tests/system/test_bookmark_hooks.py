"""`bookmark --freeze --thaw`: what is frozen is clean in the snapshot, and is always thawed, whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import World

SECONDS_MAX = 30


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Files are made, written, synced and removed in `directory` meanwhile; it must have gone on in the end."""
    stop = threading.Event()
    rounds = 0

    def write() -> None:
        nonlocal rounds
        while not stop.is_set():
            with open(directory / f"file{rounds % 50}", "wb") as file:
                file.write(os.urandom(5000))
                os.fsync(file.fileno())
            rounds += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until(lambda: rounds > 20, "the writer began")
        yield
        before = rounds
        until(lambda: rounds > before + 20, "the writer went on")
    finally:
        stop.set()
        thread.join()


def until(condition: Any, what: str) -> None:
    """A writer in another thread says nothing of itself."""
    end = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def features(world: World, image: Path) -> tuple[str, str]:
    """The state of an ext4 image, and its features."""
    lines = world.run("dumpe2fs", "-h", image).stdout.splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return fields["Filesystem state"].strip(), fields["Filesystem features"]


def bookmark(world: World, name: str, freeze: str, thaw: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """Status, document and what was said on standard error."""
    hooks = ("--freeze", freeze, "--thaw", thaw, *options)
    done = world.rewindfs("bookmark", world.mnt, name, "--json", *hooks, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def bookmarks(world: World) -> list[str]:
    return [mark["name"] for mark in world.json("points", world.store)["bookmarks"]]


@pytest.mark.parametrize("mode", ["sync", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_frozen_file_system_is_clean(world: World, source: Path, mode: str) -> None:
    world.mount(mode)
    disk = world.loop_mount(world.mnt / "disk.img")
    with writing(disk):
        world.rewindfs("bookmark", world.mnt, "in-use")
        status, made, said = bookmark(
            world, "at-rest", f"fsfreeze -f {disk}; env | grep REWINDFS_[MSB]", f"fsfreeze -u {disk}"
        )
    assert status == 0, said
    assert made["errors"] == []
    assert made["hooks"]["freeze"]["exit"] == made["hooks"]["thaw"]["exit"] == 0
    assert {f"REWINDFS_MOUNTPOINT={world.mnt}", f"REWINDFS_SOURCE={source}", "REWINDFS_BOOKMARK=at-rest"} <= set(
        said.splitlines()
    )
    versions = world.browse() / "volumes" / "disk.img"
    assert "needs_recovery" in features(world, versions / "in-use")[1]
    state, having = features(world, versions / "at-rest")
    assert state == "clean"
    assert "needs_recovery" not in having
    world.run("e2fsck", "-fn", versions / "at-rest")
    assert os.getxattr(versions / "at-rest", "user.rewindfs.seq") == str(made["seq"]).encode()
    place = world.directory / "past"
    place.mkdir()
    world.run("mount", "-o", "loop,ro", versions / "at-rest", place)
    try:
        assert (place / "file0").stat().st_size == 5000
    finally:
        world.run("umount", place)
    world.loop_unmount(disk)


def test_what_fails_is_told_and_the_application_is_thawed(world: World, source: Path) -> None:
    world.mount("sync")
    world.rewindfs("bookmark", world.mnt, "taken")
    frozen, thawed = world.directory / "frozen", world.directory / "thawed"
    freeze, thaw = f"touch {frozen}", f"touch {thawed}"

    # Refused beforehand: nothing is frozen.
    assert "already has" in world.refused("bookmark", world.mnt, "taken", "--freeze", freeze, "--thaw", thaw)
    assert not frozen.exists()

    status, told, said = bookmark(world, "a", "echo no room >&2; exit 3", thaw)
    assert (status, told["seq"], told["hooks"]["freeze"]["exit"]) == (1, None, 3)
    assert "no room" in said
    assert thawed.exists()

    status, told, said = bookmark(world, "b", freeze, "exit 4")
    assert (status, told["hooks"]["thaw"]["exit"]) == (1, 4)
    assert told["seq"]
    assert "MAY STILL BE FROZEN, run it by hand: exit 4" in said.splitlines()[-1]
    assert bookmarks(world) == ["taken", "b"]


@pytest.mark.parametrize(
    ("when", "number"),
    [("marking", signal.SIGTERM), pytest.param("freezing", signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_thaws_first(world: World, source: Path, when: str, number: signal.Signals) -> None:
    second = world.mount("sync").second
    frozen, thawed = world.directory / "frozen", world.directory / "thawed"
    stop = f"kill -STOP {second};" if when == "marking" else ""
    freeze = f"{stop} touch {frozen}; {'sleep 60' if when == 'freezing' else ''}"
    thaw = f"kill -CONT {second}; touch {thawed}"
    command = [sys.executable, "-m", "fusefs", "bookmark", str(world.mnt), "x", "--freeze", freeze, "--thaw", thaw]
    process = subprocess.Popen(command, env=world.environment, stderr=subprocess.PIPE, text=True)
    until(frozen.exists, "frozen")
    process.send_signal(number)
    _, said = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 1, said
    assert f"interrupted by {number.name}" in said
    assert "Traceback" not in said
    assert thawed.exists()
    world.rewindfs("bookmark", world.mnt, "afterwards")
    assert bookmarks(world) == ["afterwards"]


@pytest.mark.slow
def test_a_store_that_does_not_answer_ends_the_freeze(world: World, source: Path) -> None:
    second = world.mount("sync").second
    thaw = f"kill -CONT {second}"
    status, told, said = bookmark(world, "late", f"kill -STOP {second}", thaw, "--hook-timeout", "1s")
    assert (status, told["seq"], told["hooks"]["thaw"]["exit"]) == (1, None, 0)
    assert "could not be recorded within" in said
    assert told["hooks"]["frozen_seconds"] < SECONDS_MAX
    world.rewindfs("bookmark", world.mnt, "afterwards")
    assert bookmarks(world) == ["afterwards"]
