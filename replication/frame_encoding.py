"""Messages to frames: checked before they are packed, payloads never copied. `wire` is the way in."""

from __future__ import annotations

from collections.abc import Callable
from struct import error as StructError
from typing import Any, Final

import zstandard

from dedup.types import (
    AGGREGATE_BYTES_MAX,
    VOLUME_BYTES_MAX,
    WRITE_BYTES_MAX,
    Aggregate,
    Correct,
    Extent,
    Flush,
    Heartbeat,
    Reconcile,
    Write,
)
from replication.checks import (
    RARE_CHECKS,
    check_ack,
    check_aggregate,
    check_answer,
    check_compare,
    check_correct,
    check_extent,
    check_marks,
    check_offer,
    check_piece,
    check_piece_form,
    check_query,
    check_result,
    check_stamp,
    check_volume,
)
from replication.control_checks import Malformed
from replication.control_frames import encode_msgpack
from replication.errors import LocalProtocolError
from replication.frame_head import HEADER, Buffer, MessageType
from replication.frame_layout import (
    ACK,
    AGGREGATE,
    COMPARE,
    COMPARE_RESULT,
    CORRECT,
    EXTENT,
    FLUSH,
    HEARTBEAT,
    OFFER,
    QUERY,
    RARE,
    WRITE,
    Flag,
)
from replication.messages import (
    Ack,
    Compare,
    CompareResult,
    Message,
    Offer,
    Query,
    Remainder,
    Result,
    SyncRequest,
    Wanted,
)

_ZEROS: Final = int(Flag.ZEROS)
_WRITE: Final = int(MessageType.WRITE)
_RECONCILE: Final = int(MessageType.RECONCILE)


def encode(message: Message) -> list[Buffer]:
    """The frame as buffers to be sent one after the other; payloads are not copied and must not change until sent.

    Raises LocalProtocolError for a message that the peer would have to refuse.
    """
    encoder = _ENCODERS.get(type(message))
    if encoder is None:
        raise LocalProtocolError(f"{type(message).__name__} is no message of this protocol")
    try:
        return encoder(message)
    except (Malformed, StructError, TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot send {type(message).__name__}: {error}") from error


def encode_aggregate(aggregate: Aggregate, *, level: int) -> list[Buffer]:
    """Like `encode`, but compressed with this zstd level where that saves at least an eighth."""
    return compressed(encode(aggregate), level=level)


def compressed(plain: list[Buffer], *, level: int) -> list[Buffer]:
    """The frame of an Aggregate or Remainder, compressed where that saves at least an eighth."""
    body = b"".join(plain)[AGGREGATE.size :]
    smaller = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(body)
    if len(smaller) > len(body) - len(body) // 8:
        return plain
    fields = AGGREGATE.unpack_from(plain[0])
    head = AGGREGATE.pack(AGGREGATE.size + len(smaller), fields[1], int(Flag.COMPRESSED), 0, *fields[4:])
    return [head, smaller]


def frame_bytes(message: Message) -> int:
    """Length of the message's frame, uncompressed."""
    return sum(len(buffer) for buffer in encode(message))


def _extent_length(extent: Extent) -> tuple[int, int]:
    """The extent's length and its flag, checked."""
    length, flag = len(extent.data), 0
    if extent.zeros:
        if length:
            raise Malformed("an extent has both data and zeros")
        length, flag = extent.zeros, _ZEROS
    check_extent(extent.volume, extent.offset, length)
    return length, flag


def _encode_write(message: Write) -> list[Buffer]:
    extent = message.extent
    data = extent.data
    length = len(data)
    # The common case, in one condition; everything else is sorted out below.
    if not extent.zeros and 0 < length <= WRITE_BYTES_MAX and message.seq and extent.volume > 0:
        offset = extent.offset
        if offset + length <= VOLUME_BYTES_MAX:
            head = WRITE.pack(
                44 + length, _WRITE, 0, 0, message.seq, message.time, message.run, extent.volume, offset, length
            )
            return [head, data]
    if extent.length == 0:
        raise Malformed("a write of nothing")
    return _encode_range(message, _WRITE)


def _encode_reconcile(message: Reconcile) -> list[Buffer]:
    return _encode_range(message, _RECONCILE)


def _encode_range(message: Write | Reconcile, kind: int) -> list[Buffer]:
    extent = message.extent
    length, flag = _extent_length(extent)
    check_stamp(message)
    data: list[Buffer] = [extent.data] if len(extent.data) else []
    total = WRITE.size + len(extent.data)
    head = WRITE.pack(
        total, kind, flag, 0, message.seq, message.time, message.run, extent.volume, extent.offset, length
    )
    return [head, *data]


def _encode_correct(message: Correct) -> list[Buffer]:
    extent = message.extent
    length, flag = _extent_length(extent)
    check_correct(message.seq, message.refused, message.size)
    data: list[Buffer] = [extent.data] if len(extent.data) else []
    head = CORRECT.pack(
        CORRECT.size + len(extent.data),
        MessageType.CORRECT,
        flag,
        0,
        message.seq,
        message.time,
        message.run,
        message.refused,
        message.size,
        extent.volume,
        extent.offset,
        length,
    )
    return [head, *data]


def _encode_aggregate(message: Aggregate) -> list[Buffer]:
    check_aggregate(message.first_seq, message.seq, len(message.extents))
    table: list[bytes] = []
    data: list[Buffer] = []
    total = covered = 0
    for extent in message.extents:
        length, _flag = _extent_length(extent)
        check_piece(length)
        covered += length
        size = len(extent.data)
        table.append(EXTENT.pack(extent.volume, size, extent.offset, extent.zeros))
        if size:
            data.append(extent.data)
            total += size
    if covered > AGGREGATE_BYTES_MAX:
        raise Malformed(f"an aggregate of {covered} bytes; at most {AGGREGATE_BYTES_MAX} are allowed")
    body_bytes = total + len(table) * EXTENT.size
    head = AGGREGATE.pack(
        AGGREGATE.size + body_bytes,
        MessageType.AGGREGATE,
        0,
        0,
        message.first_seq,
        message.seq,
        message.time,
        message.run,
        len(table),
        body_bytes,
    )
    return [head + b"".join(table), *data]


def _encode_remainder(message: Remainder) -> list[Buffer]:
    check_aggregate(message.first_seq, message.seq, len(message.pieces))
    table: list[bytes] = []
    covered = 0
    for piece in message.pieces:
        check_piece_form(piece.volume, piece.offset, piece.data_bytes, piece.zeros)
        covered += piece.data_bytes or piece.zeros
        table.append(EXTENT.pack(piece.volume, piece.data_bytes, piece.offset, piece.zeros))
    if covered > AGGREGATE_BYTES_MAX:
        raise Malformed(f"a remainder of {covered} bytes; at most {AGGREGATE_BYTES_MAX} are allowed")
    body_bytes = len(message.data) + len(table) * EXTENT.size
    kind = MessageType.REMAINDER
    stamp = (message.first_seq, message.seq, message.time, message.run)
    head = AGGREGATE.pack(AGGREGATE.size + body_bytes, kind, 0, 0, *stamp, len(table), body_bytes)
    return [head + b"".join(table), *([message.data] if len(message.data) else [])]


def _encode_flush(message: Flush) -> list[Buffer]:
    check_stamp(message)
    check_volume(message.volume)
    kind = MessageType.FLUSH
    return [FLUSH.pack(FLUSH.size, kind, 0, 0, message.seq, message.time, message.run, message.volume)]


def _encode_heartbeat(message: Heartbeat) -> list[Buffer]:
    check_stamp(message)
    return [HEARTBEAT.pack(HEARTBEAT.size, MessageType.HEARTBEAT, 0, 0, message.seq, message.time, message.run)]


def _encode_ack(message: Ack) -> list[Buffer]:
    check_ack(message)
    levels = (message.queued, message.kept, message.received, message.durable)
    return [ACK.pack(ACK.size, MessageType.ACK, 0, 0, *levels)]


def _encode_compare(message: Compare) -> list[Buffer]:
    check_compare(message)
    total = COMPARE.size + len(message.digests)
    kind = MessageType.COMPARE
    stamp = (message.seq, message.time, message.run)
    head = COMPARE.pack(total, kind, 0, 0, *stamp, message.volume, message.offset, message.unit)
    return [head, message.digests]


def _encode_compare_result(message: CompareResult) -> list[Buffer]:
    check_answer(message.seq, message.differing)
    return _encode_answer(MessageType.COMPARE_RESULT, message.seq, message.differing)


def _encode_wanted(message: Wanted) -> list[Buffer]:
    check_marks(message.seq, message.missing)
    return _encode_answer(MessageType.WANTED, message.seq, message.missing)


def _encode_answer(kind: MessageType, seq: int, marks: bytes) -> list[Buffer]:
    return [COMPARE_RESULT.pack(COMPARE_RESULT.size + len(marks), kind, 0, 0, seq), marks]


def _encode_offer(message: Offer) -> list[Buffer]:
    check_offer(message)
    return [OFFER.pack(OFFER.size + len(message.blocks), MessageType.OFFER, 0, 0, message.seq), message.blocks]


def _encode_query(message: Query) -> list[Buffer]:
    check_query(message.id, len(message.body))
    return [QUERY.pack(QUERY.size + len(message.body), MessageType.QUERY, 0, 0, message.id), message.body]


def _encode_result(message: Result) -> list[Buffer]:
    check_result(message.id, len(message.body))
    return [QUERY.pack(QUERY.size + len(message.body), MessageType.RESULT, 0, 0, message.id), message.body]


def _encode_sync_request(_message: SyncRequest) -> list[Buffer]:
    return [HEADER.pack(HEADER.size, MessageType.SYNC_REQUEST, 0, 0)]


def _encode_rare(message: Any) -> list[Buffer]:
    cls = type(message)
    return encode_msgpack(message, *RARE[cls], RARE_CHECKS[cls])


_ENCODERS: Final[dict[type, Callable[[Any], list[Buffer]]]] = {
    **dict.fromkeys(RARE, _encode_rare),
    Write: _encode_write,
    Reconcile: _encode_reconcile,
    Correct: _encode_correct,
    Aggregate: _encode_aggregate,
    Flush: _encode_flush,
    Heartbeat: _encode_heartbeat,
    Ack: _encode_ack,
    Compare: _encode_compare,
    CompareResult: _encode_compare_result,
    Offer: _encode_offer,
    Wanted: _encode_wanted,
    Remainder: _encode_remainder,
    SyncRequest: _encode_sync_request,
    Query: _encode_query,
    Result: _encode_result,
}
