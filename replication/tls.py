"""Connections in TLS between two that hold each other's certificate.

TLS 1.3, both sides prove their key, and each accepts only the very certificates that its identity trusts: the library
checks the proof against them alone, and what was shown is then looked up among them byte by byte.

Invariants:
- No byte of the application passes before the peer has proved itself: the first `receive` or `send` waits for that.
- What the TLS engine wants to send leaves in the order in which the engine made it: only `send` takes it, and `prove`
  before any `send`. What `receive` makes the engine say (the answer to a change of keys) leaves with the next `send`,
  which is when it is due.
- What is received is decrypted at once and whole: nothing waits inside the engine that the socket would not wake for.
- bounded: the engine holds at most one piece of each direction.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from replication.errors import LinkDown
from replication.identity import Identity, IdentityError, Peer, Stamp
from replication.transport import Connection, SocketConnection
from replication.wire import Buffer

HANDSHAKE_SECONDS: Final = 8.0
"""How long a peer may take to prove itself. Less than a session waits for Hello, so that it is told apart from that."""
PARTING_SECONDS: Final = 1.0
"""How long a peer that was refused has to take note of it."""
PIECE_BYTES: Final = 256 << 10
"""Encrypted or decrypted in one go, and received at most."""
RECORD_BYTES: Final = 16 << 10
"""Most that one TLS record carries."""
RENEW_BYTES: Final = 1 << 38
"""How much goes one way under one key: what RFC 8446 5.5 allows AES-GCM, and a third less. The library has no call to
change keys within a connection, so a new connection does."""


class Untrusted(LinkDown):
    """One side does not accept the key of the other, or has none: nothing was exchanged. Persons can change that."""


@dataclass(frozen=True, slots=True)
class Terms:
    """On what a handshake is made: the own key, and whom to accept."""

    context: ssl.SSLContext
    peers: Mapping[bytes, Peer]
    """By certificate, in DER."""


class Credentials:
    """The terms of an identity for one direction, made anew when its files have changed."""

    def __init__(self, identity: Identity, *, server_side: bool) -> None:
        self._identity = identity
        self._server_side = server_side
        self._made: tuple[Stamp, Terms] | None = None

    def terms(self) -> Terms:
        """The terms as of now. Reads files; may be called in any thread. Raises IdentityError."""
        stamp, made = self._identity.stamp(), self._made
        if made is None or made[0] != stamp:
            # Two threads may do so at once: either result is right.
            made = self._made = stamp, self._make()
        return made[1]

    def _make(self) -> Terms:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if self._server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if self._server_side:
            # No resumption: each connection is checked against whom is trusted at that time.
            context.num_tickets = 0
        self._identity.check_key()
        path = self._identity.key_path
        try:
            # Without the password that nobody is there to type, an encrypted key is an error and not a question.
            context.load_cert_chain(path, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise IdentityError(
                f"{path} is damaged: {_reason(error)}; restore it, or make a new key with `rewindfs identity create "
                "--replace`"
            ) from error
        peers = {}
        for one in self._identity.trusted():
            if one.peer.role is not None if self._server_side else one.peer.server:
                try:
                    certificate = ssl.PEM_cert_to_DER_cert(one.certificate)
                    context.load_verify_locations(cadata=certificate)
                except (ssl.SSLError, ValueError) as error:
                    raise IdentityError(
                        f"the certificate of {one.peer} in {self._identity.directory} is damaged: revoke it and trust "
                        "it again"
                    ) from error
                peers[certificate] = one.peer
        return Terms(context, peers)


class TlsConnection(Connection):
    """TLS over a connected socket. `prove` is called by the first `receive` or `send` where nobody did before."""

    def __init__(self, link: SocketConnection, terms: Callable[[], Terms], *, server_side: bool) -> None:
        """`terms` is called in a thread, once."""
        self._link = link
        self._terms = terms
        self._server_side = server_side
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._engine: ssl.SSLObject | None = None
        """Set once the peer has proved itself."""
        self._proving = trio.Lock()
        self._failure: LinkDown | None = None
        self._sending = False
        self._sent_bytes = 0
        self._early = b""
        """What came with the end of the handshake."""
        self.certificate = b""
        """The peer's, in DER, once it is proved."""

    @property
    def proved(self) -> bool:
        """Whether the peer has proved itself; `peer` is set then."""
        return self._engine is not None

    async def prove(self) -> None:
        """Returns when both sides have proved themselves. Raises LinkDown, of it Untrusted; the connection is closed
        then, as it is when this is cancelled in the middle."""
        async with self._proving:
            if self._engine is not None:
                return
            if self._failure is not None:
                raise LinkDown(str(self._failure))
            self._failure = LinkDown("the handshake was broken off")
            try:
                with trio.fail_after(HANDSHAKE_SECONDS):
                    await self._shake_hands()
                self._failure = None
            except trio.TooSlowError as error:
                self._failure = LinkDown(f"the peer did not prove itself within {HANDSHAKE_SECONDS:g} s")
                raise self._failure from error
            except LinkDown as error:
                self._failure = error
                raise
            finally:
                if self._failure is not None:
                    await self._link.aclose()

    async def _shake_hands(self) -> None:
        try:
            terms = await trio.to_thread.run_sync(self._terms)
        except IdentityError as error:
            raise Untrusted(str(error)) from error
        engine = terms.context.wrap_bio(self._incoming, self._outgoing, server_side=self._server_side)
        while True:
            try:
                engine.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
            except ssl.SSLError as error:
                await self._part()
                raise self._refusal(error) from error
            data = await self._link.receive()
            if not data:
                raise LinkDown("the peer left during the handshake")
            self._incoming.write(data)
        certificate = engine.getpeercert(binary_form=True) or b""
        if certificate not in terms.peers:
            raise Untrusted("the peer's certificate is none of those that are trusted here")
        await self._flush()
        self.certificate = certificate
        self.peer = terms.peers[certificate]
        self._engine = engine
        self._early = self._decrypt(b"")

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._link.send([data])

    async def _part(self) -> None:
        """Tells the peer that it is refused, and waits a little for it to leave: what it still sends would otherwise
        make the system throw away what it was told."""
        with trio.move_on_after(PARTING_SECONDS):
            try:
                await self._flush()
                self._link.finish()
                while await self._link.receive():
                    pass
            except LinkDown:
                return  # it has left

    def _refusal(self, error: ssl.SSLError) -> LinkDown:
        """What a failed handshake, or an alert after it, means to a person."""
        reason = error.reason or ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return Untrusted(f"the peer's certificate is none of those that are trusted here ({error.verify_message})")
        if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
            return Untrusted("the peer shows no certificate")
        if "ALERT" in reason and ("UNKNOWN_CA" in reason or "CERTIFICATE" in reason):
            if self._server_side:
                return Untrusted("the client does not trust this machine's key, or not for an appliance")
            return Untrusted(
                "the appliance does not trust this machine's key: let it trust what `rewindfs identity show` prints "
                "here, with `rewindfs identity trust CERTIFICATE --role ROLE`"
            )
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST") or "RECORD_LAYER" in reason:
            return LinkDown("the peer does not speak TLS; is it a tcp:// port?")
        return LinkDown(f"the peer broke TLS: {_reason(error)}")

    async def send(self, buffers: Sequence[Buffer]) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this connection")
        self._sending = True
        try:
            if self._engine is None:
                await self.prove()
            whole = memoryview(b"".join(buffers))
            self._sent_bytes += len(whole)
            if self._sent_bytes > RENEW_BYTES:
                raise LinkDown(f"{RENEW_BYTES >> 30} GiB were sent under one key; the next connection has another")
            for start in range(0, len(whole), PIECE_BYTES):
                self._encrypt(whole[start : start + PIECE_BYTES])
                await self._flush()
        finally:
            self._sending = False

    def _encrypt(self, piece: memoryview) -> None:
        assert self._engine is not None
        try:
            while piece:
                piece = piece[self._engine.write(piece) :]
        except ssl.SSLError as error:
            raise self._refusal(error) from error

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        # What the engine has encrypted must leave, and the socket may not take it: so never here.
        return 0

    def linger(self) -> None:
        self._link.linger()

    async def receive(self) -> bytes:
        if self._engine is None:
            await self.prove()
        if self._early:
            await trio.lowlevel.checkpoint()
            return self._take_early()
        # The end of the stream is the socket's. That somebody on the way made it is no more than a broken link, which
        # he can make anyway: a frame that is cut off is not used.
        while raw := await self._link.receive():
            if data := self._decrypt(raw):
                return data
        return b""

    def receive_soon(self, milliseconds: int) -> bytes:
        if self._engine is None:
            return b""
        if self._early:
            return self._take_early()
        raw = self._link.receive_soon(milliseconds)
        return self._decrypt(raw) if raw else b""

    def _take_early(self) -> bytes:
        data, self._early = self._early, b""
        return data

    def _decrypt(self, raw: bytes) -> bytes:
        """What becomes readable with `raw`; at most a record more than that."""
        assert self._engine is not None
        self._incoming.write(raw)
        pieces = []
        try:
            while piece := self._engine.read(RECORD_BYTES):
                pieces.append(piece)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        except ssl.SSLError as error:
            raise self._refusal(error) from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def aclose(self) -> None:
        await self._link.aclose()


async def prove_client(link: SocketConnection, identity: Identity, address: object) -> TlsConnection:
    """The client's side of a new connection to `address`, once both have proved themselves. Raises LinkDown."""
    connection = TlsConnection(link, Credentials(identity, server_side=False).terms, server_side=False)
    try:
        await connection.prove()
    except LinkDown as error:
        raise type(error)(f"cannot connect to {address}: {error}") from error
    return connection


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return str(error)
