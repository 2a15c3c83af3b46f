"""The cache against a dictionary: what it gives back is right, whatever was put in, however often it is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.errors import WouldBlock
from dedup.pointer_map import Addresses
from dedup.types import BLOCK_BYTES
from replication import block_cache
from replication.block_cache import CACHE_BYTES_MAX, CACHE_BYTES_MIN, BlockCache, CacheFailed, Marks

SLOTS = 64
WAYS = block_cache._WAYS


def small_cache(slots: int = SLOTS) -> BlockCache:
    with patch.object(block_cache, "CACHE_BYTES_MIN", 0):
        return BlockCache(Path("/tmp"), slots * BLOCK_BYTES)


def block(address: int, version: int = 0) -> bytes:
    return address.to_bytes(8, "little") * (BLOCK_BYTES // 16) + version.to_bytes(8, "little") * (BLOCK_BYTES // 16)


def of(addresses: list[int]) -> Addresses:
    return np.array(addresses, dtype=np.uint64)


def marks_of(blocks: list[bytes]) -> Marks:
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, blocks)), dtype="V16")


def put(cache: BlockCache, addresses: list[int], generation: int = 1, version: int = 0) -> None:
    blocks = [block(address, version) for address in addresses]
    cache.insert(of(addresses), marks_of(blocks), memoryview(b"".join(blocks)), generation)


def got(cache: BlockCache, addresses: list[int], generation: int = 1, *, wait: bool = True) -> list[bytes | None]:
    out = bytearray(os.urandom(len(addresses) * BLOCK_BYTES))
    missing = cache.read(of(addresses), memoryview(out), generation, wait=wait)
    blocks = [bytes(out[at : at + BLOCK_BYTES]) for at in range(0, len(out), BLOCK_BYTES)]
    return [None if gone else found for found, gone in zip(blocks, missing.tolist(), strict=True)]


addresses = st.lists(st.integers(0, 150), min_size=1, max_size=SLOTS)
steps = st.lists(st.tuples(st.sampled_from(["put", "get", "session", "confirm"]), addresses), max_size=30)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_what_it_gives_is_what_was_put_in(steps: list[tuple[str, list[int]]]) -> None:
    with closing(small_cache()) as cache:
        check_steps(cache, steps)


def neighbours(cache: BlockCache, address: int, others: Iterable[int]) -> int:
    """How many of the addresses are of its set in the index."""
    sets = cache._sets(of([address, *others])).tolist()
    return sets[1:].count(sets[0])


def test_what_was_just_put_in_is_there() -> None:
    """A set's places are for blocks that differ: at first all of them named slot 0."""
    with closing(small_cache()) as cache:
        check_steps(cache, [("put", [21]), ("put", list(range(8, 15))), ("put", [*range(1, 10), 144])])


def check_steps(cache: BlockCache, steps: list[tuple[str, list[int]]]) -> None:
    generation = version = 0
    truth: dict[int, int] = {}
    """Address → the version of its block at the store, which a session may change."""
    for what, some in steps:
        match what:
            case "put":
                filled = sorted({address for address in some if address and truth.setdefault(address, version) >= 0})
                blocks = [block(address, truth[address]) for address in filled]
                cache.insert(of(filled), marks_of(blocks), memoryview(b"".join(blocks)), generation)
                for address, found in zip(filled, got(cache, filled, generation), strict=True):
                    assert found is not None or neighbours(cache, address, truth) > WAYS
            case "get":
                for address, found in zip(some, got(cache, some, generation), strict=True):
                    if not address:
                        assert found == bytes(BLOCK_BYTES)
                    elif found is not None:
                        assert found == block(address, truth[address])
            case "session":
                generation += 1
                version += 1
                # A half of the store is another one now.
                truth = {address: version if address % 2 else was for address, was in truth.items()}
            case "confirm":
                old = [
                    address
                    for address, is_old in zip(some, cache.unconfirmed(of(some), generation).tolist(), strict=True)
                    if is_old
                ]
                if old:
                    told = [block(address, truth[address]) for address in old]
                    cache.confirm(of(old), marks_of(told), generation)


def test_what_is_not_confirmed_is_not_given() -> None:
    cache = small_cache()
    put(cache, [1, 2, 3])
    assert got(cache, [1, 2, 3], 2) == [None] * 3
    assert cache.lacks(of([0, 1, 9]), 2).tolist() == [False, True, True]
    assert cache.unconfirmed(of([1, 2, 9, 0]), 2).tolist() == [True, True, False, False]
    cache.confirm(of([1, 2]), marks_of([block(1), block(2, 7)]), 2)
    assert got(cache, [1, 2, 3], 2) == [block(1), None, None]
    with pytest.raises(WouldBlock):
        got(cache, [1, 2], 2, wait=False)
    assert not cache.unconfirmed(of([2]), 2).any()  # it is gone, not to be asked about again
    cache.close()


def test_the_newest_are_kept() -> None:
    cache = small_cache()
    for start in range(1, 1000, 8):
        put(cache, list(range(start, start + 8)))
        assert got(cache, list(range(start, start + 8))) == [block(number) for number in range(start, start + 8)]
    kept = sum(found is not None for found in got(cache, list(range(1000 - SLOTS, 1001))))
    assert kept > SLOTS * 3 // 4
    assert os.fstat(cache._file.fileno()).st_size <= SLOTS * BLOCK_BYTES
    cache.close()


def test_a_disk_that_changes_bytes_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    cache = small_cache()
    put(cache, [5, 6, 7])
    os.pwrite(cache._file.fileno(), b"!", 1 * BLOCK_BYTES + 100)
    assert got(cache, [5, 6, 7]) == [block(5), None, block(7)]
    assert "is not what was written" in caplog.text
    put(cache, [6])
    assert got(cache, [5, 6, 7]) == [block(5), block(6), block(7)]
    os.ftruncate(cache._file.fileno(), 0)
    assert got(cache, [5, 6, 7]) == [None] * 3
    cache.close()


def test_a_full_disk_makes_it_smaller(caplog: pytest.LogCaptureFixture) -> None:
    cache = small_cache()
    put(cache, [1])
    with patch("os.pwritev", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        put(cache, [2])
        put(cache, [3])
    assert got(cache, [1, 2, 3]) == [block(1), None, None]
    assert caplog.text.count("keeps no more blocks: No space left on device") == 1
    put(cache, [2])
    assert got(cache, [1, 2]) == [block(1), block(2)]
    cache.close()


def test_where_none_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(CacheFailed, match="no cache can be made in .*nowhere: No such file"):
        BlockCache(tmp_path / "nowhere")
    for size in (CACHE_BYTES_MIN - 1, CACHE_BYTES_MAX + 1):
        with pytest.raises(CacheFailed, match="choose between 64M and 8G"):
            BlockCache(tmp_path, size)
