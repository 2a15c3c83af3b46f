"""Each example as a person runs it: it says what it should, and leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusefs.mountpoint import mounts
from tests.system.harness import ROOT, SEARCH_PATH, World

SECONDS_MAX = 240


@pytest.fixture
def place(world: World) -> Iterator[Path]:
    """Where the examples make what they make. Unlike pytest's own directories, other users may pass through it."""
    place = Path(tempfile.mkdtemp(prefix="examples-"))
    place.chmod(0o755)
    world.environment["TMPDIR"] = str(place)
    world.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{SEARCH_PATH}"
    yield place
    for mount in reversed(mounts()):
        if mount.path.is_relative_to(place):
            world.run("umount", "-l", mount.path)
    shutil.rmtree(place)


def check_nothing_is_left(world: World, place: Path) -> None:
    assert list(place.iterdir()) == []
    assert [mount.path for mount in mounts() if mount.path.is_relative_to(place)] == []
    assert str(place) not in world.run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").stdout
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in world.processes()]
    assert not any(b"rewindfs" in command or b"postgres" in command for command in commands), commands


def example(world: World, place: Path, name: str) -> str:
    """What the example prints; it must succeed."""
    done = world.run(ROOT / "examples" / f"{name}.sh", timeout=SECONDS_MAX)
    check_nothing_is_left(world, place)
    for line in done.stderr.splitlines():
        assert line.startswith("rewindfs: warning: ") and "shares a file system" in line, done.stderr
    return done.stdout


def facts(output: str) -> list[tuple[str, str]]:
    """The lines of `expect`: what, and what was found."""
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    return [(what.strip(), found.strip()) for what, found in (line.rsplit("  ", 1) for line in lines if "  " in line)]


def test_postgresql(world: World, place: Path) -> None:
    output = example(world, place, "postgresql")
    found = facts(output)
    assert [value for what, value in found if "invoices" in what] == ["1000"] * 3
    assert [value for what, value in found if "balances" in what] == ["t"] * 5
    (then,) = (value for what, value in found if what == "transactions, as in the clone")
    (today,) = (value for what, value in found if what == "transactions, as before the rollback")
    assert 100 <= int(then) < int(today)
    assert output.count("undo it with: rewindfs restore") == 2
    assert "store is sound" in output


def test_vm_image(world: World, place: Path) -> None:
    found = dict(facts(example(world, place, "vm-image")))
    assert (found["installed"], found["updated"], found["good.img"]) == ("boots", "does not boot", "boots")
    assert found["and the updates before it are there"] == "release 7"
    assert sum(value == "Images are identical." for value in found.values()) == 3


def test_sqlite_group(world: World, place: Path) -> None:
    output = example(world, place, "sqlite-group")
    assert [value for what, value in facts(output) if what == "total"] == ["20000"] * 3
    assert "moments after a transfer, all of them with a total of 20000: 10\n" in output
    assert output.count("in the middle of something: total ") == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["postgresql", "vm-image", "sqlite-group"])
@pytest.mark.parametrize("headline", [3, 5, 7])
def test_interrupted_examples_clean_up(world: World, place: Path, name: str, headline: int) -> None:
    """SIGTERM right behind the headline of that number."""
    command = [ROOT / "examples" / f"{name}.sh"]
    with subprocess.Popen(
        command, env=world.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        headlines = 0
        for line in running.stdout:
            headlines += line == "\n"
            if headlines == headline and line != "\n":
                break
        running.send_signal(signal.SIGTERM)
        said = running.stdout.read()
        assert running.wait(SECONDS_MAX) == 143, said
    check_nothing_is_left(world, place)
