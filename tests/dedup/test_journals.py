"""Data journals of different granularity: all open at once, switched under load, and each keeps what it promises."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from dedup.consolidator import consolidate
from dedup.container import ContainerReader
from dedup.errors import BadGranularity, NameRefused, StoreFailed, UnknownName
from dedup.granularity import EVERY_WRITE, FOREVER, granularity_ns, granularity_text
from dedup.group_state import FINE
from dedup.manifest import Manifest, SegmentRow
from dedup.points import routes_needed_since, stretches
from dedup.points_report import points_json
from dedup.reader import GroupReader, StoreReader
from dedup.retention import Policy
from dedup.snapshot_map import MapRange, snapshot_map
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.types import (
    BASE_JOURNAL,
    FINE_JOURNAL,
    ContainerId,
    JournalId,
    JournalSpec,
    Route,
    Seq,
    TimeNs,
    VolumeId,
)
from tests.dedup.faults import FaultyStorage
from tests.dedup.model import STEP_NS, Model
from tests.dedup.test_store import StoreMachine, check_moment

SECOND = 10**9
MINUTE = 60 * SECOND


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def filled(path: Path, storage: Storage | None = None) -> tuple[Store, Model, VolumeId]:
    """A store whose group `g` has a base and one volume of 1 MiB."""
    store, model = Store.open(path, storage), Model()
    group = store.group("g")
    group.ingest(model.begin())
    create = model.create("disk.img", 1 << 20)
    group.ingest([create])
    return store, model, create.volume


class Blocks:
    """Blocks that there have not been before."""

    def __init__(self) -> None:
        self._random = random.Random(7)

    def next(self) -> bytes:
        return self._random.randbytes(4096)


def journals_of(path: Path) -> dict[JournalId, list[ContainerId]]:
    """The containers of each data journal, as their headers say."""
    found: dict[JournalId, list[ContainerId]] = {}
    for file in sorted((path / "containers").iterdir()):
        reader = ContainerReader.open(Storage(), path / "containers", ContainerId(int(file.stem, 16)))
        found.setdefault(reader.header.journal, []).append(reader.header.container)
        reader.close()
    return found


def map_of(path: Path, volume: VolumeId, seq: int) -> list[MapRange]:
    store = StoreReader.open(path)
    try:
        group = store.group("g")
        state = group.view(Seq(seq)).volume(volume)
        assert state is not None
        return list(snapshot_map(store, group, state, Seq(seq)))
    finally:
        store.close()


def kept_points(reader: GroupReader, model: Model) -> list[int]:
    """The seqs of the model that history still tells from others."""
    return [seq for seq in sorted(model.history) if reader.view(Seq(seq)).state.held == seq]


# -- routing -----------------------------------------------------------------------------------------------------------


def test_each_data_journal_has_its_own_chain_and_goes_on_where_it_was(path: Path) -> None:
    store, model, volume = filled(path)
    group, blocks = store.group("g"), Blocks()
    minutes = group.create_journal("minutes", MINUTE)
    for turn in range(6):
        group.use_journal("minutes" if turn % 2 else "fine")
        group.ingest([model.write(volume, turn * 4096, blocks.next())])
    group.ingest([model.reconcile(volume, 1 << 19, blocks.next())])
    store.abandon()
    assert {journal: len(found) for journal, found in journals_of(path).items()} == {
        BASE_JOURNAL: 1,
        FINE_JOURNAL: 1,
        minutes.journal: 1,
    }
    store = Store.open(path)
    found = [one for one in map_of_writer(store, volume) if one.kind != "hole"]
    assert [(one.offset, one.kind, one.journal, one.slot) for one in found] == [
        *((turn * 4096, "journal", "minutes" if turn % 2 else "fine", turn // 2) for turn in range(6)),
        (1 << 19, "base", "base", 0),
    ]
    check_moment(store.group("g").reader(), model, model.seq)
    store.close()


def map_of_writer(store: Store, volume: VolumeId) -> list[MapRange]:
    reader = StoreReader(store.path, store.storage, store.index, store.pool)
    group = reader.group("g")
    state = group.state.volumes[volume]
    return list(snapshot_map(reader, group, state, group.held))


@pytest.mark.parametrize("lose_index", [False, True])
def test_what_is_in_use_survives_a_kill(path: Path, lose_index: bool) -> None:
    store, model, volume = filled(path)
    store.checkpoint()
    blocks = Blocks()
    minutes = store.group("g").create_journal("minutes", MINUTE)
    hours = store.group("g").create_journal("hours", 60 * MINUTE)
    store.group("g").use_journal("hours")
    store.abandon()
    if lose_index:
        shutil.rmtree(path / "index")
        (path / "index").mkdir()
    store = Store.open(path)
    group = store.group("g")
    assert group.state.journals == (FINE, minutes, hours)
    group.ingest([model.write(volume, 0, blocks.next())])
    store.close()
    assert journals_of(path) == {hours.journal: [1]}


def test_ids_are_the_stores_and_names_are_the_groups(path: Path) -> None:
    store, model, volume = filled(path)
    blocks, shared = Blocks(), b"shared" * 1000
    other = store.group("other")
    specs = [store.group("g").create_journal("minutes", MINUTE), other.create_journal("minutes", SECOND)]
    assert [spec.journal for spec in specs] == [2, 3]
    other.use_journal("minutes")
    theirs = Model()
    other.ingest(theirs.begin())
    created = theirs.create("their.img")
    other.ingest([created, theirs.write(created.volume, 0, shared[:4096])])
    store.group("g").ingest([model.write(volume, 0, shared[:4096]), model.write(volume, 4096, blocks.next())])
    store.close()
    found = [one.journal for one in map_of(path, volume, model.seq) if one.kind == "journal"]
    assert found == ["other/minutes", "fine"]


def test_names_and_widths_that_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, _ = filled(path)
    group = store.group("g")
    for name in ("base", "latest", "fine", "", "5m", "@x", ".x", "a/b", "x" * 255):
        with pytest.raises(NameRefused):
            group.create_journal(name, 0)
    for width in (-SECOND, 1, SECOND + 1, 86_401 * SECOND, FOREVER):
        with pytest.raises(BadGranularity):
            group.create_journal("wide", width)
    with pytest.raises(UnknownName, match="it has: fine"):
        group.use_journal("base")
    monkeypatch.setattr("dedup.store.JOURNALS_MAX", 2)
    group.create_journal("last", 86_400 * SECOND)
    with pytest.raises(NameRefused, match="the most there can be"):
        group.create_journal("one-more", 0)
    assert [spec.name for spec in group.state.journals] == ["fine", "last"]
    store.close()


def test_granularities_as_text() -> None:
    assert granularity_ns(EVERY_WRITE) == 0
    assert granularity_ns("60s") == granularity_ns("1m") == MINUTE
    assert granularity_ns("1d") == 86_400 * SECOND
    for text in ("", "0s", "25h", "60", "1.5s", "every", "base"):
        with pytest.raises(BadGranularity):
            granularity_ns(text)
    assert [granularity_text(width) for width in (0, MINUTE, 90 * SECOND, FOREVER)] == [
        "every-write",
        "1m",
        "1m30s",
        "snapshots",
    ]


# -- no pause ----------------------------------------------------------------------------------------------------------


class CountingStorage(Storage):
    """Counts what changes the store's files."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self.calls.append(("open", path.suffix))
        return fd

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self.calls.append(("write", self.path_of(fd).suffix))
        super().pwritev(fd, buffers, offset)

    def datasync(self, fd: int) -> None:
        self.calls.append(("sync", self.path_of(fd).suffix))
        super().datasync(fd)

    def sync_directory(self, path: Path) -> None:
        self.calls.append(("sync", path.name))
        super().sync_directory(path)


def test_a_switch_is_one_append_to_the_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = CountingStorage()
    store, model, volume = filled(path, storage)
    group, blocks = store.group("g"), Blocks()
    group.create_journal("minutes", MINUTE)
    for name in ("minutes", "fine"):
        group.use_journal(name)
        group.ingest([model.write(volume, 0, blocks.next())])
    store.sync()
    monkeypatch.setattr(store, "checkpoint", lambda: pytest.fail("a switch makes no checkpoint"))
    storage.calls.clear()
    group.switch_journal("minutes")
    assert storage.calls == [("write", ".rwj")]
    group.use_journal("fine")
    assert storage.calls[1:] == [("write", ".rwj"), ("write", ""), ("sync", "")], "one entry of the sync log"
    group.ingest([model.write(volume, 0, blocks.next())])
    storage.calls.clear()
    group.use_journal("fine")
    assert ("write", ".rwj") not in storage.calls, "it is in use already"
    monkeypatch.undo()
    store.close()


def test_a_sync_and_a_checkpoint_cover_every_open_data_journal(path: Path) -> None:
    storage = CountingStorage()
    store, model, volume = filled(path, storage)
    group, blocks = store.group("g"), Blocks()
    group.create_journal("minutes", MINUTE)
    group.create_journal("hours", 60 * MINUTE)
    for count, name in enumerate(("fine", "minutes", "hours"), 1):
        group.use_journal(name)
        group.ingest([model.write(volume, 4096 * (count + index), blocks.next()) for index in range(count)])
    storage.calls.clear()
    store.sync_files()
    assert storage.calls.count(("sync", ".rwc")) == 3, "the switches that followed the first two are in the sync log"
    for name in ("fine", "minutes", "hours"):
        group.switch_journal(name)
        group.ingest([model.write(volume, 0, blocks.next())])
    storage.calls.clear()
    store.sync_files()
    assert storage.calls.count(("sync", ".rwc")) == 3
    assert group.durable == model.seq
    assert sorted(store.settle().open.values()) == [2, 3, 4]
    store.close()


def test_a_sync_that_fails_in_any_data_journal_stops_the_store(path: Path) -> None:
    storage = FaultyStorage()
    store, model, volume = filled(path, storage)
    group, blocks = store.group("g"), Blocks()
    group.create_journal("minutes", MINUTE)
    group.use_journal("minutes")
    group.ingest([model.write(volume, 0, blocks.next())])
    group.switch_journal("fine")
    storage.refuse_sync = True
    with pytest.raises(StoreFailed):
        store.sync_files()
    with pytest.raises(StoreFailed):
        group.switch_journal("minutes")
    store.close()
    store = Store.open(path)
    assert store.group("g").state.journal != FINE_JOURNAL, "the last switch was not durable"
    assert store.group("g").held == model.seq - 1
    store.close()


def test_switching_under_load_loses_nothing(path: Path) -> None:
    """Two groups of writers and a thread that syncs; each record is in the data journal that was in use."""
    store = Store.open(path)
    turn, models, blocks = threading.Lock(), {"a": Model(), "b": Model()}, Blocks()
    volumes: dict[str, VolumeId] = {}
    for name, model in models.items():
        group = store.group(name)
        group.ingest(model.begin())
        created = model.create("disk.img", 1 << 20)
        group.ingest([created])
        volumes[name] = created.volume
        group.create_journal("minutes", MINUTE)
        group.create_journal("seconds", SECOND)
    routed: dict[str, dict[int, str]] = {name: {} for name in models}
    ended = threading.Event()
    failures: list[Exception] = []

    def write(name: str) -> None:
        chooser, model, volume = random.Random(name), models[name], volumes[name]
        try:
            for _ in range(150):
                with turn:
                    journal = chooser.choice(["fine", "minutes", "seconds"])
                    store.group(name).switch_journal(journal)
                    for _ in range(chooser.randrange(3)):
                        offset = chooser.randrange(200) * 4096
                        store.group(name).ingest([model.write(volume, offset, blocks.next())])
                        routed[name][model.seq] = journal
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    def sync() -> None:
        try:
            while not ended.is_set():
                store.sync()
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    syncing = threading.Thread(target=sync)
    writing = [threading.Thread(target=write, args=(name,)) for name in models]
    for thread in (syncing, *writing):
        thread.start()
    for thread in writing:
        thread.join()
    ended.set()
    syncing.join()
    assert not failures
    store.abandon()
    store = Store.open(path)
    for name, model in models.items():
        reader = store.group(name).reader()
        assert kept_points(reader, model) == sorted(model.history), "nothing was consolidated: every point is there"
        for seq in random.Random(1).sample(sorted(model.history), 20):
            check_moment(reader, model, seq)
        found = reader.points().ranges
        for seq, journal in routed[name].items():
            (one,) = (one for one in found if one.first <= seq <= one.last)
            assert one.journal == journal
    store.close()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_closed_windows_keep_their_last_flushed_point_and_fine_stretches_keep_all(path: Path) -> None:
    store, model, volume = filled(path)
    group, blocks = store.group("g"), Blocks()
    group.create_journal("minutes", MINUTE)
    wanted: set[int] = set(range(2, model.seq + 1))

    def go_to_next_minute() -> None:
        model.elapsed_ns += MINUTE - (model.elapsed_ns + (model.seq + 1) * STEP_NS + _START) % MINUTE

    for turn in range(3):
        group.use_journal("minutes")
        go_to_next_minute()
        group.ingest([model.write(volume, 0, blocks.next()), model.flush(volume)])
        wanted.add(model.seq)
        group.ingest([model.write(volume, 4096 * turn, blocks.next()) for _ in range(3)])
        go_to_next_minute()
        group.ingest([model.write(volume, 0, blocks.next()) for _ in range(3)])
        # No flush in this window, and the switch closes it.
        wanted.add(model.seq)
        group.use_journal("fine")
        first = model.seq + 1
        group.ingest([model.write(volume, 8192, blocks.next()) for _ in range(4)])
        wanted.update(range(first, model.seq + 1))
    group.use_journal("minutes")
    go_to_next_minute()
    group.ingest([model.write(volume, 0, blocks.next())])
    open_window = model.seq
    consolidate(group, Policy(), group.time)
    assert set(kept_points(group.reader(), model)) == set(model.history), "one window is open in that segment"
    go_to_next_minute()
    group.ingest([model.heartbeat()])
    consolidate(group, Policy(), group.time)
    reader = group.reader()
    kept = kept_points(reader, model)
    assert set(kept) - {1} == wanted | {open_window, model.seq}
    for seq in kept:
        check_moment(reader, model, seq)
    names = [(one.granularity, one.journal) for one in reader.points().ranges]
    assert names == [("every-write", "fine"), ("1m", "minutes")] * 4
    store.close()
    document = points_json(reader_points(path), None)
    ranges = document["ranges"]
    assert isinstance(ranges, list)
    assert [(one["granularity"], one["journal"]) for one in ranges] == names


_START = Model().begin()[0].time - STEP_NS


def reader_points(path: Path):  # type: ignore[no-untyped-def]
    store = StoreReader.open(path)
    try:
        return store.group("g").points()
    finally:
        store.close()


def test_what_is_older_than_all_tiers_is_called_snapshots(path: Path) -> None:
    store, model, volume = filled(path)
    group, blocks = store.group("g"), Blocks()
    for index in range(5):
        group.ingest([model.write(volume, index * 4096, blocks.next())])
    group.create_snapshot("kept")
    group.complete_segment()
    model.elapsed_ns += 40 * 86_400 * SECOND
    group.ingest([model.heartbeat()])
    consolidate(group, Policy(), group.time)
    model.elapsed_ns += SECOND
    group.ingest([model.heartbeat()])
    ranges = group.reader().points().ranges
    assert (ranges[0].granularity, ranges[0].journal) == ("snapshots", "fine")
    assert ranges[-1].granularity == "every-write"
    store.close()


# -- which range has which granularity -----------------------------------------------------------------------------

JOURNALS = (FINE, JournalSpec(JournalId(2), "minutes", MINUTE), JournalSpec(JournalId(3), "hours", 60 * MINUTE))
WINDOWS = [0, MINUTE, 60 * MINUTE, FOREVER]


@given(data=st.data())
def test_stretches_say_of_each_record_what_the_history_says(data: st.DataObject) -> None:
    """Against a list with an item per seq."""
    held = data.draw(st.integers(0, 30))
    changes = data.draw(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(JOURNALS)), max_size=8))
    routes = [Route(Seq(after), spec.journal) for after, spec in sorted(changes, key=lambda change: change[0])]
    routed = [FINE.journal] * (held + 1)
    for route in routes:
        routed[route.after + 1 :] = [route.journal] * max(0, held - route.after)
    truth = {seq: (0, routed[seq]) for seq in range(1, held + 1)}
    rows: list[SegmentRow] = []
    first = 1
    for length in data.draw(st.lists(st.integers(1, 6), max_size=5)):
        last = first + length - 1
        if last > held:
            break
        raw = data.draw(st.booleans())
        window, journal = (0, JournalId(0)) if raw else (data.draw(st.sampled_from(WINDOWS)), routed[first])
        rows.append(SegmentRow(Seq(first), Seq(last), 0 if raw else 1, window, TimeNs(0), 1, journal))
        if not raw:
            truth.update(dict.fromkeys(range(first, last + 1), (window, journal)))
        first = last + 1
    manifest = Manifest(1, tuple(rows))
    promised = {spec.journal: spec.granularity_ns for spec in JOURNALS}
    since = routes_needed_since(manifest)
    at = max((index for index, route in enumerate(routes) if route.after <= since), default=0)
    found = list(stretches(manifest, routes[at:], JOURNALS, Seq(held)))
    lasts = [one.last for one in found]
    assert lasts == sorted(set(lasts)) and (lasts[-1:] == [held] or not held)
    for seq, (window, journal) in truth.items():
        one = found[bisect_left(lasts, seq)]
        assert (one.granularity_ns, one.journal) == (max(window, promised[journal]), journal)
    for one, after in itertools.pairwise(found):
        assert (one.granularity_ns, one.journal) != (after.granularity_ns, after.journal)


# -- all of it at random -----------------------------------------------------------------------------------------------

ROUTED = {"fine": 0, "half-minutes": 30 * SECOND, "minutes": 5 * MINUTE}


class JournalMachine(StoreMachine):
    """The store's machine with three data journals, switched at random: what each promises is there."""

    def __init__(self) -> None:
        super().__init__()
        self.switches: list[tuple[int, str]] = [(0, "fine")]
        """(last seq before it, the data journal that follows), in order."""
        self.gone: set[int] = set()
        """Points that a consolidation may have thinned out."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        for name, width in ROUTED.items():
            if width:
                self.store.group("g").create_journal(name, width)

    @rule(name=st.sampled_from(sorted(ROUTED)))
    def use(self, name: str) -> None:
        self.store.group("g").use_journal(name)
        if name != self.switches[-1][1]:
            self.switches.append((self.model.seq, name))

    @rule(name=st.sampled_from(sorted(ROUTED)), seconds=st.sampled_from([0, 1, 20, 40, 400]))
    def a_burst(self, name: str, seconds: int) -> None:
        """Writes to one data journal while the time passes, flushed here and there."""
        self.use(name)
        group, volume = self.store.group("g"), self.volumes()[0]
        for index in range(6):
            self.model.elapsed_ns += seconds * SECOND // 6
            content = random.Random(self.model.seq).randbytes(700)
            group.ingest([self.model.write(volume, index * 3000, content)])
            if index in (1, 2):
                group.ingest([self.model.flush(volume)])

    def width_at(self, seq: int) -> int:
        return ROUTED[[name for after, name in self.switches if after < seq][-1]]

    @rule()
    def windows_close(self) -> None:
        """What there is is complete, and the time of its windows passes; mostly not that of the finest tier."""
        self.store.group("g").complete_segment()
        self.model.elapsed_ns += 6 * MINUTE
        self.store.group("g").ingest([self.model.heartbeat()])
        self.consolidate()

    @rule()
    def consolidate(self) -> None:
        group = self.store.group("g")
        now, policy = group.time, Policy()
        consolidate(group, policy, now)
        reader = group.reader()
        gaps = reader.gaps()
        points = [seq for seq in sorted(self.model.history) if not any(g.first <= seq <= (g.last or seq) for g in gaps)]
        closing = {max((seq for seq in points if seq <= after), default=0) for after, _ in self.switches}
        promised = self.last_of_each_window(points, reader) | closing | set(self.named.values()) | {self.model.seq}
        for seq in sorted(self.model.history):
            if reader.view(Seq(seq)).state.held == seq:
                continue
            assert seq < self.model.seq, "the last point is kept"
            assert seq not in self.named.values(), "a named point is kept"
            width, time = self.width_at(seq), self.model.times[seq]
            is_point = seq in points and seq >= group.state.base
            if is_point and now - time <= policy.every_write_ns:
                assert width, f"seq {seq} is of the every-write journal, and not old enough"
                assert time // width * width + width <= now, f"the window of seq {seq} is open"
                assert seq not in promised, f"seq {seq} is what its window keeps"
            del self.model.history[seq]
        for name, seq in self.named.items():
            assert reader.resolve(name).seq == seq

    def last_of_each_window(self, points: list[int], reader: GroupReader) -> set[int]:
        """Of each window of each data journal the last flushed point, else the last."""
        chosen: dict[tuple[int, int], tuple[bool, int]] = {}
        for seq in points:
            width = self.width_at(seq)
            if width and seq >= 2:
                view = reader.view(Seq(seq)).state
                flushed = view.held == seq and view.last_flush == seq
                key = (width, self.model.times[seq] // width)
                chosen[key] = max(chosen.get(key, (False, 0)), (flushed, seq))
        return {seq for _, seq in chosen.values()}

    @precondition(lambda self: len(self.switches) > 1)
    @rule()
    def points_tell_which_range_has_which_granularity(self) -> None:
        reader = self.store.group("g").reader()
        for one in reader.points().ranges:
            for seq in (seq for seq in self.model.history if one.first <= seq <= one.last):
                assert one.journal == [name for after, name in self.switches if after < seq][-1]


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        JournalMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_journal_machine() -> None:
    run_machine(20, 25)


@pytest.mark.slow
def test_journal_machine_at_length() -> None:
    run_machine(120, 40)
