"""Where the bytes of a frame are: types, flags, fixed parts and limits. PROTOCOL.md shows the same as tables.

All integers are little-endian and unsigned, without padding.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from dedup.types import (
    AGGREGATE_BYTES_MAX,
    WRITE_BYTES_MAX,
    Attributes,
    Bookmark,
    Create,
    EpochStart,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
)
from replication.messages import (
    COMPARE_BLOCKS_MAX,
    CONTROL_BYTES_MAX,
    DIGEST_BYTES,
    FINGERPRINT_BYTES,
    OFFER_BLOCKS_MAX,
    QUERY_BYTES_MAX,
    RESULT_BYTES_MAX,
    Failure,
    Hello,
    Reply,
    Request,
    Uncompared,
    VolumePage,
    Welcome,
)


class MessageType(IntEnum):
    """The `type` byte of a frame. Records are 32 and up."""

    HELLO = 1
    WELCOME = 2
    VOLUME_PAGE = 3
    REQUEST = 4
    REPLY = 5
    FAILURE = 6
    SYNC_REQUEST = 7
    ACK = 8
    COMPARE = 9
    COMPARE_RESULT = 10
    UNCOMPARED = 11
    OFFER = 12
    WANTED = 13
    QUERY = 14
    RESULT = 15
    WRITE = 32
    AGGREGATE = 33
    RECONCILE = 34
    CORRECT = 35
    RESIZE = 36
    CREATE = 37
    RENAME = 38
    RETIRE = 39
    ATTRIBUTES = 40
    FLUSH = 41
    BOOKMARK = 42
    HEARTBEAT = 43
    EPOCH_START = 44
    RECONCILE_BEGIN = 45
    RECONCILE_END = 46
    REMAINDER = 47


class Flag(IntFlag):
    """The `flags` byte of a frame."""

    COMPRESSED = 1
    """Aggregate, Remainder: what follows the fixed part is one zstd frame."""
    ZEROS = 2
    """Write, Reconcile, Correct: `length` zeros, no payload follows."""


_HEADER: Final = "<IBBH"
HEADER: Final = Struct(_HEADER)
"""length u32 (whole frame), type u8, flags u8, reserved u16 = 0."""
# Fixed parts, header included, so that a frame's head is one pack and one unpack.
WRITE: Final = Struct(_HEADER + "QQIIQI")
"""seq, time, run, volume, offset, length; Reconcile has the same."""
CORRECT: Final = Struct(_HEADER + "QQIQQIQI")
"""seq, time, run, refused, size, volume, offset, length."""
AGGREGATE: Final = Struct(_HEADER + "QQQIII")
"""first_seq, seq, time, run, extents, body_bytes (of table and data, uncompressed); Remainder has the same."""
EXTENT: Final = Struct("<IIQI")
"""One entry of an aggregate's table: volume, data_bytes, offset, zeros."""
FLUSH: Final = Struct(_HEADER + "QQII")
HEARTBEAT: Final = Struct(_HEADER + "QQI")
ACK: Final = Struct(_HEADER + "QQQQ")
"""queued, kept, received, durable."""
COMPARE: Final = Struct(_HEADER + "QQIIQI")
"""seq, time, run, volume, offset, unit."""
COMPARE_RESULT: Final = Struct(_HEADER + "Q")
"""seq; Wanted has the same."""
OFFER: Final = Struct(_HEADER + "Q")
QUERY: Final = Struct(_HEADER + "Q")
"""id; Result has the same."""
OFFERED_BYTES: Final = FINGERPRINT_BYTES + DIGEST_BYTES
"""What an Offer says of one block."""

AGGREGATE_EXTENTS_MAX: Final = 4096
AGGREGATE_BODY_BYTES_MAX: Final = AGGREGATE_EXTENTS_MAX * EXTENT.size + AGGREGATE_BYTES_MAX
COPY_BYTES_MAX: Final = 64 << 10
"""A payload up to this long is copied out as bytes; a longer one is a view of the received buffer (no copy)."""

RARE: Final[dict[type, tuple[MessageType, int]]] = {
    Hello: (MessageType.HELLO, 4096),
    Welcome: (MessageType.WELCOME, 4096),
    VolumePage: (MessageType.VOLUME_PAGE, 2 << 20),
    Request: (MessageType.REQUEST, CONTROL_BYTES_MAX),
    Reply: (MessageType.REPLY, CONTROL_BYTES_MAX),
    Failure: (MessageType.FAILURE, 8192),
    Uncompared: (MessageType.UNCOMPARED, 256),
    Resize: (MessageType.RESIZE, 4096),
    Create: (MessageType.CREATE, 8192),
    Rename: (MessageType.RENAME, 4 << 20),
    Retire: (MessageType.RETIRE, 4096),
    Attributes: (MessageType.ATTRIBUTES, 4096),
    Bookmark: (MessageType.BOOKMARK, 4096),
    EpochStart: (MessageType.EPOCH_START, 4096),
    ReconcileBegin: (MessageType.RECONCILE_BEGIN, 8192),
    ReconcileEnd: (MessageType.RECONCILE_END, 4096),
}
"""Messages that travel as msgpack: their type and longest frame."""

FRAME_LIMITS: Final[dict[int, tuple[int, int]]] = {
    **{kind: (HEADER.size, limit) for kind, limit in RARE.values()},
    MessageType.SYNC_REQUEST: (HEADER.size, HEADER.size),
    MessageType.ACK: (ACK.size, ACK.size),
    MessageType.COMPARE: (COMPARE.size + DIGEST_BYTES, COMPARE.size + COMPARE_BLOCKS_MAX * DIGEST_BYTES),
    MessageType.COMPARE_RESULT: (COMPARE_RESULT.size + 1, COMPARE_RESULT.size + COMPARE_BLOCKS_MAX),
    MessageType.OFFER: (OFFER.size + OFFERED_BYTES, OFFER.size + OFFER_BLOCKS_MAX * OFFERED_BYTES),
    MessageType.WANTED: (COMPARE_RESULT.size + 1, COMPARE_RESULT.size + OFFER_BLOCKS_MAX),
    MessageType.QUERY: (QUERY.size + 1, QUERY.size + QUERY_BYTES_MAX),
    MessageType.RESULT: (QUERY.size + 1, QUERY.size + RESULT_BYTES_MAX),
    MessageType.WRITE: (WRITE.size, WRITE.size + WRITE_BYTES_MAX),
    MessageType.RECONCILE: (WRITE.size, WRITE.size + WRITE_BYTES_MAX),
    MessageType.CORRECT: (CORRECT.size, CORRECT.size + WRITE_BYTES_MAX),
    MessageType.AGGREGATE: (AGGREGATE.size + 1, AGGREGATE.size + AGGREGATE_BODY_BYTES_MAX),
    MessageType.REMAINDER: (AGGREGATE.size + 1, AGGREGATE.size + AGGREGATE_BODY_BYTES_MAX),
    MessageType.FLUSH: (FLUSH.size, FLUSH.size),
    MessageType.HEARTBEAT: (HEARTBEAT.size, HEARTBEAT.size),
}
"""Shortest and longest frame of each type, header included. A compressed aggregate is never longer than a plain one."""

FLAGS_ALLOWED: Final[dict[int, int]] = {
    MessageType.WRITE: Flag.ZEROS,
    MessageType.RECONCILE: Flag.ZEROS,
    MessageType.CORRECT: Flag.ZEROS,
    MessageType.AGGREGATE: Flag.COMPRESSED,
    MessageType.REMAINDER: Flag.COMPRESSED,
}
"""The flags that a frame of each type may have; those not named have none."""
