"""Which agent feeds a group: told by the journal, whatever becomes of the index and however history is thinned."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dedup.group_state import OWNERS_MAX
from dedup.journal_reader import first_position
from dedup.metadata_journal import EntryKind, scan
from dedup.store import Store
from dedup.verify import verify
from tests.dedup import model
from tests.dedup.model import Model
from tests.dedup.thinned_world import STEP_NS, World
from tests.golden.archive import unpack

A, B = "a" * 32, "b" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def reopened(store: Store) -> Store:
    """As after a kill."""
    store.abandon()
    return Store.open(store.path)


def test_a_group_belongs_to_nobody_until_it_is_said(path: Path) -> None:
    store = Store.open(path)
    assert store.group("g").owners == ()
    store.group("g").ingest(Model().begin())
    assert reopened(store).group("g").owners == ()


def test_the_first_owner_comes_with_the_first_records(path: Path) -> None:
    store = Store.open(path)
    group = store.group("g")
    group.set_owner(A)
    assert group.owners == (A,)
    store = reopened(store)
    assert store.group("g").owners == ()  # nothing was fed
    group = store.group("g")
    group.set_owner(B)
    group.ingest(Model().begin())
    store.sync()
    assert group.owners == (B,)
    assert group.held == 2
    assert reopened(store).group("g").owners == (B,)


def test_owners_follow_each_other_and_the_last_ones_are_remembered(path: Path) -> None:
    store = Store.open(path)
    group = store.group("g")
    group.ingest(Model().begin())
    for agent in (A, B, A, A):
        group.set_owner(agent)
    assert group.owners == (B, A)
    before = group.position
    group.set_owner(A)
    assert group.position == before
    for number in range(OWNERS_MAX + 9):
        group.set_owner(f"{number:032x}")
    store = reopened(store)
    owners = store.group("g").owners
    assert len(owners) == OWNERS_MAX
    assert owners[-1] == f"{OWNERS_MAX + 8:032x}"
    store.close()
    assert verify(path).ok


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_an_owner_survives_consolidation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store")
    world.group.set_owner(A)
    world.history(2)
    world.group.set_owner(B)
    world.history(10)
    world.thin()
    start = first_position(world.store.storage, world.group.directory)
    kinds = {scanned.kind for scanned in scan(world.store.storage, world.group.directory, start)}
    assert EntryKind.OWNER not in kinds, "they were folded into what is consolidated"
    assert world.group.owners == (A, B)
    world.close()
    if index == "lost":
        shutil.rmtree(tmp_path / "store" / "index")
    store = Store.open(tmp_path / "store")
    assert store.group("g").owners == (A, B)
    store.close()
    assert verify(tmp_path / "store").ok


def test_a_store_of_an_earlier_version_belongs_to_the_next_agent(tmp_path: Path) -> None:
    path = tmp_path / "store"
    unpack("v1-plain", path)
    store = Store.open(path)
    group = store.groups[0]
    assert group.owners == ()
    group.set_owner(A)
    store = reopened(store)
    assert store.group(group.name).owners == (A,)
    store.close()
    assert verify(path).ok
