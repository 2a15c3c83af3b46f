"""Pointer maps: however a leaf is written, and however few pointers of it, each checkpoint says what it said."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import pointer_map
from dedup.catalog import Index
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import PointerMap, decode_whole, encode_whole
from dedup.types import Seq, VolumeId

VOLUME = VolumeId(3)


@given(st.dictionaries(st.integers(0, LEAF_BLOCKS - 1), st.integers(0, 12) | st.integers(1 << 40, (1 << 40) + 9)))
def test_few_pointers_are_written_as_a_whole_leaf_is(pointers: dict[int, int]) -> None:
    whole = np.zeros(LEAF_BLOCKS, np.uint64)
    indexes = np.array(sorted(pointers), np.uint16)
    addresses = np.array([pointers[index] for index in sorted(pointers)], np.uint64)
    whole[indexes] = addresses
    encoded = pointer_map._encode_few(indexes, addresses)
    assert encoded == encode_whole(whole)
    assert np.array_equal(decode_whole(encoded), whole)


@pytest.mark.parametrize("seed", range(4))
def test_what_many_checkpoints_put_equals_a_dict(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    source = random.Random(seed)
    index = Index(tmp_path_factory.mktemp("index"), writer=True)
    pointers = PointerMap(index.db["pointers"], 1)
    blocks = LEAF_BLOCKS * 5
    model = np.zeros(blocks, np.uint64)
    said = []
    for checkpoint in range(1, 30):
        count = source.choice((1, 3, 20, 700))
        changed = np.array(sorted(source.sample(range(blocks), count)), np.int64)
        first = source.randrange(1, 1 << 50)
        addresses = np.array([source.choice((0, first + at)) for at in range(count)], np.uint64)
        model[changed] = addresses
        with index.write() as txn:
            if source.random() < 0.2:
                cut = source.randrange(blocks)
                model[cut:][~np.isin(np.arange(cut, blocks), changed)] = 0
                pointers.clear_from(txn, VOLUME, cut, Seq(checkpoint))
            pointers.put_each(txn, VOLUME, Seq(checkpoint), changed, addresses)
        said.append(model.copy())
    with index.read() as txn:
        for checkpoint, then in enumerate(said, 1):
            for leaf in range(5):
                found = pointers.leaf(txn, VOLUME, leaf, Seq(checkpoint))
                wanted = then[leaf * LEAF_BLOCKS : (leaf + 1) * LEAF_BLOCKS]
                assert np.array_equal(np.zeros(LEAF_BLOCKS, np.uint64) if found is None else found, wanted)
    index.close()
