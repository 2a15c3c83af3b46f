"""What may be said when, and by whom: one state table for both ends, without socket, clock or await.

Invariants:
- Both ends run the same table and the same rules over the same messages, so they are always in the same state, apart
  from what is under way. A rule broken by a message we were asked to send is LocalProtocolError, by one that arrived
  is ProtocolError; either way the message has no effect.
- Records (and Compares) follow each other without a hole: each begins at the seq after the last one, the first at
  Welcome.held + 1.
- Ack never decreases and never passes what was sent. A CompareResult or Uncompared answers an open Compare with as many
  blocks, a Wanted an open Offer, a Reply an open Request, a Result an open Query; only so many of each are open.
- A Remainder follows the answer to its Offer. An offer whose seq was passed is forgotten.
- After a Failure, or after any broken rule, nothing more is said: CLOSED.

Use: `send` gives the buffers to put on the wire; `receive_data` what came from there, then `next_event` until None.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final, get_args

from dedup.types import Aggregate, Record, Seq, Write
from replication.errors import LocalProtocolError, ProtocolError
from replication.frame_layout import OFFERED_BYTES
from replication.messages import (
    DIGEST_BYTES,
    PROTOCOL_VERSION,
    Ack,
    Compare,
    CompareResult,
    Failure,
    Hello,
    Message,
    Offer,
    Query,
    Remainder,
    Reply,
    Request,
    Result,
    Role,
    SyncRequest,
    Uncompared,
    VolumePage,
    Wanted,
    Welcome,
)
from replication.wire import Buffer, Decoder, encode

COMPARES_OPEN_MAX: Final = 64
"""Most Compares without their CompareResult."""
OFFERS_OPEN_MAX: Final = 4
"""Most Offers whose aggregate was not said yet."""
REQUESTS_OPEN_MAX: Final = 64
"""Most Requests without their Reply."""
QUERIES_OPEN_MAX: Final = 64
"""Most Queries without their Result."""


class Side(Enum):
    """The two ends: CLIENT connects and says Hello (an agent's first appliance, a command); SERVER answers."""

    CLIENT = "client"
    SERVER = "server"


class State(Enum):
    CONNECTING = "connecting"
    """Nothing was said. The client says Hello."""
    GREETED = "greeted"
    """Hello was said. The server answers Welcome or Failure."""
    LISTING = "listing"
    """Welcome was said to an agent. The server lists the volumes."""
    STREAMING = "streaming"
    """Records, commands and their answers."""
    CLOSED = "closed"
    """Nothing more is said."""


RECORD_TYPES: Final[frozenset[type]] = frozenset(get_args(Record))
"""Messages that consume a seq and are journalled."""
NUMBERED_TYPES: Final[frozenset[type]] = RECORD_TYPES | {Compare, Remainder}
"""Messages that consume a seq."""

TABLE: Final[dict[State, dict[Side, dict[type, State]]]] = {
    State.CONNECTING: {
        Side.CLIENT: {Hello: State.GREETED},
        Side.SERVER: {Failure: State.CLOSED},
    },
    State.GREETED: {
        Side.CLIENT: {Failure: State.CLOSED},
        Side.SERVER: {Welcome: State.LISTING, Failure: State.CLOSED},
    },
    State.LISTING: {
        Side.CLIENT: {Failure: State.CLOSED},
        Side.SERVER: {VolumePage: State.LISTING, Failure: State.CLOSED},
    },
    State.STREAMING: {
        Side.CLIENT: {
            **dict.fromkeys(NUMBERED_TYPES, State.STREAMING),
            Offer: State.STREAMING,
            SyncRequest: State.STREAMING,
            Request: State.STREAMING,
            Query: State.STREAMING,
            Failure: State.CLOSED,
        },
        Side.SERVER: {
            Ack: State.STREAMING,
            CompareResult: State.STREAMING,
            Uncompared: State.STREAMING,
            Wanted: State.STREAMING,
            Reply: State.STREAMING,
            Result: State.STREAMING,
            Failure: State.CLOSED,
        },
    },
    State.CLOSED: {Side.CLIENT: {}, Side.SERVER: {}},
}
"""State → who speaks → what may be said → the state after it. Two messages have a say in it themselves: the last
VolumePage leads to STREAMING, and so does Welcome when the role is no agent's."""

AGENT_ONLY_TYPES: Final[frozenset[type]] = NUMBERED_TYPES | {
    Offer,
    SyncRequest,
    Ack,
    CompareResult,
    Uncompared,
    Wanted,
}
"""What only an agent's session carries."""
READER_ONLY_TYPES: Final[frozenset[type]] = frozenset({Query, Result})
"""What only a reader's session carries."""


class Session:
    """One end of one connection. Not to be shared between tasks that wait; no method waits."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.peer = Side.SERVER if side is Side.CLIENT else Side.CLIENT
        self.state = State.CONNECTING
        self.role: Role | None = None
        self.last_seq = Seq(0)
        """Seq of the last record or Compare said on this session, or Welcome.held."""
        self.queued = Seq(0)
        self.kept = Seq(0)
        self.received = Seq(0)
        self.durable = Seq(0)
        self._version = PROTOCOL_VERSION
        self._compares: dict[int, int] = {}
        self._offers: dict[int, int] = {}
        """Offers that are open: blocks, negative once answered."""
        self._requests: set[int] = set()
        self._queries: set[int] = set()
        self._decoder = Decoder()

    @property
    def compares_open(self) -> int:
        return len(self._compares)

    @property
    def offers_open(self) -> int:
        return len(self._offers)

    @property
    def requests_open(self) -> int:
        return len(self._requests)

    @property
    def queries_open(self) -> int:
        return len(self._queries)

    def send(self, message: Message) -> list[Buffer]:
        """The message's frame, counted as said. Raises LocalProtocolError and changes nothing when it is not allowed.

        The caller puts all of it on the wire, in the order of the calls, or gives the connection up.
        """
        buffers = encode(message)
        if type(message) is Ack and self._is_fed and self.side is Side.SERVER:
            _ack(self, Side.SERVER, message, State.STREAMING)  # what `_say` would find and do
        else:
            self._say(self.side, message)
        return buffers

    def sending(self, kind: type, first_seq: Seq, seq: Seq) -> None:
        """Counts a record, encoded before, as said: what `send` does for one, apart from the encoding.

        For a queue that keeps frames and sends them again. `kind` is the record's class; a Compare needs `send`.
        """
        if self.state is not State.STREAMING or self.side is not Side.CLIENT or kind not in RECORD_TYPES:
            raise LocalProtocolError(f"{kind.__name__} may not be sent when {self.state.value}")
        if self.role is not Role.AGENT or first_seq != self.last_seq + 1 or seq < first_seq:
            raise LocalProtocolError(f"record {first_seq}..{seq} does not follow {self.last_seq}")
        self._pass(seq)

    @property
    def _is_fed(self) -> bool:
        """Whether it streams records."""
        return self.state is State.STREAMING and self.role is Role.AGENT

    @property
    def incomplete(self) -> bool:
        """Whether the peer has begun a frame and not ended it."""
        return self._decoder.incomplete

    def receive_data(self, data: Buffer) -> None:
        """Takes what arrived; read the events after each call. `data` must not change afterwards."""
        self._decoder.receive_data(data)

    @property
    def unfilled(self) -> memoryview | None:
        """As `Decoder.unfilled`: where to receive what comes next, if anywhere."""
        return self._decoder.unfilled

    def filled(self, count: int) -> None:
        """As `Decoder.filled`."""
        self._decoder.filled(count)

    def next_event(self) -> Message | None:
        """The next message of the peer, or None until more arrives. Raises ProtocolError; then CLOSED."""
        try:
            message = self._decoder.next_message()
            # What `_say` would find and do, for what is most of the traffic.
            if (
                type(message) is Write
                and self._is_fed
                and self.side is Side.SERVER
                and message.seq == self.last_seq + 1
            ):
                self._pass(message.seq)
            elif type(message) is Ack and self._is_fed and self.side is Side.CLIENT:
                _ack(self, Side.SERVER, message, State.STREAMING)
            elif message is not None:
                self._say(self.peer, message)
        except ProtocolError:
            self.state = State.CLOSED
            raise
        return message

    def receive_eof(self) -> None:
        """The connection ended. Raises ProtocolError when that cut a frame; the session is CLOSED."""
        self.state = State.CLOSED
        if self._decoder.incomplete:
            raise ProtocolError("the connection ended within a frame")

    def _pass(self, seq: Seq) -> None:
        """A record was said: the last seq is its own, and offers of what came before are over."""
        self.last_seq = seq
        if self._offers:
            self._offers = {offered: blocks for offered, blocks in self._offers.items() if offered > seq}

    def _say(self, speaker: Side, message: Message) -> None:
        kind = type(message)
        following = TABLE[self.state][speaker].get(kind)
        if following is None:
            raise self._broken(speaker, f"{kind.__name__} is not allowed when {self.state.value}")
        if self.role is not Role.AGENT and kind in AGENT_ONLY_TYPES:
            raise self._broken(speaker, f"{kind.__name__} in a session whose role is not agent")
        if self.role is not Role.READER and kind in READER_ONLY_TYPES:
            raise self._broken(speaker, f"{kind.__name__} in a session whose role is not reader")
        rule = _RULES.get(kind)
        if rule is not None:
            following = rule(self, speaker, message, following)
        self.state = following

    def _broken(self, speaker: Side, text: str) -> LocalProtocolError | ProtocolError:
        return (
            LocalProtocolError(text) if speaker is self.side else ProtocolError(f"the peer broke the protocol: {text}")
        )


# Each rule gets (session, speaker, message, the state that the table names) and returns the state that follows.


def _hello(session: Session, speaker: Side, message: Hello, following: State) -> State:
    session.role = message.role
    session._version = message.version
    return following


def _welcome(session: Session, speaker: Side, message: Welcome, following: State) -> State:
    if message.version != session._version:
        raise session._broken(speaker, f"Welcome in version {message.version} after Hello in {session._version}")
    # A first appliance may hold what the second has not received; what that one has is told by Acks.
    session.last_seq = session.queued = message.held
    session.kept = session.durable = message.durable
    session.received = message.held if message.mode is None else message.durable
    return following if session.role is Role.AGENT else State.STREAMING


def _volume_page(session: Session, speaker: Side, message: VolumePage, following: State) -> State:
    return State.STREAMING if message.last else following


def _record(session: Session, speaker: Side, message: Any, following: State) -> State:
    if message.seq != session.last_seq + 1:
        raise session._broken(speaker, f"record {message.seq} does not follow {session.last_seq}")
    session._pass(message.seq)
    return following


def _aggregate(session: Session, speaker: Side, message: Aggregate | Remainder, following: State) -> State:
    if message.first_seq != session.last_seq + 1:
        raise session._broken(speaker, f"aggregate from {message.first_seq} does not follow {session.last_seq}")
    session._pass(message.seq)
    return following


def _remainder(session: Session, speaker: Side, message: Remainder, following: State) -> State:
    if session._offers.get(message.seq, 0) >= 0:
        raise session._broken(speaker, f"the remainder {message.seq} has no offer that was answered")
    return _aggregate(session, speaker, message, following)


def _offer(session: Session, speaker: Side, message: Offer, following: State) -> State:
    if len(session._offers) >= OFFERS_OPEN_MAX:
        raise session._broken(speaker, f"more than {OFFERS_OPEN_MAX} offers are open")
    if message.seq <= max(session._offers, default=session.last_seq):
        raise session._broken(speaker, f"offer {message.seq} does not follow the one before, or {session.last_seq}")
    session._offers[message.seq] = len(message.blocks) // OFFERED_BYTES
    return following


def _wanted(session: Session, speaker: Side, message: Wanted, following: State) -> State:
    blocks = session._offers.get(message.seq)
    if blocks is None and message.seq <= session.last_seq:
        return following  # what it answers went out whole meanwhile
    if blocks != len(message.missing):
        raise session._broken(speaker, f"an answer of {len(message.missing)} blocks to offer {message.seq}: {blocks}")
    session._offers[message.seq] = -blocks
    return following


def _compare(session: Session, speaker: Side, message: Compare, following: State) -> State:
    if len(session._compares) >= COMPARES_OPEN_MAX:
        raise session._broken(speaker, f"more than {COMPARES_OPEN_MAX} compares are open")
    _record(session, speaker, message, following)
    session._compares[message.seq] = len(message.digests) // DIGEST_BYTES
    return following


def _compare_result(session: Session, speaker: Side, message: CompareResult, following: State) -> State:
    blocks = session._compares.get(message.seq)
    if blocks != len(message.differing):
        raise session._broken(
            speaker, f"a result of {len(message.differing)} blocks for compare {message.seq}: {blocks}"
        )
    del session._compares[message.seq]
    return following


def _uncompared(session: Session, speaker: Side, message: Uncompared, following: State) -> State:
    if session._compares.pop(message.seq, None) is None:
        raise session._broken(speaker, f"compare {message.seq} is not open")
    return following


def _ack(session: Session, speaker: Side, message: Ack, following: State) -> State:
    before = (session.queued, session.kept, session.received, session.durable)
    if (
        message.received < session.received
        or message.durable < session.durable
        or message.queued < session.queued
        or message.kept < session.kept
    ):
        raise session._broken(speaker, f"{message} after {before}")
    if message.queued > session.last_seq:
        raise session._broken(speaker, f"{message} when {session.last_seq} is the last record sent")
    session.queued, session.kept = message.queued, message.kept
    session.received, session.durable = message.received, message.durable
    return following


def _request(session: Session, speaker: Side, message: Request, following: State) -> State:
    if len(session._requests) >= REQUESTS_OPEN_MAX:
        raise session._broken(speaker, f"more than {REQUESTS_OPEN_MAX} requests are open")
    if message.id in session._requests:
        raise session._broken(speaker, f"request id {message.id} is open already")
    session._requests.add(message.id)
    return following


def _reply(session: Session, speaker: Side, message: Reply, following: State) -> State:
    if message.id not in session._requests:
        raise session._broken(speaker, f"a reply to request {message.id}, which is not open")
    session._requests.discard(message.id)
    return following


def _query(session: Session, speaker: Side, message: Query, following: State) -> State:
    if len(session._queries) >= QUERIES_OPEN_MAX:
        raise session._broken(speaker, f"more than {QUERIES_OPEN_MAX} queries are open")
    if message.id in session._queries:
        raise session._broken(speaker, f"query id {message.id} is open already")
    session._queries.add(message.id)
    return following


def _result(session: Session, speaker: Side, message: Result, following: State) -> State:
    if message.id not in session._queries:
        raise session._broken(speaker, f"a result of query {message.id}, which is not open")
    session._queries.discard(message.id)
    return following


_RULES: Final[dict[type, Callable[[Session, Side, Any, State], State]]] = {
    **dict.fromkeys(RECORD_TYPES, _record),
    Hello: _hello,
    Welcome: _welcome,
    VolumePage: _volume_page,
    Aggregate: _aggregate,
    Compare: _compare,
    CompareResult: _compare_result,
    Uncompared: _uncompared,
    Offer: _offer,
    Wanted: _wanted,
    Remainder: _remainder,
    Ack: _ack,
    Request: _request,
    Reply: _reply,
    Query: _query,
    Result: _result,
}
