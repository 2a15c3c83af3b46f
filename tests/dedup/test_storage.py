"""Storage against real files, and against a kernel that refuses."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

import dedup.storage
from dedup.errors import Damaged, OnItsWay, StoreFailed, StoreFull, WouldBlock
from dedup.storage import IOV_MAX, Storage


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def fd(storage: Storage, tmp_path: Path):
    fd = storage.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    storage.close(fd)


def test_writes_more_buffers_than_one_call_takes(storage: Storage, fd: int) -> None:
    buffers = [bytes([i % 251]) * (i % 7) for i in range(3 * IOV_MAX + 5)]
    storage.pwritev(fd, buffers, 10)
    assert storage.pread(fd, 1 << 20, 10) == b"".join(buffers)
    assert storage.size(fd) == 10 + sum(map(len, buffers))


def test_short_writes_are_continued(storage: Storage, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    storage.pwritev(fd, [b"hello", b"", b"world", b"!"], 0)
    assert storage.pread(fd, 100, 0) == b"helloworld!"


def test_short_reads_are_continued_and_the_end_is_short(
    storage: Storage, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.pwritev(fd, [b"helloworld!"], 0)
    real_preadv, real_pread = os.preadv, os.pread
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, offset, flags: real_preadv(fd, [bufs[0][:3]], offset, flags))
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real_pread(fd, min(length, 2), offset))
    one, two = bytearray(7), bytearray(9)
    assert storage.pread_into(fd, [memoryview(one), memoryview(two)], 0) == 11
    assert bytes(one) == b"hellowo"
    assert bytes(two[:4]) == b"rld!"
    assert storage.pread(fd, 100, 1) == b"elloworld!"


def in_memory(storage: Storage, fd: int, length: int, offset: int) -> bool:
    try:
        return storage.pread_into(fd, [memoryview(bytearray(length))], offset, wait=False) == length
    except OnItsWay:
        return False
    except WouldBlock:
        pytest.skip("this file system does not tell what is in memory")


def test_a_part_of_a_file_is_forgotten_and_the_rest_is_not(storage: Storage, fd: int) -> None:
    content = os.urandom(4 << 20)
    for at in range(
        0, len(content), 1 << 20
    ):  # the kernel keeps what is written at once in pieces, and drops whole ones
        storage.pwritev(fd, [content[at : at + (1 << 20)]], at)
    storage.datasync(fd)
    storage.forget_cached(fd, 3 << 20, 1 << 20)
    assert not in_memory(storage, fd, 1 << 20, 3 << 20)
    assert in_memory(storage, fd, 1 << 20, 0)
    assert storage.pread(fd, len(content), 0) == content


def test_what_the_disk_does_not_have_is_not_forgotten(storage: Storage, fd: int) -> None:
    storage.pwritev(fd, [b"x" * 4096], 0)
    storage.forget_cached(fd, 0, 4096)
    assert storage.pread(fd, 4096, 0) == b"x" * 4096


def test_many_reads_are_as_so_many_reads(storage: Storage, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(100)
    storage.pwritev(fd, [content], 0)
    assert storage.pread_each(fd, 10, []) == []
    assert storage.pread_each(fd, 10, [90, 0, 7, 0]) == [content[90:], content[:10], content[7:17], content[:10]]
    assert storage.pread_each(fd, 10, [5, 95, 200]) == [content[5:15], content[95:], b""]
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 3), offset))
    assert storage.pread_each(fd, 10, [90, 0]) == [content[90:], content[:10]]


@pytest.mark.parametrize("has_it", [True, False])
@pytest.mark.parametrize("is_ext4", [True, False])
def test_room_is_reserved_where_that_can_be_and_the_file_is_not_longer(
    storage: Storage, fd: int, has_it: bool, is_ext4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_it:
        monkeypatch.setattr(dedup.storage, "_fallocate", None)
    monkeypatch.setattr(dedup.storage, "_is_ext4", lambda fd: is_ext4)
    storage.pwritev(fd, [b"z" * 4096], 0)
    storage.datasync(fd)
    before = storage.stat(fd).st_blocks
    storage.reserve(fd, 4096, 1 << 20)
    assert storage.size(fd) == 4096
    reserved = (storage.stat(fd).st_blocks - before) * 512
    assert reserved >= 1 << 20 if has_it and is_ext4 else reserved == 0
    storage.pwritev(fd, [b"y" * (1 << 20)], 4096)
    assert storage.pread(fd, 2 << 20, 0) == b"z" * 4096 + b"y" * (1 << 20)


def test_ext4_is_told_from_other_file_systems(tmp_path: Path) -> None:
    found = {}
    for directory in (tmp_path, Path("/dev/shm"), Path("/proc/self")):
        said = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=True)
        found[directory] = said.stdout.strip() == "ext2/ext3"
    for directory, is_ext4 in found.items():
        one = os.open(directory, os.O_RDONLY)
        assert dedup.storage._is_ext4(one) is is_ext4
        os.close(one)
    assert not dedup.storage._is_ext4(-1)


def test_what_cannot_be_reserved_is_told_by_the_write_alone(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup.storage, "_is_ext4", lambda fd: True)
    (tmp_path / "file").write_bytes(b"whole")
    fd = storage.open(tmp_path / "file", os.O_RDONLY)
    storage.reserve(fd, 0, 4096)
    with pytest.raises(StoreFailed, match="write failed"):
        storage.pwritev(fd, [b"x"], 0)
    storage.close(fd)


@pytest.mark.parametrize("has_it", [True, False])
def test_write_back_is_begun_where_that_can_be(
    storage: Storage, fd: int, has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_it:
        monkeypatch.setattr(dedup.storage, "_sync_file_range", None)
    storage.pwritev(fd, [b"y" * (1 << 20)], 0)
    storage.begin_write_back(fd, 0, 1 << 20)
    storage.datasync(fd)
    assert storage.pread(fd, 1 << 20, 0) == b"y" * (1 << 20)


def test_no_wait_gives_what_is_in_memory_or_says_so(storage: Storage, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.pwritev(fd, [bytes(8192)], 0)
    out = memoryview(bytearray(4096))
    for code, error in ((errno.EAGAIN, OnItsWay), (errno.EOPNOTSUPP, WouldBlock)):

        def refuse(*args: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", refuse)
            with pytest.raises(WouldBlock) as raised:
                storage.pread_into(fd, [out], 0, wait=False)
            assert raised.type is error
    with monkeypatch.context() as patched:
        real = os.preadv
        calls: list[int] = []

        def half(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
            calls.append(flags)
            if len(calls) > 1:
                raise BlockingIOError(errno.EAGAIN, "again")
            return real(fd, [buffers[0][:100]], offset)

        patched.setattr(os, "preadv", half)
        with pytest.raises(OnItsWay):
            storage.pread_into(fd, [out], 0, wait=False)
        assert calls == [os.RWF_NOWAIT, os.RWF_NOWAIT]


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreFailed), (errno.EROFS, StoreFailed)],
)
def test_refused_changes_are_typed_and_name_the_path(
    storage: Storage, fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(code, os.strerror(code))

    name = str(tmp_path / "file")
    for call in ("pwritev", "ftruncate", "replace", "mkdir"):
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(expected, match=name):
        storage.pwritev(fd, [b"x"], 0)
    with pytest.raises(expected, match=name):
        storage.truncate(fd, 0)
    with pytest.raises(expected, match=name):
        storage.replace(tmp_path / "other", tmp_path / "file")
    with pytest.raises(expected, match=str(tmp_path / "sub")):
        storage.mkdir(tmp_path / "sub")


def test_any_failed_sync_is_store_failed(
    storage: Storage, fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fdatasync", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreFailed, match="file: sync failed"):
        storage.datasync(fd)
    with pytest.raises(StoreFailed, match=str(tmp_path)):
        storage.sync_directory(tmp_path)


def test_a_read_that_the_disk_refuses_is_damage(storage: Storage, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(Damaged, match="file: offset 77"):
        storage.pread(fd, 1, 77)
    with pytest.raises(Damaged, match="file: offset 79"):
        storage.pread_each(fd, 1, [79, 80])
    with pytest.raises(Damaged, match="file: offset 78"):
        storage.pread_into(fd, [memoryview(bytearray(1))], 78, wait=False)


def test_replace_puts_the_new_file_in_place(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    storage.replace(tmp_path / "new", tmp_path / "old")
    assert storage.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"new"


def test_what_is_missing_or_there_already_passes_through(storage: Storage, fd: int, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.open(tmp_path / "none", os.O_RDONLY)
    with pytest.raises(FileExistsError):
        storage.open(tmp_path / "file", os.O_CREAT | os.O_EXCL)
    with pytest.raises(FileNotFoundError):
        storage.unlink(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        storage.listdir(tmp_path / "none")
    storage.mkdir(tmp_path / "sub")
    with pytest.raises(FileExistsError):
        storage.mkdir(tmp_path / "sub")
    assert storage.exists(tmp_path / "sub")
    storage.unlink(tmp_path / "file")
    assert not storage.exists(tmp_path / "file")


def test_one_lock_at_a_time(storage: Storage, tmp_path: Path) -> None:
    one = storage.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    two = storage.open(tmp_path / "lock", os.O_RDWR)
    try:
        assert storage.lock(one)
        assert not storage.lock(two)
        assert storage.path_of(two) == tmp_path / "lock"
    finally:
        storage.close(one)
    try:
        assert storage.lock(two)
    finally:
        storage.close(two)


def test_descriptors_are_not_inherited(storage: Storage, fd: int) -> None:
    assert not os.get_inheritable(fd)
