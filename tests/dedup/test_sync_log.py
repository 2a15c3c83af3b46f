"""The sync log: one write that makes durable what was appended, and gives it back when the files have lost it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.errors import Damaged, StoreFailed, StoreFull, UnknownFormat
from dedup.layout import CHECKSUM_BYTES, checksum
from dedup.repair import repair
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.sync_log import (
    SYNC_LOG_ALIGNMENT,
    SYNC_LOG_BYTES,
    SYNC_LOG_ENTRY,
    SYNC_LOG_ENTRY_BYTES_MAX,
    SYNC_LOG_NAME,
    Part,
    SyncLog,
    Unsynced,
    restore,
)
from tests.dedup.test_store import check_moment, filled
from tests.dedup.test_store_faults import WatchedStorage

CONTAINER = "containers/0000000000000001.rwc"
SEGMENT = "groups/g/journal/00000000000000000001.rwj"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a store would be, with the two files that are appended to."""
    for name in (CONTAINER, SEGMENT):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    return tmp_path


def part(place: Path, offset: int, content: bytes, name: str = CONTAINER) -> Part:
    return Part(place / name, offset, content)


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
    storage, content = Storage(), {CONTAINER: b"", SEGMENT: b""}
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
        (place / name).write_bytes(data[: lost % (len(data) + 1)])
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


def test_nothing_that_was_emptied_comes_back(place: Path) -> None:
    log = SyncLog(Storage(), place)
    for offset in range(3):
        assert log.keep([part(place, offset, b"old" * 3000)])
    log.empty()
    log.close()
    restore(Storage(), place)
    assert (place / CONTAINER).read_bytes() == b""


def test_entries_of_an_earlier_series_do_not_follow_a_new_one(place: Path) -> None:
    """The second entry of the new series lies where the second of the old one did."""
    log = SyncLog(Storage(), place)
    for offset in range(3):
        assert log.keep([part(place, offset, b"old")])
    log.empty()
    assert log.keep([part(place, 0, b"new")])
    log.close()
    restore(Storage(), place)
    assert (place / CONTAINER).read_bytes() == b"new"


def test_what_is_too_much_for_an_entry_is_said_once(place: Path) -> None:
    unsynced = Unsynced()
    unsynced.note(place / CONTAINER, 0, [bytes(SYNC_LOG_ENTRY_BYTES_MAX - 1)])
    unsynced.note(place / CONTAINER, 0, [b"12"])
    unsynced.note(place / CONTAINER, 0, [b"3"])
    assert unsynced.take() is None
    unsynced.note(place / CONTAINER, 7, [b"4"])
    assert unsynced.take() == [part(place, 7, b"4")]
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
def test_on_a_full_disk_the_files_are_synced(place: Path, had: bool) -> None:
    """Also where the log cannot even be emptied: it goes then."""
    storage = FullStorage()
    log = SyncLog(storage, place)
    if had:
        assert log.keep([part(place, 0, b"before")])
    storage.full = True
    assert not log.keep([part(place, 0, b"more")])
    log.empty()
    log.close()
    restore(storage, place)
    assert (place / CONTAINER).read_bytes() == b""


def test_a_file_that_is_missing_is_named_and_the_others_come_back(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SyncLog(Storage(), place)
    assert log.keep([part(place, 0, b"blocks"), part(place, 0, b"entries", SEGMENT)])
    log.close()
    (place / CONTAINER).unlink()
    restore(Storage(), place)
    assert (place / SEGMENT).read_bytes() == b"entries" and not (place / CONTAINER).exists()
    assert CONTAINER in caplog.text


@pytest.mark.parametrize(
    "name",
    ["STORE", "../x.rwc", "containers/../../x", "containers/1.rwc", "groups/../journal/00000000000000000001.rwj"],
)
def test_a_log_of_a_stranger_writes_nowhere_else(place: Path, name: str) -> None:
    log = SyncLog(Storage(), place)
    assert log.keep([Part(place / CONTAINER, 0, b"first"), Part(place / name, 0, b"evil")])
    log.close()
    with pytest.raises(Damaged, match="synclog"):
        restore(Storage(), place)
    assert (place / CONTAINER).read_bytes() == b"" and not (place / name).exists()


def test_a_log_of_a_newer_version_is_refused(place: Path) -> None:
    log = SyncLog(Storage(), place)
    assert log.keep([part(place, 0, b"x")])
    log.close()
    entry = bytearray(log_bytes(place)[: SYNC_LOG_ENTRY.size + 100])
    entry[8] = 9
    end = SYNC_LOG_ENTRY.size
    body = int.from_bytes(entry[end - 16 : end - 8], "little")
    rest = bytes(entry[: end - CHECKSUM_BYTES]) + bytes(entry[end : end + body])
    entry[end - CHECKSUM_BYTES : end] = checksum(rest).to_bytes(CHECKSUM_BYTES, "little")
    with open(place / SYNC_LOG_NAME, "r+b") as file:
        file.write(entry)
    with pytest.raises(UnknownFormat, match="version 9"):
        restore(Storage(), place)


# -- in a store --------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def appended_to(path: Path) -> list[Path]:
    return sorted([*path.glob("containers/*.rwc"), *path.glob("groups/*/journal/*.rwj")])


def forget_since(files: dict[Path, bytes]) -> None:
    """What a power cut takes of files that were not synced since they had that content."""
    for file, content in files.items():
        file.write_bytes(content)


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
    store.checkpoint()
    synced = {file: file.read_bytes() for file in appended_to(path)}
    store.group("g").ingest([model.write(volume, 0, os.urandom(4096))])
    store.sync()
    store.abandon()
    forget_since(synced)
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
