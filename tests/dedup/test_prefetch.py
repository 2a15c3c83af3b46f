"""Chunks fetched ahead: each once, a bounded number of them, none that failed; and an image read through them."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import prefetch
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged, OnItsWay, StoreFailed, WouldBlock
from dedup.image import CHUNK_BLOCKS, Image, room_for
from dedup.layout import CONTAINERS_NAME, SLOT_BITS, SLOT_MASK, container_named, container_path
from dedup.pointer_map import Addresses
from dedup.prefetch import CHUNKS_MAX, Prefetch
from dedup.reader import StoreReader
from dedup.sealed import seal
from dedup.sealed_layout import SEALED_GROUP, SEALED_TABLE_OFFSET, unpack_sealed_header
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import BLOCK_BYTES, ContainerId, Seq
from tests.dedup.model import Model

CHUNK_BYTES = CHUNK_BLOCKS * BLOCK_BYTES
SIZE = 6 * CHUNK_BYTES + 5000
READ_BYTES = 128 << 10


class Gate:
    """A fetch that waits to be let through, and counts its calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.open = threading.Event()
        self.calls = 0
        self._error = error

    def __call__(self) -> memoryview:
        self.calls += 1
        assert self.open.wait(60)
        if self._error is not None:
            raise self._error
        return memoryview(b"chunk")


@pytest.fixture
def ahead() -> Iterator[Prefetch]:
    made = Prefetch()
    yield made
    made.close()


def test_a_chunk_is_fetched_once_and_found_until_it_was_read(ahead: Prefetch) -> None:
    gate = Gate()
    assert ahead.find(1) is None
    assert ahead.begin(1, gate)
    assert ahead.begin(1, gate)
    found = ahead.find(1)
    assert found is not None
    assert not found.done()
    gate.open.set()
    assert bytes(found.result(60)) == b"chunk"
    assert ahead.find(1) is found
    assert gate.calls == 1
    ahead.drop(1)
    ahead.drop(1)
    assert ahead.find(1) is None


@pytest.mark.parametrize(("error", "lines"), [(Damaged("rot"), 0), (MemoryError(), 1)])
def test_what_failed_is_not_there(
    ahead: Prefetch, error: Exception, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(error)
    assert ahead.begin(1, gate)
    found = ahead.find(1)
    assert found is not None
    gate.open.set()
    assert found.exception(60) is error
    assert ahead.find(1) is None
    assert ahead.find(1) is None
    assert len(caplog.records) == lines


def test_no_more_than_there_is_room_for(ahead: Prefetch, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    gate.open.set()
    for chunk in range(CHUNKS_MAX):
        assert ahead.begin(chunk, gate)
        found = ahead.find(chunk)
        assert found is not None
        found.result(60)
    assert not ahead.begin(-1, gate)
    ahead.drop(3)
    assert ahead.begin(-1, gate)
    assert not ahead.begin(-2, gate)
    monkeypatch.setattr(prefetch, "ABANDONED_SECONDS", -1.0)
    assert ahead.begin(-2, gate)
    assert ahead.find(0) is None


def test_what_is_being_fetched_takes_its_room(ahead: Prefetch) -> None:
    """Though somebody has read it by himself meanwhile."""
    gate = Gate()
    for chunk in range(CHUNKS_MAX):
        assert ahead.begin(chunk, gate)
        ahead.drop(chunk)
    assert not ahead.begin(-1, gate)
    found = ahead.find(0)
    assert found is not None
    gate.open.set()
    assert bytes(found.result(60)) == b"chunk"
    ahead.drop(0)
    assert ahead.begin(-1, gate)


def test_what_is_being_fetched_is_not_abandoned(ahead: Prefetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "ABANDONED_SECONDS", -1.0)
    gate = Gate()
    assert ahead.begin(1, gate)
    ahead.drop_abandoned()
    found = ahead.find(1)
    assert found is not None
    gate.open.set()
    found.result(60)
    ahead.drop_abandoned()
    assert ahead.find(1) is None


@pytest.mark.parametrize("given", [0, 1])
def test_without_threads_nothing_is_fetched(ahead: Prefetch, monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    """And what was refused is not done later, when there are threads."""
    start, started = threading.Thread.start, 0

    def some(thread: threading.Thread) -> None:
        nonlocal started
        if started == given:
            raise RuntimeError("can't start new thread")
        started += 1
        start(thread)

    gate = Gate()
    gate.open.set()
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", some)
        for _ in range(5):
            assert not ahead.begin(1, gate)
            assert ahead.find(1) is None
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert set(threading.enumerate()) <= before
    for chunk in (1, 2):
        assert ahead.begin(chunk, gate)
        found = ahead.find(chunk)
        assert found is not None
        assert bytes(found.result(60)) == b"chunk"
    assert gate.calls == 2


# An image


class Shop:
    """A store with one volume, and its reader; its containers are compressed where they are sealed."""

    def __init__(self, directory: Path, *, sealed: bool = True) -> None:
        Store.create(directory)
        store = Store.open(directory)
        model, group = Model(), store.group("g")
        group.ingest(model.begin())
        created = model.create("a.img", SIZE)
        group.ingest([created])
        dice = random.Random(1)
        for at in range(0, SIZE, 1 << 20):
            if at != 2 << 20:  # a hole
                data = b"".join([dice.randbytes(64) * 64 for _ in range(at, min(at + (1 << 20), SIZE), BLOCK_BYTES)])
                group.ingest([model.write(created.volume, at, data[: SIZE - at])])
        self.content = model.content[created.volume]
        self.seq = Seq(model.seq)
        self.volume = created.volume
        for at in range(BLOCK_BYTES, SIZE, 1 << 20):  # a later moment, another one in each chunk
            group.ingest([model.write(created.volume, at, dice.randbytes(64))])
        self.later_content, self.later_seq = model.content[created.volume], Seq(model.seq)
        store.close()
        for name in sorted(os.listdir(directory / CONTAINERS_NAME)):
            container = container_named(name)
            if sealed and container is not None:
                seal(Storage(), directory / CONTAINERS_NAME, container, None)
        self.store = StoreReader.open(directory)

    def image(self, seq: Seq | None = None) -> Image:
        group = self.store.group()
        group.refresh()
        return group.image(self.volume, self.seq if seq is None else seq)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    made = Shop(tmp_path_factory.mktemp("prefetch") / "store")
    yield made
    made.store.close()


@pytest.mark.parametrize("sealed", [True, False])
def test_who_reads_on_finds_what_was_fetched(tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first chunk, and a hole; and for what is not compressed and in a container that is open."""
    shop = Shop(tmp_path / "store", sealed=sealed)
    image = shop.image()
    by_himself = 0
    read = ContainerPool.read_addresses

    def counting(pool: ContainerPool, addresses: Addresses, out: memoryview, *, wait: bool = True) -> None:
        nonlocal by_himself
        if threading.current_thread() is threading.main_thread():
            by_himself += len(addresses) * BLOCK_BYTES
        read(pool, addresses, out, wait=wait)

    monkeypatch.setattr(ContainerPool, "read_addresses", counting)
    got = b"".join([image.read(at, READ_BYTES) for at in range(0, SIZE, READ_BYTES)])
    assert got == shop.content
    assert by_himself == (2 * CHUNK_BYTES if sealed else SIZE + -SIZE % BLOCK_BYTES)
    shop.store.close()


def test_each_image_has_its_own(shop: Shop) -> None:
    earlier, later = shop.image(), shop.image(shop.later_seq)
    for at in range(0, SIZE, READ_BYTES):
        assert earlier.read(at, READ_BYTES) == shop.content[at : at + READ_BYTES]
        assert later.read(at, READ_BYTES) == shop.later_content[at : at + READ_BYTES]


def test_who_has_read_all_of_an_image_leaves_room_for_others(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last chunk, too, which is shorter."""
    begin = Prefetch.begin

    def counting(ahead: Prefetch, chunk: Hashable, fetch: Callable[[], memoryview]) -> bool:
        begun.append(begin(ahead, chunk, fetch))
        return begun[-1]

    begun: list[bool] = []
    monkeypatch.setattr(prefetch, "ABANDONED_SECONDS", -1.0)
    shop.store.pool.prefetch.drop_abandoned()  # of other tests
    monkeypatch.setattr(prefetch, "ABANDONED_SECONDS", 1e9)
    monkeypatch.setattr(Prefetch, "begin", counting)
    for _ in range(CHUNKS_MAX + 1):
        image = shop.image()
        for at in range(0, SIZE, READ_BYTES):
            image.read(at, READ_BYTES)
    assert begun == [True] * len(begun)
    assert len(begun) > CHUNKS_MAX


def test_who_does_not_wait_is_told_whose_work_to_wait_for(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    image = shop.image()
    let = threading.Event()
    read = ContainerPool.read_addresses

    def held(pool: ContainerPool, addresses: Addresses, out: memoryview, *, wait: bool = True) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert let.wait(60)
        read(pool, addresses, out, wait=wait)

    monkeypatch.setattr(ContainerPool, "read_addresses", held)
    for at in range(0, CHUNK_BYTES, READ_BYTES):
        image.read(at, READ_BYTES)
    with pytest.raises(OnItsWay) as caught:
        image.read(CHUNK_BYTES - 10, 20, wait=False)
    assert caught.value.work is not None
    let.set()
    caught.value.work.result(60)
    assert image.read(CHUNK_BYTES - 10, 20, wait=False) == shop.content[CHUNK_BYTES - 10 : CHUNK_BYTES + 10]


def test_what_was_given_stays_as_it_is(shop: Shop) -> None:
    """However many chunks come after it."""
    image = shop.image()
    buffer = memoryview(bytearray(room_for(CHUNK_BYTES)))
    for at in range(0, CHUNK_BYTES, READ_BYTES):
        image.read(at, READ_BYTES)
    kept = image.read_into(CHUNK_BYTES, CHUNK_BYTES, buffer)
    other = shop.image()
    for at in range(0, SIZE, READ_BYTES):
        image.read_into(at, READ_BYTES, buffer)
        other.read(at, READ_BYTES)
    assert bytes(kept) == shop.content[CHUNK_BYTES : 2 * CHUNK_BYTES]


def test_what_is_amiss_ahead_is_not_told_to_who_reads_before_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pool: ContainerPool, addresses: Addresses) -> bool:
        nonlocal looked
        looked += 1
        raise StoreFailed("the container ahead cannot be examined")

    looked = 0
    monkeypatch.setattr(ContainerPool, "is_compressed", refused)
    image = shop.image()
    assert b"".join([image.read(at, READ_BYTES) for at in range(0, SIZE, READ_BYTES)]) == shop.content
    assert looked


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, SIZE), st.sampled_from([1, 4096, READ_BYTES, CHUNK_BYTES, 3 * CHUNK_BYTES]))
        | st.tuples(st.just(-1), st.sampled_from([5000, READ_BYTES, CHUNK_BYTES])),
        max_size=30,
    ),
    st.booleans(),
)
def test_the_same_bytes_in_whatever_way_they_are_read(shop: Shop, reads: list[tuple[int, int]], wait: bool) -> None:
    """-1: on from where the last read ended."""
    image = shop.image()
    at = 0
    for offset, length in reads:
        at = at if offset < 0 else offset
        try:
            assert image.read(at, length, wait=wait) == shop.content[at : at + length]
        except WouldBlock:
            assert not wait
            assert image.read(at, length) == shop.content[at : at + length]
        at += length


def spoil(shop: Shop, image: Image, at: int) -> int:
    """Of the group that holds the image's block at that offset. Returns how many blocks are lost."""
    (address,) = image.addresses(at // BLOCK_BYTES, 1).tolist()
    path = container_path(shop.store.path / CONTAINERS_NAME, ContainerId(address >> SLOT_BITS))
    data = bytearray(path.read_bytes())
    header = unpack_sealed_header(bytes(data), path)
    slots = np.frombuffer(data, "<u2", header.slots, SEALED_TABLE_OFFSET).tolist()
    group = slots.index(address & SLOT_MASK) // header.blocks_a_group
    (begin, *_) = SEALED_GROUP.struct.unpack_from(data, header.groups_offset + group * SEALED_GROUP.size)
    data[begin + 100] ^= 1
    path.write_bytes(data)
    return len(slots[group * header.blocks_a_group :][: header.blocks_a_group])


def test_damage_ahead_is_met_by_who_reads_it(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "store")
    try:
        image = shop.image()
        at = 3 * CHUNK_BYTES + 7 * BLOCK_BYTES
        lost = spoil(shop, image, at)
        damaged = []
        for begin in range(0, SIZE, BLOCK_BYTES):
            try:
                assert image.read(begin, BLOCK_BYTES) == shop.content[begin : begin + BLOCK_BYTES]
            except Damaged as damage:
                assert f"bytes {begin}..{begin + BLOCK_BYTES}" in str(damage)
                damaged.append(begin)
        assert at in damaged
        assert len(damaged) == lost
    finally:
        shop.store.close()


def test_what_fails_just_as_it_was_found_costs_no_other_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(tmp_path / "store")
    let = threading.Event()
    read, find = ContainerPool.read_addresses, Prefetch.find

    def held(pool: ContainerPool, addresses: Addresses, out: memoryview, *, wait: bool = True) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert let.wait(60)
        read(pool, addresses, out, wait=wait)

    def ended_since(ahead: Prefetch, chunk: Hashable) -> Future[memoryview] | None:
        found = find(ahead, chunk)
        if found is not None:
            let.set()
            assert isinstance(found.exception(60), Damaged)
        return found

    monkeypatch.setattr(ContainerPool, "read_addresses", held)
    try:
        image = shop.image()
        spoil(shop, image, 2 * CHUNK_BYTES - BLOCK_BYTES)
        for at in range(0, CHUNK_BYTES, READ_BYTES):
            image.read(at, READ_BYTES)
        monkeypatch.setattr(Prefetch, "find", ended_since)
        assert image.read(CHUNK_BYTES, READ_BYTES) == shop.content[CHUNK_BYTES:][:READ_BYTES]
        assert let.is_set()
    finally:
        let.set()
        shop.store.close()
