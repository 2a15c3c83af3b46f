"""Every message of the protocol, as frozen values. PROTOCOL.md says when each may be sent and its limits.

Records (`dedup.types.Record`) travel as they are, one frame each; what is here is everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from dedup.types import ClockRun, Epoch, Record, Seq, TimeNs, VolumeId, VolumeState

PROTOCOL_VERSION: Final = 1
FRAME_BYTES_MAX: Final = 5 << 20
"""Largest frame either side accepts, header included: an aggregate of 4 MiB and its extents."""
VOLUMES_PER_PAGE_MAX: Final = 256
CONTROL_BYTES_MAX: Final = 1 << 20
"""Largest encoded Request or Reply."""
COMPARE_BLOCKS_MAX: Final = 1024
"""Blocks one Compare covers at most: 4 MiB of a volume, 16 KiB of digests."""
DIGEST_BYTES: Final = 16


class Role(Enum):
    """What a peer may do. An agent appends to its own group; an admin's requests change the store; a reader reads."""

    AGENT = "agent"
    ADMIN = "admin"
    READER = "reader"


class Level(IntEnum):
    """How far an IO has come. QUEUED: held by the first appliance. RECEIVED: journalled at the second, survives a
    killed process. DURABLE: synced there, survives a power cut."""

    QUEUED = 0
    RECEIVED = 1
    DURABLE = 2


class ErrorCode(IntEnum):
    PROTOCOL = 1
    """The peer broke the protocol; the session is closed."""
    VERSION = 2
    REFUSED = 3
    """The request is refused: role, fencing (an older epoch), unknown name."""
    STORE_FULL = 4
    """The store's disk is full; nothing of the record was kept; connect again later."""
    STORE_FAILED = 5
    """The store stopped; its appliance restarts."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of the connecting side. `epoch` is 0 for roles other than agent."""

    version: int
    role: Role
    group: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to Hello. For an agent, `held` is the last seq in the journal (resend from held + 1), `durable` the last
    synced one; volumes follow in VolumePages. `digest_key` keys this session's Compare digests."""

    version: int
    store: str
    epoch: Epoch
    held: Seq
    durable: Seq
    time: TimeNs
    run: ClockRun
    has_base: bool
    reconciling: bool
    next_volume: VolumeId
    digest_key: bytes


@dataclass(frozen=True, slots=True)
class VolumePage:
    """Volumes that exist at `Welcome.held`, at most VOLUMES_PER_PAGE_MAX of them; `last` on the final page."""

    volumes: tuple[VolumeState, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Compare:
    """Digests of a range of the source, taken under the range lock at `seq`, which it consumes like a record.

    `offset` is block-aligned; `digests` holds DIGEST_BYTES of keyed BLAKE2b for each block, the last one zero-padded;
    the second appliance answers with a CompareResult of the same seq.
    """

    seq: Seq
    time: TimeNs
    run: ClockRun
    volume: VolumeId
    offset: int
    digests: bytes


@dataclass(frozen=True, slots=True)
class CompareResult:
    """`differing[i]` is 1 where block i of the Compare differs from what the store holds at that seq."""

    seq: Seq
    differing: bytes


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Asks for DURABLE of everything received so far; answered by an Ack."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Cumulative: all records up to `received` are journalled, all up to `durable` are synced. Never decreases."""

    received: Seq
    durable: Seq


@dataclass(frozen=True, slots=True)
class Request:
    """A control command; `body` is JSON-like (msgspec-encodable builtins)."""

    id: int
    command: str
    body: dict[str, object]


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to the Request of the same id. `error` is empty on success, else one line for a person."""

    id: int
    body: dict[str, object]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Last message of a session: why the sender closes it."""

    code: ErrorCode
    text: str


Message = (
    Hello | Welcome | VolumePage | Compare | CompareResult | SyncRequest | Ack | Request | Reply | Failure | Record
)
