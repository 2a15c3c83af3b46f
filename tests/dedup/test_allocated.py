"""How much of an image is data, at most: never less than there is, and nothing where there is nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.layout import LEAF_BLOCKS
from dedup.store import Store
from dedup.types import BLOCK_BYTES, Seq
from tests.dedup.model import Model

LEAF_BYTES = LEAF_BLOCKS * BLOCK_BYTES
SIZE_MAX = 4 * LEAF_BYTES
OFFSETS = st.integers(0, SIZE_MAX - BLOCK_BYTES) | st.sampled_from([LEAF_BYTES - 1, LEAF_BYTES, 3 * LEAF_BYTES])
STEPS = st.one_of(
    st.tuples(st.just("write"), OFFSETS),
    st.tuples(st.just("zeros"), OFFSETS),
    st.tuples(st.just("resize"), st.integers(0, SIZE_MAX)),
    st.tuples(st.just("checkpoint"), st.just(0)),
)


@settings(max_examples=25)
@given(size=st.integers(0, SIZE_MAX), steps=st.lists(STEPS, max_size=8))
def test_bounds_of_what_is_allocated(size: int, steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Store.create(Path(directory) / "store")
        store = Store.open(Path(directory) / "store")
        try:
            model, group = Model(), store.group("g")
            group.ingest(model.begin())
            create = model.create("a.img", size)
            group.ingest([create])
            for what, number in steps:
                match what:
                    case "write":
                        group.ingest([model.write(create.volume, number, b"data" * 30)])
                    case "zeros":
                        group.ingest([model.write(create.volume, number, bytes(BLOCK_BYTES))])
                    case "resize":
                        group.ingest([model.resize(create.volume, number)])
                    case _:
                        store.checkpoint()
            reader = group.reader()
            reader.refresh()
            for seq in range(create.seq, model.seq + 1):
                content = model.history[seq][0][create.volume]
                leaves = [content[at : at + LEAF_BYTES] for at in range(0, len(content), LEAF_BYTES)]
                allocated = reader.image(create.volume, Seq(seq)).allocated()
                assert sum(len(leaf) for leaf in leaves if any(leaf)) <= allocated <= len(content)
            if all(what == "checkpoint" for what, _ in steps):
                assert allocated == 0
        finally:
            store.close()


def test_a_sparse_image_is_told_from_a_full_one(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    model, group = Model(), store.group("g")
    group.ingest(model.begin())
    create = model.create("a.img", 3 * LEAF_BYTES + 5)
    first, last = model.write(create.volume, 0, b"x"), model.write(create.volume, 3 * LEAF_BYTES, b"y")
    group.ingest([create, first, last])
    reader = group.reader()
    for known_at_first in (LEAF_BYTES, LEAF_BYTES + 5):  # the pointer maps tell which leaves were written, not when
        reader.refresh()
        assert reader.image(create.volume, first.seq).allocated() == known_at_first
        assert reader.image(create.volume, last.seq).allocated() == LEAF_BYTES + 5
        store.checkpoint()
    store.close()
