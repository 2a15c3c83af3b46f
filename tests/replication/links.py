"""Two connected ends of every kind, and identities that trust each other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from replication.endpoint import connect, listen
from replication.identity import Identity
from replication.messages import Role
from replication.tls_listener import TlsListener
from replication.transport import Connection, memory_pair, socket_pair

Pair = tuple[Connection, Connection]
OpenPair = Callable[[], AbstractAsyncContextManager[Pair]]


def make_identity(directory: Path) -> Identity:
    identity = Identity(directory)
    identity.create()
    return identity


def make_friends(
    directory: Path, *, role: Role = Role.AGENT, groups: tuple[str, ...] = ()
) -> tuple[Identity, Identity]:
    """A client's and a server's identity that trust each other."""
    client, server = make_identity(directory / "client"), make_identity(directory / "server")
    client.trust(server.certificate(), role=None, server=True, name="server")
    server.trust(client.certificate(), role=role, server=False, groups=groups, name="client")
    return client, server


async def tls_listener(identity: Identity) -> TlsListener:
    listener = await listen("tls://127.0.0.1:0", identity=identity)
    assert isinstance(listener, TlsListener)
    return listener


@asynccontextmanager
async def open_pair(kind: str, directory: Path) -> AsyncIterator[Pair]:
    """Both ends of a connection of that kind; closed at the end."""
    if kind in ("memory", "pair"):
        one, other = memory_pair() if kind == "memory" else socket_pair()
    else:
        client, server = make_friends(directory) if kind == "tls" else (None, None)
        listener = await listen(f"unix:{directory}/s" if kind == "unix" else f"{kind}://127.0.0.1:0", identity=server)
        ends: list[Connection] = []

        async def accept() -> None:
            ends.append(await listener.accept())
            if kind == "tls":
                await ends[0].prove()  # type: ignore[attr-defined]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            one = await connect(listener.address, identity=client)
        other = ends[0]
        await listener.aclose()
    async with one, other:
        yield one, other
