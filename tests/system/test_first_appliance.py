"""Mounts that go through a first appliance, each part a process of its own, over Unix sockets and loopback TCP."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from dedup.reader import StoreReader
from fusefs.mountpoint import is_dead
from tests.system.harness import World, check_same, image_bytes, wait_for_end
from tests.system.sites import COMMANDS, command_of

BLOCK = 4096
BLOCKS = 512


class Services:
    """A second appliance at a TCP port and a first one at a Unix socket or another port."""

    def __init__(self, world: World, *, tcp: bool) -> None:
        self.world = world
        second, first = free_port(), free_port()
        self.second_address = f"tcp://127.0.0.1:{second}"
        self.first_address = f"tcp://127.0.0.1:{first}" if tcp else f"unix:{world.directory / 'first.sock'}"
        self.pids: dict[str, int] = {}
        world.target = ("--appliance", self.first_address)

    def start(self, part: str, *options: str | Path) -> None:
        world = self.world
        where: tuple[str | Path, ...] = ("--store", world.store, "--listen", self.second_address)
        if part == "first":
            where = ("--listen", self.first_address, "--forward", self.second_address)
        world.rewindfs("appliance", part, *where, *options, "--log-file", world.directory / f"{part}.log")
        words = COMMANDS[part]
        (self.pids[part],) = (pid for pid in world.processes() if _follow(words, command_of(pid)))

    def kill(self, part: str) -> None:
        pid = self.pids.pop(part)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)

    def leave(self, part: str) -> None:
        pid = self.pids.pop(part)
        os.kill(pid, signal.SIGTERM)
        wait_for_end(pid)

    def log(self, part: str) -> str:
        return (self.world.directory / f"{part}.log").read_text()


def _follow(words: list[str], command: list[str]) -> bool:
    return any(command[at : at + len(words)] == words for at in range(len(command)))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(params=["unix", "tcp"])
def services(world: World, request: pytest.FixtureRequest) -> Iterator[Services]:
    """Both, running."""
    made = Services(world, tcp=request.param == "tcp")
    (world.source / "disk.img").write_bytes(random.Random(1).randbytes(BLOCKS * BLOCK))
    made.start("second")
    made.start("first")
    yield made
    for part in ("first", "second"):
        if part in made.pids:
            os.kill(made.pids[part], signal.SIGCONT)
            made.leave(part)


class Writer:
    """Writes blocks to the mount, synced now and then, until it is told to stop."""

    def __init__(self, world: World) -> None:
        self.written = 0
        self.errors: list[OSError] = []
        self._file = world.mnt / "disk.img"
        self._stop = False
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop = True
        self._thread.join(60)  # a write may wait for what a failed test has not started again

    def _run(self) -> None:
        dice = random.Random(2)
        try:
            with open(self._file, "r+b", buffering=0) as file:
                while not self._stop:
                    os.pwrite(file.fileno(), dice.randbytes(BLOCK), dice.randrange(BLOCKS) * BLOCK)
                    self.written += 1
                    if self.written % 50 == 0:
                        os.fsync(file.fileno())
        except OSError as error:
            self.errors.append(error)

    def more(self, world: World, count: int = 100) -> None:
        """Returns when so many more were written."""
        until = self.written + count
        world.wait_for_status(lambda _status: self.written >= until or bool(self.errors), f"{count} writes")
        assert not self.errors


def check(world: World) -> None:
    """The store is the source, without a gap but that before the base, and sound."""
    world.wait_for_state("protected")
    world.check_equal()
    assert len(world.gaps()) <= 1
    assert world.json("verify", world.store)["ok"]


def reconciles(world: World) -> int:
    return (world.directory / "mount.log").read_text().count("the store equals the source")


@pytest.mark.slow
@pytest.mark.parametrize("services", ["unix"], indirect=True)
def test_each_mode_and_a_clean_end(world: World, services: Services) -> None:
    world.mount("sync")
    with Writer(world) as writer:
        for mode in ("sync", "async", "batch", "auto", "sync"):
            world.rewindfs("mode", world.mnt, mode)
            writer.more(world, 100)
            assert world.ask("status")["second"]["mode"] == mode
        world.rewindfs("bookmark", world.mnt, "monday")
    status = world.json("status", world.mnt)
    assert status["state"] == "protected" and status["second"]["link"] == "connected"
    assert status["store"]["bytes"] > 0 and status["pids"]["second"] is None
    check(world)
    world.unmount()
    services.leave("first")
    services.leave("second")
    services.start("second")
    services.start("first")
    world.mount("batch")
    assert "a clean start" in (world.directory / "mount.log").read_text()
    assert reconciles(world) == 1
    check(world)
    world.unmount()


_SLOW = pytest.mark.slow


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=_SLOW), pytest.param("batch", marks=_SLOW)])
@pytest.mark.parametrize("services", ["unix"], indirect=True)
def test_killed_appliances_leave_no_gap(world: World, services: Services, mode: str) -> None:
    world.mount(mode)
    with Writer(world) as writer:
        for part in ("first", "second", "first"):
            writer.more(world)
            services.kill(part)
            services.start(part)
        services.kill("first")
        services.kill("second")
        services.start("second")
        services.start("first")
        writer.more(world)
    assert not writer.errors
    check(world)
    assert reconciles(world) == 1
    world.unmount()


@pytest.mark.slow
@pytest.mark.parametrize("services", ["unix"], indirect=True)
def test_killed_mount_reconciles_what_is_marked(world: World, services: Services) -> None:
    pids = world.mount("async")
    with Writer(world) as writer:
        writer.more(world)
        os.kill(pids.mount, signal.SIGKILL)
        wait_for_end(pids.mount)
    assert is_dead(world.mnt)
    world.mount("async")
    world.wait_for_state("protected")
    world.check_equal()
    assert world.json("verify", world.store)["ok"]
    world.unmount()


@pytest.mark.parametrize("services", ["tcp"], indirect=True)
def test_two_mounts_through_one_first_appliance(world: World, services: Services) -> None:
    other, place = world.directory / "other", world.directory / "other-mnt"
    other.mkdir()
    place.mkdir()
    (other / "second.img").write_bytes(random.Random(3).randbytes(BLOCKS * BLOCK))
    world.mount("async")
    world.rewindfs("mount", other, place, "--appliance", services.first_address, "--wait-base")
    with Writer(world) as writer, open(place / "second.img", "r+b", buffering=0) as file:
        for number in range(100):
            os.pwrite(file.fileno(), bytes([number + 1]) * BLOCK, number * BLOCK)
        writer.more(world)
        services.kill("first")
        services.start("first")
        os.pwrite(file.fileno(), b"!" * BLOCK, 0)
        writer.more(world)
        os.fsync(file.fileno())
    world.rewindfs("unmount", place)
    world.unmount()
    store = StoreReader.open(world.store)
    try:
        for name, volume in (("other", other / "second.img"), ("source", world.source / "disk.img")):
            group = store.group(name)
            found = image_bytes(group, volume.name, group.resolve("latest").seq)
            check_same(found, volume.read_bytes(), f"{volume.name} of {name}")
            assert len(group.gaps()) <= 1
    finally:
        store.close()


@pytest.mark.slow
@pytest.mark.parametrize("services", ["unix"], indirect=True)
def test_an_outage_behind_the_first_appliance_is_said_and_spooled(world: World, services: Services) -> None:
    services.leave("first")
    services.start("first", "--spool", world.directory / "spool")
    world.mount("async", "--outage-after", "1s")
    services.kill("second")
    with Writer(world) as writer:
        writer.more(world)
        world.wait_for_state("degraded")
        world.wait_for_status(lambda status: status["second"]["spool_bytes"] > 0, "a spool")
        services.kill("first")
        services.start("first", "--spool", world.directory / "spool")
        services.start("second")
        writer.more(world)
    check(world)
    assert reconciles(world) == 1
    world.unmount()


def test_a_first_appliance_without_a_second_says_so(world: World) -> None:
    made = Services(world, tcp=False)
    made.start("first")
    (world.source / "disk.img").write_bytes(b"x" * BLOCK)
    try:
        line = world.refused("mount", world.source, world.mnt, *world.target)
        assert "the first appliance cannot reach the second one" in line
        assert "cannot be reached now" in made.log("first")
    finally:
        made.leave("first")
