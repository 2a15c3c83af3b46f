"""What is fetched ahead: nothing for who jumps about, each chunk once for who goes on."""

from __future__ import annotations

import random

from dedup import image
from dedup.prefetch import CHUNKS_MAX
from dedup.read_ahead import STREAMS_MAX, ReadAhead
from dedup.types import BLOCK_BYTES

CHUNK_BLOCKS, AHEAD_CHUNKS = 256, 12
END = 100 * CHUNK_BLOCKS + 7


def test_one_after_the_other() -> None:
    reading = ReadAhead(CHUNK_BLOCKS, AHEAD_CHUNKS)
    told: list[int] = []
    for first in range(0, END, 32):
        told += reading.chunks(first, 32, END)
        at = (first + 32) // CHUNK_BLOCKS
        assert all(chunk <= at + AHEAD_CHUNKS for chunk in told)
    assert told == sorted(set(told))
    assert told[-1] == END // CHUNK_BLOCKS
    assert len(told) > 95


def test_side_by_side_in_another_order() -> None:
    reading = ReadAhead(CHUNK_BLOCKS, AHEAD_CHUNKS)
    firsts = list(range(0, END, 64))
    for at in range(0, len(firsts) - 4, 4):
        random.Random(at).shuffle(firsts[at : at + 4])
    told = [chunk for first in firsts for chunk in reading.chunks(first, 64, END)]
    assert len(told) == len(set(told)) > 90


def test_two_streams_and_jumps() -> None:
    reading = ReadAhead(CHUNK_BLOCKS, AHEAD_CHUNKS)
    rng = random.Random(1)
    far = 1 << 40
    assert not [chunk for _ in range(200) for chunk in reading.chunks(rng.randrange(far), 1, far)]
    told: dict[int, list[int]] = {0: [], far // 2: []}
    for step in range(0, 4096, 64):
        for start, chunks in told.items():
            chunks += reading.chunks(start + step, 64, far)
    assert all(len(chunks) > 10 for chunks in told.values())


def test_who_asks_again_does_not_go_on() -> None:
    reading = ReadAhead(CHUNK_BLOCKS, AHEAD_CHUNKS)
    for _ in range(200):
        assert reading.chunks(1000, 16, END) == []
    near = [1016, 1900, 1001, 1300]  # within NEAR_BLOCKS, back and forth
    assert [chunk for first in near for chunk in reading.chunks(first, 1, END)] == []


def test_what_is_put_off_is_told_again() -> None:
    reading = ReadAhead(CHUNK_BLOCKS, AHEAD_CHUNKS)
    for first in range(0, 2048, 64):
        chunks = reading.chunks(first, 64, END)
    while not chunks:
        first += 64
        chunks = reading.chunks(first, 64, END)
    reading.put_off(chunks[0])
    assert reading.chunks(first + 64, 64, END)[: len(chunks)] == chunks


def test_there_is_room_for_what_all_streams_of_an_image_have_ahead_of_them() -> None:
    """And for what they are at; else some of it would be fetched twice."""
    assert STREAMS_MAX * (image.AHEAD_CHUNKS + 1) <= CHUNKS_MAX
    assert CHUNKS_MAX * image.CHUNK_BLOCKS * BLOCK_BYTES <= 20 << 20
