"""`rewindfs reconcile` beside applications, and an initial sync that is killed: real mounts, real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dedup.errors import RewindError
from tests.system.harness import World, wait_for_end
from tests.system.writers import BLOCK, Writer

MEBIBYTE = 1 << 20
REGION = 4 * MEBIBYTE


def change_behind(file: Path, *blocks: int) -> None:
    """Writes to the source, past the mount."""
    with file.open("r+b") as opened:
        for block in blocks:
            opened.seek(block * BLOCK)
            opened.write(os.urandom(BLOCK))


def verify(world: World) -> tuple[int, Any]:
    """Exit status and report."""
    done = world.rewindfs("reconcile", world.mnt, "--verify-only", "--json", check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_what_was_changed_behind_the_mount_is_found_and_repaired(world: World) -> None:
    for name in ("a.img", "deep/b.img"):
        (world.source / name).parent.mkdir(exist_ok=True)
        (world.source / name).write_bytes(os.urandom(9 * MEBIBYTE + 100))
    (world.source / "small").write_bytes(b"small")
    world.mount("async")
    size = 2 * (9 * MEBIBYTE + 100) + 5
    status, report = verify(world)
    assert (status, report["compared_bytes"], report["differing_bytes"], report["ranges"]) == (0, size, 0, [])
    assert report["wire_bytes"] <= 7 * 60, "a digest a region"
    change_behind(world.source / "a.img", 3, 4, 2000)
    status, report = verify(world)
    ranges = [("a.img", 3 * BLOCK, 2 * BLOCK), ("a.img", 2000 * BLOCK, BLOCK)]
    assert status == 1 and report["sent_bytes"] == 0
    assert [(one["volume"], one["offset"], one["length"]) for one in report["ranges"]] == ranges
    assert world.gaps() == [], "to verify changes nothing"
    report = world.json("reconcile", world.mnt)
    assert (report["differing_bytes"], report["sent_bytes"]) == (3 * BLOCK, 3 * BLOCK)
    world.check_equal()
    (gap,) = world.gaps()
    assert "differed from the source" in gap.reason and gap.last is not None
    assert world.ask("status")["state"] == "protected"
    assert world.json("reconcile", world.mnt)["differing_bytes"] == 0
    assert len(world.gaps()) == 1
    world.unmount()


class Churn(threading.Thread):
    """Writes, appends, cuts, grows, renames, replaces, makes and unlinks files until it is told to stop."""

    def __init__(self, mnt: Path, seed: int) -> None:
        super().__init__()
        self.mnt = mnt
        self.dice = random.Random(seed)
        self.stop = threading.Event()
        self.steps = 0

    def run(self) -> None:
        while not self.stop.is_set():
            one, other = (self.mnt / f"f{self.dice.randrange(6)}" for _ in range(2))
            try:
                match self.dice.randrange(6):
                    case 0 | 1:
                        one.write_bytes(self.dice.randbytes(self.dice.randrange(300_000)))
                    case 2:
                        with open(one, "ab") as file:
                            file.write(self.dice.randbytes(5000))
                    case 3:
                        os.truncate(one, self.dice.randrange(200_000))
                    case 4:
                        os.rename(one, other)
                    case _:
                        one.unlink()
            except FileNotFoundError:
                continue
            self.steps += 1


@pytest.mark.parametrize(
    ("mode", "rounds"),
    [("async", 3), *(pytest.param(mode, 12, marks=pytest.mark.slow) for mode in ("sync", "async", "batch"))],
)
def test_no_difference_is_found_on_a_busy_mount(world: World, mode: str, rounds: int) -> None:
    (world.source / "a.img").write_bytes(bytes(512 * BLOCK))
    (world.source / "rest.img").write_bytes(os.urandom(2 * REGION))
    world.mount(mode)
    writer, churn = Writer(world.mnt / "a.img", 512, 1), Churn(world.mnt, 2)
    writer.start()
    churn.start()
    try:
        for _ in range(rounds):
            status, report = verify(world)
            assert (status, report["differing_bytes"], report["ranges"]) == (0, 0, [])
    finally:
        churn.stop.set()
        churn.join()
        writer.stop()
    assert churn.steps and writer.known and writer.error is None
    change_behind(world.source / "rest.img", 7)
    assert verify(world)[0] == 1, "what does differ is found all the same"
    assert world.json("reconcile", world.mnt)["sent_bytes"] == BLOCK
    world.check_equal()
    world.unmount()


def test_one_at_a_time_and_interrupted_it_ends(world: World) -> None:
    (world.source / "a.img").write_bytes(os.urandom(MEBIBYTE))
    pids = world.mount("async")
    for number in range(300):
        (world.mnt / f"v{number}").write_bytes(b"x" * 5000)
    writer = Writer(world.mnt / "a.img", 200, 1)
    writer.start()
    assert pids.second is not None
    # However quick it is, it cannot end while the second appliance stands still.
    os.kill(pids.second, signal.SIGSTOP)
    try:
        command = subprocess.Popen(
            [sys.executable, "-m", "fusefs", "reconcile", str(world.mnt), "--verify-only"],
            env=world.environment,
            cwd=world.directory,
            stderr=subprocess.PIPE,
        )
        world.wait_for_status(lambda status: (status["reconcile"] or {}).get("kind") == "verify", "a reconcile")
        with pytest.raises(RewindError, match="under way already"):
            world.ask("reconcile.start")
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
    finally:
        os.kill(pids.second, signal.SIGCONT)
    assert (command.returncode, said.strip()) == (130, b"rewindfs: error: interrupted")
    world.wait_for_status(lambda status: status["reconcile"] is None, "its end")
    writer.stop()
    assert verify(world)[0] == 0
    world.unmount()


@pytest.mark.slow
def test_initial_sync_that_is_killed_goes_on_where_it_ended(world: World) -> None:
    """The mount or the second appliance dies, or the mount is left in an orderly way, at random moments."""
    dice = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    size = 400 * MEBIBYTE
    (world.source / "big.img").write_bytes(os.urandom(size))
    (world.source / "a.img").write_bytes(bytes(512 * BLOCK))
    pids = world.mount("async", "--outage-after", "60s", wait_base=False)
    owed = [size + REGION]
    for round_ in range(8):
        writer = Writer(world.mnt / "a.img", 512, round_)
        writer.start()
        # Slower while an application writes: it must not be over before it was killed.
        while (status := world.ask("status"))["state"] == "initializing" and status["intent_bytes"] >= owed[-1]:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 3))
        if world.ask("status")["state"] != "initializing":
            writer.stop()
            break
        match dice.choice(("mount", "second", "leave")):
            case "mount":
                os.kill(pids.mount, signal.SIGKILL)
                wait_for_end(pids.mount)
                writer.join()
            case "second":
                running = world.wait_for_status(
                    lambda status: status["pids"]["second"] is not None, "a second appliance"
                )
                os.kill(running["pids"]["second"], signal.SIGKILL)
                writer.stop()
                continue
            case _:
                writer.stop()
                world.unmount()
        pids = world.mount("async", "--outage-after", "60s", wait_base=False)
        status = world.ask("status")
        if status["reconcile"] is None:
            break
        total = world.wait_for_status(
            lambda status: status["reconcile"] is None or status["reconcile"]["total"] > 0, "its work"
        )
        print(total["reconcile"])
        if total["reconcile"] is not None:
            owed.append(total["reconcile"]["total"])
            assert owed[-1] < owed[-2] + REGION
    assert len(owed) > 1 and owed[-1] < owed[0] / 2 + size / 2, owed
    world.wait_for_state("protected")
    world.check_equal()
    world.unmount()
    assert world.json("verify", world.store)["ok"]
