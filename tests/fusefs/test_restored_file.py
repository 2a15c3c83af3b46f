"""A volume restored into a file: sparse, checked, and gone on with; against the bytes that were written."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from dedup.errors import Damaged, RewindError
from dedup.reader import GroupReader, StoreReader
from dedup.store import Store
from dedup.types import Moment, Seq, VolumeId, VolumeState
from fusefs import restored_file
from fusefs.restored_file import RestoredFile, beside
from fusefs.restored_tree import RestoredTree
from tests.dedup.model import Model
from tests.system.harness import ROOT

BLOCK = 4096
PIECE = 16 * BLOCK
SIZE = 40 * PIECE + 1500
METADATA_BYTES = 2 * BLOCK
"""What a file system counts as the file's, besides its data: where that lies."""


def small_pieces() -> None:
    """Stretches of a few pieces, so that a small volume has many."""
    restored_file.PIECE_BYTES = PIECE  # type: ignore[misc]
    restored_file.STRETCH_PIECES = 4  # type: ignore[misc]
    restored_file._ZEROS = bytes(PIECE)  # type: ignore[misc]


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    names = ("PIECE_BYTES", "STRETCH_PIECES", "_ZEROS")
    with patch.multiple(restored_file, **{name: getattr(restored_file, name) for name in names}):
        small_pieces()
        yield


class Past:
    """A store with one volume, data here and there, and its reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = Model()
        self.random = random.Random(3)
        Store.create(path)
        store = Store.open(path)
        group = store.group("g")
        group.ingest(self.model.begin())
        made = self.model.create("disk.img", SIZE)
        self.volume: VolumeId = made.volume
        group.ingest([made])
        for _ in range(60):
            offset = self.random.randrange(SIZE - 9000)
            data = self.random.choice([self.random.randbytes(9000), bytes(BLOCK), self.random.randbytes(100)])
            group.ingest([self.model.write(self.volume, offset, data)])
        store.close()
        self._opened = StoreReader.open(path)
        self.group: GroupReader = self._opened.group()
        self.moment: Moment = self.group.resolve("latest")

    @property
    def state(self) -> VolumeState:
        return self.group.group_at(self.moment.seq).volume("disk.img")

    @property
    def content(self) -> bytes:
        return self.model.history[self.moment.seq][0][self.volume]

    def at(self, seq: int) -> None:
        self.moment = self.group.resolve(f"seq={seq}")

    def file(self, path: Path, **options: bool) -> RestoredFile:
        return RestoredFile(self.group, self.moment, self.state, path, **options)

    def close(self) -> None:
        self._opened.close()


@pytest.fixture
def past(tmp_path: Path) -> Iterator[Past]:
    past = Past(tmp_path / "store")
    yield past
    past.close()


def data_blocks(content: bytes) -> int:
    """Blocks that are not zeros."""
    return sum(any(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))


def test_sparse_whole_and_as_it_was(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    done = past.file(path).restore()
    assert path.read_bytes() == past.content
    status = path.stat()
    assert (status.st_mtime_ns, status.st_mode & 0o7777) == (past.moment.time, 0o644)
    assert status.st_blocks * 512 <= data_blocks(past.content) * BLOCK + METADATA_BYTES
    assert done.bytes <= data_blocks(past.content) * BLOCK and done.resumed_at == 0 and done.damaged == ()
    assert sorted(os.listdir(tmp_path)) == ["out.img", "store"]


@pytest.mark.parametrize("seq", [3, 4, 20, 40])
def test_other_moments_and_an_empty_one(past: Past, tmp_path: Path, seq: int) -> None:
    past.at(seq)
    path = tmp_path / ("n" * 255)
    past.file(path, check=seq != 20).restore()
    assert path.read_bytes() == past.content


def kill_one(past: Past, path: Path, notes: int) -> None:
    command = [sys.executable, "-m", "tests.fusefs.killed_restore"]
    done = subprocess.run([*command, past.path, path, str(past.moment.seq), str(notes)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()


def test_killed_it_goes_on_where_it_was(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    kill_one(past, path, notes=4)
    kill_one(past, path, notes=2)
    done = past.file(path).restore()
    assert path.read_bytes() == past.content
    assert done.resumed_at >= 8 * PIECE
    assert done.bytes < data_blocks(past.content) * BLOCK
    assert sorted(os.listdir(tmp_path)) == ["out.img", "store"]


def test_another_moment_is_begun_anew(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    kill_one(past, path, notes=4)
    past.at(past.moment.seq - 20)
    done = past.file(path).restore()
    assert path.read_bytes() == past.content
    assert done.resumed_at == 0


def test_what_was_not_checked_is_not_taken_for_checked(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    kill_one(past, path, notes=4)
    note = beside(path)[1]
    note.write_bytes(note.read_bytes().replace(b'"checked":true', b'"checked":false'))
    assert past.file(path).restore().resumed_at == 0
    assert path.read_bytes() == past.content


def test_a_write_that_the_disk_lost_is_found(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    written = restored_file.write_all

    def lose(fd: int, data: memoryview, offset: int) -> None:
        written(fd, bytes(data[:-1]) + b"?", offset)

    with patch.object(restored_file, "write_all", lose), pytest.raises(RewindError, match="are not what was written"):
        past.file(path).restore()
    assert not path.exists()
    past.file(path).restore()
    assert path.read_bytes() == past.content


def test_what_somebody_else_put_into_a_hole_is_found(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    past.at(3)  # nothing but a hole
    synced = os.fdatasync

    def put(fd: int) -> None:
        os.pwrite(fd, b"!", 5 * PIECE + 9)
        synced(fd)

    with (
        patch.object(os, "fdatasync", put),
        pytest.raises(RewindError, match=f"bytes {5 * PIECE}..{6 * PIECE} are not"),
    ):
        past.file(path).restore()


def test_a_file_that_is_there_is_replaced_only_when_asked(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        past.file(path).restore()
    assert path.read_bytes() == b"mine"
    past.file(path, replace=True).restore()
    assert path.read_bytes() == past.content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_one_that_has_its_owner_already_is_gone_on_with(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"in the way when it was ready")
    theirs = dataclasses.replace(past.state, uid=1234)
    with pytest.raises(FileExistsError):
        RestoredFile(past.group, past.moment, theirs, path).restore()
    assert beside(path)[0].stat().st_uid == 1234
    with pytest.raises(RewindError, match="not this user's own"):
        RestoredFile(past.group, past.moment, dataclasses.replace(theirs, uid=5678), path, replace=True).restore()
    done = RestoredFile(past.group, past.moment, theirs, path, replace=True).restore()
    assert (done.resumed_at, done.bytes) == (SIZE, 0)
    assert path.read_bytes() == past.content and path.stat().st_uid == 1234


def test_two_restores_of_one_file_do_not_mix(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    written = restored_file.write_all

    def meanwhile(fd: int, data: memoryview, offset: int) -> None:
        with pytest.raises(RewindError, match="another restore is writing it"):
            past.file(path).restore()
        written(fd, data, offset)

    with patch.object(restored_file, "write_all", meanwhile):
        past.file(path).restore()
    assert path.read_bytes() == past.content


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(past: Past, count: int) -> None:
    """Flips a byte in some blocks of the store."""
    (container,) = (file for file in (past.path / "containers").iterdir() if file.stat().st_size > 10 * BLOCK)
    raw = bytearray(container.read_bytes())
    blocks = [at for at in range(0, SIZE, BLOCK) if any(past.content[at : at + BLOCK])]
    for at in past.random.sample(blocks, count):
        block = past.content[at : at + BLOCK].ljust(BLOCK, b"\0")
        place = raw.find(block)
        assert place >= 0
        raw[place + 100] ^= 1
    container.write_bytes(raw)


def test_damage_is_named_and_left_out_only_when_asked(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    damage(past, 5)
    with pytest.raises(Damaged, match=r"disk.img at seq=\d+, bytes \d+.*--skip-damaged"):
        past.file(path).restore()
    assert not path.exists()
    done = past.file(path, skip_damaged=True).restore()
    assert sum(one.length for one in done.damaged) in range(4 * BLOCK, 5 * BLOCK + 1)
    wanted = bytearray(past.content)
    for one in done.damaged:
        wanted[one.offset : one.offset + one.length] = bytes(one.length)
    assert path.read_bytes() == wanted


# -- directories -------------------------------------------------------------------------------------------------------


def test_a_tree_goes_on_and_has_its_name_only_when_it_is_whole(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out"
    volumes = dict.fromkeys(("a.img", "d/b.img", "d/e/c.img"), past.state)
    original = RestoredFile.restore

    def fail_at_last(self: RestoredFile) -> restored_file.Restored:
        if self.temporary.parent.name == "e":
            raise OSError(errno.EIO, "the disk fails")
        return original(self)

    def tree() -> RestoredTree:
        return RestoredTree(past.group, past.moment, ".", volumes, path)

    with patch.object(RestoredFile, "restore", fail_at_last), pytest.raises(OSError, match="the disk fails"):
        tree().restore()
    assert not path.exists()
    done = tree().restore()
    assert [one.resumed_at for one in done] == [SIZE, SIZE, 0]
    assert [one.path for one in done] == [path / name for name in volumes]
    assert all((path / name).read_bytes() == past.content for name in volumes)
    assert sorted(os.listdir(tmp_path)) == ["out", "store"]
    with pytest.raises(RewindError, match="is not empty"):
        tree().restore()


def test_two_restores_of_one_tree_do_not_mix(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out"
    volumes = dict.fromkeys(("a.img", "b.img"), past.state)
    first, content = past.moment, past.content
    original = RestoredFile.restore

    def second_meanwhile(self: RestoredFile) -> restored_file.Restored:
        if self.temporary == beside(beside(path)[0] / "b.img")[0]:
            past.at(int(first.seq) - 5)
            with (
                patch.object(RestoredFile, "restore", original),
                pytest.raises(RewindError, match="another restore is"),
            ):
                RestoredTree(past.group, past.moment, ".", dict.fromkeys(volumes, past.state), path).restore()
        return original(self)

    with patch.object(RestoredFile, "restore", second_meanwhile):
        RestoredTree(past.group, first, ".", volumes, path).restore()
    assert all((path / name).read_bytes() == content for name in volumes)
    assert sorted(os.listdir(tmp_path)) == ["out", "store"]


def test_a_tree_of_another_moment_is_begun_anew(past: Past, tmp_path: Path) -> None:
    path = tmp_path / "out"
    temporary, _ = beside(path)
    later = past.state
    failing = patch.object(RestoredFile, "restore", side_effect=OSError(errno.EIO, "the disk fails"))
    with failing, pytest.raises(OSError, match="the disk fails"):
        RestoredTree(past.group, past.moment, ".", {"a.img": later}, path).restore()
    (temporary / "a.img").write_bytes(b"of a later moment")
    past.at(int(past.moment.seq) - 5)
    RestoredTree(past.group, past.moment, ".", {"a.img": past.state}, path).restore()
    assert (path / "a.img").read_bytes() == past.content
    assert Seq(past.moment.seq) < past.model.seq
