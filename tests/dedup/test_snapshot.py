"""Keeping the head as a snapshot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dedup.errors import MomentRefused, UnknownName
from dedup.store import Store
from dedup.types import Epoch, EpochStart, Record
from tests.dedup.crash_checks import GroupModel


def test_a_snapshot_of_now_waits_for_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps what `latest` resolves to, or is refused with the same words."""
    Store.create(tmp_path / "store")
    store, model = Store.open(tmp_path / "store"), GroupModel()
    group = store.group("g")
    start, created = model.start(1), model.create("disk.img", 1 << 20)
    volume = created.volume
    changes: list[list[Record]] = [
        [start, created],
        [model.reconciled()],
        [model.write(volume, 5000, b"x" * 9000)],
        [model.flush(volume)],
        [model.rename(volume, "moved.img")],
        [model.outage("an outage")],
        [model.reconciled()],
    ]
    for number, records in enumerate(changes):
        group.ingest(records)
        name = f"point {number}"
        if group.reconciling or not group.has_base:
            with pytest.raises(MomentRefused) as refused:
                group.create_snapshot(name)
            with pytest.raises(MomentRefused, match=re.escape(str(refused.value))):
                group.reader().resolve("latest")
            continue
        with monkeypatch.context() as patch:
            patch.setattr(store, "checkpoint", lambda: pytest.fail("a snapshot of now makes no checkpoint"))
            made = group.create_snapshot(name, volume="moved.img" if number > 3 else "disk.img")
            with pytest.raises(UnknownName, match="had no volume 'none'"):
                group.create_snapshot("of none", volume="none")
        latest = group.reader().resolve("latest")
        assert (made.seq, made.time, made.volume) == (latest.seq, latest.time, volume)
        assert group.durable == group.held and store.checkpoint_due()
        assert made in group.reader().snapshots()
        store.checkpoint()
    store.close()


def test_before_the_base_there_is_nothing_to_keep(tmp_path: Path) -> None:
    """Also where no gap is open."""
    Store.create(tmp_path / "store")
    store, model = Store.open(tmp_path / "store"), GroupModel()
    group = store.group("g")
    group.ingest([EpochStart(*model._next(), Epoch(1), clean=True), model.create("disk.img")])
    assert not group.reconciling
    with pytest.raises(MomentRefused):
        group.create_snapshot("early")
    store.close()
