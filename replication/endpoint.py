"""The way to a peer by its address, and the way to be found by one: Unix sockets, TCP and TLS alike."""

from __future__ import annotations

from pathlib import Path

from replication.address import Address, UnixAddress, parse_address
from replication.identity import Identity, default_directory
from replication.tcp import TcpListener, bind_tcp, connect_tcp
from replication.tls import PIECE_BYTES, prove_client
from replication.tls_listener import TlsListener
from replication.transport import Connection, Listener, connect_unix, listen_unix


async def connect(
    address: Address | str | Path, *, identity: Identity | None = None, insecure_tcp: bool = False
) -> Connection:
    """A connection to who listens at `address`; over tls:// to a peer that has proved its key.

    `identity` None is the one of `default_directory()`; only tls:// looks at it. `insecure_tcp` allows plain TCP beyond
    the loopback. Raises AddressError or, where there can be no default directory, IdentityError; else LinkDown, which
    may pass; of it `tls.Untrusted` where a key is missing or not trusted. Takes at most 20 s.
    """
    place = address if isinstance(address, Address) else parse_address(address)
    if isinstance(place, UnixAddress):
        return await connect_unix(place.path)
    place.allow(insecure_tcp=insecure_tcp)
    if not place.tls:
        return await connect_tcp(place)
    link = await connect_tcp(place, PIECE_BYTES)
    return await prove_client(link, identity or Identity(default_directory()), place)


async def listen(
    address: Address | str | Path,
    *,
    identity: Identity | None = None,
    insecure_tcp: bool = False,
    replace_stale: bool = False,
) -> Listener:
    """Listens at `address`; at tls:// for peers whose key is trusted at the time they connect.

    A host's name is listened at by the first address it has; write 0.0.0.0 or [::] for all of the machine. `identity`
    and `insecure_tcp` are as in `connect`, `replace_stale` as in `listen_unix`. Raises ReplicationError.
    """
    place = address if isinstance(address, Address) else parse_address(address)
    if isinstance(place, UnixAddress):
        return listen_unix(place.path, replace_stale=replace_stale)
    place.allow(insecure_tcp=insecure_tcp)
    sock, bound = await bind_tcp(place)
    if not place.tls:
        return TcpListener(sock, bound)
    listener = TlsListener(sock, bound, identity or Identity(default_directory()))
    try:
        await listener.check()
    except BaseException:
        await listener.aclose()
        raise
    return listener
