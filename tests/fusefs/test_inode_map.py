"""Inode numbers: stable while held, never reused, never confused by a reused inode number of the source."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from fusefs.inode_map import InodeMap, Node


@pytest.fixture
def inodes(tmp_path: Path) -> Iterator[InodeMap]:
    inodes = InodeMap(tmp_path)
    yield inodes
    inodes.close()


def look_up(inodes: InodeMap, path: Path) -> Node:
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    return inodes.adopt(fd, os.fstat(fd))


def drop(inodes: InodeMap, node: Node, lookups: int = 1) -> None:
    fd = inodes.forget(node.number, lookups)
    assert fd is not None
    os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_root_is_known_and_never_forgotten(inodes: InodeMap, tmp_path: Path) -> None:
    assert inodes.node(pyfuse3.ROOT_INODE) is inodes.root
    assert inodes.forget(pyfuse3.ROOT_INODE, 1 << 40) is None
    assert os.fstat(inodes.node(pyfuse3.ROOT_INODE).fd).st_ino == tmp_path.stat().st_ino


def test_one_node_per_file(inodes: InodeMap, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    before = descriptors()
    first, again = look_up(inodes, tmp_path / "a"), look_up(inodes, tmp_path / "a")
    assert first is again and first.lookups == 2 and first.is_regular
    assert descriptors() == before + 1
    assert inodes.forget(first.number, 1) is None
    assert inodes.node(first.number) is first
    drop(inodes, first)
    assert descriptors() == before and len(inodes) == 1


def test_a_forgotten_number_is_stale_and_not_given_again(inodes: InodeMap, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    first = look_up(inodes, tmp_path / "a")
    drop(inodes, first)
    with pytest.raises(OSError) as caught:
        inodes.node(first.number)
    assert caught.value.errno == errno.ESTALE
    assert inodes.forget(first.number, 1) is None
    assert look_up(inodes, tmp_path / "a").number > first.number


def test_a_held_inode_number_is_not_reused_by_the_source(inodes: InodeMap, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    node = look_up(inodes, tmp_path / "a")
    (tmp_path / "a").unlink()
    for index in range(50):
        other = tmp_path / f"b{index}"
        other.touch()
        assert look_up(inodes, other) is not node
    assert os.fstat(node.fd).st_nlink == 0
    assert inodes.find(node.key) is node


def test_paths_follow_renames(inodes: InodeMap, tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    node = look_up(inodes, tmp_path / "d" / "e")
    assert inodes.path(node, b"x") == "d/e/x"
    assert inodes.path(inodes.root, b"x") == "x"
    (tmp_path / "d").rename(tmp_path / "moved (deleted)")
    assert inodes.path(node, b"\xff") == "moved (deleted)/e/\udcff"
    assert inodes.path(node) == "moved (deleted)/e"


def test_removed_and_moved_directories_have_no_path(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "gone").mkdir(parents=True)
    (source / "out").mkdir()
    (tmp_path / "source-not").mkdir()
    inodes = InodeMap(source)
    gone, out = look_up(inodes, source / "gone"), look_up(inodes, source / "out")
    (source / "gone").rmdir()
    (source / "out").rename(tmp_path / "source-not" / "out")
    for node, expected in ((gone, errno.ENOENT), (out, errno.ESTALE)):
        with pytest.raises(OSError) as caught:
            inodes.path(node, b"x")
        assert caught.value.errno == expected
    inodes.close()


def test_symlinks_stand_for_themselves(inodes: InodeMap, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    node = look_up(inodes, tmp_path / "link")
    assert not node.is_regular
    assert os.readlink("", dir_fd=node.fd) == "nowhere"


def test_the_descriptor_limit_is_raised(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    InodeMap(tmp_path).close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_source_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        InodeMap(tmp_path / "file")
