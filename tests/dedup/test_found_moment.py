"""A moment found by its time is, without another replay, the one that its seq asks for."""

from __future__ import annotations

import random
from pathlib import Path

from dedup.reader import StoreReader
from dedup.types import Seq, TimeNs
from tests.benchmarks.synthetic_store import FIRST_TIME, GROUP, SECOND, Shape, make_store


def test_a_found_moment_is_the_one_that_its_seq_asks_for(tmp_path: Path) -> None:
    make_store(tmp_path / "store", Shape(1 << 26, records=20_000, snapshots=3, volumes_gone=5, gaps=4))
    chosen = random.Random(1)
    store = StoreReader.open(tmp_path / "store")
    group = store.group(GROUP)
    seqs = [Seq(chosen.randrange(group.snapshots()[0].seq, group.held)) for _ in range(12)]
    found = []
    for seq in seqs:
        time = TimeNs(FIRST_TIME + seq * SECOND)
        view = group.view_before(lambda logged, seq=seq: logged.seq > seq, group.runs()[0], time)
        found.append((view, group.group_at(seq)))
        assert group.view(seq) is view, "it was kept"
    store.close()
    store = StoreReader.open(tmp_path / "store")
    group = store.group(GROUP)
    for seq, (view, listed) in zip(seqs, found, strict=True):
        asked = group.view(seq)
        assert view.anchor == asked.anchor
        for name in ("held", "time", "point", "volumes", "last_flush"):
            assert getattr(view.state, name) == getattr(asked.state, name), name
        assert view.state.overlay.blocks == asked.state.overlay.blocks
        assert listed == group.group_at(seq)
    store.close()
