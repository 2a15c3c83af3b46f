"""Two agents and one group, copies of state and store: who may feed it is said, and nothing is merged in silence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import World, wait_for_end

BLOCK = 4096
REGION = 4 << 20


@pytest.fixture
def here(world: World, request: pytest.FixtureRequest) -> World:
    """A source of two regions, in the store."""
    if "service" in request.fixturenames:
        request.getfixturevalue("service")
    (world.source / "a.img").write_bytes(os.urandom(2 * REGION))
    world.mount("async")
    return world


@pytest.fixture
def there(here: World) -> Iterator[World]:
    """Another host's source, which is not there yet, and the same store."""
    (here.directory / "there").mkdir()
    made = World(here.directory / "there")
    made.store, made.target = here.store, here.target
    made.source.rmdir()
    yield made
    forced = made.close()
    assert not forced, forced


@pytest.fixture
def service(world: World) -> Iterator[None]:
    """The second appliance, as a service that several mounts may use."""
    world.rewindfs("appliance", "second", "--store", world.store, "--log-file", world.directory / "second.log")
    world.target = ("--store", f"unix:{world.store / 'socket'}")
    (pid,) = (pid for pid in world.processes() if b"second" in Path(f"/proc/{pid}/cmdline").read_bytes())
    yield
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)


def end_by_hand(world: World) -> None:
    """As a person ends a mount that cannot drain."""
    pid = world.pids().mount
    world.run("fusermount3", "-u", world.mnt)
    wait_for_end(pid)


def copy_source(world: World, to: Path) -> None:
    subprocess.run(["cp", "-a", world.source, to], check=True)


def write(world: World, block: int, count: int = 1) -> None:
    with open(world.mnt / "a.img", "r+b") as file:
        file.seek(block * BLOCK)
        file.write(os.urandom(count * BLOCK))


def kill(world: World) -> None:
    pids = world.pids()
    os.kill(pids.mount, signal.SIGKILL)
    wait_for_end(pids.mount)
    assert pids.second is not None
    wait_for_end(pids.second)


def log_of(world: World) -> str:
    return (world.directory / "mount.log").read_text()


@pytest.mark.usefixtures("service")
def test_a_group_is_taken_over_and_back_and_never_merged(here: World, there: World) -> None:
    copy_source(here, there.source)
    shutil.rmtree(there.source / ".rewindfs")  # a restored source: the same files, another agent
    line = there.refused("mount", there.source, there.mnt, *there.target)
    assert "is fed by agent" in line and "--take-over" in line
    write(here, 3)
    assert here.ask("status")["link"] == "connected", "a newcomer that is refused disturbs nobody"
    here.check_equal()

    there.mount("async", "--take-over")
    status = here.wait_for_status(lambda status: status["link"] == "lost", "the fence")
    assert status["state"] == "degraded" and "has taken over" in status["error"]
    write(here, 5)  # policy continue: the application goes on, unrecorded
    write(there, 7)
    there.check_equal()
    there.unmount()

    end_by_hand(here)
    line = here.refused("mount", here.source, here.mnt, *here.target)
    assert "was taken over" in line and "--take-over" in line
    here.mount("async", "--take-over")
    assert "everything=True" in log_of(here)
    here.check_equal()
    assert len(here.gaps()) == 2
    here.unmount()
    here.rewindfs("verify", here.store)


def test_a_copied_state_directory_hides_nothing(here: World, there: World) -> None:
    """Both copies are the same agent, by name: after an unclean end the marks of one say nothing of the other."""
    write(here, 1)
    kill(here)
    here.run("fusermount3", "-u", here.mnt)
    copy_source(here, there.source)
    there.mount("async")
    write(there, REGION // BLOCK + 7, 3)  # in the region that the other one has not marked
    there.ask("durable")
    kill(there)
    there.run("fusermount3", "-u", there.mnt)

    before = len(log_of(here))
    here.mount("async")
    said = log_of(here)[before:]
    assert "was fed in the meantime" in said and "everything=True" in said
    here.check_equal()
    here.unmount()


@pytest.mark.usefixtures("service")
def test_two_live_starts_of_one_agent_the_newer_feeds(here: World, there: World) -> None:
    copy_source(here, there.source)
    there.mount("async")
    status = here.wait_for_status(lambda status: status["link"] == "lost", "the fence")
    assert "a newer start" in status["error"]
    write(there, 9)
    there.check_equal()
    there.unmount()
    end_by_hand(here)
    before = len(log_of(here))
    here.mount("async")
    assert "everything=True" in log_of(here)[before:]
    here.check_equal()
    here.unmount()


def test_a_store_put_back_by_a_moment_is_sent_what_it_lost_or_it_is_said(here: World) -> None:
    """While every record in between is still queued it is simply sent again, and no gap begins."""
    here.ask("durable")
    second = here.pids().second
    assert second is not None
    os.kill(second, signal.SIGSTOP)
    copy = here.directory / "copy"
    subprocess.run(["cp", "-a", "--sparse=always", here.store, copy], check=True)
    os.kill(second, signal.SIGCONT)
    write(here, 11, 4)
    os.kill(second, signal.SIGKILL)
    shutil.rmtree(here.store)
    copy.rename(here.store)
    status = here.wait_for_status(
        lambda status: status["link"] == "lost" or status["pids"]["second"] not in (None, second), "a new appliance"
    )
    if status["link"] != "lost":
        status = here.wait_for_state("protected", "degraded")
    if status["link"] == "lost":
        assert "kept nowhere" in status["error"]
        end_by_hand(here)
        here.mount("async")
        assert len(here.gaps()) == 1
    else:
        assert here.gaps() == []
    here.check_equal()
