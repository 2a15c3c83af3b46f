"""Decoders of the store's files against arbitrary bytes, mutated valid ones, and mutated ones with right checksums.

Whatever they are given: the value that was written, or a refusal (`mutations.REFUSALS`). Behind a checksum that was
made anew it may be another value, but then a well-made one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import layout, pins, sealed_layout
from dedup.container import ContainerReader
from dedup.errors import Damaged
from dedup.layout import (
    CONTAINER_HEADER,
    PIN,
    PINS_HEADER,
    PINS_MAGIC,
    RAW_SLOTS_OFFSET,
    RAW_TABLE_OFFSET,
    SEGMENT_HEADER,
    STORE_MARKER,
    ContainerHeader,
    Fields,
    SegmentHeader,
    StoreMarker,
    checksum,
    fingerprint,
)
from dedup.retention import AtLimit, Policy, check_policy, load_policy, save_policy
from dedup.sealed import seal
from dedup.sealed_layout import (
    SEALED_GROUP,
    SEALED_GROUP_BLOCKS,
    SEALED_HEADER,
    SEALED_HEADER_OFFSET,
    SEALED_TABLE_OFFSET,
    SealedHeader,
)
from dedup.storage import Storage
from dedup.types import BLOCK_BYTES, ContainerForm, ContainerId, JournalId, Seq, TimeNs
from tests.dedup.mutations import (
    MemoryFiles,
    either,
    mutated,
    outcome,
    peak_bytes,
    with_checksum,
    with_largest_numbers,
    without_reserved,
)

PATH = Path("/store/FILE")
DIRECTORY = Path("/store/containers")
ONE = ContainerId(1)

# ---- headers ---------------------------------------------------------------------------------------------------------

_SEALED_PAGE = bytes(SEALED_HEADER_OFFSET)
Header = tuple[Fields, int, bytes, Callable[[Any], bytes], Callable[[bytes, Path], Any]]
"""Its fields, where it starts, its bytes, and the two functions."""


def _sealed_page(header: SealedHeader) -> bytes:
    return _SEALED_PAGE + sealed_layout.pack_sealed_header(header)


HEADERS: Final[dict[str, Header]] = {
    "STORE marker": (
        STORE_MARKER,
        0,
        layout.pack_store_marker(StoreMarker(bytes(range(16)), TimeNs(1 << 60))),
        layout.pack_store_marker,
        layout.unpack_store_marker,
    ),
    "container header": (
        CONTAINER_HEADER,
        0,
        layout.pack_container_header(ContainerHeader(ContainerId(7), JournalId(1), ContainerForm.RAW, TimeNs(5))),
        layout.pack_container_header,
        layout.unpack_container_header,
    ),
    "sealed header": (
        SEALED_HEADER,
        SEALED_HEADER_OFFSET,
        _sealed_page(SealedHeader.of(33, 99)),
        _sealed_page,
        sealed_layout.unpack_sealed_header,
    ),
    "segment header": (
        SEGMENT_HEADER,
        0,
        layout.pack_segment_header(SegmentHeader(Seq(9), 1 << 63, TimeNs(5))),
        layout.pack_segment_header,
        layout.unpack_segment_header,
    ),
}


@pytest.mark.parametrize("name", HEADERS)
@given(data=st.data())
def test_headers(name: str, data: st.DataObject) -> None:
    fields, start, packed, _, unpack = HEADERS[name]
    changed = data.draw(either(packed))
    value = outcome(lambda: unpack(changed, PATH))
    end = start + fields.size
    assert (value is not None) == (changed[start:end] == packed[start:end])
    assert value is None or value == unpack(packed, PATH)


@pytest.mark.parametrize("name", HEADERS)
@given(data=st.data())
def test_headers_behind_a_checksum(name: str, data: st.DataObject) -> None:
    fields, start, packed, pack, unpack = HEADERS[name]
    changed = with_checksum(data.draw(mutated(packed)), start, start + fields.size)
    value = outcome(lambda: unpack(changed, PATH))
    if value is not None:
        assert without_reserved(fields, pack(value)[start:]) == without_reserved(fields, changed[start:])


# ---- containers ------------------------------------------------------------------------------------------------------


def _blocks(count: int) -> list[bytes]:
    """A group that compresses, then one that does not."""
    source = random.Random(3)
    return [
        source.randbytes(BLOCK_BYTES) if index >= SEALED_GROUP_BLOCKS else source.randbytes(16) * 256
        for index in range(count)
    ]


BLOCKS: Final = _blocks(SEALED_GROUP_BLOCKS + 3)
SLOTS: Final = [*range(10), *range(40, 40 + len(BLOCKS) - 10)]


def _raw() -> bytes:
    header = layout.pack_container_header(ContainerHeader(ONE, JournalId(1), ContainerForm.RAW, TimeNs(5)))
    table = bytearray(layout.RAW_TABLE_BYTES)
    slots = bytearray((SLOTS[-1] + 1) * BLOCK_BYTES)
    for slot, block in zip(SLOTS, BLOCKS, strict=True):
        table[slot * 16 : slot * 16 + 16] = fingerprint(block)
        slots[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] = block
    return header.ljust(RAW_TABLE_OFFSET, b"\0") + bytes(table) + bytes(slots)


RAW: Final = _raw()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("containers")
    path = layout.container_path(directory, ONE)
    path.write_bytes(RAW)
    seal(Storage(), directory, ONE, None)
    return path.read_bytes()


def _all_blocks(content: bytes) -> dict[int, bytes]:
    """Every block that a reader gives out, by slot: each has the fingerprint that the container says."""
    storage = MemoryFiles({layout.container_path(DIRECTORY, ONE): content})
    reader = outcome(lambda: ContainerReader.open(storage, DIRECTORY, ONE))
    if reader is None:
        return {}
    try:
        assert reader.header.container == ONE
        found = {}
        for slot in {*(outcome(reader.slots) or []), *SLOTS, layout.SLOTS_MAX - 1, layout.SLOTS_MAX, layout.SLOT_MASK}:
            block = outcome(lambda slot=slot: reader.read_block(slot))
            if block is not None:
                assert fingerprint(block) == reader.fingerprints(slot, 1)
                found[slot] = block
            outcome(lambda slot=slot: reader.read_into(slot, 3, memoryview(bytearray(3 * BLOCK_BYTES))))
        return found
    finally:
        reader.close()


WRITTEN: Final = dict(zip(SLOTS, BLOCKS, strict=True))


@given(st.data())
def test_raw_containers(data: st.DataObject) -> None:
    parts = {"header": (0, 48), "table": (RAW_TABLE_OFFSET, 20 * 16), "slots": (RAW_SLOTS_OFFSET, 3 * BLOCK_BYTES)}
    start, length = parts[data.draw(st.sampled_from(sorted(parts)))]
    part = data.draw(mutated(RAW[start : start + length], same_length=True))
    content = RAW[:start] + part + RAW[start + length :]
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    assert _all_blocks(content).items() <= WRITTEN.items()


@given(st.data())
def test_sealed_containers(sealed: bytes, data: st.DataObject) -> None:
    end = data.draw(st.sampled_from([SEALED_HEADER_OFFSET + SEALED_HEADER.size, SEALED_TABLE_OFFSET + 1200, None]))
    content = data.draw(mutated(sealed[:end])) + (sealed[end:] if end else b"")
    assert _all_blocks(content).items() <= WRITTEN.items()


@given(st.data())
def test_sealed_containers_behind_their_checksums(sealed: bytes, data: st.DataObject) -> None:
    """Any table, and any group: what comes out has the fingerprint that the table says."""
    header = sealed_layout.unpack_sealed_header(sealed, PATH)
    table = sealed[SEALED_TABLE_OFFSET : header.table_end]
    groups_at = header.groups_offset - SEALED_TABLE_OFFSET
    numbers = data.draw(mutated(table[: header.slots * 2], same_length=True) | st.just(table[: header.slots * 2]))
    rows = data.draw(mutated(table[groups_at:], same_length=True) | st.just(table[groups_at:]))
    body = sealed[header.table_end :]
    first, second = SEALED_GROUP.struct.iter_unpack(rows)
    if data.draw(st.booleans()):
        frame = data.draw(mutated(body[: first[1]], same_length=True) | st.just(_zstd_bomb(len(body))))
        body = frame[: len(body)] + body[len(frame) :]
        rows = SEALED_GROUP.struct.pack(*first[:4], checksum(body[: first[1]])) + SEALED_GROUP.struct.pack(*second)
    table = numbers + table[len(numbers) : groups_at] + rows
    packed = sealed_layout.pack_sealed_header(replace(header, table_checksum=checksum(table)))
    page = sealed[:SEALED_HEADER_OFFSET] + packed + sealed[SEALED_HEADER_OFFSET + len(packed) : SEALED_TABLE_OFFSET]
    _all_blocks(page + table + body)


def _zstd_bomb(length: int) -> bytes:
    """A frame that says it holds 2^60 bytes."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00"
    return frame.ljust(length, b"\0")


def test_no_number_of_a_sealed_table_is_believed(sealed: bytes) -> None:
    header = sealed_layout.unpack_sealed_header(sealed, PATH)
    rows = sealed[header.groups_offset : header.table_end]

    def read_all() -> None:
        for changed in with_largest_numbers(rows):
            table = sealed[SEALED_TABLE_OFFSET : header.groups_offset] + changed
            packed = sealed_layout.pack_sealed_header(replace(header, table_checksum=checksum(table)))
            page = sealed[:SEALED_HEADER_OFFSET] + packed
            content = page.ljust(SEALED_TABLE_OFFSET, b"\0") + table + sealed[header.table_end :]
            assert _all_blocks(content).items() <= WRITTEN.items()

    assert peak_bytes(read_all) < 8 << 20


@pytest.mark.parametrize("length", [1 << 40, 1 << 60, (1 << 64) - 2])
def test_a_group_that_claims_to_be_huge_is_damage(sealed: bytes, length: int) -> None:
    header = sealed_layout.unpack_sealed_header(sealed, PATH)
    frame = b"\x28\xb5\x2f\xfd\xe0" + length.to_bytes(8, "little") + b"\x01\x00\x00"
    table = sealed[SEALED_TABLE_OFFSET : header.groups_offset]
    table += SEALED_GROUP.struct.pack(
        header.table_end, len(frame), SEALED_GROUP_BLOCKS, sealed_layout.CODING_ZSTD, checksum(frame)
    )
    table += SEALED_GROUP.struct.pack(header.table_end, len(frame), 3, sealed_layout.CODING_ZSTD, checksum(frame))
    packed = sealed_layout.pack_sealed_header(replace(header, table_checksum=checksum(table)))
    page = sealed[:SEALED_HEADER_OFFSET] + packed + sealed[SEALED_HEADER_OFFSET + len(packed) : SEALED_TABLE_OFFSET]
    storage = MemoryFiles({layout.container_path(DIRECTORY, ONE): page + table + frame})
    reader = ContainerReader.open(storage, DIRECTORY, ONE)
    try:
        for slot in (SLOTS[0], SLOTS[-1]):
            with pytest.raises(Damaged):
                reader.read_block(slot)
    finally:
        reader.close()


def test_a_stored_group_of_another_length_than_its_blocks_is_damage(sealed: bytes) -> None:
    header = sealed_layout.unpack_sealed_header(sealed, PATH)
    group = bytes(SEALED_GROUP_BLOCKS * BLOCK_BYTES)
    for length in (0, len(group) - 1, len(group) - BLOCK_BYTES):
        table = sealed[SEALED_TABLE_OFFSET : header.groups_offset]
        stored = header.table_end, length, SEALED_GROUP_BLOCKS, sealed_layout.CODING_STORED, checksum(group[:length])
        table += SEALED_GROUP.struct.pack(*stored) + sealed[header.table_end - SEALED_GROUP.size : header.table_end]
        packed = sealed_layout.pack_sealed_header(replace(header, table_checksum=checksum(table)))
        page = sealed[:SEALED_HEADER_OFFSET] + packed + sealed[SEALED_HEADER_OFFSET + len(packed) : SEALED_TABLE_OFFSET]
        storage = MemoryFiles({layout.container_path(DIRECTORY, ONE): page + table + group + bytes(3 * BLOCK_BYTES)})
        with pytest.raises(Damaged, match="slot table"):
            ContainerReader.open(storage, DIRECTORY, ONE)


# ---- policy and pins -------------------------------------------------------------------------------------------------

POLICY: Final = Policy(soft_limit_bytes=1 << 40, hard_limit_bytes=1 << 41, at_limit=AtLimit.THIN)
POLICY_PATH: Final = Path("/store") / layout.POLICY_NAME


def _load_policy(content: bytes) -> Policy | None:
    return outcome(lambda: load_policy(MemoryFiles({POLICY_PATH: content}), POLICY_PATH.parent))


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    store = tmp_path_factory.mktemp("store")
    save_policy(Storage(), store, POLICY)
    return (store / layout.POLICY_NAME).read_bytes()


@given(data=st.data())
def test_policies(policy_file: bytes, data: st.DataObject) -> None:
    changed = data.draw(either(policy_file))
    found = _load_policy(changed)
    assert (found is not None) == (changed == policy_file)
    assert found in (None, POLICY)


@given(data=st.data())
def test_policies_behind_their_checksum(policy_file: bytes, data: st.DataObject) -> None:
    line = data.draw(mutated(policy_file.split(b"\n")[0])).replace(b"\n", b" ") + b"\n"
    found = _load_policy(line + f"{checksum(line):016x}\n".encode())
    if found is not None:
        check_policy(found)


def test_a_policy_of_many_brackets_is_damage() -> None:
    line = b'{"version":1,"x":' + b"[" * 3000 + b"]" * 900 + b"}\n"
    with pytest.raises(Damaged):
        load_policy(MemoryFiles({POLICY_PATH: line + f"{checksum(line):016x}\n".encode()}), POLICY_PATH.parent)


PINS: Final = (
    with_checksum(PINS_HEADER.struct.pack(PINS_MAGIC, layout.FORMAT_VERSION, 0, 0, 0))
    + with_checksum(PIN.struct.pack(7, b"main", 0))
    + bytes(PIN.size)
    + with_checksum(PIN.struct.pack((1 << 64) - 1, "größe".encode(), 0))
)
PINNED: Final = {("main", Seq(7)), ("größe", Seq((1 << 64) - 1))}


@given(either(PINS))
def test_pins(changed: bytes) -> None:
    """Never less than what the reader wrote, unless its pins are gone as a whole: what is not understood pins all."""
    found = pins._unpacked(changed)
    if found is not None:
        kept = {at: changed[at : at + PIN.size] for at in range(PINS_HEADER.size, len(changed), PIN.size)}
        written = {at: PINS[at : at + PIN.size] for at in range(PINS_HEADER.size, len(PINS), PIN.size)}
        assert all(part in (*written.values(), bytes(PIN.size)) for part in kept.values())
        assert found <= PINNED
    if changed == PINS:
        assert found == PINNED


@given(st.data())
def test_pins_behind_their_checksums(data: st.DataObject) -> None:
    parts = [PINS[: PINS_HEADER.size]]
    parts += [PINS[at : at + PIN.size] for at in range(PINS_HEADER.size, len(PINS), PIN.size)]
    index = data.draw(st.integers(0, len(parts) - 1))
    parts[index] = with_checksum(data.draw(mutated(parts[index], same_length=True)))
    found = pins._unpacked(b"".join(parts))
    assert found is None or all(0 <= seq < 1 << 64 and len(group.encode()) <= 64 for group, seq in found)
