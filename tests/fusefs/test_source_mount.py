"""The handlers called directly, without the kernel: what reaches the agent, what reaches the source, which errno."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing
from pyfuse3 import ROOT_INODE, EntryAttributes, ReaddirToken, RequestContext, SetattrFields

from dedup.errors import RewindError
from fusefs.inode_map import Node
from fusefs.mountpoint import CONTROL_XATTR
from fusefs.source_mount import SourceMount
from tests.fusefs.plain_agent import PlainAgent

CALLER = cast(RequestContext, SimpleNamespace(uid=os.getuid(), gid=os.getgid(), pid=0, umask=0o022))
OTHER = cast(RequestContext, SimpleNamespace(uid=1234, gid=5678, pid=0, umask=0o027))


class Mount(SourceMount):
    """A source mount over a directory, its agent, and short words for tests."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.agent = PlainAgent(source)
        super().__init__(source, self.agent, control=source / ".rewindfs" / "control")

    async def inode(self, name: str) -> int:
        number = ROOT_INODE
        for part in name.split("/"):
            number = (await self.lookup(number, part.encode(), CALLER)).st_ino
        return number

    async def opened(self, name: str, flags: int = os.O_RDWR) -> int:
        return (await self.open(await self.inode(name), flags, CALLER)).fh

    async def change(self, name: str, fh: int | None = None, **values: int) -> EntryAttributes:
        attributes = EntryAttributes()
        fields = dict.fromkeys(("mode", "uid", "gid", "size", "atime", "mtime", "ctime"), False)
        for key, value in values.items():
            setattr(attributes, f"st_{key}_ns" if key.endswith("time") else f"st_{key}", value)
            fields[key] = True
        chosen = cast(SetattrFields, SimpleNamespace(**{f"update_{key}": value for key, value in fields.items()}))
        return await self.setattr(await self.inode(name), attributes, chosen, fh, CALLER)

    async def listed(self, name: str = "", room: int = 1000) -> list[str]:
        """All names of a directory, in replies of `room` entries."""
        fh = await self.opendir(await self.inode(name) if name else ROOT_INODE, CALLER)
        names: list[str] = []
        while True:
            Replies.names, Replies.room = [], room
            await self.readdir(fh, Replies.last if names else 0, ReaddirToken())
            if not Replies.names:
                await self.releasedir(fh)
                return names
            names += Replies.names


class Replies:
    """Stands in for the kernel's readdir buffer."""

    names: list[str]
    room: int
    last: int

    @classmethod
    def add(cls, token: ReaddirToken, name: bytes, entry: EntryAttributes, next_id: int) -> bool:
        if len(cls.names) == cls.room:
            return False
        cls.names.append(os.fsdecode(name))
        cls.last = next_id
        return True


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(b"0123456789")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "db").write_bytes(b"rows")
    (tmp_path / ".rewindfs").mkdir()
    return tmp_path


@pytest.fixture
def mount(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    monkeypatch.setattr(pyfuse3, "readdir_reply", Replies.add)
    before = set(os.listdir("/proc/self/fd"))  # other tests' may be closed meanwhile, when they are collected
    mount = Mount(source)
    yield mount
    mount.close()
    assert not mount.agent.open_handles
    leaked = [fd for fd in os.listdir("/proc/self/fd") if fd not in before and os.path.lexists(f"/proc/self/fd/{fd}")]
    assert not leaked  # whatever the test did


@contextmanager
def refused_with(number: int) -> Iterator[None]:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        yield
    assert caught.value.errno == number, caught.value


async def test_reads_and_writes(mount: Mount, source: Path) -> None:
    fh = await mount.opened("disk")
    assert bytes(await mount.read(fh, 2, 4)) == b"2345"
    assert bytes(await mount.read(fh, 8, 100)) == b"89"
    assert bytes(await mount.read(fh, 50, 10)) == b""
    assert await mount.write(fh, 4, b"xy") == 2
    assert (source / "disk").read_bytes() == b"0123xy6789"
    volume = mount.agent.volume_of((os.stat(source / "disk").st_dev, os.stat(source / "disk").st_ino))
    assert mount.agent.calls == [("write", volume, 4, 2, False)]
    await mount.fsync(fh, True)
    assert mount.agent.calls[-1] == ("fsync", volume, True)
    await mount.flush(fh)
    await mount.release(fh)
    assert mount.agent.open_handles == {}


async def test_a_read_that_would_block_waits_in_a_thread(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    fh = await mount.opened("disk", os.O_RDONLY)
    real = os.preadv

    def half_cached(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset == 0:
            return real(fd, [buffers[0][:3]], offset, flags)
        raise BlockingIOError(errno.EAGAIN, "not cached")

    monkeypatch.setattr(os, "preadv", half_cached)
    assert bytes(await mount.read(fh, 0, 10)) == b"0123456789"
    assert bytes(await mount.read(fh, 5, 10)) == b"56789"


async def test_write_only_handles_can_be_read_by_the_kernel(mount: Mount) -> None:
    fh = await mount.opened("disk", os.O_WRONLY)
    assert bytes(await mount.read(fh, 0, 3)) == b"012"


async def test_a_first_opener_that_only_reads_does_not_spoil_the_next(mount: Mount, source: Path) -> None:
    reader = await mount.opened("disk", os.O_RDONLY)
    writer = await mount.opened("disk", os.O_RDWR)
    await mount.write(writer, 0, b"W")
    assert bytes(await mount.read(reader, 0, 2)) == b"W1"
    with refused_with(errno.EBADF):
        await mount.write(reader, 0, b"R")


async def test_append_is_the_agents_and_pages_written_back_are_not(mount: Mount, source: Path) -> None:
    fh = await mount.opened("disk", os.O_WRONLY | os.O_APPEND)
    await mount.write(fh, 10, b"end")
    await mount.write(fh, 0, b"map")
    assert [call[-1] for call in mount.agent.calls] == [True, False]
    assert (source / "disk").read_bytes() == b"map3456789end"


async def test_open_truncates_through_the_agent(mount: Mount, source: Path) -> None:
    await mount.opened("disk", os.O_WRONLY | os.O_TRUNC)
    assert mount.agent.calls == [("resize", mount.agent.calls[0][1], 0)]
    assert (source / "disk").stat().st_size == 0
    mount.agent.refusal = RewindError("no room")
    with refused_with(errno.EIO):
        await mount.opened("dir/db", os.O_RDONLY | os.O_TRUNC)
    assert len(mount.agent.open_handles) == 1


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
async def test_a_claim_taken_while_a_file_is_being_opened_counts(
    mount: Mount, source: Path, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    inode = await mount.inode("disk")
    open_file = mount._open_file

    async def opened_meanwhile(node: Node, writable: bool) -> int:
        fd = await open_file(node, writable)
        mount.claims.take("disk", os.getpid(), exclusive=True)
        assert mount.open_volumes() == set()
        return fd

    monkeypatch.setattr(mount, "_open_file", opened_meanwhile)
    before = os.listdir("/proc/self/fd")
    with refused_with(errno.EBUSY):
        await mount.open(inode, flags, CALLER)
    assert mount.open_volumes() == set() and len(os.listdir("/proc/self/fd")) == len(before) + 1  # the claim's
    mount.claims.end(1)
    assert (source / "disk").read_bytes() == b"0123456789"


@pytest.mark.parametrize("through", ["path", "handle", "read-only handle"])
async def test_resize(mount: Mount, source: Path, through: str) -> None:
    flags = {"handle": os.O_RDWR, "read-only handle": os.O_RDONLY}.get(through)
    fh = None if flags is None else await mount.opened("disk", flags)
    assert (await mount.change("disk", fh, size=5)).st_size == 5
    assert (await mount.change("disk", fh, size=9000)).st_size == 9000
    assert (source / "disk").read_bytes() == b"01234" + bytes(8995)
    assert [call[::2] for call in mount.agent.calls] == [("resize", 5), ("resize", 9000)]


async def test_create_names_and_owners(mount: Mount, source: Path) -> None:
    (source / "dir").chmod(0o2775)
    os.chown(source / "dir", 1, 99)
    directory = await mount.inode("dir")
    info, entry = await mount.create(directory, b"new", stat.S_IFREG | 0o666, os.O_RDWR, OTHER)
    await mount.write(info.fh, 0, b"x")
    assert stat.S_IMODE(entry.st_mode) == 0o640
    assert (entry.st_uid, entry.st_gid) == (1234, 99)  # the group of a set-group-id directory
    assert mount.agent.calls[0] == ("create", "dir/new", 3)
    assert mount.agent.calls[1] == ("write", 3, 0, 1, False)
    made = await mount.mkdir(directory, b"sub", stat.S_IFDIR | 0o777, OTHER)
    assert stat.S_IMODE(made.st_mode) == 0o2750 and made.st_gid == 99
    link = await mount.symlink(ROOT_INODE, b"link", b"dir/new", OTHER)
    assert (link.st_uid, link.st_gid) == (1234, 5678)
    assert await mount.readlink(link.st_ino, CALLER) == b"dir/new"
    node = await mount.mknod(ROOT_INODE, b"plain", stat.S_IFREG | 0o600, 0, CALLER)
    assert stat.S_ISREG(node.st_mode) and mount.agent.calls[-1] == ("create", "plain", 4)
    fifo = await mount.mknod(ROOT_INODE, b"fifo", stat.S_IFIFO | 0o600, 0, CALLER)
    assert stat.S_ISFIFO(fifo.st_mode) and mount.agent.calls[-1] == ("create", "plain", 4)
    assert (source / "fifo").is_fifo()


async def test_create_of_what_exists(mount: Mount) -> None:
    with refused_with(errno.EEXIST):
        await mount.create(ROOT_INODE, b"disk", 0o600, os.O_RDWR | os.O_EXCL, CALLER)
    info, entry = await mount.create(ROOT_INODE, b"disk", 0o600, os.O_RDWR, CALLER)
    assert entry.st_size == 10 and bytes(await mount.read(info.fh, 0, 2)) == b"01"
    assert mount.agent.calls == []


async def test_a_refused_create_leaks_nothing(mount: Mount) -> None:
    mount.agent.refusal = RewindError("link is down")
    with refused_with(errno.EIO):
        await mount.create(ROOT_INODE, b"new", 0o600, os.O_RDWR, CALLER)


async def test_mode_owner_and_times(mount: Mount, source: Path) -> None:
    entry = await mount.change("disk", mode=0o4751, uid=7, gid=8)
    assert (stat.S_IMODE(entry.st_mode), entry.st_uid, entry.st_gid) == (0o4751, 7, 8)
    assert mount.agent.calls == [("attributes", mount.agent.calls[0][1], 0o4751, 7, 8)]
    await mount.change("disk", mtime=1_000_000_001)
    await mount.change("disk", atime=5)
    status = os.stat(source / "disk")
    assert (status.st_atime_ns, status.st_mtime_ns) == (5, 1_000_000_001)
    assert stat.S_IMODE((await mount.change("dir", mode=0o700)).st_mode) == 0o700
    (source / "link").symlink_to("disk")
    assert (await mount.change("link", uid=9)).st_uid == 9
    assert (await mount.change("link", mtime=77)).st_mtime_ns == 77
    assert os.stat(source / "disk").st_uid == 7
    assert len(mount.agent.calls) == 1  # directories and links pass through


@pytest.mark.parametrize("when", ["before", "after"])
async def test_writes_clear_set_user_id(mount: Mount, source: Path, when: str) -> None:
    if when == "before":
        (source / "disk").chmod(0o6755)
    fh = await mount.opened("disk")
    if when == "after":
        await mount.change("disk", mode=0o6755)
    await mount.write(fh, 0, b"evil")
    await mount.write(fh, 0, b"more")
    assert stat.S_IMODE((source / "disk").stat().st_mode) == 0o755
    assert [call[0] for call in mount.agent.calls[-3:]] == ["attributes", "write", "write"]
    await mount.change("disk", mode=0o2744)  # no group execute: a mark for locking
    await mount.write(fh, 0, b"fine")
    assert stat.S_IMODE((source / "disk").stat().st_mode) == 0o2744


async def test_unlink_and_what_stays_open(mount: Mount, source: Path) -> None:
    fh = await mount.opened("dir/db")
    inode = await mount.inode("dir/db")
    await mount.unlink(await mount.inode("dir"), b"db", CALLER)
    assert mount.agent.calls == [("remove", "dir/db", mount.agent.open_handles[fh])]
    assert (await mount.getattr(inode, CALLER)).st_nlink == 0
    await mount.write(fh, 4, b"!")
    assert bytes(await mount.read(fh, 0, 9)) == b"rows!"
    again = (await mount.open(inode, os.O_RDWR, CALLER)).fh
    await mount.write(again, 0, b"R")
    assert mount.agent.calls[-1][:2] == ("write", None)
    await mount.release(fh)
    await mount.release(again)
    await mount.forget([(inode, 3)])
    with refused_with(errno.ESTALE):
        await mount.getattr(inode, CALLER)
    await mount.symlink(ROOT_INODE, b"link", b"x", CALLER)
    await mount.unlink(ROOT_INODE, b"link", CALLER)
    await mount.rmdir(ROOT_INODE, b"dir", CALLER)
    assert sorted(os.listdir(source)) == [".rewindfs", "disk"]


async def test_renames(mount: Mount, source: Path) -> None:
    directory = await mount.inode("dir")
    volumes = mount.agent.volumes.copy()
    disk, db = (volumes[s.st_dev, s.st_ino] for s in map(os.stat, (source / "disk", source / "dir/db")))

    async def rename(old_dir: int, old: str, new_dir: int, new: str, flags: int = 0) -> None:
        await mount.rename(old_dir, old.encode(), new_dir, new.encode(), flags, CALLER)

    def last() -> tuple[object, ...]:
        return mount.agent.calls[-1]

    await rename(ROOT_INODE, "disk", directory, "db", pyfuse3.RENAME_EXCHANGE)
    assert last() == ("exchange", "disk", "dir/db", disk, db)
    assert (source / "disk").read_bytes() == b"rows"
    with refused_with(errno.EEXIST):
        await rename(ROOT_INODE, "disk", directory, "db", pyfuse3.RENAME_NOREPLACE)
    with refused_with(errno.ENOENT):
        await rename(ROOT_INODE, "disk", directory, "none", pyfuse3.RENAME_EXCHANGE)
    with refused_with(errno.EINVAL):
        await rename(ROOT_INODE, "disk", directory, "none", 4)
    assert len(mount.agent.calls) == 1
    await rename(directory, "db", ROOT_INODE, "disk")
    assert last() == ("rename", "dir/db", "disk", disk, db)
    assert (source / "disk").read_bytes() == b"0123456789"
    await rename(ROOT_INODE, "dir", ROOT_INODE, "moved", pyfuse3.RENAME_NOREPLACE)
    assert last() == ("rename", "dir", "moved", None, None)
    with refused_with(errno.ENOTEMPTY):
        (source / "full" / "x").mkdir(parents=True)
        await rename(ROOT_INODE, "moved", ROOT_INODE, "full")
    await mount.create(directory, b"late", 0o600, os.O_RDWR, CALLER)
    assert last()[:2] == ("create", "moved/late")


async def test_a_path_is_resolved_after_the_rename_before_it(mount: Mount) -> None:
    directory = await mount.inode("dir")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.rename, ROOT_INODE, b"dir", ROOT_INODE, b"moved", 0, CALLER)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(mount.create, directory, b"new", 0o600, os.O_RDWR, CALLER)
    assert mount.agent.calls[-1][:2] == ("create", "moved/new")


async def test_hard_links_are_refused(mount: Mount, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with refused_with(errno.EPERM):
        await mount.link(await mount.inode("disk"), ROOT_INODE, b"other", CALLER)
    os.link(source / "disk", source / "other")  # behind the mount
    fh = await mount.opened("disk", os.O_RDONLY)
    assert bytes(await mount.read(fh, 0, 2)) == b"01"
    caplog.clear()
    with refused_with(errno.EPERM):
        await mount.opened("disk", os.O_RDWR)
    assert "2 hard links" in caplog.text and "disk" in caplog.text
    with refused_with(errno.EPERM):
        await mount.rename(ROOT_INODE, b"disk", ROOT_INODE, b"new", 0, CALLER)
    with refused_with(errno.EPERM):
        await mount.change("disk", size=1)
    with refused_with(errno.EPERM):
        await mount.unlink(ROOT_INODE, b"other", CALLER)
    assert mount.agent.calls == []


async def test_what_appeared_behind_the_mount_is_not_written(mount: Mount, source: Path) -> None:
    (source / "stranger").write_bytes(b"x")
    assert bytes(await mount.read(await mount.opened("stranger", os.O_RDONLY), 0, 9)) == b"x"
    with refused_with(errno.EPERM):
        await mount.opened("stranger", os.O_RDWR)


async def test_the_state_directory_is_hidden(mount: Mount) -> None:
    name = b".rewindfs"
    for call in (mount.lookup, mount.unlink, mount.rmdir):
        with refused_with(errno.ENOENT):
            await call(ROOT_INODE, name, CALLER)
    with refused_with(errno.ENOENT):
        await mount.rename(ROOT_INODE, name, ROOT_INODE, b"x", 0, CALLER)
    with refused_with(errno.EPERM):
        await mount.rename(ROOT_INODE, b"disk", ROOT_INODE, name, 0, CALLER)
    with refused_with(errno.EPERM):
        await mount.create(ROOT_INODE, name, 0o600, os.O_RDWR, CALLER)
    for make in (mount.mkdir, mount.symlink):
        with refused_with(errno.EPERM):
            await make(ROOT_INODE, name, cast(Any, 0o700 if make == mount.mkdir else b"x"), CALLER)
    assert sorted(await mount.listed()) == ["dir", "disk"]
    await mount.mkdir(await mount.inode("dir"), name, 0o700, CALLER)  # only at the root
    assert sorted(await mount.listed("dir")) == [".rewindfs", "db"]


async def test_names_that_cannot_be(mount: Mount) -> None:
    for call in (mount.lookup, mount.unlink):
        with refused_with(errno.ENAMETOOLONG):
            await call(ROOT_INODE, b"n" * 256, CALLER)
    with refused_with(errno.ENAMETOOLONG):
        await mount.mkdir(ROOT_INODE, b"n" * 256, 0o700, CALLER)
    await mount.mkdir(ROOT_INODE, b"n" * 255, 0o700, CALLER)
    with refused_with(errno.EILSEQ):
        await mount.create(ROOT_INODE, b"\xff", 0o600, os.O_RDWR, CALLER)


@pytest.mark.parametrize("room", [1, 7, 32, 33, 1000])
async def test_listings_are_complete_whatever_fits_into_a_reply(mount: Mount, source: Path, room: int) -> None:
    names = sorted(f"file {n}" for n in range(100))
    (source / "many").mkdir()
    for name in names:
        (source / "many" / name).touch()
    known = len(mount._inodes)
    assert sorted(await mount.listed("many", room)) == names
    assert len(mount._inodes) == known + 1 + 100  # each listed entry counts as one lookup, and no other


async def test_listing_while_names_go_and_come(mount: Mount, source: Path) -> None:
    fh = await mount.opendir(ROOT_INODE, CALLER)
    Replies.names, Replies.room = [], 1
    await mount.readdir(fh, 0, ReaddirToken())
    for name in ("disk", "dir/db", "dir"):
        path = source / name
        path.rmdir() if path.is_dir() else path.unlink()
    first, Replies.names = Replies.names, []
    await mount.readdir(fh, Replies.last, ReaddirToken())
    assert len(first) == 1 and Replies.names == []
    await mount.fsyncdir(fh, False)
    await mount.readdir(fh, 0, ReaddirToken())  # rewound
    assert Replies.names == []


async def test_extended_attributes(mount: Mount, source: Path) -> None:
    inode = await mount.inode("disk")
    await mount.setxattr(inode, b"user.a", b"1\0\xff", CALLER)
    assert os.getxattr(source / "disk", "user.a") == b"1\0\xff"
    assert await mount.getxattr(inode, b"user.a", CALLER) == b"1\0\xff"
    assert list(await mount.listxattr(inode, CALLER)) == [b"user.a"]
    await mount.removexattr(inode, b"user.a", CALLER)
    for name in (b"user.a", b"security.capability"):
        with refused_with(pyfuse3.ENOATTR):
            await mount.getxattr(inode, name, CALLER)
    control = await mount.getxattr(ROOT_INODE, CONTROL_XATTR.encode(), CALLER)
    assert control == os.fsencode(source / ".rewindfs" / "control")
    with refused_with(pyfuse3.ENOATTR):
        await mount.getxattr(inode, CONTROL_XATTR.encode(), CALLER)
    status, real = await mount.statfs(CALLER), os.statvfs(source)
    assert (status.f_blocks, status.f_bsize, status.f_namemax) == (real.f_blocks, real.f_bsize, 255)


async def test_every_failure_is_an_errno(mount: Mount, caplog: pytest.LogCaptureFixture) -> None:
    fh = await mount.opened("disk")
    mount.agent.refusal = OSError(errno.ENOSPC, "full")
    with refused_with(errno.ENOSPC):
        await mount.write(fh, 0, b"x")
    mount.agent.refusal = RewindError("the link to the second appliance is down")
    for _ in range(3):
        with refused_with(errno.EIO):
            await mount.write(fh, 0, b"x")
    assert caplog.text.count("the second appliance is down") == 1
    mount.agent.refusal = ZeroDivisionError("a bug")
    for call in (mount.write(fh, 0, b"x"), mount.fsync(fh, False), mount.unlink(ROOT_INODE, b"disk", CALLER)):
        with refused_with(errno.EIO):
            await call
    assert caplog.text.count("Traceback") == 3 and "a bug" in caplog.text
    assert all(record.levelno == logging.ERROR for record in caplog.records)
    with refused_with(errno.EIO):
        await mount.write(12345, 0, b"no such handle")
