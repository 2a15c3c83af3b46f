"""`rewindfs gc` with real processes: beside a mount that is written to, without one, and killed at any moment."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from dedup.errors import StoreFull
from dedup.store import Store
from dedup.types import ClockRun, Extent, Seq, TimeNs, Write
from tests.dedup.test_gc import LeakyStorage
from tests.system.harness import World, wait_for_end

WASTE_BYTES = 6 << 20
VOLUME_BYTES = 4 << 20
KILLS = 20


def waste(store: Path, seed: int) -> None:
    """Leaves blocks in the closed store that are indexed and that nothing names."""
    storage = LeakyStorage()
    opened = Store.open(store, storage)
    (group,) = opened.groups
    volume = min(group.state.volumes)
    dice = random.Random(seed)
    storage.refuse_journal = True
    for _ in range(WASTE_BYTES >> 20):
        with pytest.raises(StoreFull):
            group.ingest(
                [
                    Write(
                        Seq(group.held + 1),
                        TimeNs(group.time),
                        ClockRun(group.run),
                        Extent(volume, 0, dice.randbytes(1 << 20)),
                    )
                ]
            )
    storage.refuse_journal = False
    opened.close()


def containers_bytes(store: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (store / "containers").iterdir())


class Writing:
    """A thread that writes to a volume until it is told to stop: new data, and data that lies wasted in the store."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._seed = seed
        self._stop = Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Writing:
        self._work = self._pool.submit(self._write)
        return self

    def _write(self) -> None:
        new, old = random.Random(time.time_ns()), random.Random(self._seed)
        wasted = old.randbytes(1 << 20)
        fd = os.open(self._path, os.O_RDWR)
        try:
            while not self._stop.is_set():
                at = new.randrange(0, 256) * 4096
                data = wasted[at : at + 4096] if new.random() < 0.5 else new.randbytes(4096)
                os.pwrite(fd, data, new.randrange(0, VOLUME_BYTES, 4096))
        finally:
            os.close(fd)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._work.result()


@pytest.fixture
def used(world: World) -> World:
    """A world whose store holds one volume, and as much again that nothing names."""
    (world.source / "data.img").write_bytes(random.Random(0).randbytes(VOLUME_BYTES))
    world.mount()
    world.unmount()
    waste(world.store, 1)
    return world


def test_beside_a_mount_and_without(used: World) -> None:
    used.mount("async")
    with Writing(used.mnt / "data.img", 1):
        done = used.json("gc", used.store)
    assert not done["dry_run"] and done["freed_bytes"] > WASTE_BYTES // 2, done
    assert set(done["planned"]) >= {"containers", "dead_blocks", "live_blocks"}
    used.unmount()
    waste(used.store, 2)
    before = containers_bytes(used.store)
    assert f"would be freed: of {len(list((used.store / 'containers').iterdir()))} containers" in (
        used.rewindfs("gc", used.store, "--dry-run").stdout
    )
    assert containers_bytes(used.store) == before
    done = used.json("gc", used.store)
    assert done["planned"]["dead_blocks"] >= WASTE_BYTES >> 12
    assert containers_bytes(used.store) <= before - WASTE_BYTES
    used.check_equal()


@pytest.mark.slow
def test_the_appliance_is_killed_while_it_collects(used: World) -> None:
    """At random moments of a collection, with a writer: nothing acknowledged is lost, and the waste goes in the end."""
    used.mount("async")
    dice = random.Random(3)
    for _ in range(KILLS):
        with Writing(used.mnt / "data.img", 1):
            command = subprocess.Popen(
                [sys.executable, "-m", "fusefs", "gc", str(used.store)],
                env=used.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            second = used.pids().second
            time.sleep(dice.uniform(0.3, 3.0))
            os.kill(second, 9)
            wait_for_end(second)
            command.wait()
        used.wait_for_state("protected")
        used.check_equal()
    used.json("gc", used.store)
    used.check_equal()
    used.unmount()
    assert used.json("gc", used.store)["freed_bytes"] == 0
    assert used.json("verify", used.store, "--read-data")["ok"]
    used.check_equal()
    assert not list((used.store / "containers").glob("*.tmp"))
