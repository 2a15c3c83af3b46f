"""What a store makes of failing disks, killed writers and impossible records: nothing passes for kept that is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dedup.errors import Damaged, MomentRefused, StoreError, StoreFailed
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import ReconcileBegin, Retire, Seq, VolumeId
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment, filled


class WatchedStorage(Storage):
    """Notes what is synced, and fails the sync of files with one suffix when told."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[str] = []
        self.failing = ""

    def datasync(self, fd: int) -> None:
        path = self.path_of(fd)
        if self.failing and path.suffix == self.failing:
            raise StoreFailed(f"{path}: sync failed: made to fail")
        self.synced.append(path.name)
        super().datasync(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def containers(path: Path) -> list[str]:
    return sorted(os.listdir(path / "containers"))


@pytest.mark.parametrize("suffix", [".rwj", ".rwc"])
def test_after_a_failed_sync_nothing_more_is_kept(path: Path, suffix: str) -> None:
    storage = WatchedStorage()
    store, model = Store.open(path, storage), Model()
    group = store.group("g")
    group.ingest(model.begin())
    create = model.create("disk.img", 1 << 20)
    group.ingest([create, model.write(create.volume, 0, b"kept" * 1024)])
    store.sync()
    durable = model.seq
    group.ingest([model.write(create.volume, 0, b"gone" * 1024)])
    storage.failing = suffix
    with pytest.raises(StoreFailed):
        store.sync()
    storage.failing = ""
    for call in (store.sync, store.checkpoint, lambda: group.ingest([model.write(create.volume, 0, b"late" * 1024)])):
        with pytest.raises(StoreFailed):
            call()
    store.abandon()
    reopened = Store.open(path)
    assert (reopened.group("g").held, reopened.group("g").durable) == (durable, durable)
    check_moment(reopened.group("g").reader(), model, durable)
    reopened.close()


def test_what_a_killed_writer_left_in_the_page_cache_is_synced(path: Path) -> None:
    store, model, volume = filled(path)
    store.checkpoint()
    store.group("g").ingest([model.write(volume, 0, os.urandom(8192))])
    store.abandon()
    left = containers(path)
    storage = WatchedStorage()
    reopened = Store.open(path, storage)
    assert reopened.group("g").durable == model.seq
    assert left and set(left) <= set(storage.synced)
    check_moment(reopened.group("g").reader(), model, model.seq)
    reopened.close()


def test_a_new_group_is_no_lost_index(path: Path) -> None:
    """Before its first checkpoint, too, blocks that did not reach the disk end the journal."""
    store, model, volume = filled(path)
    store.sync()
    durable = model.seq
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.abandon()
    (container,) = containers(path)
    with open(path / "containers" / container, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    reopened = Store.open(path)
    assert reopened.group("g").held == durable
    reopened.close()


def test_a_record_that_cannot_be_is_refused_before_it_is_journalled(path: Path) -> None:
    store, model, volume = filled(path)
    group = store.group("g")
    for bad in (
        lambda: [Retire(*model._next(), VolumeId(99))],
        lambda: [model.retire(volume), Retire(*model._next(), volume)],
        lambda: [Model.create(twin(model, volume), "again.img")],
    ):
        held, before = group.held, (model.seq, dict(model.content), dict(model.paths))
        with pytest.raises(StoreError, match="volume"):
            group.ingest(bad())
        assert group.held == held
        model.seq, model.content, model.paths = before
    group.ingest([model.write(volume, 0, b"goes on")])
    store.abandon()
    reopened = Store.open(path)
    check_moment(reopened.group("g").reader(), model, model.seq)
    reopened.close()


def test_a_rotten_block_stops_nothing_and_is_healed_by_a_whole_one(path: Path) -> None:
    store, model, volume = filled(path)
    group = store.group("g")
    group.ingest([model.write(volume, 0, os.urandom(8192))])
    store.checkpoint()
    (container,) = containers(path)
    with open(path / "containers" / container, "r+b") as file:
        file.seek(-8192, os.SEEK_END)
        file.write(b"rot")
    group.ingest([model.write(volume, 100, b"in part"), model.write(volume, 4096 + 5, b"beside it")])
    group.ingest([model.resize(volume, 2000), model.resize(volume, 1 << 20)])
    image = group.reader().image(volume, Seq(model.seq))
    with pytest.raises(Damaged, match="disk.img"):
        image.read(0, 4096)
    assert image.read(4096, 4096) == bytes(4096)
    group.ingest([model.write(volume, 0, os.urandom(4096))])
    check_moment(group.reader(), model, model.seq)
    store.close()


def twin(model: Model, volume: VolumeId) -> Model:
    """A model at the same seq that gives `volume` again."""
    return Model(model.seq, volume, dict(model.content), dict(model.paths))


def test_a_correct_reaches_back_before_a_gap_that_is_open(path: Path) -> None:
    store, model, volume = filled(path)
    group = store.group("g")
    good = model.seq
    refused = model.write(volume, 0, b"refused")
    begin = ReconcileBegin(*model._next(), "an outage")
    group.ingest([refused, begin, model.correct(volume, refused.seq, 1 << 20, 0, bytes(7))])
    reader = group.reader()
    assert reader.resolve(f"seq={good}").seq == good
    for seq in range(refused.seq, model.seq + 1):
        with pytest.raises(MomentRefused, match="gap"):
            reader.resolve(f"seq={seq}")
    store.close()
