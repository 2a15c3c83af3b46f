"""Pins: what readers need is known to the writer, whatever becomes of them; and nobody waits for a stopped one."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import layout, pins
from dedup.errors import StoreBusy, StoreFailed, StoreFull
from dedup.pins import PinBarrier, Pinned, ReaderPins, pinned
from dedup.reader import Pinning, StoreReader
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Seq
from tests.dedup.faults import open_descriptors
from tests.dedup.model import Model

ROOT = Path(__file__).resolve().parent.parent.parent

CHILD = """
import sys
from pathlib import Path
from dedup.pins import ReaderPins
from dedup.storage import Storage
from dedup.types import Seq
pins = ReaderPins.open(Path(sys.argv[1]), Storage(), everything=sys.argv[2] == "everything")
pins.enter()
for seq in range(1, 4):
    pins.pin("g", Seq(seq))
if sys.argv[2] != "inside":
    pins.leave()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / layout.READERS_NAME).mkdir()
    return tmp_path


@contextmanager
def child(store: Path, how: str, script: str = CHILD) -> Iterator[subprocess.Popen[str]]:
    """A reading process that has pinned g 1..3, or everything, or is still `inside` the barrier."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(store), how],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def moments(*seqs: int, group: str = "g") -> frozenset[tuple[str, Seq]]:
    return frozenset((group, Seq(seq)) for seq in seqs)


def pin_files(store: Path) -> list[str]:
    return [name for name in os.listdir(store / layout.READERS_NAME) if name.endswith(layout.PINS_SUFFIX)]


def shut(store: Path) -> Pinned | None:
    barrier = PinBarrier(Storage(), store)
    try:
        with barrier.shut() as found:
            return found
    finally:
        barrier.close()


def test_moments_are_pinned_as_often_as_they_are_used(store: Path) -> None:
    before = open_descriptors()
    reader = ReaderPins.open(store, Storage())
    with reader.inside():
        reader.pin("g", Seq(7))
        reader.pin("g", Seq(7))
        reader.pin("other", Seq(7))
    assert reader.pin_again("g", Seq(7)) and not reader.pin_again("g", Seq(8))
    assert shut(store) == Pinned(False, moments(7) | moments(7, group="other"))
    assert [reader.unpin("g", Seq(7)) for _ in range(3)] == [False, False, True]
    assert shut(store) == Pinned(False, moments(7, group="other"))
    reader.close()
    assert shut(store) == Pinned()
    assert pin_files(store) == []
    assert open_descriptors() == before


def test_all_readers_count(store: Path) -> None:
    one, other = ReaderPins.open(store, Storage()), ReaderPins.open(store, Storage())
    for seq, reader in ((1, one), (2, other)):
        with reader.inside():
            reader.pin("g", Seq(seq))
    assert shut(store) == Pinned(False, moments(1, 2))
    everything = ReaderPins.open(store, Storage(), everything=True)
    found = shut(store)
    assert found is not None and found.everything and found.moments == moments(1, 2)
    assert [name.split("-")[0] for name in found.holders] == [str(os.getpid())]
    everything.close()
    one.close()
    assert shut(store) == Pinned(False, moments(2))
    other.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60), st.integers(1, 6))
def test_the_file_never_says_less_than_the_reader_needs(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]], room: int
) -> None:
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pins, "PINS_MAX", room)
        reader = ReaderPins.open(store, Storage())
        uses: Counter[int] = Counter()
        for pin, seq in steps:
            if pin:
                with reader.inside():
                    reader.pin("g", Seq(seq))
                uses[seq] += 1
            elif uses[seq]:
                uses[seq] -= 1
                assert reader.unpin("g", Seq(seq)) == (not uses[seq])
            needed = moments(*(seq for seq in uses if uses[seq]))
            found = pinned(Storage(), store)
            assert found.everything == (len(needed) > room)
            assert found.everything or found.moments == needed
        reader.close()


def test_a_reader_of_too_many_moments_pins_everything(store: Path) -> None:
    reader = ReaderPins.open(store, Storage())
    with reader.inside():
        for seq in range(1, layout.PINS_MAX + 3):
            reader.pin("g", Seq(seq))
    found = pinned(Storage(), store)
    assert found.everything and len(found.holders) == 1
    assert (store / layout.READERS_NAME / found.holders[0]).stat().st_size <= 80 * layout.PINS_MAX + 24
    for seq in (1, 2):
        reader.unpin("g", Seq(seq))
    found = pinned(Storage(), store)
    assert found == Pinned(False, moments(*range(3, layout.PINS_MAX + 3)))
    reader.close()


def test_any_torn_pin_file_pins_everything(store: Path) -> None:
    reader = ReaderPins.open(store, Storage())
    with reader.inside():
        for seq in (1, 2, 3):
            reader.pin("g", Seq(seq))
    reader.unpin("g", Seq(2))
    (name,) = pin_files(store)
    path = store / layout.READERS_NAME / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert pinned(Storage(), store).everything, at
        if at < layout.PINS_HEADER.size or (at - layout.PINS_HEADER.size) % layout.PIN.size:
            path.write_bytes(whole[:at])
            assert pinned(Storage(), store).everything, at
    path.write_bytes(whole)
    assert pinned(Storage(), store) == Pinned(False, moments(1, 3))
    reader.close()


def test_the_pins_of_a_killed_reader_are_cleared(store: Path) -> None:
    with child(store, "moments") as alive, child(store, "everything") as dead:
        found = shut(store)
        assert found is not None and found.everything and found.moments == moments(1, 2, 3)
        assert [name.split("-")[0] for name in found.holders] == [str(dead.pid)]
        dead.kill()
        dead.wait()
        assert len(pin_files(store)) == 2
        assert shut(store) == Pinned(False, moments(1, 2, 3))
        assert [name.split("-")[0] for name in pin_files(store)] == [str(alive.pid)]
        alive.kill()
        alive.wait()
        assert shut(store) == Pinned()
        assert pin_files(store) == []


def test_a_reader_stopped_inside_the_barrier_postpones_and_blocks_nothing(store: Path) -> None:
    with child(store, "inside") as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        assert shut(store) is None
        # Other readers are not held up by it either.
        other = ReaderPins.open(store, Storage())
        with other.inside():
            other.pin("g", Seq(9))
        other.close()
        assert shut(store) is None
        stopped.kill()
        stopped.wait()
        assert shut(store) == Pinned()


def test_a_reader_waits_for_the_writer_and_says_when_that_takes_too_long(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = PinBarrier(Storage(), store)
    opened: list[ReaderPins] = []
    reader = threading.Thread(target=lambda: opened.append(ReaderPins.open(store, Storage())))
    with barrier.shut() as found:
        assert found == Pinned()
        with monkeypatch.context() as patch:
            patch.setattr(pins, "WAIT_SECONDS", 0.0)
            with pytest.raises(StoreBusy, match="lets no reader in"):
                ReaderPins.open(store, Storage())
        reader.start()
        reader.join(0.1)
        assert reader.is_alive() and opened == [] and pin_files(store) == []
    reader.join()
    assert len(pin_files(store)) == 1
    opened[0].close()
    barrier.close()


RACER = """
import random, sys
from pathlib import Path
from dedup.pins import ReaderPins
from dedup.storage import Storage
from dedup.types import Seq
store, rounds = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(sys.argv[3])
history = store / "history"
pins = ReaderPins.open(store, Storage())
print("ready", flush=True)
for _ in range(rounds):
    pins.enter()
    seq = draw.choice(history.read_text().split())
    pins.pin("g", Seq(int(seq)))
    pins.leave()
    for _ in range(draw.randrange(4)):
        assert seq in history.read_text().split(), f"{seq} was dropped although it was pinned"
    pins.unpin("g", Seq(int(seq)))
pins.close()
"""


def test_the_writer_never_drops_what_a_reader_has_just_pinned(store: Path) -> None:
    """Readers pin moments that they find in a history, one of them for all the time; the writer replaces any that
    nobody has pinned."""
    history = store / "history"
    history.write_text(" ".join(map(str, range(1, 5))))
    patient = ReaderPins.open(store, Storage())
    with patient.inside():
        patient.pin("g", Seq(1))
    draw = random.Random(5)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(store), "200", str(number)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    barrier = PinBarrier(Storage(), store)
    next_seq, dropped, spared, postponed = 5, 0, 0, 0
    while any(reader.poll() is None for reader in readers):
        with barrier.shut() as found:
            if found is None:
                postponed += 1
                continue
            held = history.read_text().split()
            victim = draw.choice(held)
            if found.everything or ("g", Seq(int(victim))) in found.moments:
                spared += 1
                continue
            held[held.index(victim)] = str(next_seq)
            new = store / "history.new"
            new.write_text(" ".join(held))
            new.rename(history)
            next_seq += 1
            dropped += 1
    barrier.close()
    for reader in readers:
        _, said = reader.communicate()
        assert reader.returncode == 0, said
    assert dropped and spared and postponed
    assert "1" in history.read_text().split()
    patient.close()
    assert pin_files(store) == []


# -- disks that refuse ---------------------------------------------------------------------------------------------


class RefusingStorage(Storage):
    """Refuses to make files with `reason`, as a read-only or full disk, or another user's directory, does."""

    def __init__(self, reason: int) -> None:
        super().__init__()
        self.reason = reason

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        full = self.reason == errno.ENOSPC
        if flags & os.O_CREAT if full and path.name != layout.BARRIER_NAME else not full and flags & os.O_ACCMODE:
            error = OSError(self.reason, os.strerror(self.reason))
            kind = StoreFull if full else StoreFailed
            raise kind(f"{path}: {error.strerror}") from error
        return super().open(path, flags, mode)


def test_a_reader_without_room_for_its_file_keeps_everything(store: Path) -> None:
    reader = ReaderPins.open(store, RefusingStorage(errno.ENOSPC))
    assert pin_files(store) == []
    with reader.inside():
        reader.pin("g", Seq(1))
    assert shut(store) is None
    reader.unpin("g", Seq(1))
    assert shut(store) is None
    reader.close()
    assert shut(store) == Pinned()


def test_a_reader_that_may_not_pin_is_refused(store: Path) -> None:
    with pytest.raises(StoreFailed, match="run this as the user that the store belongs to"):
        ReaderPins.open(store, RefusingStorage(errno.EACCES))


def test_on_a_read_only_disk_reading_and_writing_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "store"
    Store.create(path)
    frozen = RefusingStorage(errno.EROFS)
    store = Store.open(path)
    with pytest.raises(StoreBusy, match="is being written"):
        ReaderPins.open(path, frozen)
    store.close()
    one, other = ReaderPins.open(path, frozen), ReaderPins.open(path, frozen, everything=True)
    assert one.everything
    with one.inside():
        one.pin("g", Seq(1))
    one.unpin("g", Seq(1))
    one.close()
    with pytest.raises(StoreBusy):
        Store.open(path)
    other.close()
    Store.open(path).close()


def test_what_a_store_reader_pins(tmp_path: Path) -> None:
    path = tmp_path / "store"
    Store.create(path)
    store = Store.open(path)
    store.group("g").ingest(Model().begin())
    store.close()
    before = open_descriptors()
    for pinning, everything, files in (
        (Pinning.EVERYTHING, True, 1),
        (Pinning.MOMENTS, False, 1),
        (Pinning.NOTHING, False, 0),
    ):
        reader = StoreReader.open(path, pinning=pinning)
        assert len(pin_files(path)) == files
        found = shut(path)
        assert found is not None and found.everything == everything
        group = reader.group()
        group.hold(Seq(2))
        found = shut(path)
        assert found is not None
        assert found.moments == (moments(2) if pinning is Pinning.MOMENTS else frozenset()), pinning
        group.release(Seq(2))
        reader.close()
        assert shut(path) == Pinned()
    assert open_descriptors() == before
