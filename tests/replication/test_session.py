"""The state table: two ends joined in memory, and everything that the table does not allow."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.types import Aggregate, ClockRun, Epoch, Extent, Heartbeat, Seq, TimeNs, VolumeId, Write
from replication.errors import LocalProtocolError, ProtocolError
from replication.messages import (
    PROTOCOL_VERSION,
    Ack,
    Compare,
    CompareResult,
    ErrorCode,
    Failure,
    Hello,
    Message,
    Offer,
    Piece,
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
from replication.session import (
    COMPARES_OPEN_MAX,
    OFFERS_OPEN_MAX,
    QUERIES_OPEN_MAX,
    REQUESTS_OPEN_MAX,
    TABLE,
    Session,
    Side,
    State,
)
from replication.wire import encode


def acked(received: Seq, durable: Seq) -> Ack:
    """What a second appliance says."""
    return Ack(received, durable, received, durable)


def offer(seq: int, blocks: int) -> Offer:
    return Offer(Seq(seq), bytes(32) * blocks)


def remainder(first_seq: int, seq: int) -> Remainder:
    return Remainder(Seq(first_seq), Seq(seq), NOW, RUN, (Piece(DISK, 0, 4096, 0),), b"")


NOW, RUN, DISK = TimeNs(1), ClockRun(0), VolumeId(1)
HELLO = Hello(PROTOCOL_VERSION, Role.AGENT, "g", Epoch(1), "a")
ADMIN = Hello(PROTOCOL_VERSION, Role.ADMIN, "", Epoch(0))
READER = Hello(PROTOCOL_VERSION, Role.READER, "g", Epoch(0))
FAILURE = Failure(ErrorCode.REFUSED, "no")
LAST_PAGE = VolumePage((), True)


def welcome(held: int = 10, durable: int = 5, version: int = PROTOCOL_VERSION) -> Welcome:
    return Welcome(version, "s", Epoch(0), Seq(held), Seq(durable), NOW, RUN, True, False, DISK, b"key")


def write(seq: int) -> Write:
    return Write(Seq(seq), NOW, RUN, Extent(DISK, 0, b"x"))


def compare(seq: int, blocks: int = 2) -> Compare:
    return Compare(Seq(seq), NOW, RUN, DISK, 0, bytes(16 * blocks))


class Pair:
    """Two sessions; what one says, the other hears at once, and both must agree on the state."""

    def __init__(self) -> None:
        self.client = Session(Side.CLIENT)
        self.server = Session(Side.SERVER)

    def say(self, side: Side, message: Message) -> None:
        speaker, hearer = (self.client, self.server) if side is Side.CLIENT else (self.server, self.client)
        hearer.receive_data(b"".join(speaker.send(message)))
        assert hearer.next_event() == message
        assert hearer.next_event() is None
        assert self.client.state is self.server.state
        assert self.client.last_seq == self.server.last_seq

    def agree_refused(self, side: Side, message: Message) -> None:
        """The speaker's own session refuses to say it; said all the same, the hearer's refuses it."""
        speaker, hearer = (self.client, self.server) if side is Side.CLIENT else (self.server, self.client)
        state, last = speaker.state, speaker.last_seq
        with pytest.raises(LocalProtocolError):
            speaker.send(message)
        assert (speaker.state, speaker.last_seq) == (state, last)
        hearer.receive_data(b"".join(encode(message)))
        with pytest.raises(ProtocolError):
            hearer.next_event()
        assert hearer.state is State.CLOSED


def streaming(hello: Hello = HELLO) -> Pair:
    pair = Pair()
    pair.say(Side.CLIENT, hello)
    pair.say(Side.SERVER, welcome())
    if hello.role is Role.AGENT:
        pair.say(Side.SERVER, LAST_PAGE)
    assert pair.client.state is State.STREAMING
    return pair


def reach(state: State) -> Pair:
    pair = Pair()
    script = [(Side.CLIENT, HELLO), (Side.SERVER, welcome()), (Side.SERVER, LAST_PAGE), (Side.SERVER, FAILURE)]
    for side, message in script:
        if pair.client.state is state:
            break
        pair.say(side, message)
    assert pair.client.state is state
    return pair


EXAMPLES: list[Message] = [
    HELLO,
    welcome(),
    LAST_PAGE,
    write(11),
    compare(11),
    CompareResult(Seq(11), b"\0"),
    SyncRequest(),
    acked(Seq(10), Seq(10)),
    Request(1, "status", {}),
    Reply(1, {}),
    Uncompared(Seq(11), b"key"),
    offer(11, 1),
    Wanted(Seq(11), b"\1"),
    remainder(11, 12),
    Query(1, b"q"),
    Result(1, b"r"),
    FAILURE,
]
ANSWERS = (CompareResult, Uncompared, Wanted, Remainder, Reply)
NOT_AN_AGENTS = (Query, Result)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_in_every_state(state: State, side: Side, message: Message) -> None:
    pair = reach(state)
    if type(message) in TABLE[state][side] and not isinstance(message, ANSWERS + NOT_AN_AGENTS):
        pair.say(side, message)
    else:
        pair.agree_refused(side, message)


def test_an_offer_its_answer_and_what_is_left() -> None:
    pair = streaming()
    pair.say(Side.CLIENT, offer(12, 3))
    pair.say(Side.CLIENT, offer(14, 1))
    streaming().agree_refused(Side.CLIENT, remainder(11, 12))
    pair.say(Side.SERVER, Wanted(Seq(12), b"\0\1\0"))
    pair.say(Side.CLIENT, remainder(11, 12))
    # What it would have said was sent whole: its answer, on the way, harms nobody.
    pair.say(Side.CLIENT, Aggregate(Seq(13), Seq(14), NOW, RUN, (Extent(DISK, 0, b"x"),)))
    pair.say(Side.SERVER, Wanted(Seq(14), b"\0"))
    assert pair.client.offers_open == pair.server.offers_open == 0
    pair.agree_refused(Side.CLIENT, remainder(15, 15))


def test_open_offers_are_bounded_and_answered_in_full() -> None:
    pair = streaming()
    for seq in range(11, 11 + OFFERS_OPEN_MAX):
        pair.say(Side.CLIENT, offer(seq, 2))
    pair.agree_refused(Side.CLIENT, offer(11 + OFFERS_OPEN_MAX, 2))
    for wrong in (Wanted(Seq(12), b"\1\1"), Wanted(Seq(11), b"\1")):
        pair = streaming()
        pair.say(Side.CLIENT, offer(11, 2))
        pair.agree_refused(Side.SERVER, wrong)
    pair = streaming()
    pair.say(Side.CLIENT, offer(12, 2))
    pair.agree_refused(Side.CLIENT, offer(12, 2))
    pair = streaming()
    pair.say(Side.CLIENT, offer(12, 1))
    pair.agree_refused(Side.CLIENT, remainder(11, 12))


def test_a_compare_that_was_not_made_is_answered() -> None:
    pair = streaming()
    pair.say(Side.CLIENT, compare(11))
    pair.say(Side.SERVER, Uncompared(Seq(11), b"another"))
    assert pair.client.compares_open == 0
    pair.agree_refused(Side.SERVER, Uncompared(Seq(11), b"another"))


def test_a_session_from_hello_to_failure() -> None:
    pair = Pair()
    pair.say(Side.CLIENT, HELLO)
    pair.say(Side.SERVER, welcome())
    pair.say(Side.SERVER, VolumePage((), False))
    assert pair.client.state is State.LISTING
    pair.say(Side.SERVER, LAST_PAGE)
    pair.say(Side.CLIENT, write(11))
    pair.say(Side.CLIENT, Aggregate(Seq(12), Seq(20), NOW, RUN, (Extent(DISK, 0, b"x"),)))
    pair.say(Side.CLIENT, compare(21))
    pair.say(Side.SERVER, acked(Seq(20), Seq(12)))
    pair.say(Side.SERVER, CompareResult(Seq(21), b"\0\1"))
    pair.say(Side.CLIENT, SyncRequest())
    pair.say(Side.SERVER, acked(Seq(21), Seq(21)))
    pair.say(Side.CLIENT, Request(1, "status", {}))
    pair.say(Side.SERVER, Reply(1, {"a": 1}))
    pair.say(Side.CLIENT, FAILURE)
    assert pair.server.state is State.CLOSED
    assert (pair.server.received, pair.client.durable) == (21, 21)


def test_an_admin_sends_commands_only() -> None:
    pair = streaming(ADMIN)
    pair.say(Side.CLIENT, Request(1, "status", {}))
    pair.say(Side.SERVER, Reply(1, {}))
    for message in (write(11), SyncRequest(), compare(11)):
        streaming(ADMIN).agree_refused(Side.CLIENT, message)
    streaming(ADMIN).agree_refused(Side.SERVER, acked(Seq(10), Seq(10)))
    with pytest.raises(LocalProtocolError):
        pair.client.sending(Write, Seq(11), Seq(11))


@given(st.lists(st.tuples(st.integers(8, 14), st.integers(0, 3)), min_size=1, max_size=6))
def test_records_follow_each_other(steps: list[tuple[int, int]]) -> None:
    pair = streaming()
    last = 10
    for first, more in steps:
        record = Aggregate(Seq(first), Seq(first + more), NOW, RUN, (Extent(DISK, 0, b"x"),)) if more else write(first)
        if first != last + 1:
            pair.agree_refused(Side.CLIENT, record)
            return
        pair.say(Side.CLIENT, record)
        last = first + more


def test_frames_encoded_before_are_counted_the_same() -> None:
    pair = streaming()
    for first, seq in ((12, 12), (10, 10), (11, 10)):
        with pytest.raises(LocalProtocolError):
            pair.client.sending(Write, Seq(first), Seq(seq))
    for kind in (Compare, Ack):
        with pytest.raises(LocalProtocolError):
            pair.client.sending(kind, Seq(11), Seq(11))
    pair.client.sending(Heartbeat, Seq(11), Seq(11))
    pair.server.receive_data(b"".join(encode(Heartbeat(Seq(11), NOW, RUN))))
    assert pair.server.next_event() == Heartbeat(Seq(11), NOW, RUN)
    assert pair.client.last_seq == pair.server.last_seq == 11


@given(st.lists(st.tuples(st.integers(4, 14), st.integers(4, 14)), min_size=1, max_size=5))
def test_acks_never_decrease_nor_pass_what_was_sent(acks: list[tuple[int, int]]) -> None:
    pair = streaming()
    for seq in (11, 12):
        pair.say(Side.CLIENT, write(seq))
    said = [(10, 5)]
    for ack in acks:
        if ack[1] > ack[0]:
            continue
        if any(new < old for old, new in zip(said[-1], ack, strict=True)) or ack[0] > 12:
            pair.agree_refused(Side.SERVER, acked(Seq(ack[0]), Seq(ack[1])))
            break
        pair.say(Side.SERVER, acked(Seq(ack[0]), Seq(ack[1])))
        said.append(ack)
    assert all(old[0] <= new[0] and old[1] <= new[1] for old, new in pairwise(said))
    assert (pair.client.received, pair.client.durable) == said[-1] or pair.client.state is State.CLOSED


def test_results_answer_open_compares_once() -> None:
    for result in (CompareResult(Seq(12), b"\0\0"), CompareResult(Seq(11), b"\0")):
        pair = streaming()
        pair.say(Side.CLIENT, compare(11))
        pair.agree_refused(Side.SERVER, result)
    pair = streaming()
    pair.say(Side.CLIENT, compare(11))
    pair.say(Side.SERVER, CompareResult(Seq(11), b"\0\1"))
    assert pair.client.compares_open == 0
    pair.agree_refused(Side.SERVER, CompareResult(Seq(11), b"\0\1"))


def test_open_compares_are_bounded() -> None:
    pair = streaming()
    for number in range(COMPARES_OPEN_MAX):
        pair.say(Side.CLIENT, compare(11 + number))
    pair.agree_refused(Side.CLIENT, compare(11 + COMPARES_OPEN_MAX))


def test_open_requests_are_bounded_and_answered_once() -> None:
    pair = streaming()
    for number in range(REQUESTS_OPEN_MAX):
        pair.say(Side.CLIENT, Request(number + 1, "status", {}))
    pair.say(Side.SERVER, Reply(7, {}))
    pair.say(Side.CLIENT, Request(7, "status", {}))
    pair.agree_refused(Side.CLIENT, Request(1000, "status", {}))
    pair = streaming()
    pair.say(Side.CLIENT, Request(7, "status", {}))
    pair.agree_refused(Side.CLIENT, Request(7, "status", {}))
    pair.client = streaming().client
    pair.agree_refused(Side.SERVER, Reply(8, {}))


def test_open_queries_are_bounded_and_answered_once_in_any_order() -> None:
    pair = streaming(READER)
    for number in range(QUERIES_OPEN_MAX):
        pair.say(Side.CLIENT, Query(number + 1, b"q"))
    assert pair.client.queries_open == pair.server.queries_open == QUERIES_OPEN_MAX
    pair.say(Side.SERVER, Result(7, b"r"))
    pair.say(Side.CLIENT, Query(7, b"q"))
    pair.agree_refused(Side.CLIENT, Query(1000, b"q"))
    pair = streaming(READER)
    pair.say(Side.CLIENT, Query(7, b"q"))
    pair.agree_refused(Side.CLIENT, Query(7, b"again"))
    pair = streaming(READER)
    pair.agree_refused(Side.SERVER, Result(8, b"r"))


def test_only_a_reader_goes_back() -> None:
    for hello in (HELLO, ADMIN):
        streaming(hello).agree_refused(Side.CLIENT, Query(1, b"q"))


def test_welcome_answers_in_the_version_of_hello() -> None:
    client, server = Session(Side.CLIENT), Session(Side.SERVER)
    server.receive_data(b"".join(client.send(Hello(7, Role.AGENT, "g", Epoch(1), "a"))))
    hello = server.next_event()
    assert isinstance(hello, Hello) and hello.version == 7
    ours = welcome(version=PROTOCOL_VERSION)
    with pytest.raises(LocalProtocolError, match="version"):
        server.send(ours)
    client.receive_data(b"".join(encode(ours)))
    with pytest.raises(ProtocolError, match="version"):
        client.next_event()


def test_noise_closes_the_session() -> None:
    session = Session(Side.SERVER)
    session.receive_data(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ProtocolError):
        session.next_event()
    assert session.state is State.CLOSED


def test_the_end_of_the_connection() -> None:
    pair = streaming()
    pair.server.receive_eof()
    assert pair.server.state is State.CLOSED
    pair.client.receive_data(b"".join(encode(acked(Seq(10), Seq(10))))[:-1])
    assert pair.client.next_event() is None
    with pytest.raises(ProtocolError, match="within a frame"):
        pair.client.receive_eof()
