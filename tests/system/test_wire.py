"""What crosses the wire, counted by a relay: how many bytes, and what becomes of it when the link is cut."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import World
from tests.system.network import Relay
from tests.system.writers import BLOCK, Writer

VOLUME_BYTES = 8 << 20
CHUNK = 1 << 20


@pytest.fixture
def link(world: World) -> Iterator[Relay]:
    """The way to a second appliance of its own, through TCP; mounts of this world take it."""
    world.rewindfs("appliance", "second", "--store", world.store, "--log-file", world.directory / "second.log")
    with Relay("tcp:127.0.0.1:0", f"unix:{world.store}/socket", world.environment) as relay:
        world.target = ("--store", relay.address.replace("tcp:", "tcp://"))
        yield relay
        world.run("fusermount3", "-u", world.mnt, check=False)
        for pid in world.processes():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"second" in command:
                os.kill(pid, 15)


def sent(world: World, link: Relay, since: int = 0) -> int:
    """Bytes towards the store, once all that was written is durable there."""
    world.ask("durable")
    return int(link.tell("count")["up"]) - since


def random_volume(path: Path, seed: int) -> None:
    dice = random.Random(seed)
    with open(path, "wb") as file:
        for _ in range(VOLUME_BYTES // CHUNK):
            file.write(dice.randbytes(CHUNK))


def test_batch_sends_the_last_of_many_writes(world: World, link: Relay) -> None:
    random_volume(world.source / "a.img", 1)
    world.mount("batch")
    before = sent(world, link)
    dice = random.Random(2)
    written = 0
    with open(world.mnt / "a.img", "r+b", buffering=0) as file:
        for _ in range(4000):
            file.seek(BLOCK * dice.randrange(16))
            written += file.write(dice.randbytes(BLOCK))
    assert sent(world, link, before) < written / 4
    world.check_equal()


def test_batch_sends_no_block_that_the_store_has(world: World, link: Relay) -> None:
    random_volume(world.source / "a.img", 1)
    world.mount("batch")
    before = sent(world, link)
    (world.mnt / "copy.img").write_bytes((world.source / "a.img").read_bytes())
    assert sent(world, link, before) < VOLUME_BYTES / 20
    world.check_equal()


def test_async_sends_each_write_once(world: World, link: Relay) -> None:
    random_volume(world.source / "a.img", 1)
    world.mount("async")
    before = sent(world, link)
    random_volume(world.mnt / "a.img", 2)
    assert VOLUME_BYTES <= sent(world, link, before) < 1.05 * VOLUME_BYTES
    world.check_equal()


def test_reconcile_sends_little_more_than_what_differs(world: World, link: Relay) -> None:
    random_volume(world.source / "a.img", 1)
    world.mount("async")
    world.rewindfs("unmount", world.mnt)
    dice = random.Random(2)
    places = dice.sample(range(VOLUME_BYTES // BLOCK), 256)
    with open(world.source / "a.img", "r+b") as file:
        for place in places:
            file.seek(BLOCK * place)
            file.write(dice.randbytes(BLOCK))
    before = int(link.tell("count")["up"])
    world.mount("async")
    assert sent(world, link, before) <= 1.1 * BLOCK * len(places)
    world.check_equal()


@pytest.mark.parametrize("mode", ["batch", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("sync", "async"))])
def test_short_cuts_leave_no_gap_and_no_reconcile(world: World, link: Relay, mode: str) -> None:
    """Reset, silent in both directions, silent in one: applications notice a pause at most."""
    (world.source / "a.img").write_bytes(bytes(1024 * BLOCK))
    pid = world.mount(mode, "--outage-after", "60s").mount
    log = world.directory / "mount.log"
    before = log.stat().st_size
    writer = Writer(world.mnt / "a.img", 1024, 1, pause=0.001)
    writer.start()
    for fault in ("cut", "stall both", "stall up", "stall down", "cut"):
        time.sleep(0.2)
        link.tell(*fault.split())
        time.sleep(0.3)
        link.tell("heal")
    writer.stop()
    assert writer.error is None
    world.ask("durable")
    assert link.tell("count")["connections"] >= 3
    assert "were sent" not in log.read_text()[before:], "a reconcile"
    assert world.gaps() == []
    assert world.pids().mount == pid
    world.check_equal()
