"""What a store makes of failing disks, killed writers and impossible records: nothing passes for kept that is not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from dedup import fingerprint_index, layout
from dedup.errors import Damaged, MomentRefused, NotAStore, StoreError, StoreFailed, StoreFull, Unreadable
from dedup.fingerprint_runs import FAN, RUN_SUFFIX, run_named
from dedup.layout import fingerprint
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.types import ReconcileBegin, Retire, Seq, VolumeId
from dedup.verify import verify
from tests.dedup.faults import open_descriptors
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment, filled


class WatchedStorage(Storage):
    """Notes what is synced, and fails the sync of files whose names have one end when told."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[str] = []
        self.failing = ""

    def datasync(self, fd: int) -> None:
        path = self.path_of(fd)
        if self.failing and path.name.endswith(self.failing):
            raise StoreFailed(f"{path}: sync failed: made to fail")
        self.synced.append(path.name)
        super().datasync(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


class RefusingStorage(Storage):
    """Refuses what it is told to, of files with one suffix."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.syncs = ""

    def pread_into(self, fd: int, buffers: list[memoryview], offset: int, *, wait: bool = True) -> int:
        if self.reads and self.path_of(fd).suffix == self.reads:
            raise Unreadable(f"{self.path_of(fd)}: offset {offset}: cannot be read: made to fail")
        return super().pread_into(fd, buffers, offset, wait=wait)

    def sync_directory(self, path: Path) -> None:
        if self.syncs and path.name == self.syncs:
            raise StoreFailed(f"{path}: sync failed: made to fail")
        super().sync_directory(path)


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
        store.sync_files()
    storage.failing = ""
    for call in (
        store.sync,
        store.sync_files,
        store.checkpoint,
        lambda: group.ingest([model.write(create.volume, 0, b"late" * 1024)]),
    ):
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
    return Model(model.seq, next_volume=volume, content=dict(model.content), paths=dict(model.paths))


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


def test_a_store_that_was_left_half_made_is_made(tmp_path: Path) -> None:
    for name in ("index", "containers"):
        (tmp_path / "half" / name).mkdir(parents=True)
    (tmp_path / "half" / "STORE.tmp").write_bytes(b"torn")
    Store.create(tmp_path / "half")
    Store.open(tmp_path / "half").close()
    (tmp_path / "theirs" / "containers" / "things").mkdir(parents=True)
    with pytest.raises(NotAStore, match="neither empty nor a store"):
        Store.create(tmp_path / "theirs")


def test_an_opening_that_fails_gives_everything_back(path: Path) -> None:
    storage = RefusingStorage()
    for name in ("index", "containers"):
        storage.syncs = name
        with pytest.raises(StoreFailed, match=name):
            Store.open(path, storage)
    Store.open(path).close()


def test_a_run_that_cannot_be_read_costs_space_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)
    store, model, volume = filled(path)
    first = os.urandom(8192)
    for data in (first, os.urandom(8192), os.urandom(8192)):
        store.group("g").ingest([model.write(volume, 0, data)])
        if data is first:
            held = store.group("g").head_address(volume, 0)
        store.checkpoint()
    store.close()
    known = open_descriptors()

    class Blind(Storage):
        def pread(self, fd: int, length: int, offset: int) -> bytes:
            if self.path_of(fd).suffix == RUN_SUFFIX:
                raise Unreadable(f"{self.path_of(fd)}: offset {offset}: cannot be read: made to fail")
            return super().pread(fd, length, offset)

    store = Store.open(path, Blind())
    group = store.group("g")
    group.ingest([model.write(volume, 8192, first)])
    assert group.head_address(volume, 2) != held, "stored once more"
    store.close()
    for _ in range(2):
        store = Store.open(path)
        group = store.group("g")
        group.ingest([model.write(volume, 16384, model.content[volume][8192:16384])])
        assert group.head_address(volume, 4) in (held, group.head_address(volume, 2)), "shared with either"
        check_moment(group.reader(), model, model.seq)
        store.close()
    assert open_descriptors() == known


def test_a_run_that_cannot_be_synced_stops_the_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)
    store, model, volume = filled(path)
    store.close()
    storage = WatchedStorage()
    store = Store.open(path, storage)
    group = store.group("g")
    for _ in range(2):
        group.ingest([model.write(volume, 0, os.urandom(8192))])
        store.checkpoint()
    assert any(name.endswith(RUN_SUFFIX) for name in storage.synced)
    group.ingest([model.write(volume, 0, os.urandom(8192))])
    storage.failing = RUN_SUFFIX
    with pytest.raises(StoreFailed, match="made to fail"):
        store.checkpoint()
    storage.failing = ""
    later = Seq(model.seq)
    calls = (
        store.sync,
        store.checkpoint,
        store.merge,
        lambda: group.ingest([twin(model, volume).write(volume, 0, b"late")]),
    )
    for call in calls:
        with pytest.raises(StoreFailed, match="made to fail"):
            call()
    store.close()
    store = Store.open(path)
    assert store.group("g").durable == later
    check_moment(store.group("g").reader(), model, model.seq)
    store.close()


def with_runs(path: Path, storage: Storage) -> tuple[Store, Model, VolumeId]:
    """A store that has a merge due."""
    store, model, volume = filled(path)
    store.close()
    store = Store.open(path, storage)
    while len(store.index.fingerprint_runs()) < FAN + 1:
        store.group("g").ingest([model.write(volume, 0, os.urandom(8192))])
        store.checkpoint()
    return store, model, volume


def test_a_merge_that_cannot_be_synced_is_done_another_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing names its file, so the store goes on without it."""
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)
    known = open_descriptors()
    storage = WatchedStorage()
    store, model, volume = with_runs(path, storage)
    named = store.index.fingerprint_runs()
    storage.failing = RUN_SUFFIX
    assert not store.merge() and not store.merge()
    storage.failing = ""
    assert {run_named(name) for name in os.listdir(path / "index")} - {None} == set(named)
    store.group("g").ingest([model.write(volume, 0, os.urandom(8192))])
    store.checkpoint()
    assert store.merge()
    store.group("g").ingest([model.write(volume, 0, os.urandom(8192))])
    store.checkpoint()
    assert len(store.index.fingerprint_runs()) < len(named)
    store.close()
    store = Store.open(path)
    check_moment(store.group("g").reader(), model, model.seq)
    store.close()
    assert open_descriptors() == known


def test_a_merge_that_finds_the_disk_full_is_done_another_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)

    class FullStorage(Storage):
        is_full = False

        def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
            if self.is_full and self.path_of(fd).suffix == RUN_SUFFIX:
                raise StoreFull("no space left")
            super().pwritev(fd, buffers, offset)

    known = open_descriptors()
    storage = FullStorage()
    store, model, volume = with_runs(path, storage)
    named = store.index.fingerprint_runs()
    storage.is_full = True
    assert not store.merge()
    group = store.group("g")
    group.ingest([model.write(volume, 8192, model.content[volume][:8192])])
    assert group.head_address(volume, 2) == group.head_address(volume, 0)
    group.ingest([model.write(volume, 0, os.urandom(8192))])
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 1 << 20)
    store.checkpoint()
    assert store.index.fingerprint_runs() == named
    monkeypatch.setattr(fingerprint_index, "UNMERGED_MAX", 0)
    for _ in range(2):
        with pytest.raises(StoreFull):
            store.checkpoint()
            group.ingest([model.write(volume, 0, os.urandom(8192))])
            store.checkpoint()
    storage.is_full = False
    for _ in range(2):  # commits are let pass
        group.ingest([model.write(volume, 0, os.urandom(8192))])
        store.checkpoint()
    assert store.merge()
    group.ingest([model.write(volume, 0, os.urandom(8192))])
    store.checkpoint()
    assert len(store.index.fingerprint_runs()) < len(named)
    check_moment(group.reader(), model, model.seq)
    store.close()
    left = {run_named(name) for name in os.listdir(path / "index")} - {None}
    store = Store.open(path)
    assert left == set(store.index.fingerprint_runs())
    store.close()
    assert open_descriptors() == known


def test_the_name_of_a_group_is_durable_whoever_made_it(path: Path) -> None:
    storage = RefusingStorage()
    store = Store.open(path, storage)
    storage.syncs = "groups"
    for _ in range(2):
        with pytest.raises(StoreFailed, match="groups"):
            store.group("g")
    storage.syncs = ""
    assert store.group("g").held == 0
    store.close()


def test_a_block_that_cannot_be_read_cuts_no_history_off(path: Path) -> None:
    store, model, volume = filled(path)
    store.group("g").ingest([model.write(volume, 0, os.urandom(8192)), model.write(volume, 0, os.urandom(4096))])
    store.sync()
    store.abandon()
    storage = RefusingStorage()
    storage.reads = ".rwc"
    reopened = Store.open(path, storage)
    assert reopened.group("g").durable == model.seq
    with pytest.raises(Damaged, match="disk.img"):
        check_moment(reopened.group("g").reader(), model, model.seq)
    storage.reads = ""
    check_moment(reopened.group("g").reader(), model, model.seq)
    reopened.close()


def test_a_block_that_could_not_be_read_when_it_was_written_in_part_is_lost_for_good(path: Path) -> None:
    """Once the disk reads again it must not pass for what was written."""
    storage = RefusingStorage()
    model, volume = Model(), VolumeId(1)
    store = Store.open(path, storage)
    group = store.group("g")
    group.ingest([*model.begin(), model.create("disk.img", 1 << 20), model.write(volume, 0, os.urandom(8192))])
    store.checkpoint()
    storage.reads = ".rwc"
    before = model.seq
    group.ingest([model.write(volume, 100, b"in part")])
    storage.reads = ""
    store.abandon()
    reopened = Store.open(path)
    group = reopened.group("g")
    check_moment(group.reader(), model, before)
    image = group.reader().image(volume, Seq(model.seq))
    with pytest.raises(Damaged, match=r"disk\.img.*lost"):
        image.read(0, 4096)
    assert image.read(4096, 4096) == model.content[volume][4096:8192]
    group.ingest([model.write(volume, 0, os.urandom(4096))])
    check_moment(group.reader(), model, model.seq)
    reopened.close()


def test_a_slot_whose_entry_a_power_cut_took_is_healed_and_shared(path: Path) -> None:
    """Of one block all is there but the entry, of the other the fingerprint alone."""
    store, model, volume = filled(path)
    group = store.group("g")
    group.ingest([model.write(volume, 0, os.urandom(4096))])
    store.checkpoint()
    (segment,) = path.glob("groups/g/journal/*.rwj")
    durable, lost = segment.stat().st_size, os.urandom(8192)
    group.ingest([twin(model, volume).write(volume, 4096, lost)])
    first = group.head_address(volume, 1)
    store.abandon()
    os.truncate(segment, durable)
    container = layout.container_path(path / "containers", layout.container_of(first))
    with container.open("r+b") as file:
        file.seek(layout.RAW_SLOTS_OFFSET + (layout.slot_of(first) + 1) * 4096)
        file.write(bytes(4096))
    marks = [fingerprint(lost[at : at + 4096]) for at in (0, 4096)]
    store = Store.open(path)
    assert store.group("g").held == model.seq
    assert store.fingerprints.lookup(marks) == [None, None]
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.close()
    store = Store.open(path)
    group = store.group("g")
    assert store.fingerprints.lookup(marks) == [first, first + 1]
    group.ingest([model.write(volume, 3 * 4096, lost)])
    assert [group.head_address(volume, block) for block in (3, 4)] == [first, first + 1]
    check_moment(group.reader(), model, model.seq)
    store.close()
    assert verify(path, read_data=True).ok


def test_what_a_failed_sync_left_in_memory_is_not_believed(path: Path) -> None:
    """Every file that recovery reads past the last checkpoint is synced first, and then dropped from memory."""
    store, model, volume = filled(path)
    store.checkpoint()
    store.group("g").ingest([model.write(volume, 0, os.urandom(8192))])
    store.abandon()
    calls: list[tuple[str, str]] = []

    class Noting(Storage):
        def datasync(self, fd: int) -> None:
            calls.append(("sync", self.path_of(fd).suffix))
            super().datasync(fd)

        def forget_cached(self, fd: int) -> None:
            calls.append(("forget", self.path_of(fd).suffix))
            super().forget_cached(fd)

        def pread_into(self, fd: int, buffers: list[memoryview], offset: int, *, wait: bool = True) -> int:
            calls.append(("read", self.path_of(fd).suffix))
            return super().pread_into(fd, buffers, offset, wait=wait)

    Store.open(path, Noting()).close()
    for suffix in (".rwc", ".rwj"):
        assert calls.index(("sync", suffix)) < calls.index(("forget", suffix))
    assert calls.index(("forget", ".rwc")) < calls.index(("read", ".rwc"))
