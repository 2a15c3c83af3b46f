"""The messages by which every session begins and ends, and those that carry a command: as frozen values.

All of them, and nothing else, is what a command says that asks an appliance: hence they stand apart from the other
messages and records, and are Structs, which are made at import in a thirtieth of a dataclass's time.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

from msgspec import Struct

from dedup.ids import ClockRun, Epoch, Seq, TimeNs, VolumeId

PROTOCOL_VERSION: Final = 3
CONTROL_BYTES_MAX: Final = 1 << 20
"""Largest encoded Request or Reply."""


class Role(Enum):
    """What a peer may do. An agent appends to its own group; an admin's requests change the store; a reader reads."""

    AGENT = "agent"
    ADMIN = "admin"
    READER = "reader"


class Mode(Enum):
    """How the first appliance answers; modes.py holds the policies."""

    SYNC = "sync"
    ASYNC = "async"
    BATCH = "batch"
    AUTO = "auto"
    """Sync while the round trip is short, async beyond, and back."""


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
    FENCED = 6
    """Another agent feeds the group now; final for this one."""
    UNAVAILABLE = 7
    """A first appliance that cannot reach the second now; connect again later."""


class Hello(Struct, frozen=True):
    """First message of the connecting side. What follows `group` is empty for roles other than agent.

    `agent`: who feeds the group, the same for all starts of one source. `take_over`: be its agent from now on, whoever
    was before. `mode`: what a first appliance is to do; None leaves it to that one.
    """

    version: int
    role: Role
    group: str
    epoch: Epoch
    agent: str = ""
    take_over: bool = False
    mode: Mode | None = None


class Welcome(Struct, frozen=True):
    """Answer to Hello. For an agent, `held` is the last seq that the peer holds (resend from held + 1), `durable` the
    last one synced at the second appliance; volumes follow in VolumePages. `digest_key` keys this session's digests.
    `mode` is what a first appliance does, None from a second one."""

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
    mode: Mode | None = None


class Request(Struct, frozen=True):
    """A control command; `body` is JSON-like (msgspec-encodable builtins)."""

    id: int
    command: str
    body: dict[str, object]


class Reply(Struct, frozen=True):
    """Answer to the Request of the same id. `error` is empty on success, else one line for a person."""

    id: int
    body: dict[str, object]
    error: str = ""


class Failure(Struct, frozen=True):
    """Last message of a session: why the sender closes it."""

    code: ErrorCode
    text: str
