"""The snapshot mount: its handlers called directly, then through the kernel with real programs."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyfuse3
import pytest
from pyfuse3 import EntryAttributes, FUSEError, ReaddirToken, RequestContext

from dedup.layout import RAW_SLOTS_OFFSET
from dedup.moment import rfc3339
from dedup.store import Store
from fusefs import snapshot_images, snapshot_mount
from fusefs.mountpoint import FSTYPE, mount_at, unmount
from fusefs.snapshot_mount import SnapshotMount
from tests.dedup.model import Model
from tests.fusefs.snapshot_history import DISK_BYTES, GROUP, History

ROOT = Path(__file__).resolve().parent.parent.parent
CALLER = cast(RequestContext, SimpleNamespace(uid=os.getuid(), gid=os.getgid(), pid=1, umask=0o022))
needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounting as root needs /dev/fuse"
)


# Handlers


class Direct:
    """The handlers over a history, without a mount."""

    def __init__(self, path: Path) -> None:
        self.history = History(path)
        self.asked_anew: list[int] = []
        reader = self.history.group.reader()
        self.operations = SnapshotMount(reader, lambda: os.statvfs(path), forget_attributes=self.asked_anew.append)

    async def walk(self, path: str) -> EntryAttributes:
        inode = pyfuse3.ROOT_INODE
        for name in path.split("/"):
            entry = await self.operations.lookup(inode, name.encode(), CALLER)
            inode = entry.st_ino
        return entry

    async def read(self, path: str, offset: int, length: int) -> bytes:
        entry = await self.walk(path)
        handle = (await self.operations.open(entry.st_ino, os.O_RDONLY, CALLER)).fh
        return bytes(await self.operations.read(handle, offset, length))


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Direct]:
    direct = Direct(tmp_path / "store")
    yield direct
    direct.history.close()


async def refused(path: str, direct: Direct) -> int:
    with pytest.raises(FUSEError) as error:
        await direct.walk(path)
    return error.value.errno


async def test_attributes_of_files_and_directories(direct: Direct) -> None:
    history = direct.history
    file = await direct.walk("volumes/vm/a.img/early")
    moment = history.group.reader().resolve("early")
    assert stat.S_ISREG(file.st_mode) and stat.S_IMODE(file.st_mode) == 0o640
    assert (file.st_uid, file.st_gid, file.st_size) == (1234, 5678, 9000)
    assert file.st_mtime_ns == moment.time
    assert (await direct.walk("points/early/vm/a.img")).st_ino == file.st_ino
    directory = await direct.walk("points/early/vm")
    assert stat.S_ISDIR(directory.st_mode) and directory.st_mtime_ns == moment.time
    names = await direct.operations.listxattr(file.st_ino, CALLER)
    values = [await direct.operations.getxattr(file.st_ino, name, CALLER) for name in names]
    assert dict(zip(names, values, strict=True)) == {
        b"user.rewindfs.seq": str(moment.seq).encode(),
        b"user.rewindfs.time": rfc3339(moment.time).encode(),
        b"user.rewindfs.kind": b"crash",
        b"user.rewindfs.group": GROUP.encode(),
    }
    assert (await direct.operations.statfs(CALLER)).f_namemax == 255


async def test_names_last_as_long_as_they_are_true(direct: Direct) -> None:
    for path, seconds in [
        ("volumes/disk.img/@latest", 0),
        ("volumes/disk.img/@0s", 0),
        ("points/@latest~flush", 0),
        ("volumes/disk.img/late", 0.02),
        ("points/@late", 0.02),
        ("volumes/disk.img/@seq=20", 10),
    ]:
        if path == "volumes/disk.img/@0s":
            assert await refused(path, direct) == errno.ENOENT  # the history lies in the past: not covered until now
        else:
            assert (await direct.walk(path)).entry_timeout == seconds


async def test_a_refusal_is_explained_once(direct: Direct, caplog: pytest.LogCaptureFixture) -> None:
    directory = await direct.walk("volumes/disk.img")
    gap = direct.history.refused_write()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await refused(f"volumes/disk.img/@seq={gap}", direct) == errno.ENOENT
    assert len(caplog.records) == 1 and "in a gap" in caplog.text
    value = await direct.operations.getxattr(directory.st_ino, b"user.rewindfs.refused", CALLER)
    assert b"nearest: seq=%d" % (gap - 1) in value
    assert await refused("volumes/disk.img/nonsense", direct) == errno.ENOENT
    assert await refused("volumes/\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), direct) == errno.ENOENT
    assert len(caplog.records) == 1


async def test_reads_at_any_offset(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    history = direct.history
    seq = history.moments["late"]
    content = history.content(seq, "disk.img")
    assert content is not None
    for offset, length in [(0, 4096), (1, 1), (4095, 2), (8192, 1 << 20), (77, 1 << 20), (DISK_BYTES - 5, 4096)]:
        assert await direct.read("volumes/disk.img/late", offset, length) == content[offset : offset + length]
    assert await direct.read("volumes/disk.img/late", DISK_BYTES, 4096) == b""
    assert await direct.read("volumes/disk.img/late", DISK_BYTES + 4096, 4096) == b""
    # Nothing depends on an image being kept.
    monkeypatch.setattr(snapshot_images, "IMAGES_MAX", 1)
    for moment in range(seq - 20, seq):
        assert await direct.read(f"volumes/disk.img/@seq={moment}", 0, DISK_BYTES) == history.content(
            moment, "disk.img"
        )


async def test_what_is_opened_tells_how_much_of_it_is_data(direct: Direct) -> None:
    operations, history = direct.operations, direct.history
    create = history.model.create("sparse.img", 10 << 20)
    history.group.ingest([create])
    history.write(create.volume, 4 << 20, 5000)
    for path, blocks, asked in [
        ("volumes/sparse.img/@latest", (2 << 20) // 512, True),
        ("points/late/disk.img", 6147, False),
    ]:
        file = await direct.walk(path)
        assert file.st_blocks == -(-file.st_size // 512)
        await direct.read(path, 0, 1)
        assert (await operations.getattr(file.st_ino, CALLER)).st_blocks == blocks
        assert (await direct.walk(path)).st_blocks == blocks
        assert direct.asked_anew == ([file.st_ino] if asked else [])
        direct.asked_anew.clear()
        await direct.read(path, 0, 1)
        assert direct.asked_anew == []


async def test_nothing_can_be_changed(direct: Direct) -> None:
    operations, file = direct.operations, (await direct.walk("volumes/disk.img/late")).st_ino
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(FUSEError, match=os.strerror(errno.EROFS)):
            await operations.open(file, flags, CALLER)
    for call in (
        operations.write(file, 0, b"x"),
        operations.unlink(pyfuse3.ROOT_INODE, b"points", CALLER),
        operations.mkdir(pyfuse3.ROOT_INODE, b"new", pyfuse3.ModeT(0o755), CALLER),
        operations.setxattr(file, b"user.x", b"", CALLER),
    ):
        with pytest.raises(FUSEError, match=os.strerror(errno.EROFS)):
            await call


async def test_listing_goes_on_where_it_stopped(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    replies: list[bytes] = []

    def reply(token: object, name: bytes, entry: EntryAttributes, next_id: int) -> bool:
        if len(replies) % 2:
            replies.append(b"full")
            return False
        replies.append(name)
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    directory = await direct.walk("volumes/disk.img")
    known = len(direct.operations._inodes)
    handle = await direct.operations.opendir(directory.st_ino, CALLER)
    token = cast(ReaddirToken, None)
    for start in range(6):
        await direct.operations.readdir(handle, start, token)
    await direct.operations.releasedir(handle)
    assert replies[::2] == [b"early", b"only-disk", b"x.img", b"marked", b"late"]
    # early, only-disk and x.img are one moment, so they are one file.
    assert len(direct.operations._inodes) == known + 3
    assert not direct.operations._listings


async def test_a_long_listing_lets_others_in(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_mount, "TURN_SECONDS", 0)
    operations = direct.operations
    directory = await direct.walk("volumes/disk.img")
    turns: list[str] = []
    take_turns = operations._take_turns

    async def counted(function: Callable[..., object], *args: object) -> object:
        turns.append(function.__name__)
        return await take_turns(function, *args)

    monkeypatch.setattr(operations, "_take_turns", counted)
    entries = await operations._list(operations._directory(directory.st_ino))
    assert [name for name, _ in entries] == ["early", "only-disk", "x.img", "marked", "late"]
    assert len(turns) > len(entries)


async def test_an_unforeseen_error_is_eio(
    direct: Direct, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(direct.operations._reader, "image", broken)
    with pytest.raises(FUSEError, match=os.strerror(errno.EIO)):
        await direct.read("volumes/disk.img/late", 0, 1)
    assert "ZeroDivisionError: a bug" in caplog.text


# Through the kernel


class Browsed:
    """A store, browsed by the command."""

    def __init__(self, directory: Path, store: Path) -> None:
        self.path = directory / "snap"
        self.path.mkdir()
        self.store = store
        self.log = directory / "browse.log"
        done = self.command(store, self.path, "--log-file", self.log)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    @staticmethod
    def command(*words: object) -> subprocess.CompletedProcess[str]:
        # Both outputs are pipes: this would hang if the background process kept one of them.
        return subprocess.run(
            [sys.executable, "-m", "fusefs", "browse", *map(str, words)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def close(self) -> None:
        while mount_at(self.path):
            unmount(self.path, lazy=True)


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[[Path], Browsed]]:
    made: list[Browsed] = []

    def make(store: Path) -> Browsed:
        made.append(Browsed(tmp_path, store))
        return made[-1]

    yield make
    for browsed in made:
        browsed.close()


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path / "store")
    yield history
    history.close()


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_fuse
def test_every_moment_is_copied_byte_for_byte(
    history: History, browse: Callable[[Path], Browsed], tmp_path: Path
) -> None:
    snap, copy = browse(history.path).path, tmp_path / "copy"
    for seq in range(3, history.model.seq + 1, 3):
        for path in history.paths(seq):
            run("cp", snap / "volumes" / path / f"@seq={seq}", copy)
            assert copy.read_bytes() == history.content(seq, path), f"{path} at {seq}"
        run("cp", "-r", snap / f"points/@seq={seq}", tmp_path / "all")
        files = {str(file.relative_to(tmp_path / "all")) for file in (tmp_path / "all").rglob("*") if file.is_file()}
        assert files == history.paths(seq)
        assert all((tmp_path / "all" / path).read_bytes() == history.content(seq, path) for path in files)
        shutil.rmtree(tmp_path / "all")


@needs_fuse
def test_what_programs_see(history: History, browse: Callable[[Path], Browsed]) -> None:
    browsed = browse(history.path)
    snap = browsed.path
    mount = mount_at(snap)
    assert mount is not None and (mount.fstype, mount.source) == (FSTYPE, str(history.path))
    files = run("find", snap, "-type", "f").splitlines()
    assert str(snap / "volumes/disk.img/only-disk") in files
    assert not any("@" in file for file in files)
    late = snap / "volumes/vm/a.img/early"
    status = late.stat()
    assert (status.st_size, status.st_mode, status.st_uid) == (9000, stat.S_IFREG | 0o640, 1234)
    time = history.group.reader().resolve("early").time
    assert status.st_mtime_ns == time
    assert "20000 " in run("ls", "-l", snap / "volumes/vm/a.img")
    assert os.getxattr(late, "user.rewindfs.time") == rfc3339(time).encode()
    assert os.listxattr(snap) == []
    with pytest.raises(OSError) as error:
        os.stat(snap / "volumes/disk.img/@seq=99999")
    assert error.value.errno == errno.ENOENT
    assert b"after the last" in os.getxattr(snap / "volumes/disk.img", "user.rewindfs.refused")
    for change in (lambda: os.open(late, os.O_RDWR), lambda: os.mkdir(snap / "x"), lambda: os.unlink(late)):
        with pytest.raises(OSError) as error:
            change()
        assert error.value.errno == errno.EROFS
    assert os.statvfs(snap).f_namemax == 255
    assert Browsed.command(history.path, snap).stderr.startswith(f"rewindfs: error: {snap}: rewindfs of ")


@needs_fuse
def test_what_is_written_meanwhile_is_followed(history: History, browse: Callable[[Path], Browsed]) -> None:
    # The store is written by this process and browsed by another.
    snap = browse(history.path).path
    for _ in range(20):
        history.write(history.disk, history.random.randrange(DISK_BYTES - 5000), 5000)
        seq = history.model.seq
        assert (snap / f"volumes/disk.img/@seq={seq}").read_bytes() == history.content(seq, "disk.img")
        if seq % 5 == 0:
            history.store.checkpoint()
    assert (snap / "volumes/disk.img/@latest").read_bytes() == history.content(history.model.seq, "disk.img")
    history.snapshot("newest")
    assert (snap / "points/newest/disk.img").read_bytes() == history.content(history.model.seq, "disk.img")
    assert "newest" in os.listdir(snap / "volumes/disk.img")


_READER = """
import random, sys
path, truth, seed = sys.argv[1:]
content = open(truth, "rb").read()
generator = random.Random(seed)
with open(path, "rb", buffering=0) as file:
    for _ in range(300):
        offset, length = generator.randrange(len(content)), generator.choice([1, 4096, 5000, 300_000])
        file.seek(offset)
        assert file.read(length) == content[offset : offset + length], (offset, length)
"""


@needs_fuse
def test_several_processes_read_at_once(history: History, browse: Callable[[Path], Browsed], tmp_path: Path) -> None:
    snap, readers = browse(history.path).path, []
    for number in range(4):
        seq = history.model.seq - 3 * (number % 2)
        truth = tmp_path / f"truth{number}"
        truth.write_bytes(history.content(seq, "disk.img") or b"")
        command = [sys.executable, "-c", _READER, str(snap / f"volumes/disk.img/@seq={seq}"), str(truth), str(number)]
        readers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for reader in readers:
        _, said = reader.communicate(timeout=60)
        assert reader.returncode == 0, said


@needs_fuse
def test_damage_is_an_error_there_and_nowhere_else(tmp_path: Path, browse: Callable[[Path], Browsed]) -> None:
    store_path, model = tmp_path / "store", Model()
    Store.create(store_path)
    store = Store.open(store_path)
    store.group("g").ingest(model.begin())
    create = model.create("disk.img", 1 << 20)
    store.group("g").ingest([create, model.write(create.volume, 0, random.Random(1).randbytes(1 << 20))])
    damaged = model.seq
    store.group("g").create_snapshot("friday")
    store.group("g").create_snapshot("the same")
    store.group("g").ingest([model.write(create.volume, 1 << 19, b"later")])
    store.close()
    content = model.content[create.volume]
    (container,) = [file for file in (store_path / "containers").iterdir() if content[:4096] in file.read_bytes()]
    with open(container, "r+b") as file:
        file.seek(RAW_SLOTS_OFFSET + 100 * 4096 + 17)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    browsed = browse(store_path)
    with pytest.raises(OSError) as error:
        (browsed.path / "volumes/disk.img/friday").read_bytes()
    assert error.value.errno == errno.EIO
    with open(browsed.path / "volumes/disk.img/@latest", "rb", buffering=0) as volume:
        for block in range(256):
            if block != 100:
                assert os.pread(volume.fileno(), 4096, block * 4096) == content[block * 4096 :][:4096]
                continue
            with pytest.raises(OSError) as error:
                os.pread(volume.fileno(), 4096, block * 4096)
            assert error.value.errno == errno.EIO
    log = browsed.log.read_text()
    assert f"EIO: snapshot friday, the same: disk.img at seq={damaged}, bytes" in log
    assert f"EIO: disk.img at seq={model.seq}, bytes" in log
    assert f"{container}: offset {RAW_SLOTS_OFFSET + 100 * 4096}" in log


@needs_fuse
def test_file_system_in_a_snapshot_is_mounted(tmp_path: Path, browse: Callable[[Path], Browsed]) -> None:
    image, tree = tmp_path / "image", tmp_path / "tree"
    tree.mkdir()
    (tree / "letter").write_bytes(random.Random(2).randbytes(300_000))
    run("truncate", "-s", "8M", image)
    run("mkfs.ext4", "-q", "-F", "-d", tree, image)
    store_path, model = tmp_path / "store", Model()
    Store.create(store_path)
    store = Store.open(store_path)
    store.group("g").ingest(model.begin())
    create = model.create("disk.img", 8 << 20)
    store.group("g").ingest([create])
    data = image.read_bytes()
    for offset in range(0, len(data), 1 << 20):
        store.group("g").ingest([model.write(create.volume, offset, data[offset : offset + (1 << 20)])])
    store.group("g").create_snapshot("whole")
    store.close()
    snap, place = browse(store_path).path, tmp_path / "place"
    place.mkdir()
    run("mount", "-o", "loop,ro", snap / "volumes/disk.img/whole", place)
    try:
        assert (place / "letter").read_bytes() == (tree / "letter").read_bytes()
    finally:
        run("umount", place)


def test_stores_that_cannot_be_browsed(tmp_path: Path) -> None:
    mountpoint = tmp_path / "snap"
    mountpoint.mkdir()
    Store.create(tmp_path / "empty")
    Store.open(tmp_path / "empty").close()
    Store.create(tmp_path / "two")
    two = Store.open(tmp_path / "two")
    for name in ("left", "right"):
        two.group(name).ingest(Model().begin())
    two.close()
    for store, said in [
        (tmp_path / "nothing", "nothing"),
        (tmp_path / "empty", "holds no group yet"),
        (tmp_path / "two", "holds the groups left, right; name one with --group"),
        ("unix:/x", "cannot connect to /x: No such file or directory"),
        ("tcp://192.0.2.1:1", "use tls://, or allow it with --insecure-tcp"),
    ]:
        done = Browsed.command(store, mountpoint)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("rewindfs: error: ") and said in line
    assert mount_at(mountpoint) is None
    (mountpoint / "file").touch()
    assert "not empty" in Browsed.command(tmp_path / "two", mountpoint, "--group", "left").stderr
