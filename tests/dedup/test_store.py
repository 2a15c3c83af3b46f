"""The store against its model: every recovery point's image equals what was written, whatever happened in between."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dedup import ingest
from dedup.consolidator import consolidate
from dedup.container import marks_of
from dedup.errors import MomentRefused, NameRefused, NotAStore, OutOfOrder, StoreBusy, UnknownFormat, UnknownName
from dedup.layout import checked, fingerprint
from dedup.reader import GroupReader
from dedup.retention import Policy
from dedup.sealed import seal
from dedup.staging import Bytes
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import WRITE_BYTES_MAX, ContainerId, PointKind, Seq, VolumeId
from dedup.verify import verify
from tests.dedup.model import Model

SIZE_MAX = 60_000


def image_of(reader: GroupReader, volume: VolumeId, seq: int) -> bytes:
    image = reader.image(volume, Seq(seq))
    return image.read(0, image.size)


def check_moment(reader: GroupReader, model: Model, seq: int) -> None:
    content, paths = model.history[seq]
    assert {state.volume: path for path, state in reader.volumes_at(Seq(seq)).items()} == paths
    for volume, data in content.items():
        assert image_of(reader, volume, seq) == data, f"volume {volume} at seq {seq}"


class StoreMachine(RuleBasedStateMachine):
    """Random records, checkpoints, syncs, clean closes and kills; every kept moment is compared with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="rewindfs-test-"))
        self.model = Model()
        self.named: dict[str, int] = {}
        Store.create(self.path / "store")
        self.store = Store.open(self.path / "store")

    @initialize()
    def begin(self) -> None:
        group = self.store.group("g")
        group.ingest(self.model.begin())
        group.ingest([self.model.create("a.img", 10_000), self.model.create("b.img")])

    def volumes(self) -> list[VolumeId]:
        return sorted(self.model.content)

    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data: st.DataObject, count: int) -> None:
        records = []
        for _ in range(count):
            volume = data.draw(st.sampled_from(self.volumes()))
            offset = data.draw(st.integers(0, SIZE_MAX) | st.integers(0, 14).map(lambda block: block * 4096))
            length = data.draw(st.integers(1, 9000) | st.sampled_from([4096, 8192]))
            seed = data.draw(st.integers(0, 5))
            content = bytes(length) if seed == 0 else random.Random(seed).randbytes(length)
            kind = data.draw(st.sampled_from(["write", "write", "reconcile"]))
            make = self.model.write if kind == "write" else self.model.reconcile
            records.append(make(volume, offset, content))
        self.store.group("g").ingest(records)

    @rule(data=st.data())
    def aggregate(self, data: st.DataObject) -> None:
        volume = data.draw(st.sampled_from(self.volumes()))
        starts = sorted(data.draw(st.sets(st.integers(0, 20), min_size=2, max_size=6)))
        writes = [(start * 3000, random.Random(start).randbytes(2999)) for start in starts]
        self.store.group("g").ingest([self.model.aggregate(volume, writes)])

    @rule(data=st.data(), size=st.integers(0, SIZE_MAX))
    def resize(self, data: st.DataObject, size: int) -> None:
        self.store.group("g").ingest([self.model.resize(data.draw(st.sampled_from(self.volumes())), size)])

    @rule(data=st.data(), size=st.integers(0, SIZE_MAX))
    def refused_write(self, data: st.DataObject, size: int) -> None:
        volume = data.draw(st.sampled_from(self.volumes()))
        record = self.model.write(volume, size, b"refused" * 700)
        truth = data.draw(st.sampled_from([b"", b"truth"]))
        self.store.group("g").ingest([record, self.model.correct(volume, record.seq, size, size, truth)])

    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        volume = data.draw(st.sampled_from(self.volumes()))
        self.store.group("g").ingest([self.model.flush(volume), self.model.heartbeat()])

    @precondition(lambda self: len(self.model.content) < 4)
    @rule(size=st.integers(0, 9000))
    def create(self, size: int) -> None:
        self.store.group("g").ingest([self.model.create(f"new{self.model.next_volume}", size)])

    @precondition(lambda self: len(self.model.content) > 1)
    @rule(data=st.data(), over=st.booleans())
    def rename(self, data: st.DataObject, over: bool) -> None:
        volume = data.draw(st.sampled_from(self.volumes()))
        other = data.draw(st.sampled_from(self.volumes()))
        path = self.model.paths[other] if over else f"moved{self.model.seq}"
        self.store.group("g").ingest([self.model.rename(volume, path)])

    @precondition(lambda self: len(self.model.content) > 1)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        self.store.group("g").ingest([self.model.retire(data.draw(st.sampled_from(self.volumes())))])

    @rule()
    def snapshot(self) -> None:
        name = f"n{self.model.seq}"
        if name not in self.named:
            assert self.store.group("g").create_snapshot(name).seq == self.model.seq
            self.named[name] = self.model.seq

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def forget_snapshot(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.named)))
        self.store.group("g").delete_snapshot(name)
        del self.named[name]

    @rule(minutes=st.sampled_from([1, 20, 200, 3000, 60_000]))
    def time_passes(self, minutes: int) -> None:
        self.model.elapsed_ns += minutes * 60 * 10**9
        self.store.group("g").ingest([self.model.heartbeat()])

    @rule()
    def complete_segment(self) -> None:
        self.store.group("g").complete_segment()

    @rule()
    def consolidate(self) -> None:
        group = self.store.group("g")
        now = group.time
        consolidate(group, Policy(), now)
        reader = group.reader()
        for seq in sorted(self.model.history):
            if reader.view(Seq(seq)).state.held != seq:
                assert seq < self.model.seq, "the last point is kept"
                assert now - self.model.times[seq] > Policy().every_write_ns, f"seq {seq} is not old enough"
                assert seq not in self.named.values(), "a named point is kept"
                del self.model.history[seq]
        for name, seq in self.named.items():
            assert reader.resolve(name).seq == seq

    @rule()
    def checkpoint(self) -> None:
        self.store.checkpoint()

    @rule()
    def sync(self) -> None:
        self.store.sync()
        assert self.store.group("g").durable == self.model.seq

    @rule(clean=st.booleans(), lose_index=st.booleans())
    def reopen(self, clean: bool, lose_index: bool) -> None:
        self.store.close() if clean else self.store.abandon()
        if lose_index:
            shutil.rmtree(self.path / "store" / "index")
            (self.path / "store" / "index").mkdir()
        self.store = Store.open(self.path / "store")

    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.model.history)))
        check_moment(self.store.group("g").reader(), self.model, seq)

    @invariant()
    def head_is_the_model(self) -> None:
        if not self.model.seq:
            return
        group = self.store.group("g")
        assert group.held == self.model.seq
        assert {state.volume: state.size for state in group.volumes()} == {
            volume: len(data) for volume, data in self.model.content.items()
        }

    def teardown(self) -> None:
        if self.model.seq:
            reader = self.store.group("g").reader()
            for seq in self.model.history:
                check_moment(reader, self.model, seq)
        self.store.close()
        shutil.rmtree(self.path)


def test_store_machine() -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def filled(path: Path, storage: Storage | None = None) -> tuple[Store, Model, VolumeId]:
    store, model = Store.open(path, storage), Model()
    group = store.group("g")
    group.ingest(model.begin())
    create = model.create("disk.img", 1 << 20)
    group.ingest([create])
    return store, model, create.volume


def test_duplicate_blocks_are_stored_once_and_zeros_not_at_all(path: Path) -> None:
    store, model, volume = filled(path)
    group, block = store.group("g"), random.Random(1).randbytes(4096)
    group.ingest([model.write(volume, 0, block * 64), model.write(volume, 1 << 19, block * 64)])
    group.ingest([model.write(volume, 1 << 18, bytes(1 << 16))])
    assert store.fingerprints.pending_count == 1
    check_moment(group.reader(), model, model.seq)
    store.close()


@pytest.mark.parametrize("seed", range(4))
def test_large_writes_of_all_kinds_of_blocks(path: Path, seed: int) -> None:
    """Zeros, new ones, such as the same write has, and such as were stored before or after the last checkpoint, of
    containers that are raw or sealed; in any order, and as neighbours. Each is stored once."""
    store, model, volume = filled(path)
    group, rng = store.group("g"), random.Random(seed)
    known: list[bytes] = [bytes(4096)]
    for turn in range(8):
        records = []
        for length in rng.choices([2, 16, 255, 256, 257, 300], k=rng.randrange(1, 4)):
            blocks: list[bytes] = []
            while len(blocks) < length:
                start = rng.randrange(len(known))
                new = [rng.randbytes(4096) for _ in range(rng.randrange(1, 30))]
                blocks += rng.choice([new, new * 2, known[start : start + 40], rng.choices(known, k=30), known[:1] * 5])
            known = list(dict.fromkeys([*known, *blocks[:length]]))
            records.append(model.write(volume, rng.randrange(100) * 4096, b"".join(blocks[:length])))
        group.ingest(records)
        if turn % 3 == 2:
            store.checkpoint()
        if turn == 4:
            store.complete_containers()
            store.checkpoint()
            for container in containers_of(path):
                seal(Storage(), container.parent, ContainerId(int(container.stem)), None)
                store.pool.forget(ContainerId(int(container.stem)))
    check_moment(group.reader(), model, model.seq)
    stored = [store.fingerprints.lookup([fingerprint(block)])[0] for block in known[1:]]
    assert None not in stored and len(set(stored)) == len(stored)
    store.close()
    taken = [marks_of(Storage(), path / "containers", ContainerId(int(one.stem)))[0] for one in containers_of(path)]
    assert sum(map(len, taken)) == len(stored)
    assert verify(path, read_data=True).ok


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_have_their_fingerprint_in_common_are_kept_apart(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a write and between them; some have that of zeros."""

    def weak(block: Bytes) -> bytes:
        return bytes([block[7] % 3 + 1]) * 8 + bytes([block[9] % 2]) * 8

    monkeypatch.setattr(ingest, "xxh3_128_digest", weak)
    monkeypatch.setattr(ingest, "ZEROS_FINGERPRINT", weak(bytes(4096)))
    monkeypatch.setattr("dedup.container.xxhash", SimpleNamespace(xxh3_128_digest=weak))
    store, model, volume = filled(path)
    group, rng = store.group("g"), random.Random(seed)
    blocks = [bytes(4096), *(rng.randbytes(4096) for _ in range(40))]
    for turn in range(6):
        parts = [b"".join(rng.choices(blocks, k=rng.choice([1, 2, 5, 70]))) for _ in range(3)]
        group.ingest([model.write(volume, rng.randrange(50) * 4096, data) for data in parts])
        if turn == 3:
            store.checkpoint()
        check_moment(group.reader(), model, model.seq)
    store.close()


@pytest.mark.parametrize("more", [-4096, 0, 4096, 3 * WRITE_BYTES_MAX])
def test_a_write_of_any_length_is_stored_whole(path: Path, more: int) -> None:
    """One longer than the protocol carries, too."""
    store, model, volume = filled(path)
    data = random.Random(more).randbytes(WRITE_BYTES_MAX + more)
    store.group("g").ingest([model.write(volume, 4096, data), model.write(volume, 8192, data)])
    check_moment(store.group("g").reader(), model, model.seq - 1)
    check_moment(store.group("g").reader(), model, model.seq)
    store.close()


def containers_of(path: Path) -> list[Path]:
    return sorted((path / "containers").iterdir())


def test_one_writer(path: Path) -> None:
    store = Store.open(path)
    with pytest.raises(StoreBusy, match="another process"):
        Store.open(path)
    store.close()
    Store.open(path).close()


def test_what_is_no_store(tmp_path: Path, path: Path) -> None:
    with pytest.raises(NotAStore, match="not a rewindfs store"):
        Store.open(tmp_path)
    with pytest.raises(NotAStore, match="neither empty nor a store"):
        Store.create(tmp_path)
    marker = path / "STORE"
    data = bytearray(marker.read_bytes())
    data[8] = 99
    marker.write_bytes(checked(bytes(data)))
    with pytest.raises(UnknownFormat, match="version 99"):
        Store.open(path)


def test_records_must_follow(path: Path) -> None:
    store, model, volume = filled(path)
    skipped = model.write(volume, 0, b"lost")
    after = model.write(volume, 0, b"after")
    with pytest.raises(OutOfOrder):
        store.group("g").ingest([after])
    store.group("g").ingest([skipped, after])
    with pytest.raises(OutOfOrder):
        store.group("g").ingest([after])
    check_moment(store.group("g").reader(), model, model.seq)
    store.close()


def test_snapshots_are_names_and_nothing_else(path: Path) -> None:
    store, model, volume = filled(path)
    group = store.group("g")
    group.ingest([model.write(volume, 5000, b"x" * 9000)])
    before = {found.name: found.stat().st_size for found in (path / "containers").iterdir()}
    snapshot = group.create_snapshot("monday")
    assert {found.name: found.stat().st_size for found in (path / "containers").iterdir()} == before
    assert (snapshot.seq, snapshot.kind) == (model.seq, "snapshot")
    with pytest.raises(NameRefused, match="already"):
        group.create_snapshot("monday")
    assert [found.name for found in group.reader().snapshots()] == ["base", "monday"]
    group.delete_snapshot("monday")
    with pytest.raises(UnknownName):
        group.delete_snapshot("monday")
    with pytest.raises(NameRefused):
        group.delete_snapshot("base")
    store.abandon()
    reopened = Store.open(path)
    assert [found.name for found in reopened.group("g").reader().snapshots()] == ["base"]
    reopened.close()


def test_moments_by_time_by_seq_and_by_flush(path: Path) -> None:
    store, model, volume = filled(path)
    group = store.group("g")
    group.ingest([model.write(volume, 0, b"1"), model.flush(volume), model.write(volume, 0, b"2")])
    flushed = model.seq - 1
    for checkpoint in (False, True):
        if checkpoint:
            store.checkpoint()
        reader = group.reader()
        latest = reader.resolve("latest")
        assert (latest.seq, latest.kind) == (model.seq, PointKind.CRASH)
        assert reader.resolve("latest~flush").seq == flushed
        assert reader.resolve(f"seq={flushed}").kind is PointKind.FLUSH
        for seq in range(2, model.seq + 1):
            assert reader.resolve(rfc(model, seq)).seq == seq
        with pytest.raises(MomentRefused, match="before the first"):
            reader.resolve("seq=1")
        with pytest.raises(MomentRefused, match="before the first"):
            reader.resolve("2001-01-01T00:00:00Z")
        with pytest.raises(MomentRefused, match="after the last"):
            reader.resolve("seq=99")
        with pytest.raises(MomentRefused, match="after the last"):
            reader.resolve("2099-01-01T00:00:00Z")
        with pytest.raises(UnknownName):
            reader.resolve("no-such-name")
    store.close()


def rfc(model: Model, seq: int) -> str:
    from dedup.moment import rfc3339
    from dedup.types import TimeNs
    from tests.dedup.model import START_NS, STEP_NS

    return rfc3339(TimeNs(START_NS + seq * STEP_NS))


def test_a_corrected_write_is_a_gap(path: Path) -> None:
    store, model, volume = filled(path)
    group = store.group("g")
    group.ingest([model.write(volume, 0, b"good")])
    refused = model.write(volume, 4096, b"refused")
    group.ingest([refused, model.correct(volume, refused.seq, 1 << 20, 4096, bytes(7))])
    reader = group.reader()
    with pytest.raises(MomentRefused, match=rf"in a gap.*seq={refused.seq - 1} .*seq={refused.seq + 1} "):
        reader.resolve(f"seq={refused.seq}")
    assert reader.resolve("latest").seq == refused.seq + 1
    check_moment(reader, model, model.seq)
    points = reader.points()
    assert [(gap.first, gap.last) for gap in points.gaps] == [(refused.seq, refused.seq)]
    assert [(found.first, found.last) for found in points.ranges] == [
        (2, refused.seq - 1),
        (refused.seq + 1, model.seq),
    ]
    store.close()
