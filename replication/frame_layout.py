"""Where the bytes of a frame are: types, flags, fixed parts and limits. PROTOCOL.md shows the same as tables.

All integers are little-endian and unsigned, without padding.
"""

from __future__ import annotations

from enum import IntFlag
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
from replication.control_frames import CONTROL_FRAMES
from replication.frame_head import HEAD, HEADER, MessageType
from replication.messages import (
    COMPARE_BLOCKS_MAX,
    DIGEST_BYTES,
    FINGERPRINT_BYTES,
    OFFER_BLOCKS_MAX,
    QUERY_BYTES_MAX,
    RESULT_BYTES_MAX,
    Uncompared,
    VolumePage,
)


class Flag(IntFlag):
    """The `flags` byte of a frame."""

    COMPRESSED = 1
    """Aggregate, Remainder: what follows the fixed part is one zstd frame."""
    ZEROS = 2
    """Write, Reconcile, Correct: `length` zeros, no payload follows."""


# Fixed parts, header included, so that a frame's head is one pack and one unpack.
WRITE: Final = Struct(HEAD + "QQIIQI")
"""seq, time, run, volume, offset, length; Reconcile has the same."""
CORRECT: Final = Struct(HEAD + "QQIQQIQI")
"""seq, time, run, refused, size, volume, offset, length."""
AGGREGATE: Final = Struct(HEAD + "QQQIII")
"""first_seq, seq, time, run, extents, body_bytes (of table and data, uncompressed); Remainder has the same."""
EXTENT: Final = Struct("<IIQI")
"""One entry of an aggregate's table: volume, data_bytes, offset, zeros."""
FLUSH: Final = Struct(HEAD + "QQII")
HEARTBEAT: Final = Struct(HEAD + "QQI")
ACK: Final = Struct(HEAD + "QQQQ")
"""queued, kept, received, durable."""
COMPARE: Final = Struct(HEAD + "QQIIQI")
"""seq, time, run, volume, offset, unit."""
COMPARE_RESULT: Final = Struct(HEAD + "Q")
"""seq; Wanted has the same."""
OFFER: Final = Struct(HEAD + "Q")
QUERY: Final = Struct(HEAD + "Q")
"""id; Result has the same."""
OFFERED_BYTES: Final = FINGERPRINT_BYTES + DIGEST_BYTES
"""What an Offer says of one block."""

AGGREGATE_EXTENTS_MAX: Final = 4096
AGGREGATE_BODY_BYTES_MAX: Final = AGGREGATE_EXTENTS_MAX * EXTENT.size + AGGREGATE_BYTES_MAX
COPY_BYTES_MAX: Final = 64 << 10
"""A payload up to this long is copied out as bytes; a longer one is a view of the received buffer (no copy)."""

RARE: Final[dict[type, tuple[MessageType, int]]] = {
    **CONTROL_FRAMES,
    VolumePage: (MessageType.VOLUME_PAGE, 2 << 20),
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
