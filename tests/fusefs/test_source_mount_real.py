"""The source mount through the kernel: one mount in a process of its own, used as applications use it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from fusefs import system_calls

BLOCK = 4096
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounting as root needs /dev/fuse"
)


class Mounted(NamedTuple):
    source: Path
    path: Path
    writeback: bool


@contextmanager
def mounted(base: Path, *, writeback: bool) -> Iterator[Mounted]:
    """The plain agent's mount in a process of its own, gone at the end whatever happens."""
    source, path = base / "source", base / "mount"
    source.mkdir()
    path.mkdir()
    (source / ".rewindfs").mkdir()
    command = [sys.executable, "-m", "tests.fusefs.plain_agent", str(source), str(path)]
    process = subprocess.Popen(command + ["--writeback"] * writeback, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Mounted(source, path, writeback)
    finally:
        subprocess.run(["fusermount3", "-u", str(path)], check=False)
        try:
            assert process.wait(timeout=20) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(scope="module", params=[False, True], ids=["direct", "writeback"])
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounted(tmp_path_factory.mktemp("real"), writeback=request.param) as mounted_here:
        yield mounted_here


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def same(mount: Mounted, name: str) -> bytes:
    """The content of a file, which must be the same through the mount and in the source once it is synced."""
    with descriptor(mount.path / name, os.O_RDWR) as fd:
        os.fsync(fd)
    content = (mount.path / name).read_bytes()
    assert (mount.source / name).read_bytes() == content
    return content


def failing(number: int, *command: object) -> None:
    """Runs a command line that must fail with an errno's message."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and os.strerror(number) in done.stderr, done.stderr


def test_directories(mount: Mounted) -> None:
    top = mount.path / "tree"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("x")
    (top / "a").rename(top / "c")
    assert (top / "c" / "b" / "file").read_text() == "x"
    assert sorted(str(p.relative_to(top)) for p in top.rglob("*")) == ["c", "c/b", "c/b/file"]
    with pytest.raises(OSError) as caught:
        (top / "c").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    shutil.rmtree(top)
    assert not (mount.source / "tree").exists()


def test_rename_flags(mount: Mounted) -> None:
    directory = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    for name in ("x", "y"):
        (mount.path / name).write_text(name)
    with pytest.raises(FileExistsError):
        system_calls.rename(directory, b"x", directory, b"y", system_calls.RENAME_NOREPLACE)
    system_calls.rename(directory, b"x", directory, b"y", system_calls.RENAME_EXCHANGE)
    assert ((mount.path / "x").read_text(), (mount.source / "y").read_text()) == ("y", "x")
    with pytest.raises(FileNotFoundError):
        system_calls.rename(directory, b"x", directory, b"none", system_calls.RENAME_EXCHANGE)
    system_calls.rename(directory, b"x", directory, b"y", 0)
    assert (mount.source / "y").read_text() == "y" and not (mount.source / "x").exists()
    os.close(directory)


def test_links_and_attributes(mount: Mounted) -> None:
    file, link = mount.path / "file", mount.path / "link"
    file.write_text("x")
    link.symlink_to("file")
    assert os.readlink(mount.source / "link") == "file" and link.read_text() == "x"
    with pytest.raises(PermissionError):
        os.link(file, mount.path / "hard")
    os.setxattr(file, "user.a", b"1")
    assert os.getxattr(mount.source / "file", "user.a") == b"1"
    with pytest.raises(FileExistsError):
        os.setxattr(file, "user.a", b"2", os.XATTR_CREATE)
    assert os.listxattr(file) == ["user.a"]
    os.removexattr(file, "user.a")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(file, "user.a")
    os.chmod(file, 0o640)
    os.chown(file, 3, 4)
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    for place in (mount.path, mount.source):
        status = (place / "file").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 3, 4)
        assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    os.mkfifo(mount.path / "fifo")
    assert (mount.source / "fifo").is_fifo()
    real, here = os.statvfs(mount.source), os.statvfs(mount.path)
    assert (here.f_blocks, here.f_namemax) == (real.f_blocks, 255)


def test_permissions_are_checked_and_owners_are_the_callers(mount: Mounted) -> None:
    for directory in (mount.path, *mount.path.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    (mount.path / "secret").write_text("x")
    (mount.path / "secret").chmod(0o600)
    (mount.path / "open").mkdir()
    (mount.path / "open").chmod(0o777)
    suid = mount.path / "suid"
    suid.write_text("x")
    suid.chmod(0o4777)
    script = (
        "import os, sys; os.setgid(4321); os.setuid(4321); os.umask(0o027); os.chdir(sys.argv[1]);"
        "os.mkdir('open/dir'); os.close(os.open('open/file', os.O_CREAT | os.O_WRONLY, 0o666));"
        "os.write(os.open('suid', os.O_WRONLY), b'evil'); open('secret')"
    )
    failing(errno.EACCES, sys.executable, "-c", script, mount.path)
    for name, mode in (("dir", 0o750), ("file", 0o640)):
        status = (mount.source / "open" / name).stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (4321, 4321, mode)
    assert same(mount, "suid") == b"evil"
    assert stat.S_IMODE((mount.source / "suid").stat().st_mode) == 0o777


def test_sizes(mount: Mounted) -> None:
    file = mount.path / "sizes"
    file.write_bytes(b"0123456789")
    os.truncate(file, 4)
    assert same(mount, "sizes") == b"0123"
    with descriptor(file, os.O_RDWR) as fd:
        os.ftruncate(fd, 3 * BLOCK)
        os.pwrite(fd, b"end", 3 * BLOCK)
    assert same(mount, "sizes") == b"0123" + bytes(3 * BLOCK - 4) + b"end"
    with descriptor(file, os.O_WRONLY | os.O_TRUNC) as fd:
        assert file.stat().st_size == (mount.source / "sizes").stat().st_size == 0
        os.write(fd, b"new")
    assert same(mount, "sizes") == b"new"


def test_append(mount: Mounted) -> None:
    file = mount.path / "append"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with descriptor(file, flags) as one, descriptor(file, flags) as two:
        for turn in range(20):
            os.write((one, two)[turn % 2], b"%04d" % turn)
    assert same(mount, "append") == b"".join(b"%04d" % turn for turn in range(20))


def test_mapped_pages_written_back_through_an_appending_handle(mount: Mounted) -> None:
    file = mount.path / "mapped-append"
    file.write_bytes(b"-" * 2 * BLOCK)
    with descriptor(file, os.O_RDWR | os.O_APPEND) as fd, mmap.mmap(fd, 2 * BLOCK) as view:
        view[5:8] = b"map"
        os.write(fd, b"end")
        view[BLOCK : BLOCK + 3] = b"MAP"
        view.flush()
    content = bytearray(b"-" * 2 * BLOCK + b"end")
    content[5:8], content[BLOCK : BLOCK + 3] = b"map", b"MAP"
    assert same(mount, "mapped-append") == content


def test_mapped_writes(mount: Mounted) -> None:
    file = mount.path / "mapped"
    file.write_bytes(bytes(64 * BLOCK))
    expected = bytearray(64 * BLOCK)
    with descriptor(file, os.O_RDWR) as fd, mmap.mmap(fd, 64 * BLOCK) as view:
        for index in range(0, 64 * BLOCK, 5000):
            view[index : index + 3] = expected[index : index + 3] = b"abc"
    assert same(mount, "mapped") == expected


def test_direct_io(mount: Mounted) -> None:
    file = mount.path / "direct"
    with descriptor(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd, mmap.mmap(-1, 4 * BLOCK) as buffer:
        buffer.write(os.urandom(4 * BLOCK))
        assert os.pwrite(fd, buffer, BLOCK) == 4 * BLOCK
        with mmap.mmap(-1, 4 * BLOCK) as back:
            assert os.preadv(fd, [back], BLOCK) == 4 * BLOCK
            assert back[:] == buffer[:]
        assert (mount.source / "direct").read_bytes() == bytes(BLOCK) + buffer[:]


def test_open_files_outlive_their_names(mount: Mounted) -> None:
    file = mount.path / "unlinked"
    with descriptor(file, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"here")
        file.unlink()
        assert not (mount.source / "unlinked").exists()
        assert os.fstat(fd).st_nlink == 0 and os.fstat(fd).st_size == 4
        os.pwrite(fd, b"still", 4)
        os.ftruncate(fd, 8)
        assert os.pread(fd, 99, 0) == b"herestil"
        file.write_text("another")
        assert os.pread(fd, 4, 0) == b"here" and file.read_text() == "another"
    with descriptor(file, os.O_RDWR) as fd:
        (mount.path / "over").write_text("over")
        (mount.path / "over").rename(file)
        os.write(fd, b"ANOTHER")
        assert os.pread(fd, 99, 0) == b"ANOTHER" and file.read_text() == "over"


def test_many_files_and_long_names(mount: Mounted) -> None:
    many = mount.path / "many"
    many.mkdir()
    names = {f"{number:04d}" + "x" * (number % 250) for number in range(600)}
    for name in names:
        (many / name).touch()
    assert set(os.listdir(many)) == names == set(os.listdir(mount.source / "many"))
    with os.scandir(many) as entries:
        for entry in entries:
            if entry.stat().st_size == 0 and int(entry.name[:4]) % 2:
                os.unlink(entry.path)
    assert len(os.listdir(many)) == 300
    (many / ("n" * 255)).touch()
    with pytest.raises(OSError) as caught:
        (many / ("n" * 256)).touch()
    assert caught.value.errno == errno.ENAMETOOLONG
    shutil.rmtree(many)


def test_the_state_directory_is_hidden(mount: Mounted) -> None:
    hidden = mount.path / ".rewindfs"
    assert not hidden.exists() and ".rewindfs" not in os.listdir(mount.path)
    failing(errno.EPERM, "mkdir", hidden)
    failing(errno.EPERM, "touch", hidden)
    (mount.path / "innocent").touch()
    failing(errno.EPERM, "mv", "-T", mount.path / "innocent", hidden)
    failing(errno.ENOENT, "rmdir", hidden)
    assert (mount.source / ".rewindfs").is_dir()


@pytest.mark.parametrize("command", [("mkfs.ext4", "-qF"), ("mkfs.xfs", "-qf")], ids=["ext4", "xfs"])
def test_file_systems_are_made_on_files(mount: Mounted, command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    image = mount.path / "image"
    with descriptor(image, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 320 << 20)
    subprocess.run([*command, str(image)], check=True)
    check = ["e2fsck", "-fn"] if command[0] == "mkfs.ext4" else ["xfs_repair", "-n", "-f"]
    subprocess.run([*check, str(mount.source / "image")], check=True, capture_output=True)
    image.unlink()


def test_syncs(mount: Mounted) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with descriptor(mount.path / "synced", os.O_RDWR | os.O_CREAT | os.O_DSYNC) as fd:
        os.write(fd, b"x")
        assert (mount.source / "synced").read_bytes() == b"x"  # also with the writeback cache
        os.fdatasync(fd)
    with descriptor(mount.path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
        assert libc.syncfs(fd) == 0
