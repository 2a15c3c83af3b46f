"""Messages as frames and back: bounded, without sockets. PROTOCOL.md holds the layout tables.

Invariants:
- A Decoder holds at most one incomplete frame: its length is checked against the limit of its type before any room is
  made for it, and no frame is longer than FRAME_BYTES_MAX.
- Decompression makes at most what the frame declared, and a frame may declare at most an aggregate and its table.
- Malformed input raises ProtocolError and nothing else; nothing of a bad frame is used; the Decoder stays poisoned.
- Each message has exactly one encoding, except that an aggregate may be compressed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import error as StructError
from typing import Final

import msgspec
import zstandard

from dedup.types import (
    AGGREGATE_BYTES_MAX,
    VOLUME_BYTES_MAX,
    WRITE_BYTES_MAX,
    Aggregate,
    Correct,
    Epoch,
    Extent,
    Flush,
    Heartbeat,
    Reconcile,
    Seq,
    VolumeId,
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
    check_piece_form,
    check_query,
    check_result,
    check_stamp,
    check_volume,
)
from replication.control_checks import U32_MAX, Malformed, check_range
from replication.control_frames import msgpack_decoder
from replication.errors import LocalProtocolError, ProtocolError
from replication.frame_encoding import compressed, encode, encode_aggregate, frame_bytes
from replication.frame_head import HEADER, Buffer, MessageType
from replication.frame_layout import (
    ACK,
    AGGREGATE,
    AGGREGATE_BODY_BYTES_MAX,
    COMPARE,
    COMPARE_RESULT,
    COPY_BYTES_MAX,
    CORRECT,
    EXTENT,
    FLAGS_ALLOWED,
    FLUSH,
    FRAME_LIMITS,
    HEARTBEAT,
    OFFER,
    QUERY,
    RARE,
    WRITE,
    Flag,
)
from replication.messages import (
    FRAME_BYTES_MAX,
    PROTOCOL_VERSION,
    Ack,
    Compare,
    CompareResult,
    Hello,
    Message,
    Offer,
    Piece,
    Query,
    Remainder,
    Result,
    Role,
    SyncRequest,
    Wanted,
)

__all__ = ["Buffer", "Decoder", "compressed", "decode_all", "encode", "encode_aggregate", "frame_bytes"]

_ZEROS: Final = int(Flag.ZEROS)
_WRITE: Final = int(MessageType.WRITE)
_RECONCILE: Final = int(MessageType.RECONCILE)


def _payload(chunk: Buffer, start: int, end: int) -> bytes | memoryview:
    view = memoryview(chunk)[start:end]
    return bytes(view) if end - start <= COPY_BYTES_MAX else view.toreadonly()


def _decode_write(chunk: Buffer, start: int, end: int) -> Message:
    _, kind, flags, _, seq, time, run, volume, offset, length = WRITE.unpack_from(chunk, start)
    # The common case, in one condition; everything else is sorted out below.
    if (
        kind == _WRITE
        and not flags
        and 0 < length <= WRITE_BYTES_MAX
        and length == end - start - 44
        and seq
        and volume
        and offset + length <= VOLUME_BYTES_MAX
    ):
        data = memoryview(chunk)[start + 44 : end]
        return Write(
            seq, time, run, Extent(volume, offset, bytes(data) if length <= COPY_BYTES_MAX else data.toreadonly())
        )
    check_extent(volume, offset, length)
    extent = _extent(chunk, start + 44, end, flags, volume, offset, length)
    if not seq:
        raise Malformed("seq 0")
    if kind == _WRITE:
        if not length:
            raise Malformed("a write of nothing")
        return Write(seq, time, run, extent)
    return Reconcile(seq, time, run, extent)


def _extent(chunk: Buffer, start: int, end: int, flags: int, volume: VolumeId, offset: int, length: int) -> Extent:
    if flags:
        if start != end or not length:
            raise Malformed("zeros with a payload, or none")
        return Extent(volume, offset, b"", length)
    if end - start != length:
        raise Malformed(f"a payload of {end - start} bytes for an extent of {length}")
    return Extent(volume, offset, _payload(chunk, start, end))


def _decode_correct(chunk: Buffer, start: int, end: int) -> Message:
    _, _, flags, _, seq, time, run, refused, size, volume, offset, length = CORRECT.unpack_from(chunk, start)
    check_extent(volume, offset, length)
    check_correct(seq, refused, size)
    return Correct(
        seq, time, run, refused, size, _extent(chunk, start + CORRECT.size, end, flags, volume, offset, length)
    )


def _decode_aggregate(chunk: Buffer, start: int, end: int) -> Message:
    _, _, _, _, first_seq, seq, time, run, count, _ = AGGREGATE.unpack_from(chunk, start)
    body = _aggregate_body(chunk, start, end)
    at = count * EXTENT.size
    extents = []
    for piece in _pieces(body, count):
        size = piece.data_bytes
        extents.append(Extent(piece.volume, piece.offset, body[at : at + size] if size else b"", piece.zeros))
        at += size
    if at != len(body):
        raise Malformed("an aggregate's data does not match its table")
    return Aggregate(first_seq, seq, time, run, tuple(extents))


def _decode_remainder(chunk: Buffer, start: int, end: int) -> Message:
    _, _, _, _, first_seq, seq, time, run, count, _ = AGGREGATE.unpack_from(chunk, start)
    body = _aggregate_body(chunk, start, end)
    return Remainder(first_seq, seq, time, run, tuple(_pieces(body, count)), body[count * EXTENT.size :])


def _aggregate_body(chunk: Buffer, start: int, end: int) -> memoryview:
    """Table and data, decompressed."""
    _, _, flags, _, first_seq, seq, _, _, count, body_bytes = AGGREGATE.unpack_from(chunk, start)
    check_aggregate(first_seq, seq, count)
    check_range("aggregate body", body_bytes, count * EXTENT.size, AGGREGATE_BODY_BYTES_MAX)
    body = memoryview(chunk)[start + AGGREGATE.size : end].toreadonly()
    if flags:
        body = memoryview(_decompress(body, body_bytes))
    if len(body) != body_bytes:
        raise Malformed(f"an aggregate body of {len(body)} bytes that declares {body_bytes}")
    return body


def _pieces(body: memoryview, count: int) -> list[Piece]:
    """The table of an aggregate, checked."""
    covered = 0
    pieces = []
    for volume, size, offset, zeros in EXTENT.iter_unpack(body[: count * EXTENT.size]):
        check_piece_form(volume, offset, size, zeros)
        covered += size or zeros
        pieces.append(Piece(volume, offset, size, zeros))
    if covered > AGGREGATE_BYTES_MAX:
        raise Malformed(f"an aggregate of {covered} bytes")
    return pieces


def _decompress(body: memoryview, body_bytes: int) -> bytes:
    # The library makes room for what the zstd frame claims: believe it only when it claims what the table allows.
    try:
        if zstandard.frame_content_size(body) != body_bytes:
            raise Malformed("a compressed aggregate does not declare its size")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=body_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Malformed(f"a compressed aggregate does not decompress: {error}") from error


def _decode_flush(chunk: Buffer, start: int, end: int) -> Message:
    message = Flush(*FLUSH.unpack_from(chunk, start)[4:])
    check_stamp(message)
    check_volume(message.volume)
    return message


def _decode_heartbeat(chunk: Buffer, start: int, end: int) -> Message:
    message = Heartbeat(*HEARTBEAT.unpack_from(chunk, start)[4:])
    check_stamp(message)
    return message


def _decode_ack(chunk: Buffer, start: int, end: int) -> Message:
    message = Ack(*ACK.unpack_from(chunk, start)[4:])
    check_ack(message)
    return message


def _decode_compare(chunk: Buffer, start: int, end: int) -> Message:
    _, _, _, _, seq, time, run, volume, offset, unit = COMPARE.unpack_from(chunk, start)
    message = Compare(seq, time, run, volume, offset, bytes(memoryview(chunk)[start + COMPARE.size : end]), unit)
    check_compare(message)
    return message


def _decode_compare_result(chunk: Buffer, start: int, end: int) -> Message:
    seq, differing = _answer(chunk, start, end)
    check_answer(seq, differing)
    return CompareResult(seq, differing)


def _decode_wanted(chunk: Buffer, start: int, end: int) -> Message:
    seq, marks = _answer(chunk, start, end)
    check_marks(seq, marks)
    return Wanted(seq, marks)


def _answer(chunk: Buffer, start: int, end: int) -> tuple[Seq, bytes]:
    (*_, seq) = COMPARE_RESULT.unpack_from(chunk, start)
    return seq, bytes(memoryview(chunk)[start + COMPARE_RESULT.size : end])


def _decode_offer(chunk: Buffer, start: int, end: int) -> Message:
    (*_, seq) = OFFER.unpack_from(chunk, start)
    message = Offer(seq, bytes(memoryview(chunk)[start + OFFER.size : end]))
    check_offer(message)
    return message


def _decode_query(chunk: Buffer, start: int, end: int) -> Message:
    (*_, number) = QUERY.unpack_from(chunk, start)
    message = Query(number, _payload(chunk, start + QUERY.size, end))
    check_query(message.id, len(message.body))
    return message


def _decode_result(chunk: Buffer, start: int, end: int) -> Message:
    (*_, number) = QUERY.unpack_from(chunk, start)
    message = Result(number, _payload(chunk, start + QUERY.size, end))
    check_result(message.id, len(message.body))
    return message


def _decode_sync_request(chunk: Buffer, start: int, end: int) -> Message:
    return SyncRequest()


def _decode_hello(chunk: Buffer, start: int, end: int) -> Message:
    # Of another version no more than the version is understood, so that it can be refused in words.
    try:
        body = msgspec.msgpack.decode(bytes(memoryview(chunk)[start + HEADER.size : end]))
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise Malformed(str(error)) from error
    version = body.get("version") if isinstance(body, dict) else None
    if isinstance(version, int) and version != PROTOCOL_VERSION:
        check_range("version", version, 0, U32_MAX)
        return Hello(version, Role.READER, "", Epoch(0))
    return _decode_own_hello(chunk, start, end)


def _rare_decoder(cls: type) -> Callable[[Buffer, int, int], Message]:
    decode_body = msgpack_decoder(cls, RARE_CHECKS[cls])

    def decode(chunk: Buffer, start: int, end: int) -> Message:
        message: Message = decode_body(bytes(memoryview(chunk)[start + HEADER.size : end]))
        return message

    return decode


_decode_own_hello: Final = _rare_decoder(Hello)

_DECODERS: Final[dict[int, Callable[[Buffer, int, int], Message]]] = {
    **{int(kind): _rare_decoder(cls) for cls, (kind, _limit) in RARE.items()},
    int(MessageType.HELLO): _decode_hello,
    _WRITE: _decode_write,
    _RECONCILE: _decode_write,
    int(MessageType.CORRECT): _decode_correct,
    int(MessageType.AGGREGATE): _decode_aggregate,
    int(MessageType.FLUSH): _decode_flush,
    int(MessageType.HEARTBEAT): _decode_heartbeat,
    int(MessageType.ACK): _decode_ack,
    int(MessageType.COMPARE): _decode_compare,
    int(MessageType.COMPARE_RESULT): _decode_compare_result,
    int(MessageType.SYNC_REQUEST): _decode_sync_request,
    int(MessageType.OFFER): _decode_offer,
    int(MessageType.WANTED): _decode_wanted,
    int(MessageType.REMAINDER): _decode_remainder,
    int(MessageType.QUERY): _decode_query,
    int(MessageType.RESULT): _decode_result,
}


FILL_BYTES_MIN: Final = 64 << 10
"""A frame that lacks less is completed with what is received for the frames behind it."""


class Decoder:
    """Bytes in, messages out: `receive_data` what arrived, then `next_message` until it gives None.

    A payload longer than COPY_BYTES_MAX is a read-only view of what was received and keeps it alive.
    """

    def __init__(self) -> None:
        self._chunk: Buffer = b""
        self._at = 0
        self._frame: bytearray | None = None
        self._filled = 0
        self._error: ProtocolError | None = None

    @property
    def incomplete(self) -> bool:
        """Whether a frame has begun and not ended: the end of the connection would cut it."""
        return self._frame is not None or self._at < len(self._chunk)

    def receive_data(self, data: Buffer) -> None:
        """Takes what arrived; `data` must not change afterwards. Raises ProtocolError when poisoned, LocalProtocolError
        when more than FRAME_BYTES_MAX was left unread."""
        if self._error is not None:
            raise self._error
        rest = len(self._chunk) - self._at
        if not rest:
            self._chunk = data
        elif rest > FRAME_BYTES_MAX:
            raise LocalProtocolError("received data without reading the messages before it")
        else:
            self._chunk = b"".join((memoryview(self._chunk)[self._at :], data))
        self._at = 0

    @property
    def unfilled(self) -> memoryview | None:
        """Where the rest of a large frame belongs that has begun: received there, and told by `filled`, it is not
        copied. None where `receive_data` takes what comes next."""
        frame = self._frame
        if frame is None or len(frame) - self._filled < FILL_BYTES_MIN or self._at < len(self._chunk):
            return None
        return memoryview(frame)[self._filled :]

    def filled(self, count: int) -> None:
        """So many bytes were received at the beginning of `unfilled`."""
        self._filled += count

    def next_message(self) -> Message | None:
        """The next complete message, or None until more data comes. Raises ProtocolError, then always again."""
        if self._error is not None:
            raise self._error
        if self._frame is None and self._at == len(self._chunk):
            return None
        try:
            return self._next()
        except (Malformed, StructError) as error:
            self._error = ProtocolError(f"malformed frame from the peer: {error}")
            self._error.__cause__ = error
            self._chunk, self._at, self._frame = b"", 0, None
            raise self._error from error

    def _next(self) -> Message | None:
        chunk, at = self._chunk, self._at
        if self._frame is not None:
            return self._assemble(self._frame)
        rest = len(chunk) - at
        if rest < 8:
            return None
        length, kind, flags, reserved = HEADER.unpack_from(chunk, at)
        limits = FRAME_LIMITS.get(kind)
        if limits is None:
            raise Malformed(f"unknown type {kind}")
        if not limits[0] <= length <= limits[1]:
            raise Malformed(f"a {MessageType(kind).name} frame of {length} bytes, not {limits[0]}..{limits[1]}")
        if reserved or (flags and flags & ~FLAGS_ALLOWED.get(kind, 0)):
            raise Malformed(f"unknown flags {flags} or reserved bits {reserved} in a {MessageType(kind).name} frame")
        if rest >= length:
            self._at = at + length
            return _DECODERS[kind](chunk, at, at + length)
        self._frame = bytearray(length)
        self._filled = 0
        return self._assemble(self._frame)

    def _assemble(self, frame: bytearray) -> Message | None:
        """Fills the incomplete frame from the chunk: each byte of it is copied once, into its place."""
        chunk, at = self._chunk, self._at
        take = min(len(chunk) - at, len(frame) - self._filled)
        # A view takes the bytes as they are; a bytearray makes a copy of them first.
        memoryview(frame)[self._filled : self._filled + take] = memoryview(chunk)[at : at + take]
        self._filled += take
        self._at = at + take
        if self._filled < len(frame):
            return None
        self._frame = None
        return _DECODERS[frame[4]](frame, 0, len(frame))


def decode_all(data: Buffer) -> Sequence[Message]:
    """Every message of `data`, which must end with a whole frame. Raises ProtocolError."""
    decoder = Decoder()
    decoder.receive_data(data)
    messages = []
    while (message := decoder.next_message()) is not None:
        messages.append(message)
    if decoder.incomplete:
        raise ProtocolError("the data ends within a frame")
    return messages
