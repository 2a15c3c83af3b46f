"""The listening side of tls://: who may come in, how many may stand in the door, and who has to leave.

Invariants:
- A peer without a trusted key holds a place for HANDSHAKE_SECONDS at most, and there are HANDSHAKES_MAX such places.
  Where all are taken, the peer that has stood there longest leaves: one that stalls makes room for one that does not.
- It is told nothing but the alert of TLS and, as in every TLS handshake, the own certificate; the log gets a line, at
  most one in LOG_SECONDS.
- A peer that is trusted no longer, or for other things than before, loses its connections within LOOK_SECONDS, as long
  as someone waits in `accept`.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

import trio

from replication.address import NetworkAddress
from replication.errors import LinkDown
from replication.identity import Identity, IdentityError
from replication.log_limit import LogLimit
from replication.tcp import connection_of
from replication.tls import PIECE_BYTES, Credentials, TlsConnection
from replication.transport import Listener, SocketConnection

log = logging.getLogger("rewindfs.tls")

HANDSHAKES_MAX: Final = 16
LOOK_SECONDS: Final = 5.0
LOG_SECONDS: Final = 10.0


class TlsListener(Listener):
    """Connections that become usable when their peer has proved itself, which happens in the task that uses them."""

    def __init__(self, sock: socket.socket, address: NetworkAddress, identity: Identity) -> None:
        super().__init__(sock, address)
        self.credentials = Credentials(identity, server_side=True)
        self._guests: dict[Guest, None] = {}
        """Not closed yet; the oldest first."""
        self._look_at = trio.current_time() + LOOK_SECONDS
        self._complaint = LogLimit(log, LOG_SECONDS)

    async def check(self) -> None:
        """That there is an identity to serve with. Raises IdentityError."""
        terms = await trio.to_thread.run_sync(self.credentials.terms)
        if not terms.peers:
            log.warning(
                "%s: nobody is trusted yet, so nobody can connect; `rewindfs identity trust CERTIFICATE --role agent`",
                self.address,
            )

    async def accept(self) -> Guest:
        while True:
            if trio.current_time() >= self._look_at:
                await self._look()
            sock = None
            with trio.move_on_at(self._look_at):
                sock = await self._accept_socket()
            if sock is None:
                continue
            try:
                guest = Guest(self, connection_of(sock, PIECE_BYTES), _name_of(sock))
            except LinkDown:
                continue  # it left before it was served
            strangers = [one for one in self._guests if not one.proved]
            if len(strangers) >= HANDSHAKES_MAX:
                self._complaint.warning(
                    f"{self.address}: {len(strangers)} peers prove nothing; {strangers[0].name} has to leave"
                )
                strangers[0].leave()
            self._guests[guest] = None
            return guest

    async def _look(self) -> None:
        """Parts with those whom the identity does not trust any more."""
        self._look_at = trio.current_time() + LOOK_SECONDS
        try:
            terms = await trio.to_thread.run_sync(self.credentials.terms)
        except IdentityError as error:
            self._complaint.warning(f"{self.address}: nobody can connect: {error}")
            return
        for guest in list(self._guests):
            if guest.proved and terms.peers.get(guest.certificate) != guest.peer:
                log.warning("%s: %s is no longer trusted as it was; its session ends", self.address, guest.peer)
                guest.leave()

    def refused(self, guest: Guest, error: LinkDown) -> None:
        """The guest did not prove itself."""
        self._complaint.warning(f"{self.address}: {guest.name} was refused: {error}")

    def left(self, guest: Guest) -> None:
        """The guest's connection is closed."""
        self._guests.pop(guest, None)


class Guest(TlsConnection):
    """The server's side of a connection. A peer that does not prove itself is like one that left without a word:
    `receive` gives the end of the stream, and the listener's log line is the only one."""

    def __init__(self, listener: TlsListener, link: SocketConnection, name: str) -> None:
        super().__init__(link, listener.credentials.terms, server_side=True)
        self.name = name
        self._listener = listener
        self._left = False

    async def prove(self) -> None:
        try:
            await super().prove()
        except LinkDown as error:
            if not self._left:
                self.leave()
                self._listener.refused(self, error)
            raise

    async def receive(self) -> bytes:
        if not self.proved:
            try:
                await self.prove()
            except LinkDown:
                return b""
        return await super().receive()

    def leave(self) -> None:
        """Closes the connection at once."""
        self._left = True
        self._link.close()
        self._listener.left(self)

    async def aclose(self) -> None:
        self.leave()


def _name_of(sock: socket.socket) -> str:
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return "a peer that has left"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
