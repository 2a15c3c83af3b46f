"""Clones of past moments on a real mount: file systems, databases, every change of a name, and what must not change."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from dedup.pins import pinned
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Attributes
from fusefs.mountpoint import CLONE_XATTR, mount_at
from fusefs.overlay_directory import PREFIX, clear_dead
from tests.dedup.model import Model
from tests.system.harness import World, digest, wait_for_end


def state_of(store: Path) -> dict[str, str]:
    """Of each file of a store its content, but for what readers are noted in."""
    files = [file for file in store.rglob("*") if file.is_file() and not file.is_socket()]
    return {
        str(file.relative_to(store)): digest(file)
        for file in files
        if file.relative_to(store).parts[0] != "readers" and file.name != "lock.mdb"
    }


GROUP = "source"


def store_of(path: Path, content: dict[str, bytes], *, mode: int = 0o644, uid: int = 0, gid: int = 0) -> int:
    """A store with volumes of that content, made without a mount; returns the last seq."""
    Store.create(path)
    store, model = Store.open(path), Model()
    group = store.group(GROUP)
    group.ingest(model.begin())
    for name, data in content.items():
        made = model.create(name, len(data))
        group.ingest([made, model.write(made.volume, 0, data)])
        group.ingest([Attributes(*model._next(), made.volume, mode, uid, gid)])
    store.close()
    return model.seq


class Clones:
    """Clones in one world, their overlay in a directory of its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.place = world.directory / "overlay"
        self.place.mkdir()
        self.mnt = world.directory / "clone"
        self.mnt.mkdir()

    def mount(self, volume: str = ".", at: str = "latest", *options: str | Path) -> Path:
        where = ("--overlay", self.place, "--log-file", self.world.directory / "clone.log")
        self.world.rewindfs("clone", self.world.store, volume, "--at", at, self.mnt, *where, *options)
        return self.mnt

    def pid(self) -> int:
        return int(json.loads(os.getxattr(self.mnt, CLONE_XATTR))["pid"])

    def unmount(self) -> None:
        """By anybody; the process behind it then removes the overlay."""
        pid = self.pid()
        self.world.run("fusermount3", "-u", self.mnt)
        wait_for_end(pid)
        assert os.listdir(self.place) == []


@pytest.fixture
def clones(world: World) -> Clones:
    return Clones(world)


@contextmanager
def unchanged(store: Path) -> Iterator[None]:
    before = state_of(store)
    yield
    assert state_of(store) == before


def test_databases_go_on_from_a_moment(world: World, clones: Clones) -> None:
    """A database in WAL mode as it was while it was open: volumes of one moment, writable, and the store stays."""
    world.mount()
    (world.mnt / "db").mkdir()
    with closing(sqlite3.connect(world.mnt / "db" / "app.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
        for _ in range(20):
            database.execute("INSERT INTO rows (text) VALUES ('before')")
        world.ask("bookmark", name="here")
        database.execute("DELETE FROM rows")
    world.unmount()
    with unchanged(world.store):
        place = clones.mount("db", "here")
        copy = place / "db" / "app.db"
        assert world.sql(copy, "SELECT count(*) FROM rows; PRAGMA integrity_check") == "20\nok"
        assert world.sql(copy, "PRAGMA journal_mode = WAL; INSERT INTO rows (text) VALUES ('mine');") == "wal"
        with closing(sqlite3.connect(copy)) as one, closing(sqlite3.connect(copy)) as other:
            one.executemany("INSERT INTO rows (text) VALUES (?)", [("x" * 3000,)] * 500)
            one.commit()
            assert other.execute("SELECT count(*) FROM rows").fetchone() == (521,)
        assert world.sql(copy, "VACUUM; PRAGMA integrity_check; SELECT count(*) FROM rows") == "ok\n521"
        clones.unmount()


def test_a_file_system_that_was_in_use(world: World, source: Path, clones: Clones) -> None:
    """A dirty ext4 on a loop device: its journal replays into the overlay. Then fio and mkfs on the same file."""
    world.mount("async")
    disk = world.loop_mount(world.mnt / "disk.img")
    (disk / "kept").write_bytes(os.urandom(3 << 20))
    world.run("sync", "-f", disk)
    kept = digest(disk / "kept")
    world.rewindfs("bookmark", world.mnt, "in-use")
    (disk / "kept").unlink()
    world.loop_unmount(disk)
    world.unmount()
    with unchanged(world.store):
        image = clones.mount("disk.img", "in-use") / "disk.img"
        inside = world.loop_mount(image)
        assert digest(inside / "kept") == kept
        (inside / "new").write_bytes(os.urandom(1 << 20))
        world.loop_unmount(inside)
        world.run("e2fsck", "-fn", image)
        status = world.json("status", image.parent)
        assert status["group"] == "source" and status["state"] is None
        assert 1 << 20 < status["clone"]["overlay"]["bytes"] < 16 << 20
        world.fio(image, "--fsync=50", mebibytes=16)
        world.fio(image, "--ioengine=mmap", "--bs=4k", mebibytes=2)
        world.run("mkfs.ext4", "-q", "-F", image)
        world.run("e2fsck", "-fn", image)
        world.rewindfs("unmount", image.parent)
        assert os.listdir(clones.place) == []


def test_every_change_is_the_clones_own(world: World, clones: Clones) -> None:
    block = 4096
    content = os.urandom(5 * block + 100)
    store_of(world.store, {"a": content, "deep/er/b": b"b" * 10}, mode=0o640, uid=1234, gid=5678)
    place = clones.mount()
    a = place / "a"
    status = a.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid, status.st_size) == (0o640, 1234, 5678, len(content))
    assert status.st_blocks * 512 >= len(content)
    names = ("seq", "time", "kind", "group")
    assert set(os.listxattr(a)) == {f"user.rewindfs.{name}" for name in names}
    assert os.getxattr(a, "user.rewindfs.group") == b"source"
    os.setxattr(a, "user.mine", b"1")
    assert os.getxattr(a, "user.mine") == b"1"
    with pytest.raises(PermissionError):
        os.setxattr(a, "user.rewindfs.seq", b"1")

    model = bytearray(content)
    with open(a, "r+b", buffering=0) as file, open(a, "ab", buffering=0) as appending, open(a, "rb") as reading:
        file.seek(block - 1)
        file.write(b"xy")
        model[block - 1 : block + 1] = b"xy"
        appending.write(b"the end")
        model += b"the end"
        assert reading.read() == model
        file.truncate(2 * block + 7)
        file.truncate(4 * block)
        model[2 * block + 7 :] = bytes(2 * block - 7)
        assert a.read_bytes() == model
        with mmap.mmap(file.fileno(), 0) as mapped:
            mapped[3 * block : 3 * block + 3] = b"map"
            mapped.flush()
        model[3 * block : 3 * block + 3] = b"map"
        assert a.read_bytes() == model
        os.fsync(file.fileno())
        # Unlinked while open, and another in its place.
        a.unlink()
        a.write_bytes(b"another")
        reading.seek(0)
        assert reading.read() == model
        assert a.read_bytes() == b"another"
        assert os.listxattr(a) == []
    os.utime(a, (1, 2))
    os.chmod(a, 0o600)
    assert (a.stat().st_mtime, a.stat().st_mode & 0o777) == (2, 0o600)

    (place / "new").mkdir()
    os.rename(a, place / "new" / "c")
    os.rename(place / "deep" / "er" / "b", place / "new" / "c")
    assert (place / "new" / "c").read_bytes() == b"b" * 10
    assert os.getxattr(place / "new" / "c", "user.rewindfs.group") == b"source"
    (place / "link").symlink_to("new/c")
    assert (place / "link").read_bytes() == b"b" * 10
    with open(place / "new" / "c", "wb") as truncated:
        truncated.write(b"short")
    assert (place / "new" / "c").read_bytes() == b"short"
    os.rmdir(place / "deep" / "er")
    assert sorted(os.listdir(place)) == ["deep", "link", "new"]
    clones.unmount()
    assert clones.mount("a").joinpath("a").read_bytes() == content
    clones.unmount()


def fill(file: Path) -> None:
    with open(file, "r+b", buffering=0) as out:
        while True:
            out.write(b"x" * 65536)


def test_a_full_overlay_is_a_full_disk(world: World, clones: Clones) -> None:
    """By quota, and where its disk is full: ENOSPC, and everything else goes on."""
    content = os.urandom(8 << 20)
    store_of(world.store, {"a": content, "b": b"b" * 100_000})
    small = world.directory / "small"
    small.mkdir()
    world.run("mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", small)
    try:
        for options in (("--overlay-limit", "1M"), ("--overlay", small, "--overlay-limit", "none")):
            place = clones.mount(".", "latest", *options)
            with pytest.raises(OSError) as error:
                fill(place / "a")
            assert error.value.errno == errno.ENOSPC
            found = (place / "a").read_bytes()
            filled = len(found) - len(found.lstrip(b"x"))
            assert 0 < filled < 5 << 20 and found[filled:] == content[filled:]
            assert (place / "b").read_bytes() == b"b" * 100_000
            os.truncate(place / "a", 0)
            (place / "new").write_bytes(b"fits again" * 1000)
            assert (place / "new").read_bytes() == b"fits again" * 1000
            clones.unmount()
        place = clones.mount(".", "latest", "--overlay-limit", "16K")
        for number in range(4):
            (place / f"{number}").touch()
        with pytest.raises(OSError) as error:
            (place / "one more").mkdir()
        assert error.value.errno == errno.ENOSPC
        (place / "0").unlink()
        (place / "one more").mkdir()
        clones.unmount()
    finally:
        world.run("umount", small)


def test_what_a_killed_clone_left_goes_with_the_next(world: World, clones: Clones) -> None:
    seq = store_of(world.store, {"a": b"a" * 10_000})
    place = clones.mount()
    assert int(os.getxattr(place / "a", "user.rewindfs.seq")) == seq
    assert ("source", seq) in pinned(Storage(), world.store).moments
    (place / "a").write_bytes(b"changed")
    (left,) = os.listdir(clones.place)
    assert "is already mounted there" in world.refused("clone", world.store, "a", "--at", "latest", clones.mnt)
    # It lives: nobody touches it.
    assert clear_dead(clones.place) == 0
    pid = clones.pid()
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    assert os.listdir(clones.place) == [left]
    other = clones.place / f"{PREFIX}of-nobody"
    other.write_text("no directory")
    done = world.rewindfs("clone", world.store, "a", "--at", f"seq={seq}", clones.mnt, "--overlay", clones.place)
    assert "removed, the process that it belonged to was killed" in done.stderr
    assert "cleaned a stale mount" in done.stderr
    assert (clones.mnt / "a").read_bytes() == b"a" * 10_000
    assert left not in os.listdir(clones.place)
    other.unlink()
    # SIGTERM is an orderly end.
    pid = clones.pid()
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)
    assert mount_at(clones.mnt) is None and os.listdir(clones.place) == []
    assert pinned(Storage(), world.store).moments == frozenset()


@pytest.mark.slow
def test_refused_before_anything_is_mounted(world: World, clones: Clones) -> None:
    store_of(world.store, {"a": b"a"})
    store, mnt = world.store, clones.mnt

    def refused(volume: str, at: str, *options: str | Path) -> str:
        line = world.refused("clone", store, volume, "--at", at, mnt, "--overlay", clones.place, *options)
        assert mount_at(mnt) is None and os.listdir(clones.place) == []
        return line

    assert "before the first recovery point" in refused("a", "2020-01-01T00:00:00Z")
    assert "no volume 'b' at seq=5; it had: a" in refused("b", "latest")
    assert "--overlay" in refused("a", "latest", "--overlay", world.directory / "none")
    assert "cannot lie in the store" in refused("a", "latest", "--overlay", store)
    (mnt / "something").touch()
    assert "not empty" in refused("a", "latest")
    (mnt / "something").unlink()
    clones.mount()
    assert "cannot lie on a mount of rewindfs" in world.refused(
        *("clone", store, "a", "--at", "latest", world.snap, "--overlay", mnt)
    )
    text = world.rewindfs("status", mnt).stdout
    assert "a clone of . at seq=" in text and "until it is unmounted" in text
    clones.unmount()


@pytest.mark.slow
def test_unmounted_under_an_open_file(world: World, clones: Clones) -> None:
    """By umount -l: the overlay goes when the last file is closed."""
    store_of(world.store, {"a": bytes(1 << 20)})
    place = clones.mount()
    pid = clones.pid()
    program = "import sys,time\nf=open(sys.argv[1],'r+b');print('open',flush=True);sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, place / "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None and user.stdout.readline() == b"open\n"
        world.run("umount", "-l", place)
        assert os.listdir(clones.place) != []
    wait_for_end(pid)
    assert os.listdir(clones.place) == []
