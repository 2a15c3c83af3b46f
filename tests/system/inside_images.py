"""Images with file systems in them, filled with files, and what a directory must look like that shows them."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusefs.mountpoint import mounts
from tests.system.harness import World


@dataclass(frozen=True)
class Kind:
    """One file system: how it is made, and how it is filled."""

    name: str
    make: tuple[str, ...]
    mebibytes: int = 24
    unix: bool = True
    """Whether it knows modes, links and any name."""
    mount: tuple[str, ...] | None = ("mount", "-o", "loop")
    """None where this kernel may not know it: it is filled by mtools."""
    usual: bool = True
    """Whether it is in the tests that are always run."""


KINDS = [
    Kind("ext2", ("mkfs.ext2", "-q", "-F", "-b", "1024"), usual=False),
    Kind("ext3", ("mkfs.ext3", "-q", "-F", "-b", "4096")),
    Kind("ext4", ("mkfs.ext4", "-q", "-F")),
    Kind(
        "ext4-small", ("mkfs.ext4", "-q", "-F", "-I", "128", "-b", "1024", "-O", "^metadata_csum,^64bit"), usual=False
    ),
    Kind("xfs", ("mkfs.xfs", "-q", "-f"), 320),
    Kind(
        "xfs-wide",
        ("mkfs.xfs", "-q", "-f", "-b", "size=1024", "-n", "size=16384"),
        320,
        mount=("mount", "-o", "loop,logbsize=256k"),
        usual=False,
    ),
    Kind("btrfs", ("mkfs.btrfs", "-q", "-f"), 128),
    Kind("ntfs", ("mkfs.ntfs", "-q", "-F", "-Q"), unix=False, mount=("mount", "-t", "ntfs-3g", "-o", "loop")),
    Kind("fat12", ("mkfs.vfat", "-F", "12"), 8, unix=False, mount=None, usual=False),
    Kind("fat16", ("mkfs.vfat", "-F", "16"), unix=False, mount=None),
    Kind("fat32", ("mkfs.vfat", "-F", "32", "-s", "1"), 40, unix=False, mount=None),
]
SHOWN = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)


def make_image(world: World, kind: Kind, image: Path, *, names: int = 300, seed: int = 1) -> Path:
    """An image with files in it; returns a directory with the same files, for what need not know modes."""
    image.parent.mkdir(parents=True, exist_ok=True)
    with open(image, "xb") as file:
        file.truncate(kind.mebibytes << 20)
    world.run(*kind.make, image)
    tree = world.directory / f"tree-{kind.name}"
    tree.mkdir()
    fill(tree, kind, random.Random(seed), names)
    if kind.mount is None:
        world.run("mcopy", "-s", "-i", image, *sorted(tree.iterdir()), "::/")
        return tree
    with mounted(world, kind, image) as place:
        world.run("cp", "-a", f"{tree}/.", place)
        if kind.unix:
            # Preallocated over what was there before: bytes that nobody wrote must not show.
            with open(place / "junk", "wb") as file:
                file.write(b"junk" * (1 << 18))
                os.fsync(file.fileno())
            (place / "junk").unlink()
            world.run("sync", "-f", place)
            with open(place / "preallocated", "wb") as file:
                file.write(b"start")
                if kind.name not in ("ext2", "ext3"):  # the kernel refuses it there
                    os.posix_fallocate(file.fileno(), 0, 700_000)
        for name in [name for name in os.listdir(place / "many") if name.endswith("7")]:
            (place / "many" / name).unlink()
    return tree


@contextmanager
def mounted(world: World, kind: Kind, image: Path, *options: str) -> Iterator[Path]:
    """The image on a loop device, while the block runs."""
    assert kind.mount is not None
    place = world.directory / "inside"
    place.mkdir(exist_ok=True)
    world.run(*kind.mount, *options, image, place)
    try:
        yield place
    finally:
        device = next(mount.source for mount in mounts() if mount.path == place)
        world.run("umount", place)
        if device.startswith("/dev/loop"):
            world._wait_until_detached(device)


def fill(tree: Path, kind: Kind, chance: random.Random, names: int) -> None:
    """Files of many sizes, holes, long listings; where it is Unix: links, modes, times, strange names."""
    for name, size in (("empty", 0), ("one", 1), ("page", 4096), ("Grüße – ünï.txt", 5000), ("large", 2_345_678)):
        (tree / name).write_bytes(chance.randbytes(size))
    (tree / "UPPER.TXT").write_bytes(b"short name")
    deep = tree / "deep" / "er" / "still"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(chance.randbytes(70_000))
    (tree / "many").mkdir()
    for number in range(names):
        (tree / "many" / f"a longer name of file number {number}").write_bytes(b"%d" % number)
    if not kind.unix:
        return
    for name, at, end in (
        ("hole-first", 1_900_000, 1_900_004),
        ("hole-last", 100, 3_000_000),
        ("all-hole", 0, 900_000),
    ):
        with open(tree / name, "wb") as file:
            if name != "all-hole":
                file.seek(at)
                file.write(b"data")
            file.truncate(end)
    with open(tree / "pieces", "wb") as file:
        for piece in range(60):
            file.seek(piece * 20_000)
            file.write(chance.randbytes(4096))
    os.symlink("deep/er", tree / "link")
    os.symlink("x" * 200 + "/not/there", tree / "long-link")
    os.link(tree / "one", tree / "deep" / "same as one")
    (tree / ("n" * 255)).write_bytes(b"longest")
    with open(os.fsencode(tree) + b"/\xff\xfe not utf-8", "wb") as file:
        file.write(b"bytes")
    (tree / "suid").write_bytes(b"#!/bin/sh\n")
    os.chown(tree / "suid", 1234, 70_000)
    (tree / "suid").chmod(0o4751)
    os.utime(tree / "empty", ns=(-123_456_789_012_345_678, -98_765_432_109_876_543))
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def check_shown(shown: Path, wanted: Path, *, unix: bool, ignored: frozenset[str] = frozenset()) -> int:
    """Asserts that a directory shows what another one holds; returns how many files were compared."""
    count = 0
    expected = {
        name: status
        for name in os.listdir(wanted)
        if stat.S_IFMT((status := os.lstat(wanted / name)).st_mode) in SHOWN and name not in ignored
    }
    assert sorted(set(os.listdir(shown)) - ignored) == sorted(expected), shown
    for name, status in expected.items():
        found, file = os.lstat(shown / name), shown / name
        assert stat.S_IFMT(found.st_mode) == stat.S_IFMT(status.st_mode), file
        if unix:
            assert (found.st_mode, found.st_uid, found.st_gid) == (status.st_mode, status.st_uid, status.st_gid), file
            assert found.st_mtime_ns == status.st_mtime_ns, file
        if stat.S_ISDIR(status.st_mode):
            count += check_shown(file, wanted / name, unix=unix)
        elif stat.S_ISLNK(status.st_mode):
            assert os.readlink(file) == os.readlink(wanted / name), file
        else:
            assert not unix or found.st_nlink == status.st_nlink, file
            assert file.read_bytes() == (wanted / name).read_bytes(), file
        count += 1
    return count
