"""Every message of the protocol, as frozen values. PROTOCOL.md says when each may be sent and its limits.

Records (`dedup.types.Record`) travel as they are, one frame each; what is here is everything else. What a session
begins with and a command is made of is in control_messages.py, which costs a short command less to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from dedup.types import ClockRun, Record, Seq, TimeNs, VolumeId, VolumeState
from replication.control_messages import (
    CONTROL_BYTES_MAX,
    PROTOCOL_VERSION,
    ErrorCode,
    Failure,
    Hello,
    Mode,
    Reply,
    Request,
    Role,
    Welcome,
)

__all__ = [
    "COMPARE_BLOCKS_MAX",
    "COMPARE_BYTES_MAX",
    "COMPARE_UNITS",
    "CONTROL_BYTES_MAX",
    "DIGEST_BYTES",
    "FINGERPRINT_BYTES",
    "FRAME_BYTES_MAX",
    "OFFER_BLOCKS_MAX",
    "PROTOCOL_VERSION",
    "QUERY_BYTES_MAX",
    "RESULT_BYTES_MAX",
    "SUM_UNITS",
    "VOLUMES_PER_PAGE_MAX",
    "Ack",
    "Compare",
    "CompareResult",
    "ErrorCode",
    "Failure",
    "Hello",
    "Level",
    "Message",
    "Mode",
    "Offer",
    "Piece",
    "Query",
    "Remainder",
    "Reply",
    "Request",
    "Result",
    "Role",
    "SyncRequest",
    "Uncompared",
    "VolumePage",
    "Wanted",
    "Welcome",
]

FRAME_BYTES_MAX: Final = 5 << 20
"""Largest frame either side accepts, header included: an aggregate of 4 MiB and its extents."""
VOLUMES_PER_PAGE_MAX: Final = 256
COMPARE_BLOCKS_MAX: Final = 1024
"""Digests of one Compare at most."""
COMPARE_BYTES_MAX: Final = 4 << 20
"""Bytes of a volume that one Compare covers at most."""
COMPARE_UNITS: Final = (4096, 64 << 10, 1 << 20, 4 << 20)
"""Bytes of a volume that one unit of a Compare may have: asked from coarse to fine, what is equal costs little."""
SUM_UNITS: Final = (64 << 10, 1 << 20)
"""Units that are told by two sums each, not by a digest, so that one block alone that differs is found at once."""
DIGEST_BYTES: Final = 16
FINGERPRINT_BYTES: Final = 16
OFFER_BLOCKS_MAX: Final = 1024
"""Blocks of one Offer: all of an aggregate of 4 MiB."""
QUERY_BYTES_MAX: Final = 64 << 10
"""Largest body of a Query."""
RESULT_BYTES_MAX: Final = 2 << 20
"""Largest body of a Result: 1 MiB of blocks and what is said of them."""


class Level(IntEnum):
    """How far an IO has come. QUEUED: held by the first appliance. RECEIVED: journalled at the second, survives a
    killed process. DURABLE: synced there, survives a power cut."""

    QUEUED = 0
    RECEIVED = 1
    DURABLE = 2


@dataclass(frozen=True, slots=True)
class VolumePage:
    """Volumes that exist at `Welcome.held`, at most VOLUMES_PER_PAGE_MAX of them; `last` on the final page."""

    volumes: tuple[VolumeState, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Compare:
    """Digests of a range of the source, taken under the range lock at `seq`, which it consumes like a record.

    `offset` is a multiple of `unit`, one of COMPARE_UNITS; `digests` holds DIGEST_BYTES of keyed BLAKE2b for each unit,
    or for one of SUM_UNITS two sums of so many bytes (digests.py), what lies past the volume's end counting as zeros;
    the second appliance answers with a CompareResult of the same seq.
    """

    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId
    offset: int
    digests: bytes
    unit: int = 4096


@dataclass(frozen=True, slots=True)
class CompareResult:
    """`differing[i]` is 1 where unit i of the Compare differs from what the store holds at that seq. Of SUM_UNITS each
    has two bytes, a little-endian number: 0 equal, n only block n - 1 of the unit differs, 65535 more of it."""

    seq: Seq
    differing: bytes


@dataclass(frozen=True, slots=True)
class Uncompared:
    """The Compare `seq` was not made: its digests have another session's key. From now on the key is this one."""

    seq: Seq
    digest_key: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """What the aggregate that ends with `seq` would carry in whole blocks: for each FINGERPRINT_BYTES to find it by and
    DIGEST_BYTES of keyed BLAKE2b to tell it by, in the order of offers.py. Consumes no seq; answered by a Wanted."""

    seq: Seq
    blocks: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """`missing[i]` is 1 where block i of the Offer is not held; the others are left out of the Remainder."""

    seq: Seq
    missing: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """An extent of a Remainder, without its data: of `data_bytes` and `zeros` exactly one is not 0."""

    volume: VolumeId
    offset: int
    data_bytes: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Remainder:
    """An aggregate without the blocks that the answer to its Offer said are held. `data` is what is left of the pieces'
    data, in order."""

    first_seq: Seq
    seq: Seq
    time: TimeNs
    run: ClockRun
    pieces: tuple[Piece, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Asks for DURABLE of everything received so far; answered by an Ack."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Cumulative, none ever decreases: the peer holds all records up to `queued`, those up to `kept` on a disk, its own
    or the second appliance's; that one has journalled all up to `received` and synced all up to `durable`. Said by a
    second appliance, `queued` is `received` and `kept` is `durable`."""

    queued: Seq
    kept: Seq
    received: Seq
    durable: Seq


@dataclass(frozen=True, slots=True)
class Query:
    """What a reader asks about the past of its group; `body` is a question of history_queries.py, encoded there. Who
    passes it on need not understand it."""

    id: int
    body: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Result:
    """Answer to the Query of the same id; `body` is an answer of history_queries.py, with its checksum."""

    id: int
    body: bytes | memoryview


Message = (
    Hello
    | Welcome
    | VolumePage
    | Compare
    | CompareResult
    | Uncompared
    | Offer
    | Wanted
    | Remainder
    | SyncRequest
    | Ack
    | Request
    | Reply
    | Query
    | Result
    | Failure
    | Record
)
