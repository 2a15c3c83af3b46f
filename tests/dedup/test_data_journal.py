"""The data journal: which container, which sync, and failures half way."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import dedup.container
from dedup.container_pool import ContainerPool
from dedup.data_journal import DataJournal
from dedup.errors import StoreFailed, StoreFull
from dedup.layout import address, container_named, container_path, fingerprint
from dedup.storage import Storage
from dedup.types import Address, ContainerId, JournalId
from tests.dedup.faults import FaultyStorage, open_descriptors

SLOTS = 10


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that are full soon."""
    monkeypatch.setattr(dedup.container, "SLOTS_MAX", SLOTS)


def blocks_of(count: int, start: int = 0) -> tuple[list[bytes], list[bytes]]:
    blocks = [(start + index + 1).to_bytes(8, "little") * 512 for index in range(count)]
    return blocks, [fingerprint(block) for block in blocks]


def make(storage: Storage, directory: Path) -> DataJournal:
    numbers = itertools.count(1)
    return DataJournal(storage, directory, JournalId(1), "fine", lambda: ContainerId(next(numbers)))


def check(directory: Path, addresses: Sequence[int], blocks: list[bytes]) -> None:
    pool = ContainerPool(Storage(), directory)
    assert [pool.read_block(Address(int(where))) for where in addresses] == blocks
    pool.close()


def containers(directory: Path) -> list[int]:
    return sorted(number for name in os.listdir(directory) if (number := container_named(name)) is not None)


def test_addresses_run_on_through_containers(few_slots: None, tmp_path: Path) -> None:
    journal = make(Storage(), tmp_path)
    assert journal.container is None
    assert containers(tmp_path) == []
    assert len(journal.append([], [])) == 0
    blocks, fingerprints = blocks_of(34)
    addresses = [*journal.append(blocks[:7], fingerprints[:7]), *journal.append(blocks[7:], fingerprints[7:])]
    assert addresses == [address(ContainerId(1 + n // SLOTS), n % SLOTS) for n in range(34)]
    assert journal.container == 4
    check(tmp_path, addresses, blocks)
    journal.close()


def test_sync_covers_every_container_since_the_last_and_closes_the_full_ones(few_slots: None, tmp_path: Path) -> None:
    storage = FaultyStorage()
    before = open_descriptors()
    journal = make(storage, tmp_path)
    journal.append(*blocks_of(25))
    storage.synced.clear()
    journal.sync()
    assert storage.synced == [container_path(tmp_path, ContainerId(n)) for n in (1, 2, 3)]
    assert open_descriptors() == before + 1
    storage.synced.clear()
    journal.sync()
    assert storage.synced == [], "nothing is new"
    journal.append(*blocks_of(1, start=30))
    journal.sync()
    assert storage.synced == [container_path(tmp_path, ContainerId(3))]
    journal.close()
    assert open_descriptors() == before


def test_rotate_begins_a_new_container(tmp_path: Path) -> None:
    storage = FaultyStorage()
    journal = make(storage, tmp_path)
    journal.rotate()
    journal.append(*blocks_of(1))
    journal.rotate()
    assert journal.container is None
    assert list(journal.append(*blocks_of(1, 5))) == [address(ContainerId(2), 0)]
    storage.synced.clear()
    journal.sync()
    assert storage.synced == [container_path(tmp_path, ContainerId(n)) for n in (1, 2)]
    journal.close()


def test_a_container_that_failed_is_abandoned_and_still_synced(few_slots: None, tmp_path: Path) -> None:
    storage = FaultyStorage()
    journal = make(storage, tmp_path)
    blocks, fingerprints = blocks_of(12)
    first = journal.append(blocks[:3], fingerprints[:3])
    storage.refuse_write_after = 5000
    with pytest.raises(StoreFull):
        journal.append(blocks[3:6], fingerprints[3:6])
    storage.refuse_write_after = None
    again = journal.append(blocks[3:], fingerprints[3:])
    assert list(again) == [address(ContainerId(2), n) for n in range(9)]
    storage.synced.clear()
    journal.sync()
    assert storage.synced == [container_path(tmp_path, ContainerId(n)) for n in (1, 2)]
    check(tmp_path, [*first, *again], blocks)
    journal.close()


def test_a_full_disk_does_not_gather_containers(tmp_path: Path) -> None:
    storage = FaultyStorage()
    before = open_descriptors()
    journal = make(storage, tmp_path)
    for room in (0, 30, 100, 5000, 100):
        storage.refuse_write_after = room
        with pytest.raises(StoreFull):
            journal.append(*blocks_of(3))
    assert containers(tmp_path) == []
    assert open_descriptors() == before
    storage.refuse_write_after = None
    blocks, fingerprints = blocks_of(3)
    addresses = journal.append(blocks, fingerprints)
    check(tmp_path, [int(where) for where in addresses], blocks)
    journal.close()


def test_a_mistake_of_the_caller_takes_nothing_away(tmp_path: Path) -> None:
    journal = make(Storage(), tmp_path)
    blocks, fingerprints = blocks_of(2)
    addresses = journal.append(blocks, fingerprints)
    with pytest.raises(ValueError, match="1 fingerprints for 8192 bytes"):
        journal.append(blocks, fingerprints[:1])
    check(tmp_path, [int(where) for where in addresses], blocks)
    journal.close()


def test_nothing_goes_on_after_a_failed_sync(tmp_path: Path) -> None:
    storage = FaultyStorage()
    journal = make(storage, tmp_path)
    journal.append(*blocks_of(1))
    storage.refuse_sync = True
    with pytest.raises(StoreFailed):
        journal.sync()
    storage.refuse_sync = False  # the kernel would now call it success
    with pytest.raises(StoreFailed):
        journal.sync()
    with pytest.raises(StoreFailed):
        journal.append(*blocks_of(1))
    journal.close()


def test_sync_beside_append(few_slots: None, tmp_path: Path) -> None:
    storage = FaultyStorage()
    journal = make(storage, tmp_path)
    done = threading.Event()
    faults: list[BaseException] = []

    def sync_all_the_time() -> None:
        try:
            while not done.is_set():
                journal.sync()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            faults.append(error)

    thread = threading.Thread(target=sync_all_the_time)
    thread.start()
    blocks, fingerprints = blocks_of(300)
    addresses: list[int] = []
    for start in range(0, 300, 3):
        addresses += journal.append(blocks[start : start + 3], fingerprints[start : start + 3]).tolist()
    done.set()
    thread.join()
    assert faults == []
    journal.sync()
    # Each container is synced when it is made, and at least once after it was full.
    for number in range(1, 31):
        assert storage.synced.count(container_path(tmp_path, ContainerId(number))) >= 2
    check(tmp_path, addresses, blocks)
    journal.close()
