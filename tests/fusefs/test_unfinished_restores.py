"""The notes of what is half restored: kept, dropped with the place they are of, and refused when they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedup.errors import Damaged, RewindError
from dedup.types import Seq
from fusefs.unfinished_restores import NOTES_MAX, UnfinishedRestore, UnfinishedRestores


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "restores.json"


def test_a_note_is_kept_until_its_place_has_ended(path: Path) -> None:
    notes = UnfinishedRestores(path, "store")
    for place in ("db/app", "db", "dbx", "disk.img"):
        notes.begun(place, Seq(7), f"before-{place}")
    kept = UnfinishedRestores(path, "store").all
    assert [note.place for note in kept] == ["db", "dbx", "disk.img"]  # a directory stands for what is in it
    assert kept[0] == UnfinishedRestore("store", "db", Seq(7), "before-db")
    notes.ended("disk.img")
    assert [note.place for note in UnfinishedRestores(path, "store").all] == ["db", "dbx"]
    notes.ended(".")
    assert UnfinishedRestores(path, "store").all == ()


def test_what_is_noted_of_another_store_is_of_no_use(path: Path) -> None:
    UnfinishedRestores(path, "one").begun("disk.img", Seq(7), "")
    assert UnfinishedRestores(path, "another").all == ()


def test_there_is_a_most(path: Path) -> None:
    notes = UnfinishedRestores(path, "store")
    for number in range(NOTES_MAX):
        notes.begun(f"{number}.img", Seq(7), "")
    with pytest.raises(RewindError, match="begun and not ended"):
        notes.begun("one-more.img", Seq(7), "")
    notes.begun("5.img", Seq(8), "")
    assert len(UnfinishedRestores(path, "store").all) == NOTES_MAX


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[" * 100_000, b'[{"place": "x"}]', b"\xff"])
def test_damage_is_said(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(Damaged, match="half restored; remove it"):
        UnfinishedRestores(path, "store")
