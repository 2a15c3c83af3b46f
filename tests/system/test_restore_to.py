"""`rewindfs restore --to` and `rewindfs diff`, as a person uses them, against shadow copies."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dedup.errors import UnknownName
from fusefs.restore_cli import restore as restore_command
from replication.diff_cli import diff as diff_command
from tests.system.commands_here import document, invoke, refusal
from tests.system.harness import World, check_same

BLOCK = 4096
SIZE = 200 * BLOCK + 99
NAMES = ("a.img", "b.img", "d/c.img", "d/e/f.img", "sparse.img")


class Shadow:
    """What each volume held after each of many moments."""

    def __init__(self, world: World, moments: int) -> None:
        self.world = world
        self.dice = random.Random(11)
        self.moments: dict[int, dict[str, bytes]] = {}
        for name in NAMES:
            file = world.source / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.dice.randbytes(SIZE))
        os.truncate(world.source / "sparse.img", 0)
        os.truncate(world.source / "sparse.img", 30 << 20)
        world.mount("async")
        for _ in range(moments):
            self.change(world.mnt / self.dice.choice(NAMES))
            self.keep()

    def change(self, file: Path) -> None:
        with open(file, "r+b", buffering=0) as opened:
            opened.seek(self.dice.randrange(SIZE))
            opened.write(self.dice.randbytes(self.dice.choice([1, BLOCK, 9000])))
            if self.dice.random() < 0.3:
                opened.truncate(self.dice.randrange(SIZE // 2, SIZE))
            if self.dice.random() < 0.5:
                os.fsync(opened)

    def keep(self) -> None:
        self.world.ask("durable")
        self.moments[self.world.ask("status")["durable_seq"]] = self.now()

    def now(self) -> dict[str, bytes]:
        return {name: (self.world.source / name).read_bytes() for name in NAMES}


def restore(world: World, *words: str | Path) -> dict[str, Any]:
    return document(restore_command, world.store, *words)


def diff(world: World, *words: str | Path) -> dict[str, Any]:
    return document(diff_command, world.store, *words)


def refused(world: World, *words: str | Path) -> str:
    return refusal(restore_command, world.store, *words)


def test_restored_files_equal_their_shadows(world: World) -> None:
    shadow = Shadow(world, 12)
    out = world.directory / "out"
    for number, seq in enumerate(shadow.dice.sample(sorted(shadow.moments), 3)):
        report = restore(world, ".", "--at", f"seq={seq}", "--to", out / str(number) if number else out)
        assert report["seq"] <= seq and report["volumes"] == len(NAMES)
        for name, content in shadow.moments[seq].items():
            check_same(Path(report["file"], name).read_bytes(), content, f"{name} at seq={seq}")
    assert (out / "sparse.img").stat().st_blocks * 512 < 1 << 20
    last = max(shadow.moments)
    report = restore(world, "d/e/f.img", "--at", f"seq={last}", "--to", out)
    assert report["file"] == str(out / "f.img")
    assert (out / "f.img").read_bytes() == shadow.moments[last]["d/e/f.img"]
    restore(world, "d", "--at", "latest", "--to", out / "d2")
    assert (out / "d2/e/f.img").read_bytes() == shadow.now()["d/e/f.img"]


def test_diff_tells_every_difference_in_either_order(world: World) -> None:
    shadow = Shadow(world, 6)
    first, last = min(shadow.moments), max(shadow.moments)
    for name in NAMES:
        old, new = (shadow.moments[seq][name] for seq in (first, last))
        size = max(len(old), len(new))
        found = diff(world, name, f"seq={first}", f"seq={last}")
        back = diff(world, name, f"seq={last}", f"seq={first}")
        assert found["ranges"] == back["ranges"] and (found["from"], found["to"]) == (back["to"], back["from"])
        assert (found["from"]["size"], found["to"]["size"]) == (len(old), len(new))
        wanted = [
            at for at in range(0, size, BLOCK)
            if old[at : at + BLOCK].ljust(BLOCK, b"\0") != new[at : at + BLOCK].ljust(BLOCK, b"\0")
        ]  # fmt: skip
        blocks = [at for one in found["ranges"] for at in range(one["offset"], one["offset"] + one["length"], BLOCK)]
        assert blocks == wanted
        assert found["bytes"] == sum(min(BLOCK, size - at) for at in wanted)
    text = world.rewindfs("diff", world.store, "a.img", f"seq={first}", "latest").stdout
    assert "differ, in" in text
    with pytest.raises(UnknownName, match="no volume 'x'"):
        diff(world, "x", f"seq={first}", "latest")


def test_what_is_refused(world: World) -> None:
    (world.source / "a.img").write_bytes(b"content")
    world.mount("async")
    out = world.directory / "out"
    out.write_bytes(b"mine")
    place = ("a.img", "--at", "latest", "--to")
    told = world.refused("restore", world.store, *place, out)
    assert "is there already; name another file, or replace it with --force" in told
    assert out.read_bytes() == b"mine"
    restore(world, *place, out, "--force")
    assert out.read_bytes() == b"content"
    assert "no such directory" in refused(world, *place, world.directory / "no/out")
    assert "is no regular file" in refused(world, *place, "/dev/null", "--force")
    assert "is there and is no directory" in refused(world, ".", "--at", "latest", "--to", out)
    assert "no volume 'b'" in refused(world, "b", "--at", "latest", "--to", world.directory / "b")
    assert "after the last" in refused(world, "a.img", "--at", "seq=99999", "--to", out)
    both = ("--to", "x", "--in-place", world.mnt)
    for wrong in (both, (), ("--to", "x", "--dry-run"), ("--to", "x", "--no-bookmark")):
        assert invoke(restore_command, world.store, "a.img", "--at", "latest", *wrong).exit_code == 2


@pytest.mark.slow
def test_full_disk_says_what_is_missing_and_goes_on(world: World) -> None:
    (world.source / "a.img").write_bytes(os.urandom(3 << 20))
    world.mount("async")
    small = world.directory / "small"
    small.mkdir()
    world.run("mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", small)
    try:
        place = ("restore", world.store, "a.img", "--at", "latest", "--to", small / "out")
        told = world.refused(*place)
        assert "No space left on device: about 1.0 MiB more are needed" in told and "repeat the command" in told
        assert not (small / "out").exists()
        world.run("mount", "-o", "remount,size=8M", small)
        world.rewindfs(*place)
        assert (small / "out").read_bytes() == (world.source / "a.img").read_bytes()
        assert os.listdir(small) == ["out"]
    finally:
        world.run("umount", small)


@pytest.mark.slow
def test_damage_is_loud_and_the_rest_comes_back(world: World) -> None:
    content = os.urandom(64 * BLOCK)
    (world.source / "a.img").write_bytes(content)
    world.mount("async")
    world.unmount()
    (container,) = (file for file in (world.store / "containers").iterdir() if file.stat().st_size > 64 * BLOCK)
    raw = container.read_bytes()
    place = raw.find(content[10 * BLOCK : 11 * BLOCK])
    container.write_bytes(raw[: place + 5] + bytes([raw[place + 5] ^ 1]) + raw[place + 6 :])
    command = ("restore", world.store, "a.img", "--at", "latest", "--to", world.directory / "out")
    told = world.refused(*command)
    assert "a.img at seq=" in told and "--skip-damaged" in told
    done = world.rewindfs(*command, "--skip-damaged", "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["damaged"] == [
        {"file": str(world.directory / "out"), "offset": 10 * BLOCK, "length": BLOCK}
    ]
    assert f"bytes {10 * BLOCK}..+{BLOCK} are damaged" in done.stderr
    assert (world.directory / "out").read_bytes() == content[: 10 * BLOCK] + bytes(BLOCK) + content[11 * BLOCK :]


@pytest.mark.slow
def test_a_hundred_moments_equal_their_shadows(world: World) -> None:
    shadow = Shadow(world, 100)
    out = world.directory / "out"
    out.mkdir()
    for number, (seq, contents) in enumerate(shadow.moments.items()):
        report = restore(world, ".", "--at", f"seq={seq}", "--to", out / str(number))
        for name, content in contents.items():
            check_same(Path(report["file"], name).read_bytes(), content, f"{name} at seq={seq}")
        shutil.rmtree(report["file"])
