"""The journal of ext3 and ext4, beside a model: what a file system's blocks are after the kernel's recovery."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("dissect.util")

from fusefs.inside.ext_journal import MAGIC, Journal, _crc
from fusefs.inside.filesystem import Corrupt, Unsupported

BYTES = 1024
BLOCKS = 64
FIRST = 1
LAST_BLOCK = 40
UUID = bytes(range(16))
SEED = _crc(0xFFFFFFFF, UUID)


@dataclass(frozen=True)
class Features:
    """Of a journal."""

    wide: bool
    checksums: int
    """0: none; 2, 3: the version."""

    @property
    def flags(self) -> int:
        return 0x1 | (0x2 if self.wide else 0) | {0: 0, 2: 0x8, 3: 0x10}[self.checksums]


class Writer:
    """Writes transactions as jbd2 does, round and round."""

    def __init__(self, features: Features, start: int, sequence: int) -> None:
        self.features = features
        self.data = bytearray(BLOCKS * BYTES)
        self.place, self.sequence = start, sequence
        header = bytearray(BYTES)
        struct.pack_into(">4s7I", header, 0, MAGIC, 4, 0, BYTES, BLOCKS, FIRST, sequence, start)
        struct.pack_into(">2I", header, 36, 0, features.flags)
        header[48:64] = UUID
        header[252:256] = _crc(0xFFFFFFFF, bytes(header)).to_bytes(4)
        if features.checksums:  # counted over the superblock, which is all of this block
            header[252:256] = bytes(4)
            header[252:256] = _crc(0xFFFFFFFF, bytes(header)).to_bytes(4)
        self.data[:BYTES] = header

    def put(self, block: bytes) -> int:
        """Writes the next block; returns where."""
        place = self.place
        self.data[place * BYTES : (place + 1) * BYTES] = block
        self.place = FIRST if place + 1 == BLOCKS else place + 1
        return place

    def header(self, kind: int) -> bytearray:
        block = bytearray(BYTES)
        struct.pack_into(">4s2I", block, 0, MAGIC, kind, self.sequence)
        return block

    def seal(self, block: bytearray) -> bytes:
        if self.features.checksums:
            block[-4:] = _crc(SEED, bytes(block[:-4]) + bytes(4)).to_bytes(4)
        return bytes(block)

    def descriptor(self, blocks: list[tuple[int, bytes]]) -> None:
        block, at, datas = self.header(1), 12, []
        for index, (number, data) in enumerate(blocks):
            escaped = data.startswith(MAGIC)
            stored = bytes(4) + data[4:] if escaped else data
            datas.append(stored)
            flags = (1 if escaped else 0) | (2 if index else 0) | (8 if index == len(blocks) - 1 else 0)
            checksum = _crc(_crc(SEED, self.sequence.to_bytes(4)), stored)
            low, high = number & 0xFFFFFFFF, number >> 32
            if self.features.checksums == 3:
                tag = struct.pack(">4I", low, flags, high, checksum)
            else:
                tag = struct.pack(">IHH", low, checksum & 0xFFFF if self.features.checksums else 0, flags)
                tag += (struct.pack(">I", high) if self.features.wide else b"") + bytes(
                    2 if self.features.checksums else 0
                )
            block[at : at + len(tag)] = tag
            at += len(tag)
            if not index:
                at += 16
        self.put(self.seal(block))
        for data in datas:
            self.put(data)

    def revoke(self, numbers: list[int]) -> None:
        block, size = self.header(5), 8 if self.features.wide else 4
        struct.pack_into(">I", block, 12, 16 + size * len(numbers))
        for index, number in enumerate(numbers):
            block[16 + index * size : 16 + (index + 1) * size] = number.to_bytes(size)
        self.put(self.seal(block))

    def commit(self, time: int) -> int:
        block = self.header(2)
        struct.pack_into(">Q", block, 48, time)
        if self.features.checksums:
            block[16:20] = _crc(SEED, bytes(block)).to_bytes(4)
        self.sequence = (self.sequence + 1) & 0xFFFFFFFF
        return self.put(bytes(block))

    def journal(self) -> Journal:
        return Journal(lambda at, length: bytes(self.data[at : at + length]), len(self.data), BYTES, LAST_BLOCK)

    def found(self) -> dict[int, bytes]:
        journal = self.journal()
        return {number: journal.bytes_of(block) for number, block in journal.newer_blocks().items()}


FEATURES = st.builds(Features, st.booleans(), st.sampled_from([0, 2, 3]))
BLOCK = st.builds(
    lambda seed, magic: (MAGIC if magic else b"") + random.Random(seed).randbytes(BYTES - 4 * magic),
    st.integers(0, 1 << 30),
    st.booleans(),
)
TRANSACTION = st.tuples(
    st.lists(st.tuples(st.integers(0, LAST_BLOCK), BLOCK), min_size=1, max_size=4, unique_by=lambda pair: pair[0]),
    st.lists(st.integers(0, LAST_BLOCK), max_size=3, unique=True),
)


@given(
    FEATURES,
    st.integers(FIRST, BLOCKS - 1),
    st.sampled_from([1, 7, 0xFFFFFFFE]),
    st.lists(TRANSACTION, max_size=6),
    st.booleans(),
)
def test_recovery_is_that_of_the_model(
    features: Features,
    start: int,
    sequence: int,
    transactions: list[tuple[list[tuple[int, bytes]], list[int]]],
    complete: bool,
) -> None:
    writer = Writer(features, start, sequence)
    written: dict[int, tuple[int, bytes]] = {}
    revoked: dict[int, int] = {}
    for index, (blocks, revokes) in enumerate(transactions):
        if revokes:
            writer.revoke(revokes)
        writer.descriptor(blocks)
        if not complete and index == len(transactions) - 1:
            break
        writer.commit(index + 1)
        revoked.update(dict.fromkeys(revokes, index))
        written.update({number: (index, data) for number, data in blocks})
    wanted = {number: data for number, (index, data) in written.items() if index > revoked.get(number, -1)}
    # What an earlier transaction wrote and none revoked since stays; the model has only the last writes.
    found = writer.found()
    assert {number: found.get(number) for number in wanted} == wanted
    assert not found.keys() - written.keys()
    for number in found.keys() - wanted.keys():
        assert revoked[number] < written[number][0]


def two_transactions(features: Features) -> tuple[Writer, int]:
    """And where the commit of the second is."""
    writer = Writer(features, FIRST, 5)
    writer.descriptor([(3, b"a" * BYTES)])
    writer.commit(1)
    writer.descriptor([(3, b"b" * BYTES), (4, b"c" * BYTES)])
    return writer, writer.commit(2)


@pytest.mark.parametrize("checksums", [2, 3])
def test_a_commit_that_does_not_fit_ends_the_journal(checksums: int) -> None:
    writer, place = two_transactions(Features(True, checksums))
    assert writer.found() == {3: b"b" * BYTES, 4: b"c" * BYTES}
    writer.data[place * BYTES + 60] ^= 1
    assert writer.found() == {3: b"a" * BYTES}


@pytest.mark.parametrize("checksums", [2, 3])
@pytest.mark.parametrize("place", [FIRST + 3, FIRST + 4, FIRST + 5])
def test_damage_in_a_committed_transaction_is_refused(checksums: int, place: int) -> None:
    """As the kernel refuses to mount it: the second transaction's descriptor, or a block's own bytes."""
    writer, _ = two_transactions(Features(False, checksums))
    writer.data[place * BYTES + 500] ^= 1
    with pytest.raises(Corrupt):
        writer.found()


def test_an_old_descriptor_behind_the_end_is_no_damage() -> None:
    """Left from before the journal was made anew: it fits no checksum, and its commit is older."""
    writer, _ = two_transactions(Features(False, 3))
    place = writer.place
    writer.descriptor([(7, b"old" + bytes(BYTES - 3))])
    writer.commit(1)
    writer.data[place * BYTES + 900] ^= 1
    assert writer.found() == {3: b"b" * BYTES, 4: b"c" * BYTES}
    writer.place, writer.sequence = place, writer.sequence - 1
    writer.descriptor([(7, b"old" + bytes(BYTES - 3))])
    writer.commit(9)
    writer.data[place * BYTES + 900] ^= 1
    with pytest.raises(Corrupt):
        writer.found()


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        *((0, 0, Corrupt), (12, 4096, Corrupt), (16, 1 << 30, Corrupt), (20, 0, Corrupt), (28, 64, Corrupt)),
        *((36, 1, Unsupported), (40, 0x21, Unsupported), (40, 0x100, Unsupported), (48, 1, Corrupt)),
    ],
)
def test_superblocks_that_are_refused(offset: int, value: int, error: type[Exception]) -> None:
    writer, _ = two_transactions(Features(False, 3))
    struct.pack_into(">I", writer.data, offset, value)
    with pytest.raises(error):
        writer.journal()


@given(st.integers(0, 1 << 30))
def test_any_journal_is_read_to_an_end(seed: int) -> None:
    chance = random.Random(seed)
    writer, _ = two_transactions(Features(chance.random() < 0.5, chance.choice([0, 2, 3])))
    for _ in range(chance.choice([1, 10, 100])):
        writer.data[chance.randrange(252, 12 * BYTES)] = chance.randrange(256)
    try:
        found = writer.found()
    except (Corrupt, Unsupported):
        return
    assert all(len(data) == BYTES for data in found.values())
