"""Healing: the bytes of a damaged slot that arrive again make it whole, and with it every moment that names it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from dedup.container import RawContainerWriter
from dedup.container_pool import ContainerPool
from dedup.errors import Damaged
from dedup.healing import Healer, head_ranges
from dedup.layout import address, container_path, fingerprint
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import FINE_JOURNAL, LOST, ContainerId, Seq, VolumeId
from dedup.verify import verify
from tests.dedup.model import Model
from tests.dedup.test_repair import flip, slot_at
from tests.dedup.test_store import check_moment

BLOCK = 4096
A = VolumeId(1)
WHERE = address(ContainerId(1), 3)
"""Where block 3 of what `opened` writes lies."""


@pytest.fixture(params=["raw", "sealed"])
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Store, Model, bytes]:
    """A store that is open, of whose container 1 slot 3 is damaged; what that held is in a past moment alone."""
    path, model = tmp_path / "store", Model()
    Store.create(path)
    store = Store.open(path)
    dice = random.Random(3)
    data = b"".join(2 * dice.randbytes(BLOCK // 2) for _ in range(40))  # half of it is news: sealed, it is compressed
    store.group("g").ingest([*model.begin(), model.create("a.img")])
    store.group("g").ingest([model.write(A, 0, data), model.write(A, 3 * BLOCK, b"newer" * 1000)])
    store.close()
    container = container_path(path / "containers", ContainerId(1))
    if request.param == "sealed":
        seal(Storage(), path / "containers", ContainerId(1), None)
        flip(container, 6000)  # a group's bytes, so more than this one block
        assert not verify(path, read_data=True).ok
    else:
        flip(container, slot_at(3) + 100)
    store = Store.open(path)
    with pytest.raises(Damaged):
        store.pool.read_block(WHERE)
    return store, model, data[3 * BLOCK : 4 * BLOCK]


def test_a_block_that_arrives_again_heals_every_moment(opened: tuple[Store, Model, bytes]) -> None:
    store, model, block = opened
    group = store.group("g")
    group.ingest([model.write(A, 30 * BLOCK, block)])
    assert store.healer.wounds.healed == 1
    assert group.head_address(A, 30) == WHERE, "shared, not stored anew"
    assert store.pool.read_block(WHERE) == block
    path = store.path
    sealed = (path / "quarantine").exists()
    if not sealed:
        for seq in model.history:
            check_moment(group.reader(), model, seq)
    store.close()
    assert verify(path, read_data=True).ok is not sealed, (
        "of the sealed one, the other blocks of the group are lost yet"
    )


def test_a_group_of_a_sealed_container_heals_block_by_block(opened: tuple[Store, Model, bytes]) -> None:
    store, model, _ = opened
    content = model.history[4][0][A]
    store.group("g").ingest([model.write(A, 64 * BLOCK, content)])
    for seq in model.history:
        check_moment(store.group("g").reader(), model, seq)
    store.close()
    assert verify(store.path, read_data=True).ok


def test_other_bytes_heal_nothing(opened: tuple[Store, Model, bytes]) -> None:
    store, _, block = opened
    other = b"x" * BLOCK
    assert not store.healer.heal(WHERE, fingerprint(block), other), "not what the fingerprint says"
    assert not store.healer.heal(WHERE, fingerprint(other), other), "not what the slot is to hold"
    assert not store.healer.heal(address(ContainerId(77), 0), fingerprint(block), block), "no such container"
    assert not store.healer.heal(address(ContainerId(1), 0xFFFF), fingerprint(block), block), "no such slot"
    with pytest.raises(Damaged):
        store.pool.read_block(WHERE)
    store.close()


def test_what_the_head_lacks_is_asked_for_once(opened: tuple[Store, Model, bytes]) -> None:
    store, _, _ = opened
    group = store.group("g")
    wounds = store.healer.wounds
    wounds.note([WHERE])
    assert wounds.take("g").tolist() == [WHERE] and wounds.take("g").tolist() == []
    wounds.note([WHERE])
    assert wounds.take("g").tolist() == [WHERE], "it was found damaged again"
    assert wounds.take("other").tolist() == [WHERE]
    bad = np.array([WHERE, address(ContainerId(1), 7)], dtype=np.uint64)
    found = list(head_ranges(store.index, group.reader(), group.catalog.group_id, bad))
    assert found == [(A, 7, 1)], "block 3 was written over: only the past has the damaged one"
    store.close()


def test_a_block_lost_under_a_partial_write_is_asked_for(opened: tuple[Store, Model, bytes]) -> None:
    store, model, _ = opened
    group = store.group("g")
    try:
        store.pool.read_block(address(ContainerId(1), 9))
        flip(container_path(store.path / "containers", ContainerId(1)), slot_at(9))  # the raw one
    except Damaged:
        pass  # of the sealed one the whole group is
    group.ingest([model.write(A, 9 * BLOCK + 5, b"in part")])
    assert store.healer.wounds.take("g").tolist() == [LOST]
    found = list(head_ranges(store.index, group.reader(), group.catalog.group_id, np.array([], dtype=np.uint64)))
    assert found == [(A, 9, 1)]
    group.ingest([model.reconcile(A, 9 * BLOCK, model.content[A][9 * BLOCK : 10 * BLOCK])])
    reader = group.reader()
    image = reader.image(A, Seq(model.seq))
    assert image.read(9 * BLOCK, BLOCK) == model.content[A][9 * BLOCK : 10 * BLOCK]
    store.close()


def test_a_container_that_is_sealed_at_that_instant_is_left(tmp_path: Path) -> None:
    """A sealed one's table can have the fingerprint where the raw one's has it: here all of them lie there."""

    class Sealing(Storage):
        def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
            if flags & os.O_RDWR and path.suffix == ".rwc":
                seal(Storage(), tmp_path, ContainerId(1), range(4, 36))
            return super().open(path, flags, mode)

    blocks = [random.Random(slot).randbytes(BLOCK) for slot in range(36)]
    writer = RawContainerWriter.create(Storage(), tmp_path, ContainerId(1), FINE_JOURNAL)
    writer.append(blocks, [fingerprint(block) for block in blocks])
    writer.close()
    storage = Sealing()
    healer = Healer(storage, tmp_path, tmp_path, ContainerPool(storage, tmp_path))
    healer.heal(address(ContainerId(1), 9), fingerprint(blocks[9]), blocks[9])
    healed = container_path(tmp_path, ContainerId(1)).read_bytes()
    seal(Storage(), tmp_path, ContainerId(1), None)
    assert container_path(tmp_path, ContainerId(1)).read_bytes() == healed
