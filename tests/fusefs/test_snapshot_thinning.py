"""The snapshot mount while history is thinned out: what is open is read to its end, names lead to what is there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyfuse3
import pytest
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from dedup.retention import MINUTE_NS, Policy
from dedup.types import Seq
from fusefs.mountpoint import mount_at, unmount
from fusefs.snapshot_mount import SnapshotMount
from tests.dedup import model as models
from tests.dedup.thinned_world import STEP_NS, World

ROOT = Path(__file__).resolve().parent.parent.parent
CALLER = cast(RequestContext, SimpleNamespace(uid=os.getuid(), gid=os.getgid(), pid=1, umask=0o022))
SIZE = 3 << 20
"""Two leaves of pointers."""
POLICY = Policy(every_write_ns=MINUTE_NS, minutes_ns=100 * MINUTE_NS, hours_ns=0, days_ns=0)
needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounting as root needs /dev/fuse"
)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(models, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store", size=SIZE)
    world.history(4)
    world.reader.refresh()
    yield world
    world.close()


class Direct:
    """The handlers, over the reader of the world."""

    def __init__(self, world: World) -> None:
        self.operations = SnapshotMount(
            world.reader, lambda: os.statvfs(world.path), forget_attributes=lambda inode: None
        )

    async def walk(self, path: str, parent: int = pyfuse3.ROOT_INODE) -> EntryAttributes:
        for name in path.split("/"):
            entry = await self.operations.lookup(parent, name.encode(), CALLER)
            parent = entry.st_ino
        return entry

    async def open(self, inode: int) -> int:
        return int((await self.operations.open(inode, os.O_RDONLY, CALLER)).fh)

    async def read(self, handle: int, offset: int = 0, length: int = SIZE) -> bytes:
        parts = []
        for at in range(offset, offset + length, 1 << 20):
            parts.append(bytes(await self.operations.read(handle, at, min(1 << 20, offset + length - at))))
        return b"".join(parts)


async def refused(number: int, direct: Direct, *, directory: bool = False) -> None:
    with pytest.raises(FUSEError) as error:
        await (direct.operations.opendir(number, CALLER) if directory else direct.open(number))
    assert error.value.errno == errno.ESTALE


def thinned_point(world: World, seq: int) -> int:
    """What stands for a moment now."""
    world.reader.refresh()
    return int(world.reader.view(Seq(seq)).state.held)


async def test_what_is_open_stays_and_a_moment_that_is_gone_is_looked_up_again(world: World) -> None:
    direct = Direct(world)
    file = await direct.walk("volumes/a.img/@seq=40")
    handles = [await direct.open(file.st_ino) for _ in range(2)]
    assert await direct.read(handles[0], 0, 4096) == world.content(40)[:4096]
    assert world.thin().pieces == 0
    assert await direct.read(handles[0]) == world.content(40)
    await direct.operations.release(handles[0])
    assert world.thin().pieces == 0
    assert await direct.read(handles[1]) == world.content(40)
    await direct.operations.release(handles[1])
    assert world.thin().pieces == 1
    now = thinned_point(world, 40)
    assert now < 40
    await refused(file.st_ino, direct)
    again = await direct.walk("volumes/a.img/@seq=40")
    assert again.st_ino != file.st_ino
    assert await direct.read(await direct.open(again.st_ino)) == world.content(now)


async def test_an_image_from_before_is_not_read_on(world: World) -> None:
    """Its pointers are half decoded; the moment is kept, but not the checkpoint that it was made from."""
    direct = Direct(world)
    names = {}
    for seq in range(5, world.model.seq):
        if not world.in_gap(seq):
            names[seq] = (await direct.walk(f"points/@seq={seq}/a.img")).st_ino
            handle = await direct.open(names[seq])
            assert await direct.read(handle, 0, 4096) == world.content(seq)[:4096]
            await direct.operations.release(handle)
    assert world.thin().pieces == 1
    kept = set(world.kept())
    assert kept & names.keys() and names.keys() - kept
    for seq, inode in names.items():
        if seq in kept:
            handle = await direct.open(inode)
            assert await direct.read(handle) == world.content(seq), seq
            await direct.operations.release(handle)
        else:
            await refused(inode, direct)


async def test_open_directories_keep_their_moment_and_closed_ones_do_not(world: World) -> None:
    direct = Direct(world)
    directory = await direct.walk("points/@seq=40")
    handle = await direct.operations.opendir(directory.st_ino, CALLER)
    assert world.thin().pieces == 0
    file = await direct.walk("a.img", directory.st_ino)
    await direct.operations.releasedir(handle)
    assert world.thin().pieces == 1
    now = thinned_point(world, 40)
    await direct.walk("points/@latest")  # sees that history was thinned out
    await refused(directory.st_ino, direct, directory=True)
    await refused(file.st_ino, direct)
    with pytest.raises(FUSEError) as error:
        await direct.walk("a.img", directory.st_ino)
    assert error.value.errno == errno.ESTALE
    again = await direct.walk("points/@seq=40/a.img")
    assert await direct.read(await direct.open(again.st_ino)) == world.content(now)


async def test_a_name_that_is_bound_does_not_hide_that_its_moment_is_gone(world: World) -> None:
    direct = Direct(world)
    world.write(1)
    latest = await direct.walk("volumes/a.img/@latest")
    seq = world.model.seq
    world.write(30)
    world.group.complete_segment()
    world.write(30)
    assert world.thin(Policy(every_write_ns=0, minutes_ns=100 * MINUTE_NS, hours_ns=0, days_ns=0)).pieces
    assert thinned_point(world, seq) < seq
    await refused(latest.st_ino, direct)
    again = await direct.walk("volumes/a.img/@latest")
    assert await direct.read(await direct.open(again.st_ino)) == world.content(world.model.seq)


# Through the kernel


@pytest.fixture
def snap(world: World, tmp_path: Path) -> Iterator[Path]:
    """The mount, in its own process."""
    world.store.checkpoint()
    path = tmp_path / "snap"
    path.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fusefs", "browse", str(world.path), str(path), "--log-file", str(tmp_path / "log")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    yield path
    while mount_at(path):
        unmount(path, lazy=True)


def thin_when_released(world: World) -> None:
    """The kernel tells the mount of a close some time after it."""
    while world.thin(POLICY).postponed:
        pass


@needs_fuse
def test_a_program_reads_to_the_end_what_is_thinned_out_meanwhile(world: World, snap: Path) -> None:
    world.group.create_snapshot("friday", at="seq=40")
    named = snap / "volumes/a.img/friday"
    path = snap / "volumes/a.img/@seq=41"
    with path.open("rb", buffering=0) as file, named.open("rb", buffering=0) as snapshot:
        half = file.read(1 << 20)
        world.group.delete_snapshot("friday")
        assert world.thin().pieces == 0
        for one, seq, read in ((file, 41, half), (snapshot, 40, b"")):
            os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while part := one.read(1 << 20):
                read += part
            assert read == world.content(seq)
    thin_when_released(world)
    now = thinned_point(world, 41)
    assert now < 40
    # The kernel still remembers what the name led to; it asks again when that is gone.
    assert path.read_bytes() == world.content(now)
    assert (snap / "points/@seq=41/a.img").read_bytes() == world.content(now)


@needs_fuse
def test_every_moment_is_right_while_history_is_thinned_out_again_and_again(world: World, snap: Path) -> None:
    """What is open stays what it was; every name leads to the last moment at or before the one that it says."""
    for number in range(4):
        asked = [seq for seq in world.random.sample(range(5, world.model.seq), 5) if not world.in_gap(seq)]
        opened = [(snap / f"volumes/a.img/@seq={seq}").open("rb") for seq in asked]
        shown = [int(os.getxattr(file.fileno(), "user.rewindfs.seq")) for file in opened]
        world.history(1)
        for wait in (False, True):
            if wait:
                thin_when_released(world)
            else:
                world.thin(POLICY)
            for file, seq in zip(opened, shown, strict=True):
                if not wait:
                    with file:
                        assert file.read() == world.content(seq)
            for seq in asked:
                path = snap / f"volumes/a.img/@seq={seq}"
                assert path.read_bytes() == world.content(thinned_point(world, seq)), (number, seq)
    assert len(world.kept()) < world.model.seq / 2
