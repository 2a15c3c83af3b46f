"""The spool: frames on disk in order, whatever is cut, flipped, refused or lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import replication
import replication.spool
from dedup.errors import UnknownFormat
from dedup.layout import Fields
from dedup.types import Aggregate, Bookmark, ClockRun, Epoch, Extent, Flush, Heartbeat, Seq, TimeNs, VolumeId, Write
from replication.errors import LocalProtocolError, SpoolBusy, SpoolDamaged, SpoolFailed
from replication.messages import Compare
from replication.outbox import Frame, frame_of
from replication.spool import Spool
from replication.spool_file import ENTRY, SEGMENT, Origin, entry_bytes, segment_path
from replication.wire import decode_all
from tests.dedup.crash_disk import ALL as KILLED
from tests.dedup.crash_disk import CORNERS, some
from tests.dedup.crash_storage import Recorder, unsynced
from tests.dedup.faults import FailingCalls, FaultKind, FaultyStorage, open_descriptors

NOW, RUN, DISK = TimeNs(7), ClockRun(0), VolumeId(1)
ORIGIN = Origin("g", "ab" * 16, Epoch(3), "store")
ALL = 1 << 30


def write(seq: int, length: int = 100) -> Frame:
    return frame_of(Write(Seq(seq), TimeNs(seq), RUN, Extent(DISK, seq * 4096, bytes([seq % 255 + 1]) * length)))


def aggregate(first: int, last: int) -> Frame:
    return frame_of(Aggregate(Seq(first), Seq(last), NOW, RUN, (Extent(DISK, 0, b"x" * last),)))


def writes(first: int, last: int, length: int = 100) -> list[Frame]:
    return [write(seq, length) for seq in range(first, last + 1)]


def plain(frames: Sequence[Frame]) -> list[tuple[type, int, int, int, bytes]]:
    return [(f.kind, f.first_seq, f.seq, f.time, b"".join(f.buffers)) for f in frames]


def content(spool: Spool, bytes_max: int = ALL) -> list[tuple[type, int, int, int, bytes]]:
    """All that it holds, read step by step."""
    found: list[Frame] = []
    at = spool.first_seq
    while more := spool.read(at, bytes_max):
        found += more
        at = Seq(more[-1].seq + 1)
    return plain(found)


def fill(directory: Path, batches: Sequence[Sequence[Frame]]) -> None:
    spool = Spool.open(directory)
    for batch in batches:
        assert spool.append(batch, ORIGIN) == len(batch)
        spool.sync()
    spool.close()


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.rwq"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    with unsynced():
        yield


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replication.spool, "SPOOL_SEGMENT_BYTES", 1500)
    yield


def test_what_is_appended_is_read_in_order_also_after_opening_again(tmp_path: Path) -> None:
    frames = [
        write(5),
        aggregate(6, 9),
        frame_of(Flush(Seq(10), NOW, RUN, DISK)),
        frame_of(Heartbeat(Seq(11), NOW, RUN)),
        frame_of(Bookmark(Seq(12), NOW, RUN, "before")),
        write(13, 1 << 20),
    ]
    spool = Spool.open(tmp_path / "spool")
    assert (spool.empty, spool.origin, spool.bytes, spool.read(Seq(1), ALL)) == (True, None, 0, [])
    assert spool.append(frames[:4], ORIGIN) == 4
    assert (spool.first_seq, spool.last_seq, spool.synced_seq, spool.origin) == (5, 11, 4, ORIGIN)
    spool.sync()
    assert spool.append(frames[4:], ORIGIN) == 2
    for bytes_max in (0, 1, 300, ALL):
        assert content(spool, bytes_max) == plain(frames)
    assert spool.bytes == sum(path.stat().st_size for path in segments(tmp_path / "spool"))
    size = spool.bytes
    spool.close()
    spool = Spool.open(tmp_path / "spool")
    assert (spool.first_seq, spool.last_seq, spool.synced_seq, spool.bytes) == (5, 13, 13, size)
    assert spool.origin == ORIGIN
    assert not spool.damage
    assert content(spool) == plain(frames)
    records = [message for frame in spool.read(Seq(5), ALL) for message in decode_all(frame.buffers[0])]
    assert records == [message for frame in frames for message in decode_all(b"".join(frame.buffers))]
    spool.discard()
    assert (spool.empty, spool.bytes, segments(tmp_path / "spool")) == (True, 0, [])
    spool.close()


def test_reading_from_anywhere(tmp_path: Path, small_segments: None) -> None:
    frames = [*writes(1, 4), aggregate(5, 9), *writes(10, 60)]
    fill(tmp_path, [frames[at : at + 5] for at in range(0, len(frames), 5)])
    assert len(segments(tmp_path)) > 4
    spool = Spool.open(tmp_path)
    for seq in (60, 1, 33, 34, 7, 5, 9, 10, 61, 0):
        expected = [frame for frame in frames if frame.seq >= seq] if seq else []
        found = spool.read(Seq(seq), 1)
        assert plain(found) == plain(expected[:1])
    spool.close()


def test_segments_go_once_nothing_in_them_is_needed(tmp_path: Path, small_segments: None) -> None:
    frames = writes(1, 60)
    fill(tmp_path, [frames[at : at + 5] for at in range(0, 60, 5)])
    spool = Spool.open(tmp_path)
    for seq in range(1, 60):
        spool.drop_through(Seq(seq))
        assert spool.first_seq <= seq + 1
        assert content(spool) == plain(frames[spool.first_seq - 1 :])
        assert segments(tmp_path)[0] == segment_path(tmp_path, spool.first_seq)
    assert len(segments(tmp_path)) == 1
    spool.drop_through(Seq(60))
    assert (spool.empty, spool.bytes, segments(tmp_path)) == (True, 0, [])
    other = Origin("g", "", Epoch(4), "store")
    assert spool.append([write(99)], other) == 1
    assert (spool.origin, spool.first_seq, spool.last_seq) == (other, 99, 99)
    spool.close()


def test_frames_must_follow_and_be_of_one_origin(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path)
    spool.append([write(5)], ORIGIN)
    for wrong in ([write(5)], [write(7)], [write(6), write(8)]):
        with pytest.raises(LocalProtocolError, match="does not follow"):
            spool.append(wrong, ORIGIN)
    with pytest.raises(LocalProtocolError, match="holds records of"):
        spool.append([write(6)], Origin("g", "", Epoch(4), "store"))
    with pytest.raises(LocalProtocolError, match="Compare"):
        spool.append([frame_of(Compare(Seq(6), NOW, RUN, DISK, 0, bytes(16)))], ORIGIN)
    assert spool.append([], ORIGIN) == 0
    assert content(spool) == plain([write(5)])
    spool.close()


def test_the_limit_takes_what_fits(tmp_path: Path) -> None:
    frames = writes(1, 10)
    limit = SEGMENT.size + entry_bytes(frames[:6])
    spool = Spool.open(tmp_path, limit)
    assert spool.append(frames[:4], ORIGIN) == 4
    assert spool.append(frames[4:], ORIGIN) == 2
    assert spool.append(frames[6:], ORIGIN) == 0
    assert (spool.bytes, spool.last_seq) == (limit, 6)
    assert content(spool) == plain(frames[:6])
    spool.drop_through(Seq(6))
    assert spool.append(frames[6:], ORIGIN) == 4
    spool.close()
    tiny = Spool.open(tmp_path / "tiny", SEGMENT.size)
    assert tiny.append(frames, ORIGIN) == 0
    assert tiny.empty
    tiny.close()


@pytest.mark.parametrize("already", [0, 3])
def test_a_full_disk_loses_nothing_that_was_taken(tmp_path: Path, already: int) -> None:
    storage = FaultyStorage()
    frames = writes(1, 10)
    spool = Spool.open(tmp_path, storage=storage)
    spool.append(frames[:already], ORIGIN)
    for room in (0, 40, 300, 700):
        storage.refuse_write_after = room
        assert spool.append(frames[already:], ORIGIN) == 0
        assert content(spool) == plain(frames[:already])
    assert (spool.empty, spool.failed) == (not already, "")
    storage.refuse_write_after = None
    assert spool.append(frames[already:], ORIGIN) == 10 - already
    spool.close()
    spool = Spool.open(tmp_path)
    assert content(spool) == plain(frames)
    assert not spool.damage
    spool.close()


def test_after_a_failed_sync_it_takes_nothing_and_claims_only_what_was_synced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FaultyStorage()
    spool = Spool.open(tmp_path, storage=storage)
    spool.append(writes(1, 3), ORIGIN)
    spool.sync()
    spool.append(writes(4, 6), ORIGIN)
    storage.refuse_sync = True
    with pytest.raises(SpoolFailed):
        spool.sync()
    storage.refuse_sync = False
    assert "takes nothing more" in caplog.text
    for call in (spool.sync, lambda: spool.append([write(4)], ORIGIN)):
        with pytest.raises(SpoolFailed, match="takes nothing more"):
            call()
    assert (spool.last_seq, spool.synced_seq) == (3, 3)
    assert content(spool) == plain(writes(1, 3))
    spool.drop_through(Seq(3))
    assert spool.empty
    spool.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    before = open_descriptors()
    spool = Spool.open(tmp_path)
    with pytest.raises(SpoolBusy, match="another process uses this spool"):
        Spool.open(tmp_path)
    spool.close()
    Spool.open(tmp_path).close()
    with pytest.raises(SpoolFailed, match="no such directory"):
        Spool.open(tmp_path / "none" / "spool")
    assert open_descriptors() == before


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, [writes(1, 3)])
    path = segments(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(UnknownFormat, match="use a newer one"):
        Spool.open(tmp_path)
    assert path.read_bytes() == data


def test_cut_at_every_byte_what_is_whole_stays(tmp_path: Path, no_waiting: None) -> None:
    frames = writes(1, 4, 20)
    fill(tmp_path, [frames[:2], frames[2:]])
    path = segments(tmp_path)[0]
    good = path.read_bytes()
    ends = [SEGMENT.size + entry_bytes(frames[:count]) for count in range(5)]
    assert ends[-1] == len(good)
    for cut in (*range(0, SEGMENT.size - 1, 16), *range(SEGMENT.size - 1, len(good) + 1)):
        path.write_bytes(good[:cut])
        whole = sum(end <= cut for end in ends[1:])
        spool = Spool.open(tmp_path)
        assert content(spool) == plain(frames[:whole])
        assert (spool.empty, spool.damage) == (not whole, "")
        assert spool.append([write(whole + 1, 20)], ORIGIN) == 1
        spool.close()
        spool = Spool.open(tmp_path)
        assert content(spool) == plain([*frames[:whole], write(whole + 1, 20)])
        spool.close()


def test_no_flipped_bit_gives_wrong_bytes_and_what_was_synced_is_said_to_be_lost(
    tmp_path: Path, no_waiting: None
) -> None:
    frames = writes(1, 4, 20)
    fill(tmp_path, [frames[:2], frames[2:]])
    path = segments(tmp_path)[0]
    good = path.read_bytes()
    ends = [SEGMENT.size + entry_bytes(frames[:count]) for count in range(5)]
    for place in (*range(32), *range(32, SEGMENT.size - 16, 16), *range(SEGMENT.size - 16, len(good))):
        if 8 <= place < 12:
            continue  # the version: another one is left alone
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        spool = Spool.open(tmp_path)
        intact = sum(end <= place for end in ends[1:]) if place >= SEGMENT.size else 0
        assert content(spool) == plain(frames[:intact]), place
        # Of the second round nothing was written after its sync, so that a torn end cannot be told from a damaged one.
        assert bool(spool.damage) == (intact < 2), place
        spool.close()


def test_damage_in_an_older_segment_is_found_on_reading(tmp_path: Path, small_segments: None) -> None:
    frames = writes(1, 40)
    fill(tmp_path, [frames[at : at + 5] for at in range(0, 40, 5)])
    path = segments(tmp_path)[1]
    good = path.read_bytes()
    first = int(path.stem)
    for data in (good[:-1], good[: SEGMENT.size], good[: SEGMENT.size + entry_bytes(frames[:2])], good[:-9] + bytes(9)):
        path.write_bytes(data)
        spool = Spool.open(tmp_path)
        assert (spool.last_seq, spool.damage) == (40, "")
        found: list[Frame] = []
        with pytest.raises(SpoolDamaged, match=path.name):
            while True:
                found += spool.read(Seq(len(found) + 1), 300)
        assert plain(found) == plain(frames[: len(found)])
        assert len(found) >= first - 1
        spool.close()


@pytest.mark.parametrize("what", ["header", "missing", "other"])
def test_a_segment_that_cannot_be_used_ends_the_spool(tmp_path: Path, what: str, small_segments: None) -> None:
    frames = writes(1, 40)
    fill(tmp_path, [frames[at : at + 5] for at in range(0, 40, 5)])
    path = segments(tmp_path)[2]
    first = int(path.stem)
    if what == "missing":
        path.unlink()
        spool = Spool.open(tmp_path)
        with pytest.raises(SpoolDamaged, match=f"records from {first} on are missing"):
            content(spool)
        spool.close()
        return
    if what == "header":
        path.write_bytes(b"?" + path.read_bytes()[1:])
    else:
        other = tmp_path / "other"
        spool = Spool.open(other)
        spool.append(frames[first - 1 :], Origin("h", "", Epoch(1), "store"))
        spool.close()
        path.write_bytes(segments(other)[0].read_bytes())
    spool = Spool.open(tmp_path)
    assert f"{path}: offset 0" in spool.damage
    assert spool.last_seq == first - 1
    assert content(spool) == plain(frames[: first - 1])
    assert len(segments(tmp_path)) == 2
    spool.append([write(first)], ORIGIN)
    spool.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(1, 900), min_size=1, max_size=6)),
        st.tuples(st.just("sync"), st.none()),
        st.tuples(st.just("drop"), st.integers(0, 30)),
        st.tuples(st.just("open"), st.none()),
        st.tuples(st.just("read"), st.tuples(st.integers(0, 30), st.integers(0, 2000))),
        st.tuples(st.just("discard"), st.none()),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_a_spool_is_a_list_of_frames(tmp_path_factory: pytest.TempPathFactory, taken: list[tuple[str, object]]) -> None:
    directory = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replication.spool, "SPOOL_SEGMENT_BYTES", 1500)
        patch.setattr("dedup.storage.os.fdatasync", lambda fd: None)
        patch.setattr("dedup.storage.os.fsync", lambda fd: None)
        spool = Spool.open(directory, 20_000)
        model: list[Frame] = []
        last = 0
        for what, how in taken:
            if what == "append":
                assert isinstance(how, list)
                frames = [write(last + 1 + at, length) for at, length in enumerate(how)]
                count = spool.append(frames, ORIGIN)
                assert count == len(frames) or spool.bytes + entry_bytes([frames[count]]) + SEGMENT.size > 20_000
                model += frames[:count]
                last += count
            elif what == "sync":
                spool.sync()
                assert spool.synced_seq == spool.last_seq
            elif what == "drop":
                assert isinstance(how, int)
                spool.drop_through(Seq(last - how))
                assert spool.empty or spool.first_seq <= max(last - how, 0) + 1 or model[0].seq == spool.first_seq
                model = [frame for frame in model if not spool.empty and frame.seq >= spool.first_seq]
                assert not how or not model or model[-1].seq == last
            elif what == "open":
                spool.close()
                spool = Spool.open(directory, 20_000)
            elif what == "read":
                assert isinstance(how, tuple)
                seq, bytes_max = Seq(last - how[0]), how[1]
                found = spool.read(seq, bytes_max) if seq > 0 else []
                rest = [frame for frame in model if frame.seq >= seq] if model and model[0].seq <= seq else []
                assert plain(found) == plain(rest[: len(found)])
                assert bool(found) == bool(rest) or seq <= 0
            else:
                spool.discard()
                model = []
            assert spool.empty == (not model)
            assert content(spool) == plain(model)
            assert spool.bytes == sum(path.stat().st_size for path in segments(directory)) <= 20_000
        spool.close()


def work(directory: Path, note: list[tuple[int, int, int]], recorder: Recorder) -> None:
    """Two outages. Notes after each step how many events there were, what must be held, and what may be gone."""

    def now(spool: Spool, dropped: int) -> None:
        note.append((len(recorder.events), spool.synced_seq, dropped))

    spool = Spool.open(directory)
    for at in range(1, 21, 4):
        spool.append(writes(at, at + 3, 300), ORIGIN)
        spool.sync()
        now(spool, 0)
    for seq in (7, 14):
        note.append((len(recorder.events), spool.synced_seq, seq))
        spool.drop_through(Seq(seq))
    spool.append(writes(21, 24, 300), ORIGIN)
    spool.append(writes(25, 26, 300), ORIGIN)
    spool.sync()
    now(spool, 14)
    note.append((len(recorder.events), 0, 26))
    spool.drop_through(Seq(26))
    spool.append(writes(30, 31, 5000), Origin("g", "", Epoch(9), "store"))
    spool.sync()
    now(spool, 29)
    spool.close()


def test_a_crash_at_any_moment_leaves_what_was_synced(tmp_path: Path, small_segments: None) -> None:
    root = tmp_path / "root"
    root.mkdir()
    recorder = Recorder(root)
    note: list[tuple[int, int, int]] = [(0, 0, 0)]
    with unsynced(recorder):
        work(root / "spool", note, recorder)
    written = dict(enumerate(writes(1, 26, 300), 1)) | dict(enumerate(writes(30, 31, 5000), 30))
    seen = set()
    checked = 0
    for count in range(len(recorder.events) + 1):
        held, gone = [entry for entry in note if entry[0] <= count][-1][1:]
        disk = type(recorder.disk)()
        for event in recorder.events[:count]:
            event.play(disk)
        for survival in (KILLED, *CORNERS, *(some(1000 * count + seed) for seed in range(20))):
            image = disk.after(survival)
            if (key := (image.fingerprint(), held, gone)) in seen:
                continue
            seen.add(key)
            target = tmp_path / f"crash-{checked}"
            target.mkdir()
            image.write(target)
            with unsynced():
                spool = Spool.open(target / "spool")
                found = content(spool)
                assert not spool.damage, f"{count} events, {survival}: {spool.damage}"
                seqs = [entry[1] for entry in found]
                assert found == plain([written[seq] for seq in seqs]), f"{count} events, {survival}"
                assert seqs == list(range(seqs[0], seqs[-1] + 1)) if seqs else True
                assert set(range(gone + 1, held + 1)) <= set(seqs), f"{count} events, {survival}: {seqs}"
                spool.close()
            checked += 1
    assert checked > 100


def test_every_call_may_fail(tmp_path: Path, small_segments: None) -> None:
    """Refused or half done, a call costs at most what was not synced, and the spool says so or goes on."""

    def run(directory: Path, calls: FailingCalls) -> tuple[int, int]:
        recorder = Recorder(directory.parent, before=calls)
        synced = gone = 0
        with unsynced(recorder):
            try:
                spool = Spool.open(directory)
            except SpoolFailed:
                return 0, 0
            try:
                at = 1
                while at <= 24:
                    count = spool.append(writes(at, min(24, at + 3), 300), ORIGIN)
                    if not count:
                        break
                    at += count
                    spool.sync()
                    synced = spool.synced_seq
                gone = 9
                spool.drop_through(Seq(9))
                content(spool)
            except (SpoolFailed, SpoolDamaged):
                pass
            spool.close()
        return synced, gone

    (tmp_path / "0" / "a" / "root").mkdir(parents=True)
    listed = FailingCalls()
    run(tmp_path / "0" / "a" / "root" / "spool", listed)
    before = open_descriptors()
    number = 0
    for call in listed.calls:
        for fault in call.faults():
            if fault.kind is FaultKind.SHORT and call.name == "pread":
                continue  # the real calls say the truth; Storage reads on
            number += 1
            root = tmp_path / str(number) / "a" / "root"
            root.mkdir(parents=True)
            synced, gone = run(root / "spool", FailingCalls(fault))
            assert open_descriptors() == before, fault
            with unsynced():
                spool = Spool.open(root / "spool")
                seqs = [entry[1] for entry in content(spool)]
                assert not spool.damage, fault
                assert set(range(gone + 1, synced + 1)) <= set(seqs), fault
                assert content(spool) == plain([write(seq, 300) for seq in seqs])
                spool.close()
    assert number > 50


@pytest.mark.parametrize("fields", [SEGMENT, ENTRY], ids=lambda fields: fields.name)
def test_the_protocol_page_shows_where_the_fields_are(fields: Fields) -> None:
    assert replication.__file__ is not None
    page = (Path(replication.__file__).parent / "PROTOCOL.md").read_text()
    (rows,) = re.findall(rf"\| offset \| bytes \| in the {fields.name} \|\n.*\n((?:\|.*\n)+)", page)
    found = re.findall(r"\| (\d+) \| (\d+) \| `(\w+)`", rows)
    assert [(int(offset), int(length), name) for offset, length, name in found] == fields.table()
