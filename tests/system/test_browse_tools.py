"""The snapshot mount with the programs that people use on it: each reads the right bytes, or says why it cannot."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fusefs.snapshot_tree import NAME_SECONDS
from tests.system.harness import World, check_same, digest, mounts

MIB = 1 << 20
BLOCK = 4096


def allocated(file: Path) -> int:
    return file.stat().st_blocks * 512


def drop_kernel_caches_of(file: Path) -> None:
    """What is read next comes from the mount, and not from the pages of the program before."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def image(world: World) -> Path:
    """A snapshot, browsed, of a sparse image with an odd size; `truth` holds the same bytes."""
    content = random.Random(1)
    with open(world.source / "disk.img", "wb") as file:
        file.truncate(24 * MIB + 1232)
        for offset in (0, 5 * MIB - 100, 17 * MIB + 7):
            file.seek(offset)
            file.write(content.randbytes(300_000))
        file.write(b"a needle in here")
        file.seek(24 * MIB)
        file.write(b"the end" * 176)
    world.run("cp", world.source / "disk.img", world.directory / "truth")
    world.mount()
    world.rewindfs("snapshot", "create", world.store, "--name", "monday")
    with open(world.mnt / "disk.img", "r+b") as file:
        file.write(b"tuesday" * 1000)
    return world.browse() / "volumes/disk.img/monday"


def test_programs_on_an_image(world: World, image: Path) -> None:
    copy_with_programs(world, image)
    look_with_programs(world, image)


def copy_with_programs(world: World, image: Path) -> None:
    truth = world.directory / "truth"
    wanted, sparse = digest(truth), 4 * MIB
    copy = world.directory / "copy"
    assert allocated(image) >= image.stat().st_size, "nobody looked yet"
    for command in (
        ["cp"],
        ["cp", "--sparse=auto"],
        ["cp", "--sparse=always"],
        ["rsync", "--sparse"],
        ["qemu-img", "convert", "-f", "raw", "-O", "raw"],
        ["rsync"],
        ["rsync", "--inplace"],
        ["cp", "--preserve=all", "--sparse=never"],
    ):
        drop_kernel_caches_of(image)
        world.run(*command, image, copy)
        if command[0] == "qemu-img":  # which makes whole sectors of an image
            os.truncate(copy, truth.stat().st_size)
        assert digest(copy) == wanted, command
        is_sparse = "--sparse=never" not in command and command not in (["rsync"], ["rsync", "--inplace"])
        assert (allocated(copy) < sparse) is is_sparse, (command, allocated(copy))
        if command != ["rsync"]:
            copy.unlink()
    assert 10 * MIB > allocated(image) > 0

    dd = ["dd", f"if={image}", f"of={copy}", "status=none"]
    for options in ([], ["bs=1M"], ["bs=4096", "iflag=direct"], ["bs=1M", "conv=sparse"]):
        world.run(*dd, *options)
        assert digest(copy) == wanted, options
        copy.unlink()
    world.run(*dd, "bs=1000", "skip=5242", "count=77")
    check_same(copy.read_bytes(), truth.read_bytes()[5_242_000:5_319_000], "dd skip count")
    world.run("tar", "-C", image.parent, "-cSf", world.directory / "tar", "monday")
    world.run("tar", "-C", world.directory, "-xf", world.directory / "tar")
    assert digest(world.directory / "monday") == wanted
    assert allocated(world.directory / "tar") < sparse


def look_with_programs(world: World, image: Path) -> None:
    truth = world.directory / "truth"
    data = truth.read_bytes()
    assert world.run("sha256sum", image).stdout.split()[0] == hashlib.sha256(data).hexdigest()
    assert world.run("cmp", image, truth).stdout == ""
    assert "differ: byte 1," in world.run("cmp", image, world.source / "disk.img", check=False).stdout
    assert world.run("grep", "-abo", "needle", image).stdout == f"{data.index(b'needle')}:needle\n"
    assert world.run("tail", "-c", "7", image).stdout == "the end"
    with open(image, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        drop_kernel_caches_of(image)
        check_same(mapped[:], data, "mmap")
        assert mapped.find(b"needle") == data.index(b"needle")
    assert '"virtual-size": 25167360' in world.run("qemu-img", "info", "--output=json", "-f", "raw", image).stdout
    assert "identical" in world.run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, truth).stdout
    differs = world.run("qemu-img", "compare", image, world.source / "disk.img", check=False)
    assert (differs.returncode, differs.stdout) == (1, "Content mismatch at offset 0!\n"), differs.stderr

    top = world.snap
    assert world.run("find", top, "-type", "f", "-name", "monday", "-size", f"{len(data)}c").stdout == f"{image}\n"
    assert f" {len(data)} " in world.run("ls", "-lR", "--full-time", top / "volumes").stdout
    assert world.run("stat", "-c", "%s %F", image).stdout == f"{len(data)} regular file\n"
    assert world.run("du", "--apparent-size", "-b", image).stdout.split()[0] == str(len(data))
    # In whole MiB: what was opened counts what is data, to the leaf of the pointer maps.
    assert 2 <= int(world.run("du", "-m", image).stdout.split()[0]) <= 10
    world.run("tar", "-C", top / "points", "-cf", "/dev/null", "monday")
    (world.directory / "mirror").mkdir()
    for changes in ("cd+++++++++ monday/\n>f+++++++++ monday/disk.img\n", ""):
        done = world.run("rsync", "-a", "--itemize-changes", top / "points/monday", world.directory / "mirror")
        assert done.stdout == changes
    assert digest(world.directory / "mirror/monday/disk.img") == digest(truth)


def test_extended_attributes(world: World, source: Path) -> None:
    world.mount("sync", "--name", "vm")
    with open(world.mnt / "disk.img", "r+b") as file:
        file.write(b"flushed")
        os.fsync(file.fileno())
        file.write(b"not flushed")
        file.flush()
        world.browse()
        for name, kind in [("@latest", "crash"), ("@latest~flush", "flush")]:
            said = world.run("getfattr", "-d", "-m", "-", world.snap / "volumes/disk.img" / name).stdout
            assert f'user.rewindfs.kind="{kind}"' in said
            assert 'user.rewindfs.group="vm"' in said and 'user.rewindfs.seq="' in said
        world.rewindfs("bookmark", world.mnt, "named")
    for path in ("volumes/disk.img/@named", "points/named", "points/named/disk.img", "volumes/disk.img/named"):
        said = world.run("getfattr", "-n", "user.rewindfs.kind", "--only-values", world.snap / path).stdout
        assert said == "bookmark", path


def test_file_systems_on_loop_devices(world: World, source: Path) -> None:
    world.mount()
    disk = world.loop_mount(world.mnt / "disk.img")
    (disk / "letter").write_text("Dear customers")
    world.run("sync", "-f", disk)
    world.rewindfs("bookmark", world.mnt, "in-use")
    world.loop_unmount(disk)
    world.rewindfs("bookmark", world.mnt, "unmounted")
    versions = world.browse() / "volumes/disk.img"

    device = world.run("losetup", "--find", "--show", "--read-only", versions / "unmounted").stdout.strip()
    try:
        assert Path(f"/sys/block/{Path(device).name}/ro").read_text() == "1\n"
        assert digest(Path(device)) == digest(source / "disk.img")
    finally:
        world.run("losetup", "--detach", device)

    place = world.directory / "place"
    place.mkdir()
    for name, options in [("unmounted", "loop,ro"), ("in-use", "loop,ro,noload")]:
        world.run("mount", "-o", options, versions / name, place)
        try:
            # Without its journal a file system shows what had been written back, and that may be less.
            found = place / "letter"
            if name == "unmounted":
                assert found.read_text() == "Dear customers"
            assert next(mount for mount in mounts() if mount.path == place).fstype == "ext4"
        finally:
            world.run("umount", place)
    refused = world.run("mount", "-o", "loop,ro", versions / "in-use", place, check=False)
    assert refused.returncode == 32, "a dirty image wants to be written to"

    world.run("cp", versions / "in-use", world.directory / "copy.img")
    copied = world.loop_mount(world.directory / "copy.img")
    assert (copied / "letter").read_text() == "Dear customers"
    world.loop_unmount(copied)


def test_sqlite_reads_in_place(world: World) -> None:
    for mode in ("delete", "wal"):
        with closing(sqlite3.connect(world.source / f"{mode}.db")) as connection:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            connection.execute("CREATE TABLE t (x)")
            connection.execute("INSERT INTO t VALUES ('old')")
            connection.commit()
    world.mount()
    world.rewindfs("snapshot", "create", world.store, "--name", "before")
    for mode in ("delete", "wal"):
        world.sql(world.mnt / f"{mode}.db", "UPDATE t SET x = 'new';")
    top = world.browse()
    for whole in (top / "volumes/delete.db/before", top / "points/before/delete.db"):
        assert world.run("sqlite3", "-readonly", whole, "SELECT x FROM t").stdout == "old\n"
    for mode in ("delete", "wal"):
        for path in (top / f"volumes/{mode}.db/before", top / f"points/before/{mode}.db"):
            uri = f"file:{path}?immutable=1"
            assert world.run("sqlite3", uri, "SELECT x FROM t; PRAGMA integrity_check").stdout == "old\nok\n"
        assert world.sql(world.source / f"{mode}.db", "SELECT x FROM t;") == "new"


def test_volumes_that_change_their_names_and_sizes(world: World) -> None:
    """Each moment shows the volumes as they were, and all of it appears in a mount that was there before."""
    (world.source / "vm/old").mkdir(parents=True)
    (world.source / "vm/a.img").write_bytes(b"a" * 5000)
    (world.source / "vm/old/b.img").write_bytes(b"b" * 10)
    world.mount()
    top, moments = world.browse(), {}

    def remember(name: str) -> None:
        world.ask("bookmark", name=name)
        files = sorted(file for file in world.source.rglob("*.img"))
        moments[name] = {str(file.relative_to(world.source)): file.read_bytes() for file in files}

    remember("first")
    (world.mnt / "vm/a.img").rename(world.mnt / "vm/old/c.img")
    remember("renamed")
    (world.mnt / "vm/a.img").write_bytes(b"another one")
    os.truncate(world.mnt / "vm/old/c.img", 3)
    remember("resized")
    (world.mnt / "vm/old/b.img").unlink()
    (world.mnt / "vm/old/c.img").rename(world.mnt / "vm/a.img")
    remember("removed")
    (world.mnt / "vm/old").rename(world.mnt / "vm/new")
    (world.mnt / "vm/new/b.img").write_bytes(b"new")
    (world.mnt / "vm/new/b.img").write_bytes(b"newer")
    remember("last")

    for moment, files in moments.items():
        for point in (top / "points" / moment, top / f"points/@{moment}"):
            found = {str(file.relative_to(point)): file.read_bytes() for file in point.rglob("*") if file.is_file()}
            assert found == files, moment
        for path, content in files.items():
            assert (top / "volumes" / path / moment).read_bytes() == content
            assert (top / "volumes" / path / f"@{moment}").read_bytes() == content
        everything = {path for files in moments.values() for path in files}
        for path in everything - files.keys():
            assert moment not in os.listdir(top / "volumes" / path)
            assert not (top / "volumes" / path / f"@{moment}").exists()


def test_a_name_given_anew_never_shows_the_old_bytes(world: World) -> None:
    volume = world.mnt / "a.img"
    world.mount()
    volume.write_bytes(b"0" * 5000)
    top = world.browse()
    paths = [top / path for path in ("volumes/a.img/name", "volumes/a.img/@name", "points/name/a.img")]
    for turn in b"12":
        world.rewindfs("snapshot", "create", world.store, "--name", "name")
        kept = volume.read_bytes()
        volume.write_bytes(bytes([turn]) * (5000 + turn))
        for _ in range(2):
            os.listdir(top / "points")
            for path in paths:
                assert path.stat().st_size == len(kept)
                check_same(path.read_bytes(), kept, str(path))
        with open(paths[0], "rb") as held:
            world.rewindfs("snapshot", "delete", world.store, "name")
            time.sleep(NAME_SECONDS)  # for as long the kernel may remember it
            assert not any(path.exists() for path in paths)
            check_same(held.read(), kept, "opened before it was deleted")


class Counting:
    """Two volumes of COUNT blocks: write k puts k into block k % COUNT, first of `left.img`, then of `right.img`."""

    COUNT = 512

    def __init__(self, directory: Path) -> None:
        self.paths = [directory / name for name in ("left.img", "right.img")]
        self.done = 0
        self._ending = threading.Event()

    def work(self) -> None:
        with open(self.paths[0], "r+b") as left, open(self.paths[1], "r+b") as right:
            while not self._ending.is_set():
                number = self.done + 1
                for file in (left, right):
                    os.pwrite(file.fileno(), number.to_bytes(8, "big") * (BLOCK // 8), number % self.COUNT * BLOCK)
                self.done = number

    @contextmanager
    def working(self) -> Iterator[None]:
        thread = threading.Thread(target=self.work)
        thread.start()
        try:
            yield
        finally:
            self._ending.set()
            thread.join()

    @classmethod
    def last_in(cls, copy: Path) -> int:
        """The last write in an image. AssertionError where it is not exactly what that write left behind."""
        data = copy.read_bytes()
        assert len(data) == cls.COUNT * BLOCK
        numbers = [int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data), BLOCK)]
        last = max(numbers)
        for block, number in enumerate(numbers):
            assert number == max(0, last - (last - block) % cls.COUNT), f"block {block} of the image after write {last}"
            check_same(data[block * BLOCK :][:BLOCK], number.to_bytes(8, "big") * (BLOCK // 8), f"block {block}")
        return last


def test_each_copy_of_a_busy_volume_is_one_moment(world: World) -> None:
    for name in ("left.img", "right.img"):
        (world.source / name).write_bytes(bytes(Counting.COUNT * BLOCK))
    world.mount("async")
    top = world.browse()
    copy, latest = world.directory / "copy", top / "volumes/left.img/@latest"
    counting, seen = Counting(world.mnt), []
    with counting.working():
        while counting.done < Counting.COUNT:
            pass
        world.ask("durable")
        bound = b""
        for _ in range(2):
            while (now := os.getxattr(latest, "user.rewindfs.seq")) == bound:
                pass  # a name relative to now stays bound for two seconds
            bound = now
            for command in (["cp"], ["cp", "--sparse=always"], ["rsync", "--inplace"], ["dd"]):
                words = [f"if={latest}", f"of={copy}"] if command == ["dd"] else [latest, copy]
                world.run(*command, *words)
                seen.append(Counting.last_in(copy))
                assert seen[-1] <= counting.done + 1
        # The same file again by its seq: what it is does not change while its volume is written.
        with open(latest, "rb") as held:
            seq = os.getxattr(held.fileno(), "user.rewindfs.seq").decode()
            check_same((top / f"volumes/left.img/@seq={seq}").read_bytes(), held.read(), f"seq={seq}")
        world.run("cp", "-r", top / "points/@latest", world.directory / "both")
        left, right = (Counting.last_in(world.directory / "both" / name) for name in ("left.img", "right.img"))
        assert left - 1 <= right <= left, "one moment of both"
    assert seen == sorted(seen) and seen[-1] > seen[0] > 0
