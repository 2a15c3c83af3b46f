"""The metadata journal: every flip and cut, failures half way, rotation, readers beside the writer."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dedup.journal_reader
import dedup.metadata_journal
from dedup import layout
from dedup.errors import Damaged, OutOfOrder, StoreError, StoreFailed, StoreFull
from dedup.layout import SEGMENT_HEADER_BYTES, segment_path
from dedup.metadata_journal import (
    FIRST_POSITION,
    EntryKind,
    JournalPosition,
    JournalWriter,
    Logged,
    encode,
    extents_of,
    first_position,
    read,
    scan,
    segments,
)
from dedup.storage import Storage
from dedup.types import (
    ClockRun,
    Flush,
    Heartbeat,
    Seq,
    SnapshotDelete,
    TimeNs,
    VolumeId,
)
from tests.dedup.faults import FaultyStorage, open_descriptors
from tests.dedup.journal_samples import noted, snapshot, write


def make(directory: Path, batches: Sequence[Sequence[Logged]], storage: Storage | None = None) -> JournalWriter:
    writer = JournalWriter.open(storage or Storage(), directory, None)
    for batch in batches:
        writer.append(batch)
    return writer


def entries(directory: Path, start: JournalPosition = FIRST_POSITION, **options: object) -> list[Logged]:
    return [logged for logged, _ in read(Storage(), directory, start, **options)]  # type: ignore[arg-type]


def test_append_then_read_from_every_position(tmp_path: Path) -> None:
    written = [write(1), write(2, 3), noted(Heartbeat(Seq(3), TimeNs(4), ClockRun(1))), snapshot(3), write(4)]
    writer = make(tmp_path, [written[:1], [], written[1:]])
    positions = [FIRST_POSITION]
    for expected, (logged, position) in zip(written, read(Storage(), tmp_path, FIRST_POSITION), strict=True):
        assert logged == expected
        positions.append(position)
    assert positions[-1] == writer.position
    for index, position in enumerate(positions):
        assert entries(tmp_path, position) == written[index:]
        assert entries(tmp_path, limit=position) == written[:index]
    scanned = list(scan(Storage(), tmp_path, FIRST_POSITION))
    assert [(s.kind, s.first_seq, s.seq, s.time, s.run, s.journal) for s in scanned] == [
        (e.kind, e.first_seq, e.seq, e.time, e.run, e.journal) for e in written
    ]
    assert [extents_of(s.raw) for s in scanned] == [e.extents for e in written]
    assert [s.position for s in scanned] == positions[1:]
    writer.close()


def test_no_journal_has_no_entries(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert first_position(Storage(), missing) == FIRST_POSITION
    assert entries(missing) == []
    with pytest.raises(Damaged, match="is missing"):
        entries(missing, JournalPosition(Seq(5), SEGMENT_HEADER_BYTES))
    writer = make(tmp_path, [])
    assert entries(tmp_path) == []
    assert writer.position == FIRST_POSITION == first_position(Storage(), tmp_path)
    writer.close()


def test_a_new_journal_is_never_made_over_another(tmp_path: Path) -> None:
    make(tmp_path, [[write(1)]]).close()
    with pytest.raises(Damaged, match="a new journal was asked for"):
        JournalWriter.open(Storage(), tmp_path, None)
    assert entries(tmp_path) == [write(1)]


@pytest.mark.parametrize("left", [0, 1, SEGMENT_HEADER_BYTES - 1, SEGMENT_HEADER_BYTES])
def test_a_first_segment_without_entries_is_made_anew(tmp_path: Path, left: int) -> None:
    make(tmp_path, []).close()
    os.truncate(segment_path(tmp_path, Seq(1)), left)
    assert entries(tmp_path) == []
    writer = make(tmp_path, [[write(1)]])
    assert entries(tmp_path) == [write(1)]
    writer.close()
    os.truncate(segment_path(tmp_path, Seq(1)), left)
    writer = JournalWriter.open(Storage(), tmp_path, first_position(Storage(), tmp_path))
    writer.append([write(1)])
    assert entries(tmp_path) == [write(1)]
    writer.close()


def test_order_is_kept(tmp_path: Path) -> None:
    writer = make(tmp_path, [[write(1), write(2)]])
    bookmark_alone = noted(SnapshotDelete(Seq(1), TimeNs(1), ClockRun(0), "x"))
    for wrong in ([write(2)], [write(4)], [write(3), write(5)], [bookmark_alone], [snapshot(3)]):
        with pytest.raises(OutOfOrder, match="does not follow"):
            writer.append(wrong)
    assert entries(tmp_path) == [write(1), write(2)]
    writer.append([snapshot(2), write(3)])
    assert len(entries(tmp_path)) == 4
    writer.close()


def test_a_seq_that_does_not_follow_on_disk_is_damage(tmp_path: Path) -> None:
    writer = make(tmp_path, [[write(1)]])
    writer.close()
    again = JournalWriter.open(Storage(), tmp_path, writer.position)
    again.append([write(5)])  # nothing to hold it against, right after opening
    again.close()
    with pytest.raises(Damaged, match=rf"offset {writer.position.offset}: seq 5\.\.5 does not follow seq 1"):
        entries(tmp_path)


def small_journal(directory: Path) -> tuple[Path, bytes, list[Logged], list[int]]:
    written = [write(1), noted(Flush(Seq(2), TimeNs(4), ClockRun(1), VolumeId(1))), write(3, 2), write(4)]
    make(directory, [written]).close()
    path = segment_path(directory, Seq(1))
    ends = [position.offset for _, position in read(Storage(), directory, FIRST_POSITION)]
    return path, path.read_bytes(), written, ends


def test_no_flipped_byte_gives_a_wrong_entry(tmp_path: Path) -> None:
    path, good, written, ends = small_journal(tmp_path)
    for place in range(len(good)):
        for bit in (0, 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            seen: list[Logged] = []
            damage = ""
            try:
                for logged, _ in read(Storage(), tmp_path, FIRST_POSITION):
                    seen.append(logged)
            except StoreError as error:
                damage = str(error)
            whole = sum(end <= place for end in ends) if place >= SEGMENT_HEADER_BYTES else 0
            assert seen == written[:whole], place
            if place < ends[-2]:  # in the last entry it cannot be told from one that is being written
                assert str(path) in damage, place
            if SEGMENT_HEADER_BYTES <= place < ends[-2]:
                assert f"offset {[SEGMENT_HEADER_BYTES, *ends][whole]}: " in damage
            with pytest.raises(StoreError, match=str(path)):
                entries(tmp_path, limit=JournalPosition(Seq(1), ends[-1]))
            if place >= SEGMENT_HEADER_BYTES:
                assert entries(tmp_path, torn=True) == written[:whole]


def test_every_cut_ends_the_journal_at_the_last_whole_entry(tmp_path: Path) -> None:
    path, good, written, ends = small_journal(tmp_path)
    for length in range(len(good), -1, -1):
        os.truncate(path, length)
        whole = sum(end <= length for end in ends)
        assert entries(tmp_path) == written[:whole]
        if length < len(good):
            with pytest.raises(Damaged):
                entries(tmp_path, limit=JournalPosition(Seq(1), ends[-1]))
        if length >= SEGMENT_HEADER_BYTES:
            position = JournalPosition(Seq(1), ([SEGMENT_HEADER_BYTES, *ends])[whole])
            path.write_bytes(good[:length] + b"\xff" * 30)
            writer = JournalWriter.open(Storage(), tmp_path, position)
            writer.append(written[whole:])
            writer.close()
            assert entries(tmp_path) == written
            path.write_bytes(good)
            with pytest.raises(Damaged, match="ends before"):
                entries(tmp_path, JournalPosition(Seq(1), len(good) + 8))


def test_a_hole_left_by_a_power_cut_ends_the_journal_for_recovery_only(tmp_path: Path) -> None:
    path, good, written, ends = small_journal(tmp_path)
    path.write_bytes(good[: ends[0]] + bytes(ends[1] - ends[0]) + good[ends[1] :])
    assert entries(tmp_path, torn=True) == written[:1]
    with pytest.raises(Damaged, match=f"offset {ends[0]}: "):
        entries(tmp_path)


def test_entries_of_another_segment_are_not_taken_for_its_own(tmp_path: Path) -> None:
    path, good, written, ends = small_journal(tmp_path)
    (tmp_path / "other").mkdir()
    make(tmp_path / "other", [written]).close()
    other = segment_path(tmp_path / "other", Seq(1)).read_bytes()
    path.write_bytes(good[: ends[0]] + other[ends[0] :])
    assert entries(tmp_path) == written[:1]


@settings(max_examples=30)
@given(st.integers(0, 400), st.integers(1, 4))
def test_a_full_disk_leaves_the_journal_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, room: int, batch: int
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    storage = FaultyStorage()
    writer = make(directory, [[write(1)]], storage)
    path = segment_path(directory, Seq(1))
    before, position = path.read_bytes(), writer.position
    new = [write(seq) for seq in range(2, 2 + batch)]
    storage.refuse_write_after = room
    if room < batch * 96:
        storage.synced.clear()
        with pytest.raises(StoreFull):
            writer.append(new)
        assert path.read_bytes() == before
        assert writer.position == position
        assert storage.synced == [path]  # what was cut off cannot come back under what is written next
        storage.refuse_write_after = None
    writer.append(new)
    assert entries(directory) == [write(1), *new]
    writer.close()


def test_nothing_goes_on_after_a_failure_that_leaves_the_disk_unknown(tmp_path: Path) -> None:
    for number, fault in enumerate(("refuse_truncate", "refuse_sync")):
        directory = tmp_path / str(number)
        directory.mkdir()
        storage = FaultyStorage()
        writer = make(directory, [[write(1)]], storage)
        storage.refuse_write_after = 50
        setattr(storage, fault, True)
        with pytest.raises(StoreFailed):
            writer.append([write(2)])
        storage.refuse_write_after = None
        setattr(storage, fault, False)
        for call in (lambda: writer.append([write(2)]), writer.sync, lambda: writer.truncate_to(FIRST_POSITION)):  # noqa: B023
            with pytest.raises(StoreFailed):
                call()
        writer.close()
        assert entries(directory) == [write(1)]


def test_a_failed_sync_is_not_tried_again(tmp_path: Path) -> None:
    storage = FaultyStorage()
    writer = make(tmp_path, [[write(1)]], storage)
    storage.refuse_sync = True
    with pytest.raises(StoreFailed):
        writer.sync()
    storage.refuse_sync = False
    with pytest.raises(StoreFailed):
        writer.sync()
    writer.close()


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup.metadata_journal, "SEGMENT_BYTES_MAX", SEGMENT_HEADER_BYTES + 300)


def test_rotation(small_segments: None, tmp_path: Path) -> None:
    storage = FaultyStorage()
    before = open_descriptors()
    writer = make(tmp_path, [[write(seq)] for seq in range(1, 20)], storage)
    assert segments(Storage(), tmp_path) == [1, 5, 9, 13, 17]
    for first in (1, 5, 9, 13):  # when it is made and before the next one is
        assert storage.synced.count(segment_path(tmp_path, Seq(first))) == 2
    assert entries(tmp_path) == [write(seq) for seq in range(1, 20)]
    positions = [position for _, position in read(Storage(), tmp_path, FIRST_POSITION)]
    for index, position in enumerate(positions):
        assert entries(tmp_path, position) == [write(seq) for seq in range(index + 2, 20)]
        assert entries(tmp_path, limit=position) == [write(seq) for seq in range(1, index + 2)]
    writer.close()
    assert open_descriptors() == before


def test_a_missing_or_damaged_segment_is_said(small_segments: None, tmp_path: Path) -> None:
    writer = make(tmp_path, [[write(seq)] for seq in range(1, 20)])
    writer.close()
    end = writer.position
    middle = segment_path(tmp_path, Seq(9))
    good = middle.read_bytes()
    for bad in (good[:-1], good[:20], b"", good[:-90] + bytes([good[-90] ^ 1]) + good[-89:], good[:-96]):
        middle.write_bytes(bad)
        for torn in (False, True):
            with pytest.raises(Damaged, match=r"\.rwj: offset"):
                entries(tmp_path, torn=torn)
    middle.unlink()
    with pytest.raises(Damaged, match="the segment before it ends at seq 8"):
        entries(tmp_path)
    middle.write_bytes(good)
    segment_path(tmp_path, Seq(17)).unlink()
    with pytest.raises(Damaged, match="is missing"):
        entries(tmp_path, limit=end)


def test_snapshots_do_not_rotate_into_a_name_that_is_taken(small_segments: None, tmp_path: Path) -> None:
    writer = make(tmp_path, [[write(1)], [snapshot(1)] * 8, [snapshot(1)], [snapshot(1)] * 9, [write(2)]])
    assert segments(Storage(), tmp_path) == [1, 2]
    assert [logged.seq for logged in entries(tmp_path)] == [1] * 19 + [2]
    writer.close()


def test_a_disk_full_while_rotating_leaves_the_journal_as_it_was(small_segments: None, tmp_path: Path) -> None:
    storage = FaultyStorage()
    writer = make(tmp_path, [[write(seq)] for seq in range(1, 5)], storage)
    position = writer.position
    storage.refuse_write_after = 10
    with pytest.raises(StoreFull):
        writer.append([write(5)])
    assert writer.position == position
    assert segments(Storage(), tmp_path) == [1]
    storage.refuse_write_after = None
    writer.append([write(5)])
    assert segments(Storage(), tmp_path) == [1, 5]
    assert len(entries(tmp_path)) == 5
    writer.close()


def test_opening_at_a_position_cuts_off_what_lies_behind(small_segments: None, tmp_path: Path) -> None:
    make(tmp_path, [[write(seq)] for seq in range(1, 20)]).close()
    positions = [FIRST_POSITION, *(position for _, position in read(Storage(), tmp_path, FIRST_POSITION))]
    for kept in (18, 12, 8, 7, 0):
        storage = FaultyStorage()
        writer = JournalWriter.open(storage, tmp_path, positions[kept])
        assert entries(tmp_path) == [write(seq) for seq in range(1, kept + 1)]
        writer.close()
    writer = JournalWriter.open(Storage(), tmp_path, FIRST_POSITION)
    with pytest.raises(OutOfOrder):
        writer.append([write(2)])
    writer.append([write(1)])
    writer.close()


def test_truncate_to_takes_back_across_segments(small_segments: None, tmp_path: Path) -> None:
    before = open_descriptors()
    writer = make(tmp_path, [[write(1), write(2)]])
    position = writer.position
    for seq in range(3, 12):
        writer.append([write(seq)])
    with pytest.raises(ValueError, match="lies after"):
        writer.truncate_to(JournalPosition(Seq(99), 0))
    writer.truncate_to(position)
    assert writer.position == position
    writer.append([write(3)])
    assert entries(tmp_path) == [write(1), write(2), write(3)]
    writer.close()
    assert open_descriptors() == before


def test_sync_beside_append(small_segments: None, tmp_path: Path) -> None:
    storage = FaultyStorage()
    writer = make(tmp_path, [], storage)
    done = threading.Event()
    faults: list[BaseException] = []

    def sync_all_the_time() -> None:
        try:
            while not done.is_set():
                writer.sync()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            faults.append(error)

    thread = threading.Thread(target=sync_all_the_time)
    thread.start()
    for seq in range(1, 300):
        writer.append([write(seq)])
    done.set()
    thread.join()
    assert faults == []
    assert len(entries(tmp_path)) == 299
    for first in segments(Storage(), tmp_path)[:-1]:
        assert storage.synced.count(segment_path(tmp_path, first)) >= 2
    writer.close()


def test_reading_goes_in_bounded_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup.journal_reader, "CHUNK_BYTES", 500)
    written = [write(seq, 100 if seq == 20 else 1 + seq % 3) for seq in range(1, 60)]
    make(tmp_path, [written]).close()
    storage = FaultyStorage()
    assert [logged for logged, _ in read(storage, tmp_path, FIRST_POSITION)] == written
    largest = len(encode(written[19], 0))
    assert max(storage.reads) == largest
    assert sorted(storage.reads)[-2] == 500
    path = segment_path(tmp_path, Seq(1))
    good = path.read_bytes()
    for place in range(SEGMENT_HEADER_BYTES, len(good) - 200, 101):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :])
        with pytest.raises(Damaged, match=r"\.rwj: offset"):
            entries(tmp_path)


def test_an_append_that_was_taken_back_while_it_was_read_is_no_damage(tmp_path: Path) -> None:
    """The chunk was read in the middle of it: the start of the old entry, then entries of the new append."""
    _, _, written, ends = small_journal(tmp_path)

    class Racing(Storage):
        raced = False

        def pread(self, fd: int, length: int, offset: int) -> bytes:
            data = super().pread(fd, length, offset)
            if length > SEGMENT_HEADER_BYTES and not self.raced:
                self.raced = True
                at = ends[1] - offset
                data = data[: at + 20] + b"old!" + data[at + 24 :]
            return data

    assert [logged for logged, _ in read(Racing(), tmp_path, FIRST_POSITION)] == written


def test_a_well_sealed_entry_that_says_what_cannot_be_is_damage(tmp_path: Path) -> None:
    writer = make(tmp_path, [[write(1)]])
    writer.close()
    path = segment_path(tmp_path, Seq(1))
    good = path.read_bytes()
    seed = layout.unpack_segment_header(good, path).seed
    entry = good[SEGMENT_HEADER_BYTES:]

    def resealed(at: int, value: bytes) -> bytes:
        changed = bytearray(entry)
        changed[at : at + len(value)] = value
        changed[:8] = layout.checksum(bytes(changed[8:]), seed).to_bytes(8, "little")
        return good[:SEGMENT_HEADER_BYTES] + changed

    flush = bytes([EntryKind.FLUSH])
    for at, value in ((44, b"\x02"), (44, b"\0"), (12, flush), (68, b"\x02"), (64, b"\x01\x10"), (63, b"\x7f")):
        path.write_bytes(resealed(at, value))
        with pytest.raises(Damaged, match=rf"{path}: offset {SEGMENT_HEADER_BYTES}: the entry of seq 1: "):
            entries(tmp_path)
