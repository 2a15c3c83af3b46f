"""Sealing and the sealed form: what is live stays, damage is said, failures leave the container as it was."""

from __future__ import annotations

import os
import random
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import container_pool, layout, sealed_layout
from dedup.container import ContainerReader, RawContainerWriter
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged, StoreError, StoreFailed, StoreFull, WouldBlock
from dedup.layout import address, container_path, fingerprint
from dedup.salvage import found_in
from dedup.sealed import seal
from dedup.sealed_form import PLACE_BYTES, GroupCache
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId, JournalId, TimeNs
from tests.dedup.faults import FaultyStorage, open_descriptors

ONE = ContainerId(1)
GROUP = sealed_layout.SEALED_GROUP_BLOCKS


def make(directory: Path, blocks: list[bytes]) -> None:
    writer = RawContainerWriter.create(Storage(), directory, ONE, JournalId(3))
    writer.append(blocks, [fingerprint(block) for block in blocks])
    writer.close()


def mixed_blocks(count: int, seed: int = 0, stored: int = 1) -> list[bytes]:
    """A few groups that compress, a few that do not: the first of these is number `stored`, 0 or 1; with 2 all do."""
    source = random.Random(seed)
    return [
        source.randbytes(BLOCK_BYTES) if index // GROUP % 2 == stored else source.randbytes(64) * 64
        for index in range(count)
    ]


def read_slot(directory: Path, slot: int, count: int = 1) -> bytes:
    reader = ContainerReader.open(Storage(), directory, ONE)
    out = bytearray(count * BLOCK_BYTES)
    try:
        reader.read_into(slot, count, memoryview(out))
    finally:
        reader.close()
    return bytes(out)


def test_exact_bytes(tmp_path: Path) -> None:
    blocks = [b"a" * BLOCK_BYTES, b"b" * BLOCK_BYTES, random.Random(1).randbytes(BLOCK_BYTES)]
    make(tmp_path, blocks)
    size = seal(Storage(), tmp_path, ONE, [0, 1])
    data = container_path(tmp_path, ONE).read_bytes()
    assert len(data) == size
    header = layout.unpack_container_header(data, tmp_path)
    assert (header.form, header.container, header.journal) == (ContainerForm.SEALED, 1, 3)
    assert sealed_layout.unpack_sealed_header(data, tmp_path).slots == 2
    assert data[4096:4104] == bytes([0, 0, 1, 0, 0, 0, 0, 0])
    assert data[4104:4136] == fingerprint(blocks[0]) + fingerprint(blocks[1])
    offset, stored, count, coding, checksum = sealed_layout.SEALED_GROUP.struct.unpack_from(data, 4136)
    assert (offset, stored, count, coding) == (4160, len(data) - 4160, 2, sealed_layout.CODING_ZSTD)
    assert checksum == layout.checksum(data[4160:])
    assert zstandard.decompress(data[4160:]) == blocks[0] + blocks[1]


@settings(max_examples=25)
@given(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)))
def test_live_slots_stay_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, live: set[int], later: set[int]
) -> None:
    directory = tmp_path_factory.mktemp("containers")
    blocks = mixed_blocks(100)
    make(directory, blocks)
    seal(Storage(), directory, ONE, live)
    for kept in (live, live & later):
        reader = ContainerReader.open(Storage(), directory, ONE)
        assert reader.header.form is ContainerForm.SEALED
        assert reader.slots() == sorted(kept)
        for slot in range(100):
            if slot in kept:
                assert reader.read_block(slot) == blocks[slot]
                assert reader.fingerprints(slot, 1) == fingerprint(blocks[slot])
            else:
                with pytest.raises(Damaged, match=f"slot {slot} is not in the container"):
                    reader.read_block(slot)
        reader.close()
        seal(Storage(), directory, ONE, live & later)  # a sealed container is sealed again
    assert os.listdir(directory) == ["0000000000000001.rwc"]


def test_all_slots_and_runs_across_groups(tmp_path: Path) -> None:
    blocks = mixed_blocks(100)
    make(tmp_path, blocks)
    raw_bytes = container_path(tmp_path, ONE).stat().st_size
    assert seal(Storage(), tmp_path, ONE, None) < raw_bytes
    assert read_slot(tmp_path, 0, 100) == b"".join(blocks)
    assert read_slot(tmp_path, 30, 40) == b"".join(blocks[30:70])
    with pytest.raises(Damaged, match="slot 100 is not"):
        read_slot(tmp_path, 90, 11)


def test_a_run_with_a_missing_slot_inside_is_damage(tmp_path: Path) -> None:
    make(tmp_path, mixed_blocks(10))
    seal(Storage(), tmp_path, ONE, {0, 1, 2, 4, 5})
    with pytest.raises(Damaged, match="slot 3 is not"):
        read_slot(tmp_path, 1, 4)


def test_slots_of_a_failed_append_are_not_sealed(tmp_path: Path) -> None:
    storage = FaultyStorage()
    blocks = mixed_blocks(4)
    writer = RawContainerWriter.create(storage, tmp_path, ONE, JournalId(1))
    storage.refuse_write_after = BLOCK_BYTES
    with pytest.raises(StoreFull):
        writer.append(blocks[:2], [fingerprint(block) for block in blocks[:2]])
    storage.refuse_write_after = None
    writer.append(blocks[2:], [fingerprint(block) for block in blocks[2:]])
    writer.close()
    seal(Storage(), tmp_path, ONE, None)
    assert read_slot(tmp_path, 2, 2) == b"".join(blocks[2:])
    with pytest.raises(Damaged):
        read_slot(tmp_path, 0)


def test_damage_is_never_sealed_in(tmp_path: Path) -> None:
    blocks = mixed_blocks(40)
    make(tmp_path, blocks)
    path = container_path(tmp_path, ONE)
    with path.open("r+b") as file:
        file.seek(layout.RAW_SLOTS_OFFSET + 7 * BLOCK_BYTES + 5)
        file.write(b"?")
    before = path.read_bytes()
    descriptors = open_descriptors()
    with pytest.raises(Damaged, match="slot 7 does not match"):
        seal(Storage(), tmp_path, ONE, range(40))
    with pytest.raises(Damaged):
        seal(Storage(), tmp_path, ONE, [50])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert open_descriptors() == descriptors
    seal(Storage(), tmp_path, ONE, set(range(40)) - {7})
    assert read_slot(tmp_path, 8) == blocks[8]


@pytest.mark.parametrize("fault", ["full", "sync"])
def test_a_failed_seal_leaves_the_container_as_it_was(tmp_path: Path, fault: str) -> None:
    make(tmp_path, mixed_blocks(70))
    path = container_path(tmp_path, ONE)
    before = path.read_bytes()
    size = 0
    while True:
        storage = FaultyStorage()
        storage.refuse_sync = fault == "sync"
        storage.refuse_write_after = size if fault == "full" else None
        try:
            seal(storage, tmp_path, ONE, None)
        except (StoreFull, StoreFailed):
            assert path.read_bytes() == before
            assert os.listdir(tmp_path) == [path.name]
        else:
            break
        if fault == "sync":
            return
        size += 20_011
    assert size > 100_000
    assert storage.synced == [path.with_name(path.name + ".tmp")]


def test_no_flipped_byte_and_no_cut_gives_wrong_bytes(tmp_path: Path) -> None:
    blocks = [random.Random(3).randbytes(64) * 64, random.Random(4).randbytes(BLOCK_BYTES)]
    make(tmp_path, blocks)
    seal(Storage(), tmp_path, ONE, None)
    path = container_path(tmp_path, ONE)
    good = path.read_bytes()

    def readable() -> int:
        count = 0
        for slot, block in enumerate(blocks):
            try:
                assert read_slot(tmp_path, slot) == block
                count += 1
            except StoreError as error:
                assert str(path) in str(error)
        return count

    header = sealed_layout.SEALED_HEADER_OFFSET + sealed_layout.SEALED_HEADER.size
    for place in [*range(header), *range(4096, 4096 + 100), *range(4196, len(good), 13)]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x04]) + good[place + 1 :])
        unused = layout.CONTAINER_HEADER.size <= place < sealed_layout.SEALED_HEADER_OFFSET
        assert readable() == (2 if unused else 0), place
    for length in [*range(header), *range(4096, len(good), 17), len(good) - 1]:
        path.write_bytes(good[:length])
        assert readable() == 0, length
    path.write_bytes(good)
    assert readable() == 2


def test_a_table_that_says_what_cannot_be_is_damage(tmp_path: Path) -> None:
    make(tmp_path, mixed_blocks(2))
    seal(Storage(), tmp_path, ONE, None)
    path = container_path(tmp_path, ONE)
    good = path.read_bytes()
    end = sealed_layout.unpack_sealed_header(good, path).table_end
    for at, value in ((4096, b"\x01\x00\x01\x00"), (4098, b"\xff\xff"), (end - 12, b"\x09"), (end - 10, b"\x07")):
        bad = bytearray(good)
        bad[at : at + len(value)] = value
        header = sealed_layout.SealedHeader.of(2, layout.checksum(bytes(bad[4096:end])))
        bad[64:88] = sealed_layout.pack_sealed_header(header)
        path.write_bytes(bad)
        with pytest.raises(Damaged, match="cannot be"):
            ContainerReader.open(Storage(), tmp_path, ONE)


def test_open_readers_and_the_pool_survive_sealing(tmp_path: Path) -> None:
    blocks = mixed_blocks(64)
    make(tmp_path, blocks)
    pool = ContainerPool(Storage(), tmp_path)
    wanted = np.arange(64, dtype=np.uint64) + np.uint64(address(ONE, 0))
    out = memoryview(bytearray(64 * BLOCK_BYTES))
    pool.read_addresses(wanted, out)
    seal(Storage(), tmp_path, ONE, None)
    for _ in range(2):
        out[:] = bytes(len(out))
        pool.read_addresses(wanted, out)
        assert bytes(out) == b"".join(blocks)
        assert pool.read_block(address(ONE, 33)) == blocks[33]
        pool.forget(ONE)
    pool.read_addresses(wanted, out)
    pool.read_addresses(wanted, out, wait=False)
    seal(Storage(), tmp_path, ONE, [5])
    pool.forget(ONE)
    assert pool.read_block(address(ONE, 5)) == blocks[5]
    pool.close()


def test_group_cache_is_bounded() -> None:
    cache = GroupCache(3 * PLACE_BYTES + 5)
    groups = [bytes([number]) * (PLACE_BYTES - number) for number in range(51)]

    def holds(number: int) -> bool:
        out = memoryview(bytearray(1000))
        if not cache.read((1, number), 200, out):
            return False
        assert bytes(out) == groups[number][200:1200]
        return True

    for number in range(50):
        cache.put((1, number), memoryview(groups[number]))
        cache.put((1, number), memoryview(groups[number]))
    assert [number for number in range(50) if holds(number)] == [47, 48, 49]
    assert holds(47)
    cache.put((1, 50), memoryview(groups[50]))
    assert [number for number in (47, 48, 49, 50) if holds(number)] == [47, 49, 50]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 9)), max_size=20), st.integers(1, 5))
def test_group_cache_gives_what_was_put_or_nothing(reads: list[tuple[int, int, int]], places: int) -> None:
    """Groups that take one, two and three places, in fewer than all of them need."""
    cache = GroupCache(places * PLACE_BYTES)
    piece = PLACE_BYTES // 4
    groups = [random.Random(number).randbytes(piece * (number * 4 + 2)) for number in range(3)]
    for number, start, count in reads:
        group = memoryview(groups[number % 3])
        start = min(start, len(group) // piece - 1)
        out = memoryview(bytearray(min(count * piece, len(group) - start * piece)))
        if cache.read((1, number % 3), start * piece, out):
            assert out == group[start * piece :][: len(out)]
        cache.put((1, number % 3), group)
        whole = memoryview(bytearray(len(group)))
        assert cache.read((1, number % 3), 0, whole) == (len(group) <= places * PLACE_BYTES)


class CountingStorage(Storage):
    """Says what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def pread_into(self, fd: int, buffers: list[memoryview], offset: int, *, wait: bool = True) -> int:
        self.lengths.append(sum(buffer.nbytes for buffer in buffers))
        return super().pread_into(fd, buffers, offset, wait=wait)


def test_of_a_group_stored_as_it_is_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    blocks = mixed_blocks(5 * GROUP)  # groups 1 and 3 do not compress; 0, 2 and 4 do
    make(tmp_path, blocks)
    seal(Storage(), tmp_path, ONE, None)
    storage = CountingStorage()
    reader = ContainerReader.open(storage, tmp_path, ONE)
    assert reader.read_block(GROUP + 8) == blocks[GROUP + 8]
    assert storage.lengths == [BLOCK_BYTES]
    data = bytearray(container_path(tmp_path, ONE).read_bytes())
    at = data.index(blocks[GROUP + 9]) + 7
    data[at] ^= 1
    container_path(tmp_path, ONE).write_bytes(data)
    assert reader.read_block(GROUP + 8) == blocks[GROUP + 8], "its neighbour's damage is not its own"
    with pytest.raises(Damaged, match=f"slot {GROUP + 9} does not match its fingerprint"):
        reader.read_block(GROUP + 9)
    reader.close()


def test_groups_stored_side_by_side_are_one_read(tmp_path: Path) -> None:
    source = random.Random(1)
    blocks = [source.randbytes(BLOCK_BYTES) for _ in range(100)]
    make(tmp_path, blocks)
    seal(Storage(), tmp_path, ONE, None)
    storage = CountingStorage()
    reader = ContainerReader.open(storage, tmp_path, ONE)
    out = memoryview(bytearray(70 * BLOCK_BYTES))
    reader.read_into(20, 70, out)
    assert bytes(out) == b"".join(blocks[20:90])
    assert storage.lengths == [70 * BLOCK_BYTES]
    reader.close()


def test_compressed_groups_side_by_side_are_one_read(tmp_path: Path) -> None:
    """As far as all of them is wanted; of the others what is wanted, and that is kept."""
    blocks = mixed_blocks(6 * GROUP, stored=2)
    make(tmp_path, blocks)
    seal(Storage(), tmp_path, ONE, None)
    storage = CountingStorage()
    reader = ContainerReader.open(storage, tmp_path, ONE, cache=GroupCache())
    out = memoryview(bytearray(5 * GROUP * BLOCK_BYTES))
    reader.read_into(3, 5 * GROUP, out)
    assert bytes(out) == b"".join(blocks[3 : 5 * GROUP + 3])
    assert len(storage.lengths) == 3, "the first, four together, the last"
    assert reader.read_block(0) == blocks[0]
    assert reader.read_block(6 * GROUP - 1) == blocks[-1]
    assert len(storage.lengths) == 3
    reader.close()


def test_of_groups_read_together_the_damaged_one_is_said(tmp_path: Path) -> None:
    blocks = mixed_blocks(3 * GROUP, stored=2)
    make(tmp_path, blocks)
    seal(Storage(), tmp_path, ONE, None)
    path = container_path(tmp_path, ONE)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    reader = ContainerReader.open(Storage(), tmp_path, ONE)
    out = memoryview(bytearray(3 * GROUP * BLOCK_BYTES))
    with pytest.raises(Damaged, match=f"offset {_offset_of_group(path, 2)}: .*its checksum"):
        reader.read_into(0, 3 * GROUP, out)
    reader.read_into(0, 2 * GROUP, out[: 2 * GROUP * BLOCK_BYTES])
    assert bytes(out[: 2 * GROUP * BLOCK_BYTES]) == b"".join(blocks[: 2 * GROUP])
    reader.close()


def _offset_of_group(path: Path, number: int) -> int:
    data = path.read_bytes()
    header = sealed_layout.unpack_sealed_header(data, path)
    row = sealed_layout.SEALED_GROUP.struct.unpack_from(
        data, header.groups_offset + number * sealed_layout.SEALED_GROUP.size
    )
    return int(row[0])


def read_whole(pool: ContainerPool, count: int) -> bytes:
    out = memoryview(bytearray(count * BLOCK_BYTES))
    pool.read_addresses(np.arange(count, dtype=np.uint64) + np.uint64(address(ONE, 0)), out)
    return bytes(out)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 199), st.integers(1, 120), st.booleans()), max_size=12), st.integers(0, 9))
def test_whole_groups_and_parts_of_them_are_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]], seed: int
) -> None:
    directory = tmp_path_factory.mktemp("containers")
    blocks = mixed_blocks(200, seed, stored=seed % 3)
    make(directory, blocks)
    if seed:
        seal(Storage(), directory, ONE, None)
    pool = ContainerPool(Storage(), directory)
    assert pool.read_block(address(ONE, 0)) == blocks[0]
    for first, count, wait in steps:
        count = min(count, 200 - first)
        wanted = np.arange(first, first + count, dtype=np.uint64) + np.uint64(address(ONE, 0))
        out = memoryview(bytearray(count * BLOCK_BYTES))
        pool.read_addresses(wanted, out, wait=True)
        assert bytes(out) == b"".join(blocks[first : first + count])
        if not wait:
            with suppress(WouldBlock):
                out[:] = bytes(len(out))
                pool.read_addresses(wanted, out, wait=False)
                assert bytes(out) == b"".join(blocks[first : first + count])
    pool.close()


def test_a_replaced_file_is_not_held_open_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor of the old file is given up: one in use soon, an idle one when it is looked for."""
    blocks = mixed_blocks(64)
    make(tmp_path, blocks)
    pool = ContainerPool(Storage(), tmp_path)
    before = open_descriptors()
    assert pool.read_block(address(ONE, 3)) == blocks[3]
    seal(Storage(), tmp_path, ONE, None)
    pool.close_idle()
    assert open_descriptors() == before, "its file is another by now"
    pool.read_block(address(ONE, 3))
    pool.close_idle()
    assert open_descriptors() == before + 1, "in use a moment ago"
    monkeypatch.setattr(container_pool, "IDLE_SECONDS", 0.0)
    pool.close_idle()
    assert open_descriptors() == before

    pool.read_block(address(ONE, 3))
    seal(Storage(), tmp_path, ONE, range(10))
    assert pool.read_block(address(ONE, 63)) == blocks[63], "the old file, as it was"
    monkeypatch.setattr(container_pool, "CURRENT_SECONDS", 0.0)
    with pytest.raises(Damaged, match="slot 63 is not"):
        pool.read_block(address(ONE, 63))
    assert pool.read_block(address(ONE, 9)) == blocks[9]
    assert open_descriptors() == before + 1, "of the new file only"
    pool.close()


def seal_as_at_first(directory: Path, blocks: list[bytes], more: bytes = b"") -> None:
    """A sealed container as the first versions wrote it: groups of 32, of which its header says nothing. `more` lies
    behind the first one's frame."""
    groups = [b"".join(blocks[at : at + 32]) for at in range(0, len(blocks), 32)]
    header = sealed_layout.SealedHeader.of(len(blocks), group_blocks=0)
    rows, stored, offset = b"", b"", header.table_end
    for group in groups:
        coded, coding = zstandard.compress(group), sealed_layout.CODING_ZSTD
        if len(coded) > len(group) * 15 / 16:
            coded, coding = group, sealed_layout.CODING_STORED
        coded += more if not rows else b""
        row = offset, len(coded), len(group) // BLOCK_BYTES, coding, layout.checksum(coded)
        rows, stored, offset = rows + sealed_layout.SEALED_GROUP.struct.pack(*row), stored + coded, offset + len(coded)
    table = np.arange(len(blocks), dtype="<u2").tobytes()
    table = table.ljust(layout.padded(len(table)), b"\0") + b"".join(map(fingerprint, blocks)) + rows
    page = layout.pack_container_header(
        layout.ContainerHeader(ONE, JournalId(3), ContainerForm.SEALED, TimeNs(5))
    ).ljust(sealed_layout.SEALED_HEADER_OFFSET, b"\0")
    page += layout.checked(struct.pack("<IIQQ", len(blocks), len(groups), layout.checksum(table), 0))
    container_path(directory, ONE).write_bytes(page.ljust(sealed_layout.SEALED_TABLE_OFFSET, b"\0") + table + stored)


def test_what_the_first_versions_sealed_is_read_and_sealed_anew(tmp_path: Path) -> None:
    blocks = mixed_blocks(150)
    seal_as_at_first(tmp_path, blocks)
    pool = ContainerPool(Storage(), tmp_path)
    assert pool.read_block(address(ONE, 40)) == blocks[40]
    assert read_whole(pool, 150) == b"".join(blocks)
    assert [pool.read_block(address(ONE, slot)) for slot in range(150)] == blocks
    pool.close()
    seal(Storage(), tmp_path, ONE, None)
    header = sealed_layout.unpack_sealed_header(container_path(tmp_path, ONE).read_bytes(), tmp_path)
    assert (header.slots, header.blocks_a_group) == (150, GROUP)
    assert read_slot(tmp_path, 0, 150) == b"".join(blocks)


@pytest.mark.parametrize("damaged", ["nothing", "container header", "slots", "group_blocks", "groups"])
@pytest.mark.parametrize("first", [False, True])
def test_what_is_left_of_groups_of_either_size_is_found(tmp_path: Path, first: bool, damaged: str) -> None:
    """Whatever number of the headers is wrong."""
    blocks = mixed_blocks(150)
    if first:
        seal_as_at_first(tmp_path, blocks)
    else:
        make(tmp_path, blocks)
        seal(Storage(), tmp_path, ONE, None)
    fields = {"container header": 20, "slots": 65, "group_blocks": 66, "groups": 68}
    data = bytearray(container_path(tmp_path, ONE).read_bytes())
    if damaged in fields:
        data[fields[damaged]] ^= 0x40
    container_path(tmp_path, ONE).write_bytes(data)
    wanted = set(map(fingerprint, blocks))
    assert found_in(Storage(), tmp_path, ONE, wanted) == wanted


@pytest.mark.parametrize("count", [20, 150])
@pytest.mark.parametrize("first", [False, True])
def test_no_bit_of_the_sealed_header_costs_a_block(tmp_path: Path, first: bool, count: int) -> None:
    """A header that is possible, and wrong, is not believed either: some counts make as many groups."""
    blocks = mixed_blocks(count, stored=0)
    if first:
        seal_as_at_first(tmp_path, blocks)
    else:
        make(tmp_path, blocks)
        seal(Storage(), tmp_path, ONE, None)
    path, wanted = container_path(tmp_path, ONE), set(map(fingerprint, blocks))
    whole, start = path.read_bytes(), sealed_layout.SEALED_HEADER_OFFSET
    for bit in range(sealed_layout.SEALED_HEADER.size * 8):
        data = bytearray(whole)
        data[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert found_in(Storage(), tmp_path, ONE, wanted) == wanted, f"bit {bit % 8} of byte {start + bit // 8}"


@pytest.mark.parametrize("more", [b"more", zstandard.compress(bytes(BLOCK_BYTES))])
def test_what_lies_behind_a_frame_is_in_no_block(tmp_path: Path, more: bytes) -> None:
    """Written by whom it may be, with all its checksums right."""
    blocks = mixed_blocks(150, stored=2)
    seal_as_at_first(tmp_path, blocks, more)
    reader = ContainerReader.open(Storage(), tmp_path, ONE)
    for first, count in ((0, 150), (0, 64), (32, 64), (3, 140), (0, 32)):
        out = memoryview(bytearray(count * BLOCK_BYTES))
        try:
            reader.read_into(first, count, out)
        except Damaged:
            assert first == 0, "the group that has more"
        else:
            assert bytes(out) == b"".join(blocks[first : first + count])
    reader.close()
