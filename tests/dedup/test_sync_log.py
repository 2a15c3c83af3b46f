"""The sync log: one write that makes durable what was appended, and gives it back when the files have lost it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.errors import Damaged, StoreFailed, StoreFull, UnknownFormat, Unreadable
from dedup.layout import (
    CHECKSUM_BYTES,
    CONTAINER_PAGE_BYTES,
    ContainerHeader,
    SegmentHeader,
    checksum,
    container_path,
    pack_container_header,
    pack_segment_header,
)
from dedup.reader import StoreReader
from dedup.repair import repair
from dedup.sealed import seal
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.sync_log import (
    SYNC_LOG_ALIGNMENT,
    SYNC_LOG_BYTES,
    SYNC_LOG_ENTRY,
    SYNC_LOG_ENTRY_BYTES_MAX,
    SYNC_LOG_MAGIC,
    SYNC_LOG_NAME,
    SYNC_LOG_PART,
    Part,
    SyncLog,
    Unsynced,
)
from dedup.sync_log_restore import is_waiting, restore
from dedup.types import FINE_JOURNAL, ContainerForm, ContainerId, Seq, TimeNs, VolumeId
from dedup.verify import verify
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment, filled
from tests.dedup.test_store_faults import WatchedStorage

CONTAINER = "containers/0000000000000001.rwc"
SEGMENT = "groups/g/journal/00000000000000000001.rwj"
RAW = pack_container_header(ContainerHeader(ContainerId(1), FINE_JOURNAL, ContainerForm.RAW, TimeNs(1)))
FIRST = pack_segment_header(SegmentHeader(Seq(1), 7, TimeNs(1)))
BEGINS = {CONTAINER: RAW, SEGMENT: FIRST}
"""What was synced when the files were made."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a store would be, with the two files that are appended to."""
    for name, begin in BEGINS.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(begin)
    return tmp_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def part(place: Path, offset: int, content: bytes, name: str = SEGMENT) -> Part:
    """Behind what the file begins with."""
    return Part(place / name, len(BEGINS[name]) + offset, content)


def segment(place: Path) -> bytes:
    """What was appended to it."""
    content = (place / SEGMENT).read_bytes()
    assert content.startswith(FIRST)
    return content[len(FIRST) :]


def log_bytes(place: Path) -> bytes:
    return (place / SYNC_LOG_NAME).read_bytes()


appends = st.lists(
    st.tuples(st.sampled_from([CONTAINER, SEGMENT]), st.binary(min_size=1, max_size=9000)), min_size=1, max_size=12
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(runs=st.lists(appends, min_size=1, max_size=4), lost=st.integers(0, 1 << 16), torn=st.integers(0, 1 << 16))
def test_what_was_kept_comes_back_in_order_and_what_is_torn_does_not(
    place: Path, runs: list[list[tuple[str, bytes]]], lost: int, torn: int
) -> None:
    """The model: each file is the bytes that were appended; the files lose any, and the last entry is cut anywhere."""
    storage, content = Storage(), dict(BEGINS)
    (place / SYNC_LOG_NAME).unlink(missing_ok=True)
    log, states, ends = SyncLog(storage, place), [dict(content)], [0]
    for run in runs:
        for name, data in run:
            log.unsynced.note(place / name, len(content[name]), [data[:1], data[1:]])
            content[name] += data
        parts = log.unsynced.take()
        assert parts is not None and log.keep(parts)
        states.append(dict(content))
        ends.append(len(log_bytes(place).rstrip(b"\0")))
    log.close()
    for name, data in content.items():
        begin = len(BEGINS[name])
        (place / name).write_bytes(data[: begin + lost % (len(data) + 1 - begin)])
    cut = ends[-2] + torn % (ends[-1] - ends[-2] + 1)
    with open(place / SYNC_LOG_NAME, "r+b") as file:
        file.seek(cut)
        file.write(bytes(ends[-1] - cut))
    restore(storage, place)
    expected = states[-1] if cut == ends[-1] else states[-2]
    for name, data in expected.items():
        assert (place / name).read_bytes()[: len(data)] == data
    after = {name: (place / name).read_bytes() for name in content}
    restore(storage, place)  # it is empty
    assert {name: (place / name).read_bytes() for name in content} == after


class NamingStorage(Storage):
    """Notes which directories are synced."""

    def __init__(self) -> None:
        super().__init__()
        self.named: list[Path] = []

    def sync_directory(self, path: Path) -> None:
        self.named.append(path)
        super().sync_directory(path)


def test_the_name_of_the_log_is_durable_before_anything_is_kept(place: Path) -> None:
    storage = NamingStorage()
    log = SyncLog(storage, place)
    assert log.keep([part(place, 0, b"x")]) and storage.named == [place]
    assert log.keep([part(place, 1, b"y")]) and storage.named == [place]
    log.close()


def test_nothing_that_was_emptied_comes_back(place: Path) -> None:
    log = SyncLog(Storage(), place)
    for offset in range(3):
        assert log.keep([part(place, offset, b"old" * 3000)])
    log.empty()
    log.close()
    restore(Storage(), place)
    assert segment(place) == b""


def test_entries_of_an_earlier_series_do_not_follow_a_new_one(place: Path) -> None:
    """The second entry of the new series lies where the second of the old one did."""
    log = SyncLog(Storage(), place)
    for offset in range(3):
        assert log.keep([part(place, offset, b"old")])
    log.empty()
    assert log.keep([part(place, 0, b"new")])
    log.close()
    restore(Storage(), place)
    assert segment(place) == b"new"


def test_what_is_too_much_for_an_entry_is_said_once(place: Path) -> None:
    unsynced = Unsynced()
    most = SYNC_LOG_ENTRY_BYTES_MAX - 2 * SYNC_LOG_PART.size
    unsynced.note(place / SEGMENT, 0, [bytes(most - 1), b"1"])
    unsynced.note(place / SEGMENT, 0, [b""])
    assert [len(one.content) for one in unsynced.take() or ()] == [most, 0]
    unsynced.note(place / SEGMENT, 0, [bytes(most)])
    unsynced.note(place / SEGMENT, 0, [b"2"])
    unsynced.note(place / SEGMENT, 0, [b"3"])
    assert unsynced.take() is None
    unsynced.note(place / SEGMENT, 7, [b"4"])
    assert unsynced.take() == [Part(place / SEGMENT, 7, b"4")]
    assert unsynced.take() == []


def test_a_full_log_takes_no_more_until_it_is_emptied(place: Path) -> None:
    log = SyncLog(Storage(), place)
    large = [part(place, 0, bytes(SYNC_LOG_ENTRY_BYTES_MAX))]
    kept = 0
    while log.keep(large):
        kept += 1
    assert kept == SYNC_LOG_BYTES // (SYNC_LOG_ENTRY_BYTES_MAX + SYNC_LOG_ALIGNMENT)
    assert len(log_bytes(place)) == SYNC_LOG_BYTES
    log.empty()
    assert log.keep(large)
    log.close()


class FullStorage(Storage):
    """Writes nothing more to the log while it is full."""

    full = False

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        if self.full and self.path_of(fd).name == SYNC_LOG_NAME:
            raise StoreFull(f"{self.path_of(fd)}: made to be full")
        super().pwritev(fd, buffers, offset)


@pytest.mark.parametrize("had", [False, True])
def test_on_a_full_disk_the_files_are_synced(place: Path, monkeypatch: pytest.MonkeyPatch, had: bool) -> None:
    """Also where the log cannot even be emptied: it goes then."""
    storage = FullStorage()
    log = SyncLog(storage, place)
    if had:
        assert log.keep([part(place, 0, b"before")])
    storage.full = True
    assert not log.keep([part(place, 0, b"more")])
    assert not log.keep([part(place, 0, b"more")]), "it is not tried again at once"
    log.empty()
    assert (place / SYNC_LOG_NAME).exists() is False
    storage.full = False
    monkeypatch.setattr("dedup.sync_log.ROOM_RETRY_SECONDS", 0)
    log._full_until = 0
    assert log.keep([part(place, 0, b"again")])
    log.close()
    restore(storage, place)
    assert segment(place) == b"again"


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize("name", [CONTAINER, SEGMENT])
def test_a_file_that_does_not_get_its_part_keeps_the_log_as_it_is(place: Path, name: str, how: str) -> None:
    """Whoever puts it back has everything; who cannot asks for the rest."""
    log = SyncLog(Storage(), place)
    assert log.keep([part(place, 0, b"blocks", CONTAINER), part(place, 0, b"entries")])
    log.close()
    files = {other: (place / other).read_bytes() for other in (*BEGINS, SYNC_LOG_NAME)}
    (other,) = BEGINS.keys() - {name}
    (place / name).unlink() if how == "missing" else spoil(place / name)
    for _ in range(2):
        with pytest.raises(Damaged, match=Path(name).name):
            restore(Storage(), place)
    assert log_bytes(place) == files[SYNC_LOG_NAME]
    assert (place / other).read_bytes() == files[other]
    (place / name).write_bytes(files[name])
    assert restore(Storage(), place) == []
    assert segment(place) == b"entries" and (place / CONTAINER).read_bytes() == RAW + b"blocks"
    for again, content in files.items():
        (place / again).write_bytes(content)
    (place / name).unlink() if how == "missing" else spoil(place / name)
    assert restore(Storage(), place, leaving=True) == [place / name]
    assert (place / other).read_bytes() != files[other]
    assert restore(Storage(), place) == [], "it is empty"


class RefusingReads(Storage):
    """Cannot read one file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._refused = path

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        if self.path_of(fd) == self._refused:
            raise Unreadable(f"{self._refused}: offset {offset}: cannot be read: made to fail")
        return super().pread(fd, length, offset)


def test_what_cannot_be_read_this_time_is_restored_the_next(place: Path) -> None:
    storage = RefusingReads(place / CONTAINER)
    log = SyncLog(storage, place)
    assert log.keep([part(place, 0, b"blocks", CONTAINER)])
    log.close()
    with pytest.raises(Unreadable):
        restore(storage, place)
    assert restore(Storage(), place) == []
    assert (place / CONTAINER).read_bytes() == RAW + b"blocks"


def test_a_segment_behind_the_last_one_was_cut_off_and_is_no_damage(place: Path) -> None:
    """The store that failed to sync removed it, and nothing of it was durable."""
    cut = place / SEGMENT.replace("1.rwj", "9.rwj")
    log = SyncLog(Storage(), place)
    assert log.keep([part(place, 0, b"kept"), Part(cut, 48, b"not durable")])
    log.close()
    assert restore(Storage(), place) == []
    assert segment(place) == b"kept" and not cut.exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_entry_before_a_whole_one_is_no_end_of_the_log(place: Path, which: int) -> None:
    """For the later one was begun when the earlier one was durable."""
    log = SyncLog(Storage(), place)
    for number in range(3):
        assert log.keep([part(place, number, bytes([65 + number]))])
    log.close()
    content = bytearray(log_bytes(place))
    content[which * SYNC_LOG_ALIGNMENT + SYNC_LOG_ENTRY.size + 3] ^= 1
    (place / SYNC_LOG_NAME).write_bytes(content)
    with pytest.raises(Damaged, match=f"offset {which * SYNC_LOG_ALIGNMENT}"):
        restore(Storage(), place)
    assert log_bytes(place) == content and segment(place) == b""
    assert restore(Storage(), place, leaving=True) == [place / SYNC_LOG_NAME]
    wanted = bytearray(b"ABC")
    wanted[which] = 0
    assert segment(place) == wanted


@pytest.mark.parametrize(
    "name",
    ["STORE", "../x.rwc", "containers/../../x", "containers/1.rwc", "groups/../journal/00000000000000000001.rwj"],
)
def test_a_log_of_a_stranger_writes_nowhere_else(place: Path, name: str) -> None:
    log = SyncLog(Storage(), place)
    assert log.keep([part(place, 0, b"first"), Part(place / name, 0, b"evil")])
    log.close()
    with pytest.raises(Damaged, match="synclog"):
        restore(Storage(), place)
    assert segment(place) == b"" and not (place / name).exists()


def test_a_log_of_a_newer_version_is_refused(place: Path) -> None:
    write_entry(place, b"", parts=0, version=9)
    with pytest.raises(UnknownFormat, match="version 9"):
        restore(Storage(), place)


BAD = {
    "a path that is no text": b"\xff" * 32,
    "a path with a zero byte": b"groups/a\0b/journal/00000000000000000001.rwj",
    "no part at all": None,
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_understood_is_damage_and_a_repair_takes_it_away(path: Path, what: str) -> None:
    """Its checksum is right all the same."""
    name = BAD[what]
    body = b"" if name is None else SYNC_LOG_PART.struct.pack(0, 1, len(name)) + name + b"x"
    write_entry(path, body, parts=1)
    with pytest.raises(Damaged, match="--repair"):
        Store.open(path)
    report = repair(path)
    assert report.ok and any("sync log" in one.what for one in report.repairs)
    assert (path / "quarantine" / SYNC_LOG_NAME).exists()
    Store.open(path).close()


def test_a_part_far_behind_every_file_is_damage(place: Path) -> None:
    name = SEGMENT.encode()
    write_entry(place, SYNC_LOG_PART.struct.pack(1 << 63, 1, len(name)) + name + b"x", parts=1)
    with pytest.raises(Damaged):
        restore(Storage(), place)


def test_a_part_that_ends_behind_its_entry_is_damage(place: Path) -> None:
    name = SEGMENT.encode()
    write_entry(place, SYNC_LOG_PART.struct.pack(0, 9, len(name)) + name + b"x", parts=1)
    with pytest.raises(Damaged):
        restore(Storage(), place)


def write_entry(store: Path, body: bytes, parts: int, version: int = 1, number: int = 0) -> None:
    """A log of one entry, whose checksum is right."""
    head = SYNC_LOG_ENTRY.struct.pack(SYNC_LOG_MAGIC, version, b"", parts, 7, number, len(body), 0)[:-CHECKSUM_BYTES]
    entry = head + checksum(head + body).to_bytes(CHECKSUM_BYTES, "little") + body
    (store / SYNC_LOG_NAME).write_bytes(entry.ljust(SYNC_LOG_BYTES, b"\0"))


def test_a_first_entry_that_is_not_the_first_of_its_series_is_none(place: Path) -> None:
    """Also of a version that is not known: it is left over."""
    name = SEGMENT.encode()
    body = SYNC_LOG_PART.struct.pack(0, 1, len(name)) + name + b"x"
    write_entry(place, body, parts=1, version=9, number=1)
    restore(Storage(), place)
    assert segment(place) == b""


def test_a_container_that_was_sealed_since_stays_as_it_is(path: Path) -> None:
    """By a build that does not know the log."""
    store, model, volume = filled(path)
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.sync()
    store.abandon()
    (path / SYNC_LOG_NAME).rename(path / "aside")
    store = Store.open(path)
    store.complete_containers()
    store.settle()
    seal(store.storage, path / "containers", ContainerId(1), None)
    store.close()
    (path / "aside").rename(path / SYNC_LOG_NAME)
    reopened = Store.open(path)
    check_moment(reopened.group("g").reader(), model, model.seq)
    reopened.close()
    assert verify(path, read_data=True).ok


@pytest.mark.parametrize("had", [False, True])
def test_opening_empties_the_log_for_good_whatever_it_looks_like(path: Path, had: bool) -> None:
    """Whoever emptied it may have been killed before the disk had that."""
    store, model, volume = filled(path)
    store.group("g").ingest([model.write(volume, 0, b"1" * 4096)])
    store.sync()
    if had:
        store.sync_files()
    store.abandon()
    storage = WatchedStorage()
    reopened = Store.open(path, storage)
    assert SYNC_LOG_NAME in storage.synced
    reopened.abandon()


# -- in a store --------------------------------------------------------------------------------------------------------


def appended_to(path: Path) -> list[Path]:
    return sorted([*path.glob("containers/*.rwc"), *path.glob("groups/*/journal/*.rwj")])


def forget_since(files: dict[Path, bytes]) -> None:
    """What a power cut takes of files that were not synced since they had that content."""
    for file, content in files.items():
        file.write_bytes(content)


def after_power_cut(store: Store, model: Model, volume: VolumeId) -> None:
    """It has taken what was written last from all files but the log."""
    store.checkpoint()
    synced = {file: file.read_bytes() for file in appended_to(store.path)}
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.sync()
    assert not is_waiting(Storage(), store.path), "its writer lives"
    store.abandon()
    forget_since(synced)


def test_a_small_sync_asks_the_disk_once_and_a_power_cut_takes_nothing(path: Path) -> None:
    storage = WatchedStorage()
    store, model, volume = filled(path, storage)
    store.checkpoint()
    synced = {file: file.read_bytes() for file in appended_to(path)}
    group = store.group("g")
    group.ingest([model.write(volume, 0, os.urandom(6000))])
    store.sync()  # makes the log
    storage.synced = []
    for number in range(1, 4):
        group.ingest([model.write(volume, number * 5000, os.urandom(6000)), model.flush(volume)])
        store.sync()
        assert group.durable == model.seq
    assert storage.synced == [SYNC_LOG_NAME] * 3
    store.abandon()
    forget_since(synced)
    reopened = Store.open(path)
    assert reopened.group("g").held == model.seq
    for seq in model.history:
        check_moment(reopened.group("g").reader(), model, seq)
    reopened.close()


def test_a_checkpoint_leaves_nothing_in_the_log_alone(path: Path) -> None:
    """So that what comes after it may replace the files: a log that is old would bring old bytes back."""
    storage = WatchedStorage()
    store, model, volume = filled(path, storage)
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.sync()
    storage.synced = []
    store.checkpoint()
    in_order = [name for name in storage.synced if name.endswith((".rwc", ".rwj", SYNC_LOG_NAME))]
    assert in_order == [*(file.name for file in appended_to(path)), SYNC_LOG_NAME]
    store.abandon()
    for file in appended_to(path):
        file.unlink()
    restore(Storage(), path)
    assert appended_to(path) == []


def test_a_log_that_cannot_be_synced_stops_the_store_and_nothing_is_lost(path: Path) -> None:
    storage = WatchedStorage()
    store, model, volume = filled(path, storage)
    group = store.group("g")
    store.sync()
    group.ingest([model.write(volume, 0, os.urandom(4096))])
    durable = group.durable
    storage.failing = SYNC_LOG_NAME
    with pytest.raises(StoreFailed, match="synclog"):
        store.sync()
    assert group.durable == durable < model.seq
    storage.failing = ""
    with pytest.raises(StoreFailed):
        store.sync()
    store.abandon()
    reopened = Store.open(path)
    held = reopened.group("g").held
    assert durable <= held <= model.seq
    check_moment(reopened.group("g").reader(), model, held)
    reopened.close()


def test_files_that_cannot_be_synced_keep_what_the_log_had(path: Path) -> None:
    """The disk dropped what was written to a container; its blocks were durable in the log alone."""
    storage = WatchedStorage()
    store, model, volume = filled(path, storage)
    store.checkpoint()
    synced = {file: file.read_bytes() for file in appended_to(path)}
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.sync()
    storage.failing = ".rwc"
    with pytest.raises(StoreFailed):
        store.sync_files()
    store.abandon()
    forget_since(synced)
    reopened = Store.open(path)
    assert reopened.group("g").held == model.seq
    check_moment(reopened.group("g").reader(), model, model.seq)
    reopened.close()


def test_a_repair_begins_with_what_the_log_has(path: Path) -> None:
    store, model, volume = filled(path)
    after_power_cut(store, model, volume)
    os.truncate(container_path(path / "containers", ContainerId(1)), CONTAINER_PAGE_BYTES)  # it looks empty
    assert repair(path).ok
    reopened = Store.open(path)
    assert reopened.group("g").held == model.seq
    check_moment(reopened.group("g").reader(), model, model.seq)
    reopened.close()


def test_large_appends_are_synced_in_their_files(path: Path) -> None:
    storage = WatchedStorage()
    store, model, volume = filled(path, storage)
    store.sync()
    storage.synced = []
    store.group("g").ingest([model.write(volume, 0, os.urandom(SYNC_LOG_ENTRY_BYTES_MAX))])
    store.sync()
    assert {file.suffix for file in map(Path, storage.synced)} >= {".rwc", ".rwj"}
    store.close()


def test_who_reads_after_a_power_cut_is_told_and_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside a writer, which has restored its log, there is nothing to tell."""
    store, model, volume = filled(path)
    durable = model.seq
    after_power_cut(store, model, volume)
    before = log_bytes(path)
    reader = StoreReader.open(path)
    assert "sync log" in caplog.text
    assert reader.group("g").resolve("latest").seq == durable
    reader.close()
    assert verify(path, read_data=True).ok
    assert log_bytes(path) == before
    Store.open(path).close()
    caplog.clear()
    reader = StoreReader.open(path)
    assert reader.group("g").resolve("latest").seq == model.seq and not caplog.text
    reader.close()


def test_a_repair_says_what_a_damaged_container_costs_and_keeps_the_log(path: Path) -> None:
    store, model, volume = filled(path)
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    after_power_cut(store, model, volume)
    kept = log_bytes(path)
    spoil(container_path(path / "containers", ContainerId(1)))
    with pytest.raises(Damaged, match="does not match"):
        Store.open(path)
    said = "; ".join(one.what for one in repair(path).repairs)
    assert "the sync log could not be restored whole, of containers/" in said and "sends them again" not in said
    assert (path / "quarantine" / SYNC_LOG_NAME).read_bytes() == kept
    Store.open(path).close()


def test_a_reader_that_looks_at_the_lock_keeps_no_writer_away(path: Path) -> None:
    storage = Storage()
    fd = storage.open(path / "lock", os.O_RDWR | os.O_CREAT)
    assert storage.lock(fd, shared=True)
    timer = threading.Timer(0.02, storage.close, [fd])
    timer.start()
    Store.open(path).close()
    timer.join()


def test_a_sync_between_an_append_and_its_note_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are synced when blocks are written, and before all is noted: that sync has them, or the next one."""
    storage = WatchedStorage()
    store, model, volume = filled(path, storage)
    store.sync_files()
    note = store.sync_log.unsynced.note
    beside = [True]

    def noted(path: Path, offset: int, buffers: Sequence[Buffer]) -> None:
        note(path, offset, buffers)
        if path.suffix == ".rwc" and beside.pop():
            beside.append(False)
            storage.synced = []
            store.sync_files()

    monkeypatch.setattr(store.sync_log.unsynced, "note", noted)
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.sync()
    assert any(name.endswith(".rwc") for name in storage.synced)
    store.abandon()


def test_a_group_that_is_made_beside_a_sync_of_the_files_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = WatchedStorage()
    store, _, _ = filled(path, storage)
    take = store.sync_log.unsynced.take

    def taken() -> list[Part] | None:
        monkeypatch.undo()
        other = Model()
        store.group("other").ingest(other.begin())
        storage.synced = []
        return take()

    monkeypatch.setattr(store.sync_log.unsynced, "take", taken)
    store.sync_files()
    assert storage.synced.count("00000000000000000001.rwj") == 2
    store.close()


def test_what_nobody_foresaw_in_a_sync_stops_the_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be made durable is forgotten: the next sync must not call it so."""
    store, model, volume = filled(path)
    store.sync()
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    monkeypatch.setattr(store.sync_log, "keep", lambda parts: [][0])
    with pytest.raises(IndexError):
        store.sync()
    monkeypatch.undo()
    with pytest.raises(StoreFailed):
        store.sync()
    assert store.group("g").durable < model.seq
    store.abandon()
