"""The harness itself: it must find what a test leaves behind, or no system test proves that nothing is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.system import harness
from tests.system.harness import World, wait_for_end


def test_loop_mounts_come_and_go(world: World) -> None:
    image = world.ext4_image(mebibytes=8)
    place = world.loop_mount(image)
    world.sql(place / "shop.db", "CREATE TABLE orders (id INTEGER); INSERT INTO orders VALUES (7);")
    copy = world.directory / "copy.img"
    world.run("sync", "-f", place)
    world.run("cp", image, copy)
    world.loop_unmount(place)
    world.check_ext4(copy)
    assert world.sql(world.loop_mount(copy) / "shop.db", "SELECT id FROM orders;") == "7"


def test_damaged_file_system_is_noticed(world: World) -> None:
    image = world.ext4_image(mebibytes=8)
    with open(image, "r+b") as file:
        # Bitmaps and the first inodes, a few blocks behind the superblock.
        file.seek(16 << 10)
        file.write(os.urandom(256 << 10))
    with pytest.raises(AssertionError):
        world.check_ext4(image)


def test_fio_reads_back_what_it_wrote(world: World) -> None:
    world.fio(world.source / "fio.img", mebibytes=2)
    assert (world.source / "fio.img").stat().st_size == 2 << 20


def test_process_left_behind_is_found_and_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "END_SECONDS_MAX", 0.1)
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(1000)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=world.environment, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        assert process.pid in world.processes()
        (left,) = world.close()
        assert f"process {process.pid} did not leave" in left
        process.wait()
    wait_for_end(process.pid)
    assert world.processes() == []
