"""Repair of stores that were damaged on purpose: what can be had is had back, nothing is made worse, all is said."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dedup import layout, sealed_layout
from dedup.catalog import Index
from dedup.damage import Report
from dedup.errors import Damaged, NotAStore, StoreBusy
from dedup.reader import StoreReader
from dedup.repair import repair
from dedup.sealed import seal
from dedup.storage import Buffer, Storage
from dedup.store import Store
from dedup.types import ContainerId, Seq, VolumeId
from dedup.verify import verify
from replication.verify_cli import verify as verify_command
from tests.dedup.model import Model
from tests.dedup.test_store import check_moment

BLOCK = 4096
A = VolumeId(1)


@dataclass
class Built:
    """A closed store: container 1 holds the base, 2 what was written then (its block 1 also lies in 3), 3 the rest."""

    path: Path
    model: Model

    @property
    def journal(self) -> Path:
        return self.path / "groups" / "g" / "journal"

    @property
    def segment(self) -> Path:
        return layout.segment_path(self.journal, Seq(1))

    def container(self, number: int) -> Path:
        return layout.container_path(self.path / "containers", ContainerId(number))

    def check_every_moment(self) -> None:
        store = StoreReader.open(self.path)
        try:
            for seq in self.model.history:
                check_moment(store.group("g"), self.model, seq)
        finally:
            store.close()

    def lost_blocks(self) -> set[tuple[int, int]]:
        """(seq, block) of volume A that cannot be read; asserts that every other one is right."""
        store, lost = StoreReader.open(self.path), set()
        try:
            reader = store.group("g")
            for seq, (content, _) in self.model.history.items():
                if A not in content:
                    continue
                image = reader.image(A, Seq(seq))
                for block in range(0, len(content[A]), BLOCK):
                    try:
                        assert image.read(block, BLOCK) == content[A][block : block + BLOCK]
                    except Damaged:
                        lost.add((seq, block // BLOCK))
        finally:
            store.close()
        return lost


def build(path: Path) -> Built:
    model, dice = Model(), random.Random(7)
    Store.create(path)
    store = Store.open(path)
    group = store.group("g")
    group.ingest([*model.begin(), model.create("a.img", 20 * BLOCK), model.create("b.img")])
    group.ingest([model.reconcile(A, 0, dice.randbytes(8 * BLOCK))])
    store.checkpoint()
    group.ingest([model.write(A, block * BLOCK, dice.randbytes(BLOCK)) for block in range(4)])
    group.create_snapshot("early")
    store.close()
    store = Store.open(path)
    group = store.group("g")
    group.ingest([model.write(A, block * BLOCK + 7, dice.randbytes(BLOCK)) for block in range(3, 6)])
    group.ingest([model.resize(A, 18 * BLOCK), model.flush(A)])
    twin = model.content[A][BLOCK : 2 * BLOCK]
    store.ingest._known = lambda blocks, *_: np.zeros(len(blocks), np.uint64)  # type: ignore[method-assign]
    group.ingest([model.write(A, 12 * BLOCK, twin)])  # stored a second time
    store.close()
    return Built(path, model)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("repair") / "store")


@pytest.fixture
def built(template: Built, tmp_path: Path) -> Built:
    shutil.copytree(template.path, tmp_path / "store")
    return Built(tmp_path / "store", copy.deepcopy(template.model))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x40]))


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.ok}


def slot_at(slot: int) -> int:
    return layout.RAW_SLOTS_OFFSET + slot * BLOCK


def remove_index(built: Built) -> None:
    shutil.rmtree(built.path / "index")


def garbage_index(built: Built) -> None:
    (built.path / "index" / "data.mdb").write_bytes(b"no database" * 1000)


def empty_index(built: Built) -> None:
    for name in os.listdir(built.path / "index"):
        (built.path / "index" / name).unlink()


def store_row(built: Built, key: bytes) -> None:
    """One that only opening for writing reads."""
    index = Index(built.path / "index", writer=True)
    with index.write() as txn:
        txn.put(key, b"\xc1 no value", db=index.db["store"])
    index.close()


def merged_row(built: Built) -> None:
    store_row(built, b"merged")


def runs_row(built: Built) -> None:
    store_row(built, b"runs")


def gone_row(built: Built) -> None:
    store_row(built, b"gone" + bytes(3))


def header(built: Built) -> None:
    flip(built.container(2), 20)


def header_version(built: Built) -> None:
    flip(built.container(2), 8)


def other_number(built: Built) -> None:
    page = built.container(1).read_bytes()[: layout.CONTAINER_PAGE_BYTES]
    with built.container(2).open("r+b") as file:
        file.write(page)


def table(built: Built) -> None:
    with built.container(2).open("r+b") as file:
        file.seek(layout.RAW_TABLE_OFFSET)
        file.write(os.urandom(64))


def sealed(built: Built) -> None:
    seal(Storage(), built.container(2).parent, ContainerId(2), None)


def sealed_header(built: Built) -> None:
    sealed(built)
    flip(built.container(2), 20)


def sealed_count(built: Built) -> None:
    sealed(built)
    flip(built.container(2), sealed_layout.SEALED_HEADER_OFFSET + 1)


def sealed_table(built: Built) -> None:
    sealed(built)
    flip(built.container(2), sealed_layout.SEALED_TABLE_OFFSET + 9)


def copied_block(built: Built) -> None:
    flip(built.container(2), slot_at(1) + 9)


def base_gone(built: Built) -> None:
    """All that the base holds was stored again, and then the base's container was lost."""
    store = Store.open(built.path)
    store.ingest._known = lambda blocks, *_: np.zeros(len(blocks), np.uint64)  # type: ignore[method-assign]
    for seq in (5, built.model.seq):
        content = built.model.history[seq][0][A]
        records = [built.model.write(VolumeId(2), at, content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
        store.group("g").ingest(records)
    store.close()
    built.container(1).unlink()


def marker(built: Built) -> None:
    flip(built.path / "STORE", 50 - 8)


def no_marker(built: Built) -> None:
    (built.path / "STORE").unlink()


def leftovers(built: Built) -> None:
    built.container(9).write_bytes(b"")
    built.container(2).with_name(built.container(2).name + ".tmp").write_bytes(b"half")
    (built.journal / "MANIFEST.tmp").write_bytes(b"")


def unnamed_garbage(built: Built) -> None:
    built.container(9).write_bytes(bytes(layout.RAW_SLOTS_OFFSET + BLOCK))


WHOLE: list[Callable[[Built], None]] = [
    remove_index,
    garbage_index,
    empty_index,
    merged_row,
    runs_row,
    gone_row,
    header,
    header_version,
    other_number,
    table,
    sealed_header,
    sealed_count,
    sealed_table,
    copied_block,
    base_gone,
    marker,
    no_marker,
    leftovers,
    unnamed_garbage,
]
"""Damage after which nothing is lost."""


@pytest.mark.parametrize("damage", WHOLE, ids=lambda damage: damage.__name__)
def test_what_can_be_had_back_is(template: Built, tmp_path: Path, damage: Callable[[Built], None]) -> None:
    built = build(tmp_path / "store") if damage is base_gone else Built(tmp_path / "store", template.model)
    if damage is not base_gone:
        shutil.copytree(template.path, built.path)
    damage(built)
    report = repair(built.path, read_data=True)
    assert report.ok, failed(report)
    assert report.repaired == len(report.repairs) > 0
    built.check_every_moment()
    assert repair(built.path, read_data=True).repairs == (), "the second time there is nothing to do"


def test_a_sound_store_is_left_alone(built: Built) -> None:
    before = {path: path.read_bytes() for path in built.path.rglob("*.rw?")}
    report = repair(built.path, read_data=True)
    assert report.ok and report.repairs == ()
    assert {path: path.read_bytes() for path in built.path.rglob("*.rw?")} == before


def test_what_is_lost_is_lost_alone(built: Built) -> None:
    flip(built.container(2), slot_at(2) + 5)  # block 2, which nothing else holds
    flip(built.container(2), 20)
    report = repair(built.path, read_data=True)
    assert failed(report) == {"pointers-resolve"}
    assert "3 blocks kept, 0 healed from copies, 1 lost" in report.repairs[0].what
    lost = built.lost_blocks()
    assert {block for _, block in lost} == {2}
    assert (built.path / "quarantine" / built.container(2).name).exists()
    note = (built.path / "quarantine" / (built.container(2).name + ".txt")).read_text()
    assert "header does not match its checksum" in note
    assert repair(built.path, read_data=True).repairs == (), "what is lost is not tried again"
    # Once its bytes turn up, a block of the file that was written anew is healed like any other.
    assert built.lost_blocks() == lost


def test_a_container_that_is_gone_leaves_its_number_spent(built: Built) -> None:
    """No address of a lost container may ever come to stand for another block."""
    built.container(3).unlink()
    remove_index(built)
    report = repair(built.path, read_data=True)
    assert failed(report) == {"pointers-resolve"}
    before = built.lost_blocks()
    store = Store.open(built.path)
    store.group("g").ingest([built.model.write(A, 17 * BLOCK, os.urandom(BLOCK))])
    store.close()
    assert before <= built.lost_blocks()


def test_no_opening_gives_a_lost_container_s_number_again(built: Built) -> None:
    built.container(3).unlink()
    remove_index(built)
    store = Store.open(built.path)
    store.group("g").ingest([built.model.write(A, 17 * BLOCK, os.urandom(BLOCK))])
    store.close()
    assert not built.container(3).exists() and built.container(4).exists()
    assert built.lost_blocks(), "and what can be read is right"


def test_a_running_writer_is_not_disturbed(built: Built) -> None:
    store = Store.open(built.path)
    with pytest.raises(StoreBusy, match="stop"):
        repair(built.path)
    store.close()


def test_no_store_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(NotAStore):
        repair(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]


# -- journals ----------------------------------------------------------------------------------------------------------


def middle(path: Path) -> int:
    return path.stat().st_size // 2


def test_a_broken_journal_is_not_cut_unasked(built: Built) -> None:
    flip(built.segment, middle(built.segment))
    before = built.segment.read_bytes()
    report = repair(built.path)
    assert "journal" in failed(report) and report.repairs == ()
    assert built.segment.read_bytes() == before
    # The index reaches over it: the latest moments are there as they were.
    store = StoreReader.open(built.path)
    check_moment(store.group("g"), built.model, built.model.seq)
    store.close()


def test_a_journal_that_the_index_bridges_is_not_cut_at_all(built: Built) -> None:
    flip(built.segment, middle(built.segment))
    report = repair(built.path, accept_loss=True)
    assert "journal" in failed(report) and report.repairs == ()


def test_a_broken_journal_without_an_index_is_cut_when_asked(built: Built) -> None:
    flip(built.segment, middle(built.segment))
    remove_index(built)
    refused = repair(built.path)
    assert {"journal"} <= failed(refused), "not unasked"
    report = repair(built.path, accept_loss=True, read_data=True)
    assert report.ok, failed(report)
    assert any("history was cut off" in one.what for one in report.repairs)
    assert (built.path / "quarantine" / built.segment.name).read_bytes()[:40] == built.segment.read_bytes()[:40]
    store = StoreReader.open(built.path)
    held = store.group("g").held
    assert 4 < held < built.model.seq
    for seq in range(1, held + 1):
        check_moment(store.group("g"), built.model, seq)
    store.close()


def test_a_journal_shorter_than_the_index_is_history_lost(built: Built) -> None:
    built.segment.write_bytes(built.segment.read_bytes()[: middle(built.segment)])
    assert "journal" in failed(repair(built.path))
    report = repair(built.path, accept_loss=True, read_data=True)
    assert report.ok and report.repaired


# -- killed half-way ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill -9 is to the code it hits."""


class Doomed(Storage):
    """Lets so many changes of files happen, then none any more; a write that it stops has happened in part."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def _step(self) -> None:
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        if self.left <= 0:
            whole = b"".join(bytes(buffer) for buffer in buffers)
            super().pwritev(fd, [whole[: len(whole) // 2]], offset)
        self._step()
        super().pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        self._step()
        super().truncate(fd, size)

    def datasync(self, fd: int) -> None:
        self._step()
        super().datasync(fd)

    def replace(self, src: Path, dst: Path) -> None:
        self._step()
        super().replace(src, dst)

    def move(self, src: Path, dst: Path) -> None:
        self._step()
        super().move(src, dst)

    def link(self, src: Path, dst: Path) -> None:
        self._step()
        super().link(src, dst)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def sync_directory(self, path: Path) -> None:
        self._step()
        super().sync_directory(path)


def cut(built: Built) -> None:
    flip(built.segment, middle(built.segment))
    remove_index(built)


def everything(built: Built) -> None:
    """All of it at once."""
    for damage in (header, copied_block, marker, leftovers, unnamed_garbage, remove_index):
        damage(built)


@pytest.mark.parametrize("damage", [everything, cut], ids=lambda damage: damage.__name__)
def test_a_repair_that_is_killed_can_be_run_again(
    template: Built, tmp_path: Path, damage: Callable[[Built], None]
) -> None:
    calls = 0
    while True:
        built = Built(tmp_path / str(calls), template.model)
        shutil.copytree(template.path, built.path)
        damage(built)
        try:
            repair(built.path, read_data=True, accept_loss=damage is cut, storage=Doomed(calls))
        except Killed:
            calls += 1
        else:
            break
        report = repair(built.path, read_data=True, accept_loss=damage is cut)
        assert report.ok, (calls, failed(report))
        if damage is everything:
            built.check_every_moment()
        shutil.rmtree(built.path)
    assert calls > 10


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(built: Built) -> None:
    header(built)
    before = CliRunner().invoke(verify_command, [str(built.path), "--json"])
    assert before.exit_code == 1
    result = CliRunner().invoke(verify_command, [str(built.path), "--repair", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ok"] and document["repaired"] == 1
    (done,) = document["repairs"]
    assert done["file"] == f"containers/{built.container(2).name}" and "written anew" in done["what"]
    assert verify(built.path, read_data=True).ok


def test_accepting_loss_is_a_part_of_repairing(built: Built) -> None:
    assert CliRunner().invoke(verify_command, [str(built.path), "--accept-loss"]).exit_code == 2
