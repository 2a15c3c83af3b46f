"""kill −9 at random instants of each process under load. Nothing acknowledged is lost, every gap is said.

Invariants under test: `acknowledged-is-kept`, `replica-equals-source`, `gap-is-said`, `one-writer`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest

from dedup.errors import MomentRefused
from dedup.moment import rfc3339
from dedup.reader import GroupReader
from dedup.store import Store
from dedup.types import Seq, TimeNs
from fusefs.mountpoint import NotMounted
from tests.system.harness import Pids, World, image_bytes, wait_for_end
from tests.system.writers import BLOCK, Writer

VOLUMES = ("a.img", "deep/b.img")
BLOCKS = 2 * 1024
LOAD_SECONDS_MAX = 0.5
TRIES = 25
"""Random moments looked at for each that is wanted."""

FEW = 3
ALL = 50
rounds = pytest.mark.parametrize("kills", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])


def modes(*often: object, seldom: Sequence[object]) -> pytest.MarkDecorator:
    """Of each test the shortest that tells something is always run; `make test-slow` runs the others."""
    slow = [pytest.param(*one, marks=pytest.mark.slow) if isinstance(one, tuple) else one for one in seldom]
    return pytest.mark.parametrize(("mode", "both"), [*often, *slow])


@pytest.fixture
def writers(world: World) -> list[Writer]:
    """One writer a volume; the volumes are there, and zeros."""
    made = []
    for seed, name in enumerate(VOLUMES):
        path = world.source / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(BLOCKS * BLOCK))
        made.append(Writer(world.mnt / name, BLOCKS, seed))
    return made


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Prints its seed, for a failure to be had again as nearly as it can be."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def load(writers: list[Writer], dice: random.Random) -> None:
    """Starts the writers, and returns after they have been at it for a random while."""
    for writer in writers:
        writer.start()
    time.sleep(dice.uniform(0.02, LOAD_SECONDS_MAX))


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_for_end(pid)


def check_moments(group: GroupReader, writers: list[Writer], dice: random.Random, wanted: int) -> tuple[int, int]:
    """Holds `wanted` random moments of each writer against what it knows. How many were there, how many refused."""
    good = refused = 0
    for writer in writers:
        held = 0
        # Most of the time that a killed mount takes to come back lies in a gap, so many are asked for one that is held.
        for moment in writer.moments(TRIES * wanted, dice):
            try:
                point = group.resolve(rfc3339(TimeNs(moment)))
            except MomentRefused as refusal:
                assert "gap" in str(refusal) or "after the last" in str(refusal), refusal
                refused += 1
                continue
            name = next(name for name in VOLUMES if writer.file.match(name))
            writer.check(image_bytes(group, name, point.seq), moment)
            held += 1
            if held == wanted:
                break
        good += held
    return good, refused


@rounds
@pytest.mark.parametrize("mode", ["sync", "async", pytest.param("batch", marks=pytest.mark.slow)])
def test_second_appliance_killed(
    world: World, writers: list[Writer], dice: random.Random, kills: int, mode: str
) -> None:
    pids = world.mount(mode, "--outage-after", "60s")
    for writer in writers:
        writer.start()
    second = pids.second
    for _ in range(kills):
        time.sleep(dice.uniform(0.02, LOAD_SECONDS_MAX))
        kill(second)
        status = world.wait_for_status(
            lambda status, old=second: status["pids"]["second"] not in (None, old) and status["link"] == "connected",
            "another second appliance",
        )
        second = status["pids"]["second"]
    for writer in writers:
        writer.stop()
        assert writer.error is None
    assert world.ask("status")["pids"]["mount"] == pids.mount
    world.check_equal()
    assert world.gaps() == []
    with world.reader() as group:
        if mode != "batch":  # there recovery points lie between aggregates only
            assert check_moments(group, writers, dice, 3) == (6, 0)
    world.unmount()
    assert world.json("verify", world.store)["ok"]


def killed_round(world: World, writers: list[Writer], dice: random.Random, pids: Pids, both: bool) -> Seq:
    """Kills under load, and checks what is left before anything is mounted again. Returns the last seq held."""
    load(writers, dice)
    kill(*([pids.mount, pids.second] if both else [pids.mount]))
    for writer in writers:
        writer.join()
        assert writer.error is not None
    wait_for_end(pids.second)
    with pytest.raises(NotMounted, match="died"):
        world.ask("status")
    store = Store.open(world.store)
    (group,) = store.groups
    held = group.held
    store.close()
    return held


@rounds
@modes(("sync", False), ("async", True), seldom=[("async", False), ("batch", True)])
def test_mount_killed(
    world: World, writers: list[Writer], dice: random.Random, kills: int, mode: str, both: bool
) -> None:
    bookmarks: dict[str, dict[str, bytes]] = {}
    number = count()
    pids = world.mount(mode)
    for gaps in range(1, kills + 1):
        name = f"mark-{next(number)}"
        world.ask("bookmark", name=name)
        bookmarks[name] = {volume: (world.source / volume).read_bytes() for volume in VOLUMES}
        log = (world.directory / "mount.log").stat().st_size
        held = killed_round(world, writers, dice, pids, both)
        pids = world.mount(mode)

        said = (world.directory / "mount.log").read_text()[log:]
        assert "everything=False, created=(), retired=(), changed=()" in said, "more than marks was compared"
        world.check_equal()
        found = world.gaps()
        assert len(found) == gaps
        assert found[-1].first > held and found[-1].last is not None
        with world.reader() as group:
            for inside in range(found[-1].first, found[-1].last + 1):
                with pytest.raises(MomentRefused, match="gap"):
                    group.resolve(f"seq={inside}")
            group.resolve(f"seq={held}")
    with world.reader() as group:
        for name, contents in bookmarks.items():
            point = group.resolve(name)
            assert {volume: image_bytes(group, volume, point.seq) for volume in VOLUMES} == contents
        good, _ = check_moments(group, writers, dice, 4) if mode != "batch" else (1, 0)
        assert good
    world.unmount()
    assert world.json("verify", world.store)["ok"]
    world.mount(mode)
    assert len(world.gaps()) == kills


class Churn(threading.Thread):
    """Makes, writes, cuts, renames, replaces, exchanges, restyles and unlinks files until the mount dies under it."""

    def __init__(self, mnt: Path, dice: random.Random) -> None:
        super().__init__()
        self.mnt = mnt
        self.dice = dice
        self.steps = 0
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            while True:
                try:
                    self._step(self.mnt / f"f{self.dice.randrange(8)}", self.mnt / f"f{self.dice.randrange(8)}")
                except FileNotFoundError:
                    continue
                self.steps += 1
        except OSError as error:
            self.error = error

    def _step(self, one: Path, other: Path) -> None:
        match self.dice.randrange(7):
            case 0 | 1:
                one.write_bytes(self.dice.randbytes(self.dice.randrange(100_000)))
            case 2:
                with open(one, "ab") as file:
                    file.write(self.dice.randbytes(5000))
            case 3:
                os.truncate(one, self.dice.randrange(60_000))
            case 4:
                os.rename(one, other)
            case 5:
                os.chmod(one, self.dice.choice((0o600, 0o640, 0o644)))
            case _:
                one.unlink()


@rounds
@pytest.mark.parametrize("mode", ["async", pytest.param("sync", marks=pytest.mark.slow)])
def test_mount_killed_while_names_change(world: World, dice: random.Random, kills: int, mode: str) -> None:
    pids = world.mount(mode)
    for _ in range(kills):
        churn = Churn(world.mnt, dice)
        churn.start()
        time.sleep(dice.uniform(0.1, 2 * LOAD_SECONDS_MAX))
        kill(pids.mount)
        churn.join(60)
        assert churn.error is not None and churn.steps
        pids = world.mount(mode)
        world.check_equal()
    assert len(world.gaps()) == kills
