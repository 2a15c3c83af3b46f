"""Raw containers and the pool: exact bytes, damage, and failures half way."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

import dedup.container
from dedup import layout
from dedup.container import STREAM_BYTES, ContainerReader, RawContainerWriter
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged, OnItsWay, StoreError, StoreFailed, StoreFull, Unreadable, WouldBlock
from dedup.layout import RAW_SLOTS_OFFSET, RAW_TABLE_OFFSET, address, container_path, fingerprint
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, LOST, ContainerForm, ContainerId, JournalId
from tests.dedup.faults import FaultyStorage, open_descriptors

ONE = ContainerId(1)
FINE = JournalId(1)


def blocks_of(count: int, seed: int = 0) -> list[bytes]:
    """Different blocks, half of each of them random."""
    source = random.Random(seed)
    return [source.randbytes(2048) + bytes(2048) for _ in range(count)]


def fill(storage: Storage, directory: Path, container: ContainerId, blocks: list[bytes]) -> RawContainerWriter:
    writer = RawContainerWriter.create(storage, directory, container, FINE)
    writer.append(blocks, [fingerprint(block) for block in blocks])
    return writer


def read_slots(directory: Path, slot: int, count: int) -> bytes:
    out = bytearray(count * BLOCK_BYTES)
    reader = ContainerReader.open(Storage(), directory, ONE)
    try:
        reader.read_into(slot, count, memoryview(out))
    finally:
        reader.close()
    return bytes(out)


def test_exact_bytes(tmp_path: Path) -> None:
    blocks = blocks_of(3)
    fill(Storage(), tmp_path, ONE, blocks).close()
    data = container_path(tmp_path, ONE).read_bytes()
    header = layout.unpack_container_header(data, tmp_path)
    assert (header.container, header.journal, header.form) == (1, 1, ContainerForm.RAW)
    assert data[RAW_TABLE_OFFSET : RAW_TABLE_OFFSET + 48] == b"".join(map(fingerprint, blocks))
    assert not any(data[RAW_TABLE_OFFSET + 48 : RAW_SLOTS_OFFSET])
    assert data[RAW_SLOTS_OFFSET:] == b"".join(blocks)


def test_appends_are_readable_at_once_and_durable_after_sync(tmp_path: Path) -> None:
    storage = FaultyStorage()
    writer = RawContainerWriter.create(storage, tmp_path, ONE, FINE)
    path = container_path(tmp_path, ONE)
    assert storage.synced == [path]
    reader = ContainerReader.open(storage, tmp_path, ONE)
    blocks = blocks_of(600)
    out = memoryview(bytearray(BLOCK_BYTES))
    for index, block in enumerate(blocks):
        assert writer.append([block], [fingerprint(block)]) == index
        reader.read_into(index, 1, out)
        assert out == block
    assert reader.slots() == list(range(600))
    assert reader.fingerprints(250, 10) == b"".join(map(fingerprint, blocks[250:260]))
    assert read_slots(tmp_path, 200, 400) == b"".join(blocks[200:])
    writer.sync()
    assert storage.synced == [path, path]
    reader.close()
    writer.close()


def test_an_empty_container_has_no_slots(tmp_path: Path) -> None:
    RawContainerWriter.create(Storage(), tmp_path, ONE, FINE).close()
    reader = ContainerReader.open(Storage(), tmp_path, ONE)
    assert reader.slots() == []
    with pytest.raises(Damaged, match="past the file's end"):
        reader.read_into(0, 1, memoryview(bytearray(BLOCK_BYTES)))
    reader.close()


def test_a_container_is_never_made_over_another(tmp_path: Path) -> None:
    writer = fill(Storage(), tmp_path, ONE, blocks_of(1))
    writer.close()
    with pytest.raises(StoreFailed, match="there already"):
        RawContainerWriter.create(Storage(), tmp_path, ONE, FINE)
    assert read_slots(tmp_path, 0, 1) == blocks_of(1)[0]


def test_a_full_disk_leaves_no_half_made_container(tmp_path: Path) -> None:
    storage = FaultyStorage()
    storage.refuse_write_after = 10
    before = open_descriptors()
    with pytest.raises(StoreFull):
        RawContainerWriter.create(storage, tmp_path, ONE, FINE)
    assert os.listdir(tmp_path) == []
    assert open_descriptors() == before


@pytest.mark.parametrize("written", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 100, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 17])
def test_slots_of_a_failed_append_are_never_used_again(tmp_path: Path, written: int) -> None:
    storage = FaultyStorage()
    blocks = blocks_of(5)
    writer = fill(storage, tmp_path, ONE, blocks[:1])
    storage.refuse_write_after = written
    with pytest.raises(StoreFull):
        writer.append(blocks[1:3], [fingerprint(block) for block in blocks[1:3]])
    storage.refuse_write_after = None
    assert writer.next_slot == 3
    assert writer.append(blocks[3:], [fingerprint(block) for block in blocks[3:]]) == 3
    writer.close()
    assert read_slots(tmp_path, 0, 1) == blocks[0]
    assert read_slots(tmp_path, 3, 2) == b"".join(blocks[3:])
    for slot in (1, 2):
        try:
            found = read_slots(tmp_path, slot, 1)
        except Damaged as error:
            assert f"offset {RAW_SLOTS_OFFSET + slot * BLOCK_BYTES}" in str(error)
        else:
            assert found == blocks[slot]


def test_append_refuses_what_does_not_fit(tmp_path: Path) -> None:
    writer = RawContainerWriter.create(Storage(), tmp_path, ONE, FINE)
    writer.next_slot = layout.SLOTS_MAX - 1
    blocks = blocks_of(2)
    fingerprints = [fingerprint(block) for block in blocks]
    with pytest.raises(ValueError, match="1 slots free"):
        writer.append(blocks, fingerprints)
    with pytest.raises(ValueError, match="1 fingerprints for 5 bytes"):
        writer.append([b"short"], fingerprints[:1])
    assert writer.append(blocks[:1], fingerprints[:1]) == layout.SLOTS_MAX - 1
    assert writer.slots_free == 0
    writer.close()
    assert read_slots(tmp_path, layout.SLOTS_MAX - 1, 1) == blocks[0]


def test_no_flipped_byte_gives_wrong_bytes(tmp_path: Path) -> None:
    blocks = blocks_of(2)
    fill(Storage(), tmp_path, ONE, blocks).close()
    path = container_path(tmp_path, ONE)
    good = path.read_bytes()
    used_table = range(RAW_TABLE_OFFSET, RAW_TABLE_OFFSET + 32)
    slots = range(RAW_SLOTS_OFFSET, len(good))
    places = [
        *range(layout.CONTAINER_HEADER.size),
        40,
        4095,
        *used_table,
        RAW_TABLE_OFFSET + 33,
        *slots[::61],
        slots[-1],
    ]
    with path.open("r+b", buffering=0) as file:
        for place in places:
            os.pwrite(file.fileno(), bytes([good[place] ^ 0x10]), place)
            seen = 0
            for slot in (0, 1):
                try:
                    assert read_slots(tmp_path, slot, 1) == blocks[slot]
                    seen += 1
                except StoreError as error:
                    assert str(path) in str(error)
            is_slot_byte = place in used_table or place in slots
            assert seen == (0 if place < layout.CONTAINER_HEADER.size else 1 if is_slot_byte else 2), place
            os.pwrite(file.fileno(), good[place : place + 1], place)


def test_no_cut_gives_wrong_bytes(tmp_path: Path) -> None:
    blocks = blocks_of(2)
    fill(Storage(), tmp_path, ONE, blocks).close()
    path = container_path(tmp_path, ONE)
    size = path.stat().st_size
    for length in [*range(size - 1, RAW_SLOTS_OFFSET - 1, -97), RAW_SLOTS_OFFSET, RAW_TABLE_OFFSET, 40, 39, 1, 0]:
        os.truncate(path, length)
        readable = max(0, length - RAW_SLOTS_OFFSET) // BLOCK_BYTES
        for slot in (0, 1):
            if slot < readable:
                assert read_slots(tmp_path, slot, 1) == blocks[slot]
            else:
                with pytest.raises(Damaged, match=str(path)):
                    read_slots(tmp_path, slot, 1)


def test_the_file_of_another_container_is_refused(tmp_path: Path) -> None:
    fill(Storage(), tmp_path, ContainerId(2), blocks_of(1)).close()
    os.rename(container_path(tmp_path, ContainerId(2)), container_path(tmp_path, ONE))
    before = open_descriptors()
    with pytest.raises(Damaged, match="is container 2"):
        ContainerReader.open(Storage(), tmp_path, ONE)
    with pytest.raises(Damaged, match="is missing"):
        ContainerReader.open(Storage(), tmp_path, ContainerId(2))
    assert open_descriptors() == before


def make_pool(directory: Path, containers: int, *, open_max: int = 64) -> tuple[ContainerPool, dict[int, bytes]]:
    blocks = {}
    for number in range(1, containers + 1):
        mine = blocks_of(40, seed=number)
        fill(Storage(), directory, ContainerId(number), mine).close()
        blocks |= {address(ContainerId(number), slot): block for slot, block in enumerate(mine)}
    return ContainerPool(Storage(), directory, open_max=open_max), blocks


def test_pool_reads_runs_holes_and_single_blocks(tmp_path: Path) -> None:
    pool, blocks = make_pool(tmp_path, 3, open_max=2)
    source = random.Random(7)
    places = sorted(blocks)
    for _ in range(200):
        wanted: list[int] = []
        while len(wanted) < 30:
            start = source.randrange(len(places))
            wanted += source.choice([[0] * source.randrange(4), places[start : start + source.randrange(9)]])
        out = bytearray(b"x" * (len(wanted) * BLOCK_BYTES))
        pool.read_addresses(np.array(wanted, dtype=np.uint64), memoryview(out))
        assert bytes(out) == b"".join(blocks.get(where, bytes(BLOCK_BYTES)) for where in wanted)
        assert pool.read_block(places[start]) == blocks[places[start]]
        assert pool.fingerprints(places[start]) == fingerprint(blocks[places[start]])
    pool.read_addresses(np.array([], dtype=np.uint64), memoryview(b""))
    pool.close()


def test_pool_reads_a_run_at_once(tmp_path: Path) -> None:
    pool, blocks = make_pool(tmp_path, 1)
    sizes = []

    class Counting(Storage):
        def pread_into(self, fd: int, buffers: list[memoryview], offset: int, *, wait: bool = True) -> int:
            sizes.append(sum(buffer.nbytes for buffer in buffers))
            return super().pread_into(fd, buffers, offset, wait=wait)

    pool = ContainerPool(Counting(), tmp_path)
    out = memoryview(bytearray(32 * BLOCK_BYTES))
    pool.read_addresses(np.array(sorted(blocks)[:32], dtype=np.uint64), out)
    assert sizes == [32 * BLOCK_BYTES, 4096]
    pool.close()


def asked(pool: ContainerPool, pairs: list[tuple[int, bytes]]) -> list[bool]:
    """Whether the pool has these blocks at these addresses; they come as views, as those of a large write do."""
    addresses = np.array([where for where, _ in pairs], np.uint64)
    blocks = [memoryview(bytearray(block)) for _, block in pairs]
    return pool.same_each(addresses, blocks, [fingerprint(block) for _, block in pairs])


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "damage", [None, RAW_SLOTS_OFFSET + 17 * BLOCK_BYTES + 5, RAW_TABLE_OFFSET + 17 * 16 + 3, "cut"]
)
def test_pool_tells_which_blocks_are_the_same(tmp_path: Path, sealed: bool, damage: int | str | None) -> None:
    """Scattered or neighbours, in any order, several times each; never of one that is not there so."""
    pool, blocks = make_pool(tmp_path, 3)
    source, places, lost = random.Random(3), sorted(blocks), set()
    if damage is not None:
        path = container_path(tmp_path, ONE)
        with path.open("r+b") as file:
            if damage == "cut":
                file.truncate(RAW_SLOTS_OFFSET + 17 * BLOCK_BYTES)
                lost = {address(ONE, slot) for slot in range(17, 40)}
            else:
                file.seek(int(damage))
                file.write(bytes([path.read_bytes()[int(damage)] ^ 1]))
                lost = {address(ONE, 17)}
    if sealed:
        seal(Storage(), tmp_path, ContainerId(2), None)
    for count in (1, 2, 5, 60, 300):
        for _ in range(5):
            wanted: list[int] = []
            while len(wanted) < count:
                start = source.randrange(len(places))
                wanted += source.choice([source.choices(places, k=7), places[start : start + source.randrange(9)]])
            good = [(where, blocks[where]) for where in wanted if where not in lost]
            assert not good or all(asked(pool, good))
            # All under the fingerprints that the table has, or had, and not all of them there.
            known = [*good, *((where, blocks[where]) for where in lost)]
            source.shuffle(known)
            assert not any(same and where in lost for (where, _), same in zip(known, asked(pool, known), strict=True))
            wrong = [(where, blocks[source.choice(places)]) for where in wanted]
            nowhere = [(address(ContainerId(9), 3), blocks[places[0]]), (address(ONE, layout.SLOTS_MAX), bytes(4096))]
            mixed = [*good, *wrong, *nowhere, *((where, blocks[where]) for where in lost)]
            source.shuffle(mixed)
            for (where, block), is_same in zip(mixed, asked(pool, mixed), strict=True):
                assert not is_same or (block == blocks.get(where) and where not in lost)
    pool.close()


@pytest.mark.parametrize("sealed", [False, True])
def test_pool_compares_pieces_each_as_one(tmp_path: Path, sealed: bool) -> None:
    """The very blocks, where they lie one behind the other; nothing else, and no piece over the end of a container."""
    pool, blocks = make_pool(tmp_path, 3)
    if sealed:
        seal(Storage(), tmp_path, ContainerId(2), None)
    lengths, places = (7, 1, 20, 3), sorted(blocks)
    starts = [source * 40 + at for source, at in ((1, 30), (0, 5), (2, 0), (1, 30))]
    wanted = [place for start, count in zip(starts, lengths, strict=True) for place in places[start : start + count]]

    def asked_in_pieces(wanted: list[int], contents: list[bytes]) -> bool:
        marks = list(map(fingerprint, contents))
        whole, ends = memoryview(b"".join(contents)), np.cumsum(lengths) * BLOCK_BYTES
        pieces = [whole[end - length * BLOCK_BYTES : end] for end, length in zip(ends, lengths, strict=True)]
        return pool.same_pieces(np.array(wanted, np.uint64), pieces, marks)

    contents = [blocks[where] for where in wanted]
    assert asked_in_pieces(wanted, contents)
    for at in range(len(wanted)):
        assert not asked_in_pieces(wanted, [*contents[:at], contents[at][:-1] + b"x", *contents[at + 1 :]])
    swapped = [wanted[1], wanted[0], *wanted[2:]]
    assert not asked_in_pieces(swapped, [blocks[where] for where in swapped])
    over = places[35:66]
    assert not asked_in_pieces(over, [blocks[where] for where in over])
    path = container_path(tmp_path, ContainerId(1))
    content = bytearray(path.read_bytes())
    content[RAW_TABLE_OFFSET + (starts[1] * 16)] ^= 1
    path.write_bytes(content)
    pool.forget(ContainerId(1))
    assert not asked_in_pieces(wanted, contents)  # its bytes are right, its fingerprint is not
    pool.close()


def test_pool_compares_whole_blocks_only(tmp_path: Path) -> None:
    pool, blocks = make_pool(tmp_path, 1)
    pairs = [(where, blocks[where][:-1]) for where in list(blocks)[::2]]
    with pytest.raises(ValueError, match="4096"):
        asked(pool, pairs)
    pool.close()


def test_pool_reads_scattered_blocks_one_by_one_where_the_disk_refuses_some(tmp_path: Path) -> None:
    _, blocks = make_pool(tmp_path, 1)
    bad = address(ONE, 6)

    class Refusing(FaultyStorage):
        def pread(self, fd: int, length: int, offset: int) -> bytes:
            if length == BLOCK_BYTES and offset == RAW_SLOTS_OFFSET + 6 * BLOCK_BYTES:
                raise Unreadable("the disk refuses")
            return super().pread(fd, length, offset)

    pool = ContainerPool(Refusing(), tmp_path)
    pairs = [(where, blocks[where]) for where in list(blocks)[::2]]
    assert asked(pool, pairs) == [where != bad for where, _ in pairs]
    pool.close()


@pytest.mark.parametrize("count", [STREAM_BYTES // BLOCK_BYTES - 1, STREAM_BYTES // BLOCK_BYTES])
def test_room_is_reserved_for_what_streams_in(tmp_path: Path, count: int) -> None:
    asked_for: list[tuple[int, int]] = []

    class Noting(Storage):
        def reserve(self, fd: int, offset: int, length: int) -> None:
            asked_for.append((offset, length))
            super().reserve(fd, offset, length)

    blocks = blocks_of(count)
    fill(Noting(), tmp_path, ONE, blocks).close()
    expected = [(RAW_SLOTS_OFFSET, STREAM_BYTES)] if count * BLOCK_BYTES == STREAM_BYTES else []
    assert asked_for == expected
    assert read_slots(tmp_path, 0, count) == b"".join(blocks)


def test_pool_keeps_few_descriptors_and_gives_all_back(tmp_path: Path) -> None:
    before = open_descriptors()
    pool, blocks = make_pool(tmp_path, 12, open_max=4)
    for where, block in blocks.items():
        assert pool.read_block(where) == block
        assert open_descriptors() <= before + 4
    pool.close()
    assert open_descriptors() == before


def test_pool_never_closes_what_another_thread_reads(tmp_path: Path) -> None:
    before = open_descriptors()
    pool, blocks = make_pool(tmp_path, 6, open_max=1)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        source = random.Random(seed)
        try:
            for _ in range(400):
                where = source.choice(list(blocks))
                assert pool.read_block(where) == blocks[where]
                if source.random() < 0.1:
                    pool.forget(ContainerId(source.randrange(1, 7)))
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    pool.close()
    assert open_descriptors() == before


def test_pool_does_not_wait_when_told_not_to(tmp_path: Path) -> None:
    pool, blocks = make_pool(tmp_path, 1)
    wanted = np.array([0, *sorted(blocks)[:2]], dtype=np.uint64)
    out = memoryview(bytearray(3 * BLOCK_BYTES))
    with pytest.raises(WouldBlock):
        pool.read_addresses(wanted, out, wait=False)
    pool.read_addresses(wanted, out)
    out[:] = bytes(len(out))
    pool.read_addresses(wanted, out, wait=False)
    assert bytes(out) == bytes(BLOCK_BYTES) + b"".join(blocks[int(where)] for where in wanted[1:])
    pool.close()


def test_an_address_that_names_nothing_is_damage(tmp_path: Path) -> None:
    pool, _ = make_pool(tmp_path, 1)
    out = memoryview(bytearray(2 * BLOCK_BYTES))
    for wanted in ([address(ONE, 39), address(ONE, 40)], [address(ContainerId(9), 0), 0]):
        with pytest.raises(Damaged, match=r"\.rwc: offset"):
            pool.read_addresses(np.array(wanted, dtype=np.uint64), out)
    with pytest.raises(Damaged, match="past the file's end"):
        pool.read_block(address(ONE, layout.SLOTS_MAX))
    with pytest.raises(Damaged, match="a lost block"):
        pool.read_block(LOST)
    pool.close()


def in_memory(storage: Storage, path: Path, slot: int) -> bool:
    fd = storage.open(path, os.O_RDONLY)
    try:
        out = memoryview(bytearray(BLOCK_BYTES))
        return storage.pread_into(fd, [out], RAW_SLOTS_OFFSET + slot * BLOCK_BYTES, wait=False) == BLOCK_BYTES
    except OnItsWay:
        return False
    except WouldBlock:
        pytest.skip("this file system does not tell what is in memory")
    finally:
        storage.close(fd)


@pytest.mark.parametrize(("run", "passes"), [(STREAM_BYTES, True), (STREAM_BYTES - BLOCK_BYTES, False)])
def test_what_streams_in_leaves_memory_when_it_is_far_behind(
    tmp_path: Path, run: int, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup.container, "NEAR_BYTES", 4 * STREAM_BYTES)
    storage, blocks = Storage(), blocks_of(run // BLOCK_BYTES)
    fingerprints = [fingerprint(block) for block in blocks]
    writer = RawContainerWriter.create(storage, tmp_path, ONE, FINE)
    path = layout.container_path(tmp_path, ONE)
    for _ in range(16):
        writer.append([b"".join(blocks)], fingerprints)
        writer.let_pass()
        writer.sync()  # so that the disk has it
    assert in_memory(storage, path, 0) is not passes
    assert in_memory(storage, path, writer.next_slot - 1), "the newest may be written again"
    writer.close()
    assert in_memory(storage, path, writer.next_slot - 1) is not passes
    assert read_slots(tmp_path, 0, writer.next_slot) == b"".join(blocks) * 16


def test_what_streams_in_waits_for_no_more_than_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says `let_pass`: pieces that follow each other wait for PASSING_BYTES, others for the next one."""
    begun: list[tuple[int, int]] = []

    class Noting(Storage):
        def begin_write_back(self, fd: int, offset: int, length: int) -> None:
            begun.append(((offset - RAW_SLOTS_OFFSET) // BLOCK_BYTES, length // BLOCK_BYTES))

    monkeypatch.setattr(dedup.container, "PASSING_BYTES", 2 * STREAM_BYTES)
    count = STREAM_BYTES // BLOCK_BYTES
    blocks = blocks_of(count)
    fingerprints = [fingerprint(block) for block in blocks]
    writer = RawContainerWriter.create(Noting(), tmp_path, ONE, FINE)
    for _ in range(3):
        writer.append([b"".join(blocks)], fingerprints)
    assert begun == [(0, 2 * count)]
    writer.append(blocks[:1], fingerprints[:1])
    writer.append([b"".join(blocks)], fingerprints)
    assert begun[1:] == [(2 * count, count)]
    for _ in range(2):
        writer.let_pass()
        assert begun[2:] == [(3 * count + 1, count)]
    writer.close()
