"""A damaged store heals itself from the source that it protects, past moments too, while all of it runs."""

from __future__ import annotations

import os
from pathlib import Path

from dedup.types import Seq
from tests.system.harness import World

BLOCK = 4096


def damage(store: Path, block: bytes) -> Path:
    """Flips a bit of the block, wherever in the containers it lies. Returns the container."""
    for container in sorted((store / "containers").iterdir()):
        at = container.read_bytes().find(block)
        if at >= 0:
            with container.open("r+b") as file:
                file.seek(at + 1234)
                file.write(bytes([block[1234] ^ 1]))
            return container
    raise AssertionError("no container has the block")


def test_blocks_are_healed_from_the_source(world: World) -> None:
    first, second = os.urandom(16 * BLOCK), os.urandom(BLOCK)
    (world.source / "disk.img").write_bytes(first)
    world.mount("sync")
    with (world.mnt / "disk.img").open("r+b") as file:
        file.seek(5 * BLOCK)
        file.write(second)
        file.flush()
        os.fsync(file.fileno())
    with world.reader() as reader:
        before, volume = reader.held, reader.volumes_at(reader.held)["disk.img"].volume
    damage(world.store, first[2 * BLOCK : 3 * BLOCK])  # of the base, and as it is today
    damage(world.store, second)
    assert world.rewindfs("verify", world.store, "--read-data", check=False).returncode == 1
    report = world.json("verify", world.store, "--read-data", "--repair")
    assert report["ok"] and report["repaired"] == 1, report
    assert "2 damaged blocks were healed from the source" in report["repairs"][0]["what"]
    with world.reader() as reader:
        content = first[: 5 * BLOCK] + second + first[6 * BLOCK :]
        assert reader.image(volume, Seq(before)).read(0, 16 * BLOCK) == content
        base = reader.snapshot("base")
        assert base is not None
        assert reader.image(volume, base.seq).read(0, 16 * BLOCK) == first
    world.check_equal()
    world.unmount()


def test_what_the_source_lacks_is_repaired_with_nothing_running(world: World) -> None:
    (world.source / "disk.img").write_bytes(old := os.urandom(4 * BLOCK))
    world.mount("sync")
    with (world.mnt / "disk.img").open("r+b") as file:
        file.write(os.urandom(4 * BLOCK))
    container = damage(world.store, old[BLOCK : 2 * BLOCK])
    world.unmount()
    with container.open("r+b") as file:
        file.write(b"not a header")
    done = world.rewindfs("verify", world.store, "--repair", check=False)
    assert done.returncode == 1, "one block is lost for good"
    assert "3 blocks kept, 0 healed from copies, 1 lost" in done.stdout, done.stdout
    world.mount("sync")
    world.check_equal()
    world.unmount()
