"""The files inside an image: where their bytes are, and the process that reads them, whatever the image makes of it."""

from __future__ import annotations

import errno
import os
import random
import resource
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.errors import Damaged, MomentGone
from fusefs import known_names
from fusefs.inside.filesystem import Corrupt
from fusefs.inside.image_process import ImageProcess, ImageUnreadable, NothingInside
from fusefs.inside.image_stream import CACHE_BLOCK_BYTES, ImageBytes, ImageStream
from fusefs.inside.messages import Entries, Open, Read, encode
from fusefs.inside.runs import Run, Runs
from tests.system.harness import SEARCH_PATH, missing_tools

pytest.importorskip("dissect.extfs", reason="the extra rewindfs[files] is not installed (make test installs it)")
needs_mkfs = pytest.mark.skipif(bool(missing_tools(["mkfs.ext4"])), reason="mkfs.ext4 is not installed")


class Bytes:
    """An image in memory, for which reading may fail."""

    label = "disk.img at seq=7"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.error: Exception | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        if self.error is not None:
            raise self.error
        return self.data[offset : offset + length]

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        raise NotImplementedError

    def next_data(self, offset: int) -> int:
        return offset


def ext4(tmp_path: Path, *options: str) -> bytes:
    """An image with a few files, made without mounting anything."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5):
        (tree / f"file-{number}").write_bytes(random.Random(number).randbytes(100_000))
    image = tmp_path / "disk.img"
    with open(image, "xb") as file:
        file.truncate(8 << 20)
    command = ["mkfs.ext4", "-q", "-F", "-d", str(tree), *options, str(image)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": SEARCH_PATH})
    return image.read_bytes()


RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 5)), max_size=8)


@given(RUNS, st.integers(0, 80), st.integers(0, 60))
def test_runs_are_holes_and_pieces(given_runs: list[tuple[int, int, int]], offset: int, length: int) -> None:
    image = bytes(range(1, 65))
    runs, model, end = [], bytearray(200), 0
    for gap, place, count in given_runs:
        runs.append(Run(end + gap, place, count))
        model[end + gap : end + gap + count] = image[place : place + count]
        end += gap + count
    stream = ImageStream(ImageBytes(len(image), lambda at, count: image[at : at + count]))
    assert Runs(runs).read(stream, offset, length) == model[offset : offset + length]


@pytest.mark.parametrize(
    "runs", [[Run(0, 0, 2), Run(1, 9, 2)], [Run(5, 0, 1), Run(0, 0, 1)], [Run(0, 0, 0)], [Run(0, -1, 1)]]
)
def test_runs_that_cannot_be(runs: list[Run]) -> None:
    with pytest.raises(Corrupt):
        Runs(runs)


@given(st.data())
def test_streams_give_what_is_there(data: st.DataObject) -> None:
    image = random.Random(3).randbytes(3 * CACHE_BLOCK_BYTES + 100)
    whole = ImageBytes(len(image), lambda at, count: image[at : at + count])
    start = data.draw(st.integers(0, 1000))
    replaced = {number: random.Random(number).randbytes(512) for number in data.draw(st.sets(st.integers(0, 190)))}
    functions: dict[int, Callable[[], bytes]] = {number: partial(bytes, block) for number, block in replaced.items()}
    stream = ImageStream(whole, start).replacing(512, functions)
    wanted = bytearray(image[start:])
    for number, block in replaced.items():
        at = number * 512
        wanted[at : at + 512] = block[: len(wanted[at : at + 512])]
    for _ in range(5):
        offset, count = data.draw(st.integers(0, len(wanted) + 9)), data.draw(st.integers(-1, 2 * CACHE_BLOCK_BYTES))
        stream.seek(offset)
        assert stream.read(count) == (wanted[offset:] if count < 0 else wanted[offset : offset + count])
    with pytest.raises(Corrupt):
        stream.read_at(len(wanted) - 1, 2)


@needs_mkfs
def test_one_process_answers_many_questions(tmp_path: Path) -> None:
    process = ImageProcess(Bytes(ext4(tmp_path)))
    root = process.open().root
    entries = {entry.name: entry for entry in process.list(root, 0).entries}
    assert sorted(entries) == [b"file-0", b"file-1", b"file-2", b"file-3", b"file-4", b"lost+found"]
    assert process.list(root, 6).entries == process.lookup(root, b"none").entries == []
    for number in range(5):
        (entry,) = process.lookup(root, b"file-%d" % number).entries
        assert entry == entries[entry.name]
        content = random.Random(number).randbytes(100_000)
        assert process.read(entry.node, 0, 1 << 20) == content
        assert process.read(entry.node, 99_000, 5000) == content[99_000:]
        assert process.read(entry.node, 200_000, 5000) == b""
    assert process.xattrs(root) == {}
    with pytest.raises(ImageUnreadable):
        process.readlink(entries[b"file-0"].node)
    process.close()
    with pytest.raises(ImageUnreadable, match="closed"):
        process.list(root, 0)


@needs_mkfs
@pytest.mark.parametrize("error", [Damaged("disk.img: block 3"), MomentGone("thinned out"), OSError(errno.EIO, "disk")])
def test_what_the_store_raises_is_raised(tmp_path: Path, error: Exception) -> None:
    image = Bytes(ext4(tmp_path))
    process = ImageProcess(image)
    root = process.open().root
    (entry,) = process.lookup(root, b"file-3").entries
    image.error = error
    with pytest.raises(type(error)) as raised:
        process.read(entry.node, 0, 100_000)
    assert raised.value is error
    image.error = None  # of the next question nothing is wrong
    assert process.read(entry.node, 0, 100_000) == random.Random(3).randbytes(100_000)
    process.close()


def endless(image: bytes) -> bytes:
    """An ext2 whose root directory's file-4 says that it is huge, and whose blocks of pointers point to themselves."""
    data = bytearray(image)
    (block_size,) = (1024 << struct.unpack_from("<I", data, 1024 + 24)[0],)
    (inode_size,) = struct.unpack_from("<H", data, 1024 + 88)
    (table,) = struct.unpack_from("<I", data, (2048 if block_size == 1024 else block_size) + 8)
    for number in range(11, 17):
        at = table * block_size + (number - 1) * inode_size
        (pointed,) = struct.unpack_from("<I", data, at + 40 + 12 * 4)
        if not pointed:
            continue
        data[pointed * block_size : (pointed + 1) * block_size] = struct.pack("<I", pointed) * (block_size // 4)
        struct.pack_into("<3I", data, at + 40 + 12 * 4, pointed, pointed, pointed)
        struct.pack_into("<I", data, at + 4, 0xFFFFFFFF)
        struct.pack_into("<I", data, at + 108, 0xFF)
    return bytes(data)


@needs_mkfs
def test_a_question_that_does_not_end_is_ended(tmp_path: Path) -> None:
    image = Bytes(endless(ext4(tmp_path, "-t", "ext2", "-b", "1024", "-O", "^metadata_csum")))
    process = ImageProcess(image, question_seconds=0.3)
    root = process.open().root
    (entry,) = process.lookup(root, b"file-4").entries
    for _ in range(3):  # the first one waits, the others are answered at once
        with pytest.raises(ImageUnreadable, match="took too long"):
            process.read(entry.node, 0, 4096)
    process.close()


@needs_mkfs
def test_a_question_that_needs_too_much_memory_is_ended(tmp_path: Path) -> None:
    image = Bytes(endless(ext4(tmp_path, "-t", "ext2", "-b", "1024", "-O", "^metadata_csum")))
    process = ImageProcess(image)
    root = process.open().root
    assert process._process is not None
    resource.prlimit(process._process.pid, resource.RLIMIT_AS, (160 << 20, 160 << 20))
    (entry,) = process.lookup(root, b"file-4").entries
    with pytest.raises(ImageUnreadable, match="needed too much memory"):
        process.read(entry.node, 0, 4096)
    process.close()


@needs_mkfs
def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    process = ImageProcess(Bytes(ext4(tmp_path)))
    root = process.open().root
    assert process._process is not None
    process._process.kill()
    with pytest.raises(ImageUnreadable, match="signal 9"):
        process.list(root, 0)
    with pytest.raises(ImageUnreadable, match="signal 9"):
        process.list(root, 0)
    process._broken_until = 0.0  # as if a minute had passed
    assert len(process.list(root, 0).entries) == 6
    assert process._end() == "ended with status 0"
    assert len(process.list(root, 0).entries) == 6
    process.close()


@given(st.integers(0, 1 << 30))
def test_no_image_at_all(seed: int) -> None:
    """Bytes that begin like something, or like nothing: each is refused, in this process to be quick."""
    from fusefs.inside.image_tree import ImageTree

    chance = random.Random(seed)
    data = bytearray(chance.randbytes(200_000) if chance.random() < 0.5 else bytes(200_000))
    magic = chance.choice([(1080, b"\x53\xef"), (0, b"XFSB"), (65600, b"_BHRfS_M"), (3, b"NTFS    "), (54, b"FAT16")])
    data[magic[0] : magic[0] + len(magic[1])] = magic[1]
    data[510:512] = b"\x55\xaa"
    try:
        tree = ImageTree(ImageBytes(len(data), lambda at, count: bytes(data[at : at + count])))
        tree.status(tree.root)
        tree.names(tree.root, 0, 10)
    except Exception:  # noqa: BLE001 - of any type, by the interface
        return
    pytest.fail(f"it was taken for an image: {tree.root}")


def test_messages_are_small() -> None:
    assert len(encode(Open(1 << 50))) < 40 and len(encode(Read((0, 12), 1 << 40, 1 << 20))) < 60


def log_file(pages: list[tuple[int, int, int]]) -> bytes:
    """A $LogFile whose restart pages say: sequence, first client in use, flags."""
    data = b""
    for sequence, client, flags in pages:
        head = struct.pack("<4s2HQ2IH", b"RSTR", 0x1E, 9, 0, 4096, 4096, 0x30).ljust(0x30, b"\0")
        data += (head + struct.pack("<Q4H", sequence, 1, 0xFFFF, client, flags)).ljust(4096, b"\0")
    return data + bytes(8192)


@pytest.mark.parametrize(
    ("start", "clean"),
    [
        (b"\xff" * 8192, True),
        (log_file([(5, 0, 0), (6, 0xFFFF, 0)]), True),
        (log_file([(5, 0xFFFF, 0), (6, 0, 0)]), False),
        (log_file([(9, 0, 2), (6, 0, 0)]), True),
        (bytes(8192), False),
        (b"CHKD" + bytes(8188), False),
    ],
)
def test_ntfs_logs(start: bytes, clean: bool) -> None:
    from fusefs.inside.ntfs import log_is_clean

    assert log_is_clean(start) == clean


@pytest.mark.skipif(bool(missing_tools(["mkfs.ntfs"])), reason="mkfs.ntfs is not installed")
@pytest.mark.parametrize("clean", [True, False])
def test_an_ntfs_whose_log_was_not_replayed_is_not_shown(tmp_path: Path, clean: bool) -> None:
    image = tmp_path / "disk.img"
    with open(image, "xb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ntfs", "-q", "-F", str(image)], check=True, env={**os.environ, "PATH": SEARCH_PATH})
    data = bytearray(image.read_bytes())
    at = data.index(b"\xff" * (1 << 17))  # as it is emptied
    at += -at % 4096
    start = log_file([(5, 0xFFFF if clean else 0, 0)])
    data[at : at + len(start)] = start
    process = ImageProcess(Bytes(bytes(data)))
    try:
        if clean:
            assert process.list(process.open().root, 0) == Entries([])
            return
        for _ in range(2):
            with pytest.raises(ImageUnreadable, match="its log is not replayed here.*rewindfs clone"):
                process.open()
    finally:
        process.close()


def test_what_is_no_file_system_is_told_from_what_is_not_read() -> None:
    for data, kind in ((bytes(100_000), NothingInside), (b"XFSB" + bytes(99_996), ImageUnreadable)):
        process = ImageProcess(Bytes(data))
        for _ in range(2):  # found, and remembered
            with pytest.raises(ImageUnreadable) as raised:
                process.open()
            assert type(raised.value) is kind
        process.close()


def test_names_that_the_kernel_is_told_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_names, "NAMES_MAX", 3)
    forgotten: list[tuple[int, bytes]] = []
    names = known_names.KnownNames(lambda directory, name: forgotten.append((directory, name)))
    for name in (b"a", b"b", b"c", b"a", b"d", b"e"):
        names.add(7, name)
    assert forgotten == [(7, b"b"), (7, b"c")]
