"""Fixtures of the system tests: real commands, real mounts, real processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.harness import Pids, World, missing_tools

TOOLS = (
    *("fusermount3", "mkfs.ext4", "e2fsck", "sqlite3", "fio", "losetup", "mount"),
    *("getfattr", "rsync", "qemu-img"),
)


def why_not() -> str | None:
    """What keeps this machine from running system tests."""
    if not os.path.exists("/dev/fuse"):
        return "this machine has no /dev/fuse"
    if os.geteuid() != 0:
        return "loop mounts need root"
    if missing := missing_tools(TOOLS):
        return f"not installed: {', '.join(missing)} (make test installs them)"
    return None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A World; the test fails if something of it could not be ended in the ordinary way."""
    if reason := why_not():
        if os.environ.get("CI"):
            pytest.fail(f"system tests must run in CI, but {reason}")
        pytest.skip(reason)
    world = World(tmp_path)
    yield world
    left = world.close()
    # Shown with a test that failed, and with no other: what a reader got as EIO is explained in a log only.
    print(world.logs())
    assert not left, "left behind: " + "; ".join(left) + "\n" + world.logs()


@pytest.fixture
def source(world: World) -> Path:
    """The source directory, holding one ext4 image, `disk.img`."""
    world.ext4_image()
    return world.source


@pytest.fixture
def store(world: World) -> Path:
    """Where the store will be; not there yet."""
    return world.store


@pytest.fixture
def mounted(world: World, source: Path) -> Callable[..., Pids]:
    """Mounts `source`: `mounted(mode, *options)` returns the pids behind the mount."""
    return world.mount
