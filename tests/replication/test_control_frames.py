"""What a short command says and hears: the same frames as the whole codec's, and nothing that may not follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.types import ClockRun, Epoch, Seq, TimeNs, VolumeId
from replication.control_frames import CONTROL_FRAMES, ControlDecoder, ControlMessage, encode_control
from replication.errors import HandshakeRefused, LinkReset, LocalProtocolError, ProtocolError, RequestRefused
from replication.exchange import REQUEST_ID, Exchange
from replication.frame_head import HEADER, MessageType
from replication.messages import (
    PROTOCOL_VERSION,
    ErrorCode,
    Failure,
    Hello,
    Message,
    Reply,
    Request,
    Role,
    SyncRequest,
    Welcome,
)
from replication.wire import decode_all, encode
from tests.replication.strategies import messages, short_control

WELCOME = Welcome(
    PROTOCOL_VERSION, "s", Epoch(0), Seq(0), Seq(0), TimeNs(1), ClockRun(0), False, False, VolumeId(1), b""
)


def frame(message: Message) -> bytes:
    return b"".join(encode(message))


def heard(decoder: ControlDecoder, data: bytes) -> list[ControlMessage]:
    decoder.receive_data(data)
    found = []
    while (message := decoder.next_message()) is not None:
        found.append(message)
    return found


@given(st.lists(short_control, min_size=1, max_size=4), st.data())
def test_the_frames_are_those_of_the_whole_codec_however_they_are_cut(
    said: list[ControlMessage], data: st.DataObject
) -> None:
    stream = b"".join(b"".join(encode_control(message)) for message in said)
    assert decode_all(stream) == said
    assert stream == b"".join(frame(message) for message in said)
    decoder, found, at = ControlDecoder(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        found += heard(decoder, stream[at : at + size])
        at += size
    assert found == said


@given(short_control, st.data())
def test_what_is_mutated_is_a_message_or_a_protocol_error(message: ControlMessage, data: st.DataObject) -> None:
    mutated = bytearray(frame(message))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = heard(ControlDecoder(), bytes(mutated))
    except ProtocolError:
        return
    assert b"".join(frame(one) for one in found) == mutated[: sum(len(frame(one)) for one in found)]


@given(messages)
def test_of_other_types_nothing_is_heard(message: Message) -> None:
    if type(message) in CONTROL_FRAMES:
        assert heard(ControlDecoder(), frame(message)) == [message]
    else:
        with pytest.raises(ProtocolError):
            heard(ControlDecoder(), frame(message))


@pytest.mark.parametrize(("kind", "limit"), CONTROL_FRAMES.values())
def test_a_length_is_checked_when_the_head_arrives(kind: MessageType, limit: int) -> None:
    for length in (0, HEADER.size - 1, limit + 1):
        with pytest.raises(ProtocolError, match="bytes"):
            heard(ControlDecoder(), HEADER.pack(length, kind, 0, 0))
    assert heard(ControlDecoder(), HEADER.pack(limit, kind, 0, 0)) == []
    for flags, reserved in ((1, 0), (0, 1)):
        with pytest.raises(ProtocolError, match="flags"):
            heard(ControlDecoder(), HEADER.pack(limit, kind, flags, reserved))


@pytest.mark.parametrize(
    "message",
    [
        Hello(PROTOCOL_VERSION, Role.ADMIN, "a/b", Epoch(0)),
        Request(1, "c", {"text": "\udc80"}),
        Request(1, "c", {"long": "x" * (1 << 20)}),
        Request(1, "c", {"bytes": b"no JSON"}),
        Request(0, "c", {}),
    ],
)
def test_what_the_peer_would_refuse_is_not_said(message: ControlMessage) -> None:
    with pytest.raises(LocalProtocolError, match="cannot send") as refused:
        encode_control(message)
    with pytest.raises(LocalProtocolError) as elsewhere:
        encode(message)
    assert str(refused.value) == str(elsewhere.value)


def exchange(*, welcomed: bool = True) -> Exchange:
    talk = Exchange("g", "command", {"a": 1}, Role.ADMIN)
    assert decode_all(b"".join(talk.begin())) == [Hello(PROTOCOL_VERSION, Role.ADMIN, "g", Epoch(0))]
    if welcomed:
        assert decode_all(b"".join(talk.receive(frame(WELCOME)))) == [Request(REQUEST_ID, "command", {"a": 1})]
    return talk


def test_an_exchange() -> None:
    talk = exchange()
    assert talk.reply is None
    assert talk.receive(frame(Reply(REQUEST_ID, {"b": [2]}))) == []
    assert talk.reply == {"b": [2]}


OTHER_VERSION = Welcome(
    PROTOCOL_VERSION + 1, "s", Epoch(0), Seq(0), Seq(0), TimeNs(1), ClockRun(0), False, False, VolumeId(1), b"key"
)


@pytest.mark.parametrize(
    ("said", "called"),
    [
        (
            OTHER_VERSION,
            f"the peer broke the protocol: Welcome in version {PROTOCOL_VERSION + 1} after Hello in {PROTOCOL_VERSION}",
        ),
        (Reply(REQUEST_ID, {"x": "A" * 900_000}), "the peer broke the protocol: Reply instead of a welcome"),
        (Hello(PROTOCOL_VERSION, Role.ADMIN, "g", Epoch(0)), "the peer broke the protocol: Hello instead of a welcome"),
        (SyncRequest(), "malformed frame from the peer: type 7 in the answer to a command"),
    ],
)
def test_instead_of_a_welcome(said: Message, called: str) -> None:
    """What the peer said is not repeated: it may be long, or a key."""
    talk = exchange(welcomed=False)
    with pytest.raises(ProtocolError) as broken:
        talk.receive(frame(said))
    assert str(broken.value) == called
    assert talk.reply is None


@pytest.mark.parametrize("said", [WELCOME, Reply(REQUEST_ID + 1, {}), Request(REQUEST_ID, "c", {}), SyncRequest()])
def test_instead_of_the_reply(said: Message) -> None:
    talk = exchange()
    with pytest.raises(ProtocolError):
        talk.receive(frame(said))
    assert talk.reply is None


@pytest.mark.parametrize("welcomed", [False, True])
def test_a_failure_and_the_end_of_the_stream(welcomed: bool) -> None:
    with pytest.raises(HandshakeRefused, match="full") as refused:
        exchange(welcomed=welcomed).receive(frame(Failure(ErrorCode.STORE_FULL, "full")))
    assert refused.value.code is ErrorCode.STORE_FULL
    with pytest.raises(LinkReset, match="whether|look"):
        exchange(welcomed=welcomed).receive(b"")


def test_a_refused_request() -> None:
    with pytest.raises(RequestRefused, match="^no$"):
        exchange().receive(frame(Reply(REQUEST_ID, {}, "no")))
