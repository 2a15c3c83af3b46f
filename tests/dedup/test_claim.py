"""The claim, word by word, at the store: a base snapshot, IOs into a first data journal, a second snapshot that is only
pointers into both, then IOs into a second data journal of another granularity while the first still receives.

`tests/system/test_claim.py` plays the same with real mounts.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from dedup.consolidator import consolidate
from dedup.journal_reader import first_position
from dedup.metadata_journal import read
from dedup.reader import StoreReader
from dedup.retention import Policy
from dedup.snapshot_map import snapshot_map
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.types import Seq
from tests.dedup.crash_workload import GroupModel
from tests.dedup.model import START_NS, STEP_NS
from tests.dedup.test_store import check_moment

BLOCKS = 64
MINUTE = 60 * 10**9


class CountingStorage(Storage):
    """Counts reads and writes by the kind of file."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def _count(self, what: str, path: Path) -> None:
        self.counts[f"{what} {path.suffix or path.name}"] += 1

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self._count("open", path)
        return fd

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._count("read", self.path_of(fd))
        return super().pread(fd, length, offset)

    def pread_into(self, fd: int, buffers: list[memoryview], offset: int, *, wait: bool = True) -> int:
        self._count("read", self.path_of(fd))
        return super().pread_into(fd, buffers, offset, wait=wait)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._count("write", self.path_of(fd))
        super().pwritev(fd, buffers, offset)


class Protected:
    """A group with one volume of BLOCKS blocks, its base made by a reconcile, and its model."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.group = store.group(name)
        self.model = model = GroupModel()
        self._random = random.Random(name)
        start, created = model.start(1), model.create("disk.img", BLOCKS * 4096)
        self.volume = created.volume
        content = [model.reconcile(self.volume, n * 4096, self._random.randbytes(4096)) for n in range(BLOCKS)]
        self.group.ingest([start, created, *content, model.reconciled()])
        self.base = model.seq
        self.places: dict[int, str] = dict.fromkeys(range(BLOCKS), "base")
        """Which data journal received each block last."""
        self.routed: dict[int, str] = {}
        """The data journal in use at each write and flush."""
        self.flushes: set[int] = set()

    def write(self, journal: str, count: int, *, flush: bool = False) -> None:
        for _ in range(count):
            block = self._random.randrange(BLOCKS)
            self.group.ingest([self.model.write(self.volume, block * 4096, self._random.randbytes(4096))])
            self.places[block] = self.routed[self.model.seq] = journal
        if flush:
            self.group.ingest([self.model.flush(self.volume)])
            self.routed[self.model.seq] = journal
            self.flushes.add(self.model.seq)

    def map_at(self, seq: int) -> dict[int, str]:
        """Where each block lies, as `snapshot map` says."""
        reader = StoreReader(self.store.path, self.store.storage, self.store.index, self.store.pool)
        group = reader.group(self.group.name)
        state = group.view(Seq(seq)).volume(self.volume)
        assert state is not None
        found: dict[int, str] = {}
        for one in snapshot_map(reader, group, state, Seq(seq)):
            assert one.journal is not None and (one.kind == "base") == (one.journal == "base")
            found.update(dict.fromkeys(range(one.offset // 4096, (one.offset + one.length) // 4096), one.journal))
        return found

    def kept(self) -> list[int]:
        """The recovery points that the journal still tells from others."""
        storage, directory = self.store.storage, self.group.directory
        entries = read(storage, directory, first_position(storage, directory))
        return [logged.seq for logged, _ in entries if logged.kind.consumes_seq]

    def check(self, seqs: Collection[int]) -> None:
        """Restores some of these moments, and holds them against the model."""
        reader = self.group.reader()
        for seq in sorted(self._random.sample(sorted(seqs), min(len(seqs), 25))):
            assert reader.view(Seq(seq)).state.held == seq
            check_moment(reader, self.model, seq)


def next_minute(one: Protected) -> None:
    one.model.elapsed_ns += MINUTE - (START_NS + one.model.elapsed_ns + (one.model.seq + 1) * STEP_NS) % MINUTE


def test_the_claim_word_by_word(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    storage = CountingStorage()
    store = Store.open(tmp_path / "store", storage)

    # The initial backup snapshot.
    groups = [Protected(store, name) for name in ("one", "two")]
    for one in groups:
        assert [found.name for found in one.group.reader().snapshots()] == ["base"]
        assert one.map_at(one.base) == dict.fromkeys(range(BLOCKS), "base")

    # IOs into the first data journal, which keeps every write.
    for one in groups:
        one.write("fine", 40)

    # A second snapshot: no source is even there, no block is read or written.
    seconds: dict[str, tuple[int, dict[int, str]]] = {}
    for one in groups:
        store.sync()
        storage.counts.clear()
        snapshot = one.group.create_snapshot("second")
        assert snapshot.seq == one.model.seq
        assert not [what for what in storage.counts if what.endswith(".rwc")], storage.counts
        assert storage.counts["write .rwj"] == 1, "its name is all that is written"
        seconds[one.group.name] = snapshot.seq, dict(one.places)
        found = one.map_at(snapshot.seq)
        assert found == one.places and set(found.values()) == {"base", "fine"}

    # More IOs into a second data journal of another granularity, while the first still receives.
    for one in groups:
        one.group.create_journal(f"minutes-{one.group.name}", MINUTE)
    containers = {file.name for file in (tmp_path / "store" / "containers").iterdir()}
    turn = threading.Lock()
    failures: list[Exception] = []

    def load(one: Protected) -> None:
        chooser = random.Random(one.group.name)
        try:
            for _ in range(60):
                name = chooser.choice(["fine", f"minutes-{one.group.name}"])
                with turn:
                    one.group.switch_journal(name)
                    if chooser.random() < 0.2:
                        next_minute(one)
                    one.write(name, chooser.randrange(1, 4), flush=chooser.random() < 0.3)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=load, args=(one,)) for one in groups]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.sync()
    for thread in threads:
        thread.join()
    assert not failures
    added = {file.name for file in (tmp_path / "store" / "containers").iterdir()} - containers
    assert len(added) == 2, "one chain for each further data journal; the first goes on in its open container"

    # A third snapshot, with pointers into all of them; the restores are the model's.
    for one in groups:
        third = one.group.create_snapshot("third")
        assert one.map_at(third.seq) == one.places
        assert set(one.places.values()) == {"base", "fine", f"minutes-{one.group.name}"}
        seq, places = seconds[one.group.name]
        assert one.map_at(seq) == places, "what came later changed nothing of it"
        assert one.kept() == sorted(one.model.history)
        one.check(one.model.history)

    # The windows close: one point of each stays, the last flushed one; of the every-write journal all do.
    for one in groups:
        one.group.complete_segment()
        next_minute(one)
        one.group.ingest([one.model.heartbeat()])
        consolidate(one.group, Policy(), one.group.time)
        check_kept(one)
    store.abandon()
    store = Store.open(tmp_path / "store")
    for one in groups:
        one.store, one.group = store, store.group(one.group.name)
        check_kept(one)
    store.close()


def check_kept(one: Protected) -> None:
    kept = set(one.kept())
    assert {seq for seq, name in one.routed.items() if name == "fine"} <= kept
    windows: dict[int, list[int]] = {}
    visits: dict[tuple[int, int], list[int]] = {}
    switches, before = 0, "fine"
    for seq, name in one.routed.items():
        switches, before = switches + (name != before), name
        if name != "fine":
            minute = one.model.times[seq] // MINUTE
            windows.setdefault(minute, []).append(seq)
            visits.setdefault((minute, switches), []).append(seq)
    for members in windows.values():
        assert ([seq for seq in members if seq in one.flushes] or members)[-1] in kept
    for members in visits.values():
        wanted = {([seq for seq in members if seq in one.flushes] or members)[-1], members[-1]}
        assert kept & set(members) <= wanted, "its own point, and the one at which a switch may have closed it"
    assert len(kept) < len(one.model.history)
    one.check(kept)
