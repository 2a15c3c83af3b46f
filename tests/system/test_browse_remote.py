"""Going back from afar: browse over tls:// and unix:, beside a writer, and over the end of the second appliance."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedup.types import Seq
from fusefs.mountpoint import mount_at
from tests.system.harness import World, check_same, image_bytes, wait_for_end
from tests.system.sites import Identities, make_identities

MIB = 1 << 20
WRITES = 4096


class Site:
    """A source that is mounted, its second appliance at two addresses, and who goes back over either."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.identities: Identities = make_identities(world)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.tls = f"tls://127.0.0.1:{free.getsockname()[1]}"
        self.unix = f"unix:{world.directory}/second"
        self.start_second()
        world.target = ("--appliance", self.unix)
        self.snaps: list[Path] = []

    def start_second(self) -> None:
        listen = ("--listen", self.unix, "--listen", self.tls, "--identity", self.identities.second)
        words = ("appliance", "second", "--store", self.world.store, *listen)
        self.world.rewindfs(*words, "--log-file", self.world.directory / "second.log")

    def second(self) -> int:
        words = ["fusefs", "appliance", "second"]
        for pid in self.world.processes():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if any(command[at : at + 3] == words for at in range(len(command))):
                return pid
        raise AssertionError("no second appliance")

    def kill_second(self) -> None:
        pid = self.second()
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)

    def browse(self, address: str, *options: str | Path) -> Path:
        place = self.world.directory / f"snap{len(self.snaps)}"
        place.mkdir()
        self.snaps.append(place)
        identity = ("--identity", self.identities.agent, "--cache", self.world.directory)
        log = self.world.directory / f"{place.name}.log"
        self.world.rewindfs("browse", address, place, *identity, "--log-file", log, *options)
        return place

    def close(self) -> None:
        for place in self.snaps:
            if mount_at(place) is not None:
                self.world.run("fusermount3", "-u", place)
        self.world.unmount()
        pid = self.second()
        os.kill(pid, signal.SIGTERM)
        wait_for_end(pid)


@pytest.fixture
def site(world: World) -> Iterator[Site]:
    one = Site(world)
    yield one
    one.close()


@contextmanager
def writer(file: Path) -> Iterator[None]:
    """Somebody who writes all the time."""
    stop = threading.Event()
    rng = random.Random(3)
    size = file.stat().st_size

    def write() -> None:
        with open(file, "r+b", buffering=0) as target:
            while not stop.is_set():
                target.seek(rng.randrange(size // WRITES) * WRITES)
                target.write(rng.randbytes(WRITES))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def dropped(file: Path) -> Path:
    """The file, of which the kernel keeps nothing."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def protect(world: World, mebibytes: int, snapshots: int) -> dict[str, bytes]:
    """Mounts the source with two volumes; the content of `disk.img` at each snapshot."""
    rng = random.Random(mebibytes)
    shadow = bytearray(rng.randbytes(mebibytes * MIB))
    (world.source / "disk.img").write_bytes(shadow)
    (world.source / "busy.img").write_bytes(bytes(4 * MIB))
    world.mount("async")
    contents = {}
    for number in range(snapshots):
        with open(world.mnt / "disk.img", "r+b", buffering=0) as disk:
            for _ in range(40):
                offset, data = rng.randrange(len(shadow) - 9000), rng.randbytes(rng.choice([100, 4096, 9000]))
                disk.seek(offset)
                disk.write(data)
                shadow[offset : offset + len(data)] = data
            os.fsync(disk.fileno())
        world.ask("durable")
        world.rewindfs("snapshot", "create", world.target[1], "--name", f"s{number}")
        contents[f"s{number}"] = bytes(shadow)
    return contents


def check_copy(snap: Path, name: str, content: bytes) -> None:
    copy = snap.parent / f"{snap.name}-{name}"
    shutil.copyfile(dropped(snap / "volumes" / "disk.img" / name), copy)
    check_same(copy.read_bytes(), content, f"{snap.name}: {name}")
    copy.unlink()


def test_two_browse_from_afar(site: Site, world: World) -> None:
    """Beside a writer; one of them over the end of the second appliance, too; and who is refused."""
    contents = protect(world, 6, 2)
    check_refusals(site, world)
    near, far = site.browse(site.unix), site.browse(site.tls)
    with writer(world.mnt / "busy.img"):
        for snap in (near, far):
            for name, content in contents.items():
                check_copy(snap, name, content)
            assert sorted(path.name for path in (snap / "points").iterdir()) == ["base", "s0", "s1"]
        busy = far / "volumes" / "busy.img"
        with open(busy / "@latest", "rb") as latest:
            seq = os.getxattr(latest.fileno(), "user.rewindfs.seq").decode()
            found = latest.read()
        check_same((near / "volumes" / "busy.img" / f"@seq={seq}").read_bytes(), found, f"seq={seq}")
        with world.reader() as group:
            check_same(found, image_bytes(group, "busy.img", Seq(int(seq))), f"seq={seq}")
        # What comes later is seen without a remount.
        world.rewindfs("snapshot", "create", site.unix, "--name", "later")
        assert (far / "volumes" / "disk.img" / "later").read_bytes() == contents["s1"]
        with pytest.raises(FileNotFoundError):
            (far / "volumes" / "disk.img" / "@seq=99999999999").stat()
        refusal = os.getxattr(far / "volumes" / "disk.img", "user.rewindfs.refused").decode()
        assert "after the last recovery point" in refusal
    for snap in (near, far):
        pid = next(pid for pid in world.processes() if str(snap).encode() in Path(f"/proc/{pid}/cmdline").read_bytes())
        anonymous = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "RssAnon" in line)
        assert int(anonymous.split()[1]) < 150_000
    check_a_read_outlives_the_second_appliance(site, site.browse(site.tls), contents)


def check_a_read_outlives_the_second_appliance(site: Site, snap: Path, contents: dict[str, bytes]) -> None:
    file = snap / "volumes" / "disk.img"
    done: dict[str, bytes] = {}
    with open(dropped(file / "s0"), "rb", buffering=0) as s0, open(dropped(file / "s1"), "rb", buffering=0) as s1:
        head = s0.read(MIB)
        site.kill_second()
        readers = {"s0": threading.Thread(target=lambda: done.update(s0=head + s0.read()))}
        readers["s1"] = threading.Thread(target=lambda: done.update(s1=s1.read()))
        for thread in readers.values():
            thread.start()
        site.start_second()
        for thread in readers.values():
            thread.join()
    for name, found in done.items():
        check_same(found, contents[name], name)
    assert done.keys() == contents.keys()
    assert "connected again" in (snap.parent / f"{snap.name}.log").read_text()


def check_refusals(site: Site, world: World) -> None:
    place, stranger = world.directory / "place", world.directory / "stranger"
    place.mkdir()
    world.rewindfs("identity", "create", "--identity", stranger)
    certificate = world.directory / "second-identity.pem"
    world.rewindfs("identity", "trust", certificate, "--identity", stranger)
    said = world.refused("browse", site.tls, place, "--identity", stranger)
    assert "does not trust this machine's key" in said
    said = world.refused("browse", site.unix, place, "--group", "nothing")
    assert "no group 'nothing'" in said
    assert mount_at(place) is None


@pytest.mark.slow
def test_a_bounded_wait_and_then_on(site: Site, world: World) -> None:
    """Nobody answers for longer than a read waits: EIO, the log says why; then it is there again, and all is well."""
    contents = protect(world, 24, 4)
    snap = site.browse(site.unix)
    file = snap / "volumes" / "disk.img"
    with open(file / "s0", "rb", buffering=0) as opened:
        assert opened.read(4096) == contents["s0"][:4096]
        site.kill_second()
        opened.seek(20 * MIB)
        with pytest.raises(OSError, match="Input/output error"):
            opened.read(4096)
        log = (world.directory / "snap0.log").read_text()
        assert "no link for" in log and "read refused with EIO" in log
        assert opened.seek(0) == 0 and opened.read(4096) == contents["s0"][:4096]
        site.start_second()
        opened.seek(20 * MIB)
        found = None
        while found is None:
            try:
                found = opened.read(4096)
            except OSError:
                continue  # it is not connected again yet
        assert found == contents["s0"][20 * MIB : 20 * MIB + 4096]
    for name, content in contents.items():
        check_copy(snap, name, content)
    # Stopped, and not dead: whoever waits goes on with it.
    pid = site.second()
    os.kill(pid, signal.SIGSTOP)
    done: list[bytes] = []
    thread = threading.Thread(target=lambda: done.append(dropped(file / "@latest").read_bytes()))
    thread.start()
    thread.join(2)
    assert not done
    os.kill(pid, signal.SIGCONT)
    thread.join()
    check_same(done[0], contents["s3"], "latest")


@pytest.mark.slow
def test_kills_while_it_is_read(site: Site, world: World) -> None:
    contents = protect(world, 24, 3)
    snaps = [site.browse(site.unix), site.browse(site.tls, "--cache-limit", "64M")]
    rng = random.Random(9)
    with writer(world.mnt / "busy.img"):
        for _ in range(5):
            name = rng.choice(list(contents))
            threads = [threading.Thread(target=check_copy, args=(snap, name, contents[name])) for snap in snaps]
            failures: list[BaseException | None] = []
            hook, threading.excepthook = threading.excepthook, lambda failed: failures.append(failed.exc_value)  # noqa: B023
            try:
                for thread in threads:
                    thread.start()
                threads[0].join(rng.random() / 2)
                site.kill_second()
                site.start_second()
                for thread in threads:
                    thread.join()
            finally:
                threading.excepthook = hook
            assert not failures
