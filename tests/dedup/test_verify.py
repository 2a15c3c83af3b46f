"""Verification against stores that were damaged on purpose: the right check says so, and names what it concerns."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from dedup import layout
from dedup.catalog import Index, _decode, _encode
from dedup.damage import CHECKS, Check, Report
from dedup.errors import Damaged, NotAStore
from dedup.fingerprint_runs import run_name
from dedup.group_verify import GroupVerifier
from dedup.head_replay import HeadReplay
from dedup.overlay import Overlay
from dedup.pointer_map import SEQ_MAX
from dedup.reachability import Reachability, consecutive
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import Bookmark, ClockRun, ContainerId, Seq, Snapshot, VolumeId
from dedup.verify import verify
from tests.dedup.model import Model

BLOCK = 4096
A, B = VolumeId(1), VolumeId(2)


@dataclass
class Built:
    """A closed store: a.img and b.img in the base, then writes, a snapshot `early`, more writes and a resize."""

    path: Path
    model: Model

    @property
    def container(self) -> Path:
        """The one that holds what was written after the base."""
        return layout.container_path(self.path / "containers", ContainerId(2))

    @property
    def segment(self) -> Path:
        return layout.segment_path(self.path / "groups" / "g" / "journal", Seq(1))


@pytest.fixture
def built(tmp_path: Path) -> Built:
    path, model, dice = tmp_path / "store", Model(), random.Random(7)
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    start, end = model.begin()
    group.ingest([start, end])
    group.ingest([model.create("a.img", 40 * BLOCK), model.create("b.img", 8 << 20)])
    group.ingest([model.reconcile(A, 0, dice.randbytes(20 * BLOCK))])
    store.checkpoint()
    group.ingest([model.write(A, block * BLOCK, dice.randbytes(BLOCK)) for block in range(5)])
    group.create_snapshot("early")
    store.checkpoint()
    group.ingest([model.write(B, (block * 300) * BLOCK + 5, dice.randbytes(5000)) for block in range(5)])
    group.ingest([model.write(A, 0, dice.randbytes(3 * BLOCK)), model.resize(A, 30 * BLOCK), model.flush(A)])
    store.close()
    return Built(path, model)


def check(report: Report, name: str) -> Check:
    (found,) = [one for one in report.checks if one.name == name]
    return found


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def failed(report: Report) -> set[str]:
    assert report.ok == all(one.ok for one in report.checks)
    return {one.name for one in report.checks if not one.ok}


@pytest.mark.parametrize("read_data", [False, True])
def test_a_sound_store_is_clean(built: Built, read_data: bool) -> None:
    report = verify(built.path, read_data=read_data)
    assert tuple(one.name for one in report.checks) == CHECKS
    assert failed(report) == set() and report.ok
    assert all(one.items for one in report.checks), "each check looked at something"
    assert check(report, "journal").items == built.model.seq + 1, "every record, and the snapshot's entry"


def test_an_empty_store_and_no_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "s")
    Store.open(tmp_path / "s").close()
    assert verify(tmp_path / "s", read_data=True).ok
    with pytest.raises(NotAStore):
        verify(tmp_path)


def test_a_torn_tail_is_clean(built: Built) -> None:
    with built.segment.open("ab") as segment:
        segment.write(built.segment.read_bytes()[64:100])
    assert verify(built.path).ok


def test_what_a_crash_leaves_of_a_container_is_no_damage(built: Built) -> None:
    layout.container_path(built.path / "containers", ContainerId(9)).write_bytes(b"")
    assert verify(built.path, read_data=True).ok


@pytest.mark.parametrize("is_missing", [False, True])
def test_a_run_of_fingerprints_that_is_lost_is_named_until_it_is_done_without(built: Built, is_missing: bool) -> None:
    (run,) = (built.path / "index").glob("*.rwf")
    if is_missing:
        run.unlink()
    else:
        flip(run, 20)
    report = verify(built.path)
    assert failed(report) == {"fingerprints"}
    (found,) = check(report, "fingerprints").damage
    assert found.file == f"index/{run.name}" and "and that is all" in found.what
    assert ("missing" if is_missing else "header is damaged") in found.what
    Store.open(built.path).close()
    assert verify(built.path, read_data=True).ok


def test_a_run_that_a_writer_has_merged_meanwhile_is_no_damage(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [(1 << 20, 2 << 20), (2 << 20,), (2 << 20,)]
    monkeypatch.setattr(Index, "fingerprint_runs", lambda index: names.pop(0))
    found = check(verify(built.path), "fingerprints")
    assert found.items == 2 and [one.file for one in found.damage] == [f"index/{run_name(2 << 20)}"]


def test_a_flipped_block_is_found_by_reading_it(built: Built) -> None:
    flip(built.container, layout.RAW_SLOTS_OFFSET + 3 * BLOCK + 17)  # the fourth write: block 3 of a.img, for good
    assert verify(built.path).ok, "the block itself was not read"
    report = verify(built.path, read_data=True)
    assert failed(report) == {"pointers-resolve"}
    found = check(report, "pointers-resolve").damage
    assert {(one.snapshot, one.volume, one.offset, one.length) for one in found} == {
        ("early", "a.img", 3 * BLOCK, BLOCK),
        ("latest", "a.img", 3 * BLOCK, BLOCK),
    }
    assert {one.file for one in found} == {built.container.name} and {one.group for one in found} == {"g"}


def test_a_flipped_fingerprint_is_found_without_reading_data(built: Built) -> None:
    flip(built.container, layout.RAW_TABLE_OFFSET + 4 * 16 + 2)
    report = verify(built.path)
    assert failed(report) == {"pointers-resolve"}
    assert {(one.snapshot, one.offset) for one in check(report, "pointers-resolve").damage} == {
        ("early", 4 * BLOCK),
        ("latest", 4 * BLOCK),
    }


def test_damage_in_no_snapshot_is_named_by_its_record(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "s"
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    group.ingest([*model.begin(), model.create("a.img")])
    first = model.write(A, 8 * BLOCK, b"x" * BLOCK)
    group.ingest([first, model.write(A, 8 * BLOCK, b"y" * BLOCK)])
    store.close()
    flip(layout.container_path(path / "containers", ContainerId(1)), layout.RAW_SLOTS_OFFSET)
    (found,) = check(verify(path, read_data=True), "pointers-resolve").damage
    assert (found.snapshot, found.volume, found.offset, found.length) == (None, "a.img", 8 * BLOCK, BLOCK)
    assert f"seq={first.seq}" in found.what


def test_a_flipped_byte_in_the_journal(built: Built) -> None:
    flip(built.segment, built.segment.stat().st_size // 2)
    report = verify(built.path)
    assert "journal" in failed(report)
    (found,) = check(report, "journal").damage
    assert found.file == built.segment.name and "offset" in found.what
    # What the journal cannot say any more is not called sound.
    assert "could not be checked" in check(report, "index-equals-journal").damage[0].what


@pytest.mark.parametrize("keep", [64, 200])
def test_a_journal_that_ends_before_what_the_index_holds(built: Built, keep: int) -> None:
    built.segment.write_bytes(built.segment.read_bytes()[:keep])
    assert "journal" in failed(verify(built.path))


def test_a_missing_segment(built: Built) -> None:
    built.segment.unlink()
    assert "journal" in failed(verify(built.path))


def test_a_truncated_container(built: Built) -> None:
    with built.container.open("r+b") as file:
        file.truncate(layout.RAW_SLOTS_OFFSET + 2 * BLOCK)
    report = verify(built.path)
    assert failed(report) == {"pointers-resolve"}
    early = [one for one in check(report, "pointers-resolve").damage if one.snapshot == "early"]
    assert [(one.offset, one.length) for one in early] == [(2 * BLOCK, 3 * BLOCK)]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: flip(path, 20)], ids=["gone", "header"])
@pytest.mark.parametrize("read_data", [False, True])
def test_a_container_that_is_gone_or_does_not_open(
    built: Built, damage: Callable[[Path], None], read_data: bool
) -> None:
    damage(built.container)
    report = verify(built.path, read_data=read_data)
    assert failed(report) == {"containers", "pointers-resolve"}
    assert [one.file for one in check(report, "containers").damage] == [built.container.name]
    named = {(one.snapshot, one.volume) for one in check(report, "pointers-resolve").damage}
    assert named >= {("early", "a.img"), ("latest", "a.img"), ("latest", "b.img")}


def test_a_sealed_container(built: Built) -> None:
    seal(Storage(), built.container.parent, ContainerId(2), None)
    assert verify(built.path, read_data=True).ok
    flip(built.container, built.container.stat().st_size - 9)
    report = verify(built.path, read_data=True)
    assert failed(report) == {"pointers-resolve"}


def alter_pointer(path: Path, volume: VolumeId, block: int, address: int) -> None:
    """Puts another address into the newest version of the pointer map."""
    index = Index(path / "index", writer=True)
    with index.write() as txn:
        leaf, at = divmod(block, layout.LEAF_BLOCKS)
        pointers = index.pointers(1)
        indexes, addresses = np.array([at], dtype=np.uint16), np.array([address], dtype=np.uint64)
        with txn.cursor(index.db["pointers"]) as cursor:
            cursor.last()
            seq = Seq(layout.POINTER_KEY.unpack(cursor.key())[3])
        whole = pointers.leaf(txn, volume, leaf, SEQ_MAX)
        assert whole is not None
        whole[indexes] = addresses
        pointers.put(txn, volume, leaf, seq, np.arange(len(whole), dtype=np.uint16), whole)
    index.close()


def test_a_pointer_that_the_journal_does_not_say(built: Built) -> None:
    alter_pointer(built.path, B, 600, int(layout.address(ContainerId(2), 0)))
    report = verify(built.path, read_data=True)
    assert failed(report) == {"index-equals-journal"}
    (found,) = check(report, "index-equals-journal").damage
    assert (found.volume, found.offset, found.length) == ("b.img", 600 * BLOCK, BLOCK)


@pytest.mark.parametrize(("container", "slot"), [(2, 9000), (77, 1), (2, 0xFFFF)])
def test_a_pointer_to_nothing(built: Built, container: int, slot: int) -> None:
    alter_pointer(built.path, B, 600, int(layout.address(ContainerId(container), slot)))
    report = verify(built.path)
    assert failed(report) >= {"index-equals-journal", "pointers-resolve"}
    (found,) = check(report, "pointers-resolve").damage
    assert (found.snapshot, found.volume, found.offset) == ("latest", "b.img", 600 * BLOCK)


def test_a_leaf_that_does_not_decode(built: Built) -> None:
    index = Index(built.path / "index", writer=True)
    with index.write() as txn, txn.cursor(index.db["pointers"]) as cursor:
        cursor.last()
        cursor.put(cursor.key(), b"\0\0garbage")
    index.close()
    assert failed(verify(built.path)) == {"index-equals-journal"}


def test_a_name_that_the_index_lost(built: Built) -> None:
    index = Index(built.path / "index", writer=True)
    with index.write() as txn:
        txn.delete(layout.GROUP_KEY.pack(1) + b"early", db=index.db["names"])
    index.close()
    report = verify(built.path)
    assert failed(report) == {"index-equals-journal"}
    assert "early" in check(report, "index-equals-journal").damage[0].what


def test_a_name_of_no_record(built: Built) -> None:
    index = Index(built.path / "index", writer=True)
    with index.write() as txn:
        key = layout.GROUP_KEY.pack(1) + b"early"
        value = txn.get(key, db=index.db["names"])
        assert value is not None
        wrong = replace(_decode(value, Snapshot), seq=Seq(127))
        txn.put(key, _encode(wrong), db=index.db["names"])
    index.close()
    report = verify(built.path)
    assert "catalog" in failed(report)
    assert check(report, "catalog").damage[0].snapshot == "early"


def test_a_bookmark_names_a_bookmarks_record(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "s"
    Store.create(path)
    store = Store.open(path)
    store.group("g").ingest([*model.begin(), model.create("a.img")])
    last = model.flush(A)
    store.group("g").ingest([last, Bookmark(Seq(last.seq + 1), last.time, ClockRun(0), "mark")])
    store.close()
    assert verify(path).ok


def test_a_group_that_the_index_does_not_know(built: Built) -> None:
    index = Index(built.path / "index", writer=True)
    with index.write() as txn:
        txn.delete(b"g", db=index.db["groups"])
    index.close()
    assert "index-equals-journal" in failed(verify(built.path))


@pytest.mark.parametrize("key", [b"watermark", b"merged", b"runs", b"gone" + bytes(3)])
def test_a_row_of_the_whole_store_that_does_not_decode(built: Built, key: bytes) -> None:
    """No store opens over it, so it has to be said."""
    index = Index(built.path / "index", writer=True)
    with index.write() as txn:
        txn.put(key, b"\xc1 no value", db=index.db["store"])
    index.close()
    with pytest.raises(Damaged):
        Store.open(built.path)
    assert failed(verify(built.path)) == {"index-equals-journal"}


def test_the_store_stays_usable_and_unchanged(built: Built) -> None:
    before = {path: path.read_bytes() for path in built.path.rglob("*.rw?")}
    verify(built.path, read_data=True)
    assert {path: path.read_bytes() for path in built.path.rglob("*.rw?")} == before
    Store.open(built.path).close()


def test_small_windows_find_the_same(built: Built) -> None:
    """The replay in windows of one leaf compares each leaf once, and no less."""
    alter_pointer(built.path, B, 600, int(layout.address(ContainerId(2), 0)))
    items = []
    for leaves_max in (1, 2, 100):
        index, storage = Index(built.path / "index", writer=False), Storage()
        checks = {name: Check(name) for name in CHECKS}
        slots = Reachability(storage, built.path / "containers")
        group = GroupVerifier(storage, built.path, index, "g", 1, checks, slots, leaves_max=leaves_max)
        group.begin()
        group.journal(lambda done: None)
        group.compare()
        index.close()
        (found,) = checks["index-equals-journal"].damage
        assert (found.volume, found.offset) == ("b.img", 600 * BLOCK)
        items.append(checks["index-equals-journal"].items)
    assert items == [items[0]] * 3


def test_a_replay_keeps_to_its_window() -> None:
    replay = HeadReplay(leaves_max=1)
    overlay = Overlay()
    for leaf in (5, 1, 3, 2):
        overlay.put(A, leaf * layout.LEAF_BLOCKS, np.array([leaf], dtype=np.uint64))
    replay.take(overlay)
    assert list(replay.leaves()) == [(A, 1)] and replay.end == (A, 2) and replay.touched == {(A, 1)}


def test_a_replay_packs_what_it_does_not_use() -> None:
    dice = np.random.default_rng(3)
    replay = HeadReplay(leaves_max=40)
    blocks = np.zeros(400 * layout.LEAF_BLOCKS, dtype=np.uint64)
    for _ in range(30):
        overlay = Overlay()
        if dice.random() < 0.2:
            cut = int(dice.integers(len(blocks)))
            overlay.cut(A, cut)
            blocks[cut:] = 0
        for place in dice.integers(len(blocks), size=20).tolist():
            address = dice.integers(1, 1 << 40, size=1).astype(np.uint64)
            overlay.put(A, place, address)
            blocks[place] = address[0]
        replay.take(overlay)
    assert replay.end is None and len(list(replay.leaves())) > 40
    for leaf in range(400):
        assert np.array_equal(replay.leaf((A, leaf)), blocks[leaf * layout.LEAF_BLOCKS :][: layout.LEAF_BLOCKS])


def test_consecutive() -> None:
    assert list(consecutive(np.array([], dtype=np.int64))) == []
    assert list(consecutive(np.array([1, 2, 5, 7, 8, 9], dtype=np.int64))) == [(1, 2), (5, 1), (7, 3)]


def test_a_group_before_its_first_checkpoint_is_sound(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    store, model = Store.open(tmp_path / "store"), Model()
    store.group("without-a-record")
    store.group("killed-early").ingest([*model.begin(), model.create("a.img", BLOCK), model.write(A, 0, b"a")])
    store.sync()
    store.abandon()
    report = verify(tmp_path / "store", read_data=True)
    assert report.ok, report
    assert check(report, "journal").items == 4
