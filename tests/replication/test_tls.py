"""TLS: who gets in, who does not, and that no peer holds up another."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from replication import tls, tls_listener
from replication.address import AddressError, NetworkAddress
from replication.certificate import Certificate
from replication.endpoint import connect, listen
from replication.errors import LinkDown, ReplicationError
from replication.identity import Fingerprint, Identity, IdentityError
from replication.log_limit import LogLimit
from replication.messages import Role
from replication.tls import Untrusted
from replication.tls_listener import Guest, TlsListener
from replication.transport import Connection
from tests.replication.links import make_friends, make_identity, open_pair
from tests.replication.links import tls_listener as listener_of
from tests.replication.test_transport import receive_exactly

Friends = tuple[Identity, Identity]


@pytest.fixture
def friends(tmp_path: Path) -> Friends:
    """A client's and a server's identity that trust each other."""
    return make_friends(tmp_path)


class Heard(list[bytes]):
    """What guests said, in the order in which it was heard."""

    def __init__(self) -> None:
        self._more = trio.Event()

    def append(self, item: bytes) -> None:
        super().append(item)
        self._more.set()
        self._more = trio.Event()

    async def reaches(self, count: int) -> None:
        while len(self) < count:
            await self._more.wait()


@asynccontextmanager
async def serving(identity: Identity) -> AsyncIterator[tuple[TlsListener, list[Guest], Heard]]:
    """A listener whose guests' first bytes are noted; an empty one for a guest that did not prove itself."""
    listener = await listener_of(identity)
    guests: list[Guest] = []
    heard = Heard()

    async def serve(guest: Guest) -> None:
        try:
            while data := await guest.receive():
                heard.append(data)
                await guest.send([b"heard ", data])
            heard.append(b"")
        except LinkDown:
            heard.append(b"broken")
        finally:
            await guest.aclose()

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            guest = await listener.accept()
            guests.append(guest)
            nursery.start_soon(serve, guest)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, nursery)
            yield listener, guests, heard
            nursery.cancel_scope.cancel()
    await listener.aclose()


async def said(connection: Connection) -> bytes:
    """What comes until the end or the break."""
    got = b""
    try:
        while data := await connection.receive():
            got += data
    except LinkDown:
        pass
    return got


async def exchange(listener: TlsListener, identity: Identity) -> bytes:
    """What a served client is told."""
    async with await connect(listener.address, identity=identity) as connection:
        await connection.send([b"hello"])
        return await receive_exactly(connection, 11)


async def plain(listener: TlsListener) -> trio.SocketStream:
    """A bare TCP connection to the listener."""
    assert isinstance(listener.address, NetworkAddress)
    return await trio.open_tcp_stream("127.0.0.1", listener.address.port)


async def test_friends_talk_and_know_each_other(tmp_path: Path) -> None:
    client, server = make_friends(tmp_path, role=Role.READER, groups=("a", "b"))
    async with serving(server) as (listener, guests, _heard):
        assert await exchange(listener, client) == b"heard hello"
        peer = guests[0].peer
        assert peer is not None and (peer.name, peer.role, peer.groups) == ("client", Role.READER, {"a", "b"})
        assert peer.fingerprint == client.certificate().fingerprint
        assert peer.may_touch("a") and not peer.may_touch("c")
        assert listener.accept is not None and isinstance(listener.address, NetworkAddress) and listener.address.port


async def test_a_client_whom_nobody_trusts_is_told_so_and_learns_nothing(
    friends: Friends, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_identity(tmp_path / "stranger")
    stranger.trust(friends[1].certificate(), role=None, server=True)
    async with serving(friends[1]) as (listener, guests, heard):
        for _ in range(3):
            connection = await connect(listener.address, identity=stranger)
            # In TLS 1.3 the client is done before the server has looked at its certificate.
            with pytest.raises(Untrusted, match="does not trust this machine's key: .*rewindfs identity show"):
                await connection.receive()
            await connection.aclose()
        assert all(not guest.proved and guest.peer is None for guest in guests)
        await heard.reaches(3)
        assert heard == [b"", b"", b""]
        lines = [record.message for record in caplog.records if record.name == "rewindfs.tls"]
        assert len(lines) == 1 and "was refused: the peer's certificate is none of those" in lines[0]
        assert await exchange(listener, friends[0]) == b"heard hello"


async def test_what_a_stranger_says_with_its_handshake_is_not_heard(friends: Friends, tmp_path: Path) -> None:
    stranger = make_identity(tmp_path / "stranger")
    stranger.trust(friends[1].certificate(), role=None, server=True)
    async with serving(friends[1]) as (listener, _guests, heard):
        async with await connect(listener.address, identity=stranger) as connection:
            with pytest.raises(Untrusted):
                for _ in range(1000):
                    await connection.send([b"write this"])
                    await connection.receive()
        await heard.reaches(1)
        assert heard == [b""]


async def test_a_server_whom_the_client_does_not_trust(friends: Friends, tmp_path: Path) -> None:
    impostor = make_identity(tmp_path / "impostor")
    impostor.trust(friends[0].certificate(), role=Role.AGENT, server=False)
    async with serving(impostor) as (listener, guests, heard):
        with pytest.raises(Untrusted, match="^cannot connect to tls://127.*is none of those that are trusted here"):
            await connect(listener.address, identity=friends[0])
        await heard.reaches(1)
        assert heard == [b""] and not guests[0].proved


async def test_trust_is_for_one_direction(tmp_path: Path) -> None:
    """Who may only connect cannot pose as an appliance, and an appliance gets no role by being one."""
    one, other = make_identity(tmp_path / "one"), make_identity(tmp_path / "other")
    one.trust(other.certificate(), role=Role.AGENT, server=False)
    other.trust(one.certificate(), role=None, server=True)
    async with serving(other) as (listener, _guests, _heard):
        with pytest.raises(Untrusted):
            await connect(listener.address, identity=one)
        one.trust(other.certificate(), role=None, server=True)
        connection = await connect(listener.address, identity=one)
        with pytest.raises(Untrusted):
            await connection.receive()
        await connection.aclose()
        other.trust(one.certificate(), role=Role.AGENT, server=False)
        assert await exchange(listener, one) == b"heard hello"


async def test_many_are_trusted(friends: Friends, tmp_path: Path) -> None:
    client, server = friends
    others = [make_identity(tmp_path / str(number)) for number in range(20)]
    for number, other in enumerate(others):
        server.trust(other.certificate(), role=Role.READER, server=False, name=f"n{number}")
        other.trust(server.certificate(), role=None, server=True)
        client.trust(other.certificate(), role=None, server=True)
    async with serving(server) as (listener, guests, _heard):
        for one in [*others, client]:
            assert await exchange(listener, one) == b"heard hello"
        assert [guest.peer.name for guest in guests if guest.peer] == [f"n{number}" for number in range(20)] + [
            "client"
        ]


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_listener, "LOOK_SECONDS", 0.01)


@pytest.mark.usefixtures("quick_look")
@pytest.mark.parametrize("change", ["revoke", "role", "groups"])
async def test_whom_the_server_trusts_no_longer_loses_its_connection(friends: Friends, change: str) -> None:
    client, server = friends
    async with serving(server) as (listener, _guests, heard):
        connection = await connect(listener.address, identity=client)
        await connection.send([b"hello"])
        assert await receive_exactly(connection, 11) == b"heard hello"
        if change == "revoke":
            server.revoke("client")
        else:
            groups = ("g",) if change == "groups" else ()
            role = Role.READER if change == "role" else Role.AGENT
            server.trust(client.certificate(), role=role, server=False, groups=groups)
        assert await said(connection) == b""
        await connection.aclose()
        await heard.reaches(2)
        assert heard == [b"hello", b"broken"]
        if change == "revoke":
            async with await connect(listener.address, identity=client) as connection:
                with pytest.raises(Untrusted):
                    await connection.receive()
        else:
            assert await exchange(listener, client) == b"heard hello"


async def test_a_damaged_list_lets_nobody_in_and_throws_nobody_out(
    friends: Friends, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = friends
    path = server.directory / "trusted.json"
    async with serving(server) as (listener, guests, _heard):
        connection = await connect(listener.address, identity=client)
        async with connection:
            await connection.send([b"hello"])
            assert await receive_exactly(connection, 11) == b"heard hello"
            assert len(guests) == 1
            whole = path.read_bytes()
            path.write_bytes(whole[:-20])
            await listener._look()
            assert "is damaged" in caplog.text
            with pytest.raises(LinkDown):
                await exchange(listener, client)
            await connection.send([b"still"])
            assert await receive_exactly(connection, 11) == b"heard still"
            path.write_bytes(whole)
            assert await exchange(listener, client) == b"heard hello"


async def test_no_identity_is_said_in_one_line(friends: Friends, tmp_path: Path) -> None:
    nobody = Identity(tmp_path / "nobody")
    with pytest.raises(IdentityError, match="make one with `rewindfs identity create`"):
        await listen("tls://127.0.0.1:0", identity=nobody)
    async with serving(friends[1]) as (listener, _guests, heard):
        with pytest.raises(Untrusted, match="make one with `rewindfs identity create`"):
            await connect(listener.address, identity=nobody)
        lonely = make_identity(tmp_path / "lonely")
        with pytest.raises(Untrusted, match="none of those that are trusted"):
            await connect(listener.address, identity=lonely)
        await heard.reaches(2)
        assert heard == [b"", b""]


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:60] + b"!!!!" + content[64:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_key(path: Path) -> None:
    other = make_identity(path.parent / "other").key_path.read_bytes()
    path.write_bytes(other[: other.index(b"-----BEGIN C")] + path.read_bytes()[other.index(b"-----BEGIN C") :])


def encrypt(path: Path) -> None:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    path.write_bytes(encrypted + path.read_bytes()[path.read_bytes().index(b"-----BEGIN C") :])


@pytest.mark.parametrize("harm", [damage, empty, another_key, encrypt])
async def test_a_damaged_key_is_an_error_and_no_question(friends: Friends, harm: Callable[[Path], None]) -> None:
    harm(friends[1].key_path)
    with pytest.raises(IdentityError, match=r"identity\.pem is damaged: .*; restore it"):
        await listen("tls://127.0.0.1:0", identity=friends[1])


GARBAGE = [
    b"",
    b"\x00",
    b"GET / HTTP/1.0\r\n\r\n",
    bytes(1 << 16),
    b"\x16\x03\x01\xff\xff" + bytes(1 << 17),
    b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    b"\x15\x03\x03\x00\x02\x02\x28",
    b"\x30\x00\x00\x00\x01\x00\x00\x00" + b"a Hello in plain",
    os.urandom(5000),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_ends_its_connection_only(friends: Friends, garbage: bytes) -> None:
    async with serving(friends[1]) as (listener, guests, heard):
        async with await plain(listener) as stream:
            await stream.send_all(garbage)
            await stream.send_eof()
            answer = b""
            try:
                while data := await stream.receive_some(1000):
                    answer += data
            except trio.BrokenResourceError:
                pass
            # At most an alert of TLS: a record header and two bytes.
            assert answer == b"" or (answer[:1] == b"\x15" and len(answer) == 7)
        await heard.reaches(1)
        assert heard == [b""] and not guests[0].proved
        assert await exchange(listener, friends[0]) == b"heard hello"


async def test_a_tls_client_at_a_plain_port(friends: Friends) -> None:
    listener = await listen("tcp://127.0.0.1:0")
    assert isinstance(listener.address, NetworkAddress)

    async def serve() -> None:
        async with await listener.accept() as connection:
            await connection.receive()
            await connection.send([b"\x20\x00\x00\x00\x06\x00\x00\x00 no frame of ours"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(LinkDown, match="does not speak TLS; is it a tcp:// port"):
            await connect(f"tls://127.0.0.1:{listener.address.port}", identity=friends[0])
    await listener.aclose()


async def test_an_older_tls_is_not_spoken(friends: Friends) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(friends[0].key_path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(friends[1]) as (listener, _guests, heard):
        stream = trio.SSLStream(await plain(listener), context)
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()
        await trio.aclose_forcefully(stream)
        await heard.reaches(1)
        assert heard == [b""]


async def test_a_client_without_a_certificate(friends: Friends) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with serving(friends[1]) as (listener, _guests, heard):
        stream = trio.SSLStream(await plain(listener), context)
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"hello")
            await stream.receive_some()
        await trio.aclose_forcefully(stream)
        await heard.reaches(1)
        assert heard == [b""]


async def test_a_peer_that_stalls_holds_up_nobody(friends: Friends) -> None:
    async with (
        serving(friends[1]) as (listener, guests, heard),
        await plain(listener) as silent,
        await plain(listener) as slow,
    ):
        await slow.send_all(b"\x16\x03\x01\x02\x00\x01")
        assert await exchange(listener, friends[0]) == b"heard hello"
        assert len(guests) == 3 and heard[0] == b"hello"
        del silent


async def test_a_peer_that_stalls_is_let_go(friends: Friends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.05)
    async with serving(friends[1]) as (listener, _guests, heard), await plain(listener) as silent:
        assert await silent.receive_some() == b""
        await heard.reaches(1)
        assert heard == [b""]


async def test_a_server_that_stalls_is_given_up(friends: Friends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.05)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(LinkDown, match="^cannot connect to tls.*did not prove itself within"):
            await connect(f"tls://127.0.0.1:{sock.getsockname()[1]}", identity=friends[0])


async def test_those_who_stall_take_each_others_places(friends: Friends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_listener, "HANDSHAKES_MAX", 2)
    async with serving(friends[1]) as (listener, guests, heard):
        crowd = [await plain(listener) for _ in range(5)]
        for stream in crowd[:3]:
            assert await stream.receive_some() == b""
        assert sum(guest.proved for guest in guests) == 0 and len(guests) == 5
        assert await exchange(listener, friends[0]) == b"heard hello"
        assert heard.count(b"hello") == 1
        for stream in crowd:
            await stream.aclose()


async def test_what_is_changed_on_the_way_breaks_the_link(tmp_path: Path) -> None:
    async with open_pair("tls", tmp_path) as (one, other):
        await one.send([b"good"])
        await one._link.send([b"\x17\x03\x03\x00\x20" + bytes(32)])  # type: ignore[attr-defined]
        with pytest.raises(LinkDown, match="broke TLS"):
            while await other.receive():
                pass


async def test_what_is_cut_off_is_not_used(tmp_path: Path) -> None:
    async with open_pair("tls", tmp_path) as (one, other):
        await one.send([b"whole"])
        one._engine.write(b"cut off")  # type: ignore[attr-defined]
        await one._link.send([one._outgoing.read()[:-1]])  # type: ignore[attr-defined]
        await one.aclose()
        assert await said(other) == b"whole"


async def test_a_key_that_has_served_long_enough_ends_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "RENEW_BYTES", 1000)
    async with open_pair("tls", tmp_path) as (one, other):
        await one.send([bytes(1000)])
        await other.send([bytes(1000)])
        with pytest.raises(LinkDown, match="under one key"):
            await one.send([b"x"])
        assert await receive_exactly(other, 1000) == bytes(1000)


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_a_connection_that_is_reset_is_link_down(tmp_path: Path, kind: str) -> None:
    async with open_pair(kind, tmp_path) as (one, other):
        sock = (one._link if kind == "tls" else one)._sock  # type: ignore[attr-defined]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await one.aclose()
        with pytest.raises(LinkDown, match="the link to the peer broke"):
            await other.receive()


async def test_a_handshake_that_is_cancelled_in_the_middle_closes_the_connection(friends: Friends) -> None:
    listener = await listener_of(friends[1])
    async with await plain(listener) as stream:
        guest = await listener.accept()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.receive)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        assert await stream.receive_some() == b""
        assert await guest.receive() == b""
        with pytest.raises(LinkDown):
            await guest.send([b"x"])
        await guest.aclose()
    await listener.aclose()


async def test_closing_ends_a_handshake(friends: Friends) -> None:
    listener = await listener_of(friends[1])
    async with await plain(listener), trio.open_nursery() as nursery:
        guest = await listener.accept()
        nursery.start_soon(said, guest)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await guest.aclose()
    await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


def certificate_of(
    key: Ed25519PrivateKey, signer: Ed25519PrivateKey, name: str, issuer: str, *, ends: datetime.datetime
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(ends)
        .sign(signer, None)
    )


def pem_of(key: Ed25519PrivateKey, *certificates: x509.Certificate) -> bytes:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


@pytest.mark.parametrize("authority", [False, True])
async def test_a_trusted_key_vouches_for_nobody(friends: Friends, tmp_path: Path, authority: bool) -> None:
    """Not even where its certificate says that it may."""
    client, server = friends
    chief, key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    ends = datetime.datetime(2100, 1, 1)
    if authority:
        own = certificate_of(chief, chief, "chief", "chief", ends=ends)
        pem = own.public_bytes(serialization.Encoding.PEM).decode()
        server.trust(Certificate(pem, Fingerprint("SHA256:x")), role=Role.ADMIN, server=True, name="chief")
    else:
        content = client.key_path.read_bytes()
        own = x509.load_pem_x509_certificate(content)
        loaded = serialization.load_pem_private_key(content, None)
        assert isinstance(loaded, Ed25519PrivateKey)
        chief = loaded
    issuer = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    leaf = certificate_of(key, chief, "leaf", str(issuer), ends=ends)
    client.key_path.write_bytes(pem_of(key, leaf, own))
    async with serving(server) as (listener, _guests, heard):
        connection = await connect(listener.address, identity=client)
        assert await said(connection) == b""
        await connection.aclose()
        await heard.reaches(1)
        assert heard == [b""]


async def test_a_certificate_that_has_ended(friends: Friends) -> None:
    client, server = friends
    key = Ed25519PrivateKey.generate()
    old = certificate_of(key, key, "old", "old", ends=datetime.datetime(2001, 1, 1))
    pem = old.public_bytes(serialization.Encoding.PEM).decode()
    server.trust(Certificate(pem, Fingerprint("SHA256:x")), role=Role.ADMIN, server=True, name="old")
    client.key_path.write_bytes(pem_of(key, old))
    async with serving(server) as (listener, _guests, heard):
        async with await connect(listener.address, identity=client) as connection:
            with pytest.raises(LinkDown):
                await connection.receive()
        await heard.reaches(1)
        assert heard == [b""]


async def test_plain_tcp_stays_on_this_machine() -> None:
    with pytest.raises(AddressError, match="--insecure-tcp"):
        await connect("tcp://192.0.2.1:1")
    with pytest.raises(AddressError, match="--insecure-tcp"):
        await listen("tcp://0.0.0.0:0")
    listener = await listen("tcp://0.0.0.0:0", insecure_tcp=True)
    assert isinstance(listener.address, NetworkAddress)
    await (await connect(f"tcp://127.0.0.1:{listener.address.port}")).aclose()
    await listener.aclose()


async def test_nobody_there_and_a_place_that_is_taken(friends: Friends) -> None:
    listener = await listen("tcp://localhost:0")
    with pytest.raises(ReplicationError, match=r"^cannot listen at tcp://localhost:\d+: Address already in use"):
        await listen(listener.address)
    await listener.aclose()
    await listener.aclose()
    with pytest.raises(LinkDown, match=r"^cannot connect to tcp://localhost:\d+: Connection refused$"):
        await connect(listener.address)
    with pytest.raises(LinkDown, match="port 0"):
        await connect("tcp://localhost:0")
    with pytest.raises(LinkDown, match="^cannot connect to tls://no.invalid:1: "):
        await connect("tls://no.invalid:1", identity=friends[0])
    with pytest.raises(ReplicationError, match="^cannot listen at tls://192.0.2.1:1: Cannot assign"):
        await listen("tls://192.0.2.1:1", identity=friends[0])


async def test_ipv6(friends: Friends) -> None:
    try:
        listener = await listen("tls://[::1]:0", identity=friends[1])
    except ReplicationError:
        pytest.skip("no IPv6 here")
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            async with await listener.accept() as guest:
                assert await guest.receive() == b"six"

        nursery.start_soon(serve)
        async with await connect(listener.address, identity=friends[0]) as connection:
            await connection.send([b"six"])
            assert await said(connection) == b""
    await listener.aclose()


def test_the_log_says_what_it_left_out(caplog: pytest.LogCaptureFixture) -> None:

    limit = LogLimit(logging.getLogger("rewindfs.tls"), 3600)
    for number in range(5):
        limit.warning(f"line {number}")
    limit._next = 0
    limit.warning("last")
    assert [record.message for record in caplog.records] == ["line 0", "last (4 more such lines were left out)"]
