"""The codec: every message there and back, however the bytes are cut; anything else only ever ProtocolError."""

from __future__ import annotations

import struct

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.types import (
    AGGREGATE_BYTES_MAX,
    PATH_BYTES_MAX,
    VOLUME_BYTES_MAX,
    WRITE_BYTES_MAX,
    Aggregate,
    Bookmark,
    ClockRun,
    Correct,
    Create,
    Extent,
    Heartbeat,
    Record,
    Rename,
    Resize,
    Seq,
    TimeNs,
    VolumeId,
    VolumeState,
    Write,
)
from replication.errors import LocalProtocolError, ProtocolError
from replication.frame_layout import AGGREGATE, COPY_BYTES_MAX, EXTENT, FRAME_LIMITS, HEADER, MessageType
from replication.messages import (
    FRAME_BYTES_MAX,
    PROTOCOL_VERSION,
    QUERY_BYTES_MAX,
    RESULT_BYTES_MAX,
    Ack,
    Compare,
    CompareResult,
    Hello,
    Message,
    Mode,
    Query,
    Reply,
    Request,
    Result,
    Role,
    SyncRequest,
    VolumePage,
)
from replication.wire import Decoder, decode_all, encode, encode_aggregate, frame_bytes
from tests.replication.strategies import aggregates, messages

ONE, NOW, RUN, DISK = Seq(1), TimeNs(1), ClockRun(0), VolumeId(1)


def frame(message: Message) -> bytes:
    return b"".join(encode(message))


def write_of(data: bytes, **changes: object) -> Write:
    return Write(ONE, NOW, RUN, msgspec.structs.replace(Extent(DISK, 0, data), **changes))


@given(messages)
def test_round_trip(message: Message) -> None:
    data = frame(message)
    assert decode_all(data) == [message]
    assert len(data) == frame_bytes(message)
    low, high = FRAME_LIMITS[data[4]]
    assert low <= len(data) <= high


@given(st.lists(messages, max_size=5), st.data())
def test_cut_anywhere(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(frame, sent))
    decoder, got, at = Decoder(), [], 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        decoder.receive_data(stream[at : at + step])
        at += step
        while (message := decoder.next_message()) is not None:
            got.append(message)
    assert got == sent
    assert not decoder.incomplete


@given(st.lists(messages, min_size=1, max_size=2))
@settings(max_examples=30)
def test_byte_by_byte(sent: list[Message]) -> None:
    decoder, got = Decoder(), []
    for byte in b"".join(map(frame, sent)):
        decoder.receive_data(bytes([byte]))
        if (message := decoder.next_message()) is not None:
            got.append(message)
    assert got == sent


@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_unread_data_is_kept(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(frame, sent))
    cut = data.draw(st.integers(0, len(stream)))
    decoder = Decoder()
    decoder.receive_data(stream[:cut])
    decoder.receive_data(stream[cut:])
    assert [decoder.next_message() for _ in sent] == sent


@given(messages, st.data())
def test_mutated_frames_only_raise_protocol_error(message: Message, data: st.DataObject) -> None:
    mutated = bytearray(frame(message))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder()
    decoder.receive_data(bytes(mutated))
    try:
        while (got := decoder.next_message()) is not None:
            assert frame(got)  # what is let in could have been sent
    except ProtocolError:
        with pytest.raises(ProtocolError):
            decoder.next_message()
        with pytest.raises(ProtocolError):
            decoder.receive_data(b"")


@given(aggregates, st.data())
def test_mutated_compressed_aggregates_only_raise_protocol_error(aggregate: Aggregate, data: st.DataObject) -> None:
    mutated = bytearray(b"".join(encode_aggregate(aggregate, level=1)))
    mutated[data.draw(st.integers(4, len(mutated) - 1))] ^= data.draw(st.integers(1, 255))
    decoder = Decoder()
    decoder.receive_data(bytes(mutated))
    try:
        decoder.next_message()
    except ProtocolError:
        pass
    except LocalProtocolError:
        pytest.fail("an error of the peer was called ours")


@given(st.binary(max_size=200))
def test_noise_only_raises_protocol_error(noise: bytes) -> None:
    decoder = Decoder()
    decoder.receive_data(noise)
    try:
        while decoder.next_message() is not None:
            pass
    except ProtocolError:
        pass


@given(messages)
def test_truncated_frames_are_incomplete(message: Message) -> None:
    data = frame(message)
    decoder = Decoder()
    decoder.receive_data(data[:-1])
    assert decoder.next_message() is None
    assert decoder.incomplete
    with pytest.raises(ProtocolError, match="within a frame"):
        decode_all(data[:-1])


@pytest.mark.parametrize("kind", sorted(FRAME_LIMITS))
def test_length_is_checked_when_the_header_arrives(kind: int) -> None:
    low, high = FRAME_LIMITS[kind]
    assert high <= FRAME_BYTES_MAX
    for length in {low - 1, high + 1, 0, (1 << 32) - 1} - {*range(low, high + 1)}:
        decoder = Decoder()
        decoder.receive_data(HEADER.pack(length, kind, 0, 0))
        with pytest.raises(ProtocolError):
            decoder.next_message()


def test_every_type_has_limits_and_every_record_a_type() -> None:
    assert set(FRAME_LIMITS) == set(MessageType)
    assert len(MessageType) == len(Message.__args__)
    assert set(Record.__args__) <= set(Message.__args__)


@pytest.mark.parametrize(
    ("kind", "flags", "reserved"), [(99, 0, 0), (0, 0, 0), (7, 1, 0), (7, 0, 1), (7, 2, 0), (8, 4, 0)]
)
def test_unknown_types_flags_and_reserved_bits_are_refused(kind: int, flags: int, reserved: int) -> None:
    with pytest.raises(ProtocolError):
        decode_all(HEADER.pack(8, kind, flags, reserved))


def test_a_flag_of_another_type_is_refused() -> None:
    data = bytearray(frame(write_of(b"x")))
    data[5] = 1
    with pytest.raises(ProtocolError):
        decode_all(bytes(data))


def test_payloads_are_not_copied_when_sent() -> None:
    data = bytes(5000)
    assert encode(write_of(data))[1] is data


def test_payloads_are_not_copied_when_received_if_large() -> None:
    small = decode_all(frame(write_of(bytes(COPY_BYTES_MAX))))[0]
    large = decode_all(frame(write_of(bytes(COPY_BYTES_MAX + 1))))[0]
    assert isinstance(small, Write)
    assert isinstance(large, Write)
    assert isinstance(small.extent.data, bytes)
    assert isinstance(large.extent.data, memoryview)
    assert large.extent.data.readonly


def test_the_largest_messages_fit() -> None:
    full = bytes(WRITE_BYTES_MAX)
    pieces = tuple(Extent(VolumeId(number + 1), 0, full) for number in range(4))
    aggregate = Aggregate(ONE, Seq(4), NOW, RUN, pieces)
    for message in (write_of(full), aggregate):
        assert decode_all(frame(message)) == [message]
    assert decode_all(b"".join(encode_aggregate(aggregate, level=1))) == [aggregate]
    long_path = "/".join(["n" * 255] * 16)
    assert len(long_path) <= PATH_BYTES_MAX
    state = VolumeState(DISK, long_path, 0, 0o644, 0, 0)
    page = VolumePage((state,) * 256, True)
    assert decode_all(frame(page)) == [page]


BAD: list[Message] = [
    write_of(b""),
    write_of(b"x", zeros=5),
    write_of(bytes(WRITE_BYTES_MAX + 1)),
    write_of(b"", zeros=WRITE_BYTES_MAX + 1),
    write_of(b"", zeros=-1),
    write_of(b"xx", offset=VOLUME_BYTES_MAX - 1),
    write_of(b"x", offset=-1),
    write_of(b"x", volume=0),
    Write(Seq(0), NOW, RUN, Extent(DISK, 0, b"x")),
    Write(Seq(-1), NOW, RUN, Extent(DISK, 0, b"x")),
    Write(Seq(1 << 64), NOW, RUN, Extent(DISK, 0, b"x")),
    Write(ONE, TimeNs(-1), RUN, Extent(DISK, 0, b"x")),
    Write(ONE, NOW, ClockRun(1 << 32), Extent(DISK, 0, b"x")),
    Heartbeat(Seq(0), NOW, RUN),
    Correct(Seq(5), NOW, RUN, Seq(5), 0, Extent(DISK, 0, b"")),
    Correct(Seq(5), NOW, RUN, Seq(1), VOLUME_BYTES_MAX + 1, Extent(DISK, 0, b"")),
    Aggregate(Seq(2), ONE, NOW, RUN, (Extent(DISK, 0, b"x"),)),
    Aggregate(ONE, Seq(2), NOW, RUN, ()),
    Aggregate(ONE, Seq(2), NOW, RUN, (Extent(DISK, 0, b""),)),
    Aggregate(ONE, Seq(5), NOW, RUN, (Extent(DISK, 0, b"", AGGREGATE_BYTES_MAX // 4),) * 5),
    Resize(ONE, NOW, RUN, DISK, VOLUME_BYTES_MAX + 1),
    Resize(ONE, NOW, RUN, DISK, -1),
    *(
        Create(ONE, NOW, RUN, DISK, path, 0, 0o644, 0, 0)
        for path in ("", "/etc", "a/../b", "..", "a//b", "a/", "./a", "a\0b", "n" * 256, "a/" * 2050 + "a", "\udc80")
    ),
    Create(ONE, NOW, RUN, DISK, "a", 0, 1 << 16, 0, 0),
    Create(ONE, NOW, RUN, DISK, "a", 0, 0, -1, 0),
    Rename(ONE, NOW, RUN, ()),
    Rename(ONE, NOW, RUN, ((DISK, "a"), (DISK, "b"))),
    Rename(ONE, NOW, RUN, ((DISK, "a"),), (DISK,)),
    Rename(ONE, NOW, RUN, ((DISK, "a"), (VolumeId(2), "a"))),
    Bookmark(ONE, NOW, RUN, ""),
    Bookmark(ONE, NOW, RUN, "a/b"),
    Compare(ONE, NOW, RUN, DISK, 1, bytes(16)),
    Compare(ONE, NOW, RUN, DISK, 0, bytes(15)),
    Compare(ONE, NOW, RUN, DISK, 0, b""),
    Compare(ONE, NOW, RUN, DISK, 0, bytes(16 * 1025)),
    CompareResult(ONE, bytes(1025)),
    Compare(ONE, NOW, RUN, DISK, 0, bytes(16), 1 << 20),
    Compare(ONE, NOW, RUN, DISK, 4096, bytes(32), 1 << 20),
    Compare(ONE, NOW, RUN, DISK, 0, bytes(32), 4 << 20),
    CompareResult(ONE, b""),
    Ack(Seq(1), Seq(2), Seq(1), Seq(2)),
    Ack(Seq(2), Seq(2), Seq(3), Seq(1)),
    Ack(Seq(3), Seq(1), Seq(3), Seq(2)),
    Ack(Seq(3), Seq(4), Seq(3), Seq(2)),
    Hello(PROTOCOL_VERSION, Role.AGENT, "g", 0, "a"),
    Hello(PROTOCOL_VERSION, Role.AGENT, "", 1, "a"),
    Hello(PROTOCOL_VERSION, Role.AGENT, "..", 1, "a"),
    Hello(PROTOCOL_VERSION, Role.AGENT, "g", 1),
    Hello(PROTOCOL_VERSION, Role.READER, "g", 0, "a"),
    Hello(PROTOCOL_VERSION, Role.READER, "g", 0, mode=Mode.SYNC),
    Hello(PROTOCOL_VERSION, Role.ADMIN, "g", 1),
    VolumePage((VolumeState(DISK, "a", 0, 0, 0, 0),) * 257, True),
    Request(0, "status", {}),
    Request(1, "", {}),
    Request(1, "status", {"a": b"bytes"}),
    Request(1, "status", {"a": "x" * (1 << 20)}),
    Request(1, "status", {1: 2}),
    Reply(1, {}, "x" * 5000),
    Query(0, b"q"),
    Query(1, b""),
    Query(1, bytes(QUERY_BYTES_MAX + 1)),
    Result(0, b"r"),
    Result(1, b""),
    Result(1, bytes(RESULT_BYTES_MAX + 1)),
]


@pytest.mark.parametrize("message", BAD, ids=lambda message: str(message)[:60])
def test_what_the_peer_would_refuse_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)


def rare(kind: MessageType, value: object) -> bytes:
    body = msgspec.msgpack.encode(value)
    return HEADER.pack(HEADER.size + len(body), kind, 0, 0) + body


def test_of_a_hello_of_another_version_only_that_is_read() -> None:
    body = msgspec.msgpack.encode({"version": PROTOCOL_VERSION + 1, "new": ["what", {"ever": 1}]})
    frame = HEADER.pack(HEADER.size + len(body), MessageType.HELLO, 0, 0) + body
    assert decode_all(frame) == [Hello(PROTOCOL_VERSION + 1, Role.READER, "", 0)]
    for bad in ({"version": "1"}, {"version": -1}, {"version": 1 << 32}, {}, [PROTOCOL_VERSION + 1]):
        body = msgspec.msgpack.encode(bad)
        with pytest.raises(ProtocolError):
            decode_all(HEADER.pack(HEADER.size + len(body), MessageType.HELLO, 0, 0) + body)


@pytest.mark.parametrize("message", [one for one in BAD if isinstance(one, (Create, Rename, Bookmark, Hello, Request))])
def test_what_must_not_be_sent_is_refused(message: Message) -> None:
    kind = MessageType[type(message).__name__.upper()]
    try:
        data = rare(kind, message)
    except UnicodeEncodeError:
        data = rare(kind, {"path": b"\x80"})
    with pytest.raises(ProtocolError):
        decode_all(data)


def test_only_the_canonical_encoding_is_taken() -> None:
    fields = {"code": 1, "text": "t"}
    assert decode_all(rare(MessageType.FAILURE, fields))
    for other in (fields | {"more": 1}, {"text": "t", "code": 1}, {"code": 1.0, "text": "t"}, {"code": 1}, [1, "t"]):
        with pytest.raises(ProtocolError):
            decode_all(rare(MessageType.FAILURE, other))


def test_deep_nesting_is_refused() -> None:
    body: object = None
    for _ in range(100):
        body = [body]
    with pytest.raises(ProtocolError):
        decode_all(rare(MessageType.REPLY, {"id": 1, "body": {"a": body}, "error": ""}))
    deep = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(ProtocolError):
        decode_all(HEADER.pack(8 + len(deep), MessageType.REPLY, 0, 0) + deep)


def compressed_frame(body: bytes, count: int, body_bytes: int) -> bytes:
    return AGGREGATE.pack(AGGREGATE.size + len(body), MessageType.AGGREGATE, 1, 0, 1, 2, 1, 0, count, body_bytes) + body


def test_compression_is_used_only_where_it_helps() -> None:
    import random

    noise = random.Random(0).randbytes(8192)
    plain = Aggregate(ONE, Seq(2), NOW, RUN, (Extent(DISK, 0, noise),))
    text = Aggregate(ONE, Seq(2), NOW, RUN, (Extent(DISK, 0, b"text" * 2048),))
    assert b"".join(encode_aggregate(plain, level=1)) == frame(plain)
    small = b"".join(encode_aggregate(text, level=1))
    assert len(small) < 200
    assert decode_all(small) == [text]


def test_a_decompression_bomb_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < FRAME_BYTES_MAX
    with pytest.raises(ProtocolError, match="declare its size"):
        decode_all(compressed_frame(bomb, 1, 4096 + EXTENT.size))
    with pytest.raises(ProtocolError, match="not within"):
        decode_all(compressed_frame(bomb, 1, 64 << 20))


def test_compressed_data_that_hides_its_size_is_refused() -> None:
    body = EXTENT.pack(1, 8, 0, 0) + bytes(8)
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(body)
    with pytest.raises(ProtocolError):
        decode_all(compressed_frame(hidden, 1, len(body)))
    honest = zstandard.ZstdCompressor().compress(body)
    assert decode_all(compressed_frame(honest, 1, len(body)))
    with pytest.raises(ProtocolError):
        decode_all(compressed_frame(honest + b"more", 1, len(body)))
    with pytest.raises(ProtocolError):
        decode_all(compressed_frame(honest[:-2], 1, len(body)))


@pytest.mark.parametrize(
    "table",
    [
        EXTENT.pack(1, 9, 0, 0) + bytes(8),
        EXTENT.pack(1, 7, 0, 0) + bytes(8),
        EXTENT.pack(1, 8, 0, 8) + bytes(8),
        EXTENT.pack(0, 8, 0, 0) + bytes(8),
        EXTENT.pack(1, 0, 0, 0),
        EXTENT.pack(1, 8, VOLUME_BYTES_MAX, 0) + bytes(8),
        EXTENT.pack(1, (1 << 32) - 1, 0, 0) + bytes(8),
        EXTENT.pack(1, 0, 0, (1 << 32) - 1),
    ],
)
def test_a_table_that_does_not_match_its_data_is_refused(table: bytes) -> None:
    head = AGGREGATE.pack(AGGREGATE.size + len(table), MessageType.AGGREGATE, 0, 0, 1, 2, 1, 0, 1, len(table))
    with pytest.raises(ProtocolError):
        decode_all(head + table)


def test_receiving_without_reading_is_bounded() -> None:
    decoder = Decoder()
    decoder.receive_data(frame(SyncRequest()) * (FRAME_BYTES_MAX // 8 + 1))
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"more")


def test_an_announced_frame_takes_no_room_before_its_length_is_checked() -> None:
    decoder = Decoder()
    decoder.receive_data(struct.pack("<IBBH", 0xFFFFFFFF, MessageType.WRITE, 0, 0))
    with pytest.raises(ProtocolError):
        decoder.next_message()
    assert not decoder.incomplete


def test_no_message_is_refused_with_our_error() -> None:
    with pytest.raises(LocalProtocolError):
        encode("text")  # type: ignore[arg-type]
