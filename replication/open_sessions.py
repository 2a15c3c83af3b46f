"""The connections that a service has open: how many there may be, and of whom.

Invariants:
- bounded: those without a Hello, those with one, and of these the ones of one key, each by a limit of its own. Whoever
  has said nothing takes no place from those who have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import trio

from replication.identity import Fingerprint, Peer
from replication.messages import ErrorCode
from replication.refused import Refused
from replication.transport import Connection

log = logging.getLogger("rewindfs.sessions")

SESSIONS_MAX: Final = 128
PEER_SESSIONS_MAX: Final = 96
"""Sessions of one key at a time: a first appliance needs one for each group, and nobody can take all of them."""
UNGREETED_MAX: Final = 64
"""Connections that have not said Hello. One more ends the oldest of them: they cost little and come from anybody."""


class Guest(Protocol):
    """One connection's session."""

    @property
    def peer(self) -> Peer | None:
        """Who the other end has proved to be; known once it has said Hello."""

    def end(self, code: ErrorCode, text: str) -> None:
        """End it soon, with this Failure as its last word."""


S = TypeVar("S", bound=Guest)


class OpenSessions(Generic[S]):
    """Each session `came`, is `greeted` once it has said Hello, and `left`."""

    def __init__(self, sessions_max: int = SESSIONS_MAX) -> None:
        self._sessions_max = sessions_max
        self._all: set[S] = set()
        self._ungreeted: dict[S, None] = {}
        self._greeted: set[S] = set()
        self._keys: dict[S, Fingerprint] = {}
        self._left = trio.Event()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[S]:
        """Those that are open now; some may come and go meanwhile."""
        return iter(list(self._all))

    def came(self, session: S) -> None:
        """It has said nothing yet."""
        if len(self._ungreeted) >= UNGREETED_MAX:
            oldest = next(iter(self._ungreeted))
            del self._ungreeted[oldest]
            oldest.end(ErrorCode.REFUSED, f"{UNGREETED_MAX} connections that came later wait without a Hello, too")
        self._all.add(session)
        self._ungreeted[session] = None

    def greeted(self, session: S) -> None:
        """It has said Hello, and may do what it said. Raises Refused when there are too many."""
        if len(self._greeted) >= self._sessions_max:
            raise Refused(f"{self._sessions_max} sessions are open already; try again later")
        peer = session.peer
        if peer is not None:
            if sum(one == peer.fingerprint for one in self._keys.values()) >= PEER_SESSIONS_MAX:
                raise Refused(f"{peer.name} has {PEER_SESSIONS_MAX} sessions open already; try again later")
            self._keys[session] = peer.fingerprint
        self._ungreeted.pop(session, None)
        self._greeted.add(session)

    def left(self, session: S) -> None:
        """It is over."""
        self._all.discard(session)
        self._greeted.discard(session)
        self._ungreeted.pop(session, None)
        self._keys.pop(session, None)
        left, self._left = self._left, trio.Event()
        left.set()

    async def all_left(self) -> None:
        """Waits until none is open."""
        while self._all:
            await self._left.wait()


class Accepts(Protocol):
    """What connections come from; `transport.Listener` is one."""

    async def accept(self) -> Connection: ...

    async def aclose(self) -> None: ...


async def accept_until(
    stop: trio.Event,
    listeners: Sequence[Accepts],
    sessions: trio.Nursery,
    serve: Callable[[Connection], Coroutine[Any, Any, None]],
    task_status: trio.TaskStatus[None],
) -> None:
    """Has each connection served by a task of its own, until `stop`; then closes the listeners. `task_status` is told
    once it listens."""
    try:
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(_accept_each, listener, sessions, serve)
            task_status.started()
            await stop.wait()
            accepting.cancel_scope.cancel()
    finally:
        for listener in listeners:
            await listener.aclose()


async def _accept_each(
    listener: Accepts, sessions: trio.Nursery, serve: Callable[[Connection], Coroutine[Any, Any, None]]
) -> None:
    """Until cancelled. Where the system has no room for another connection it says so, and tries again."""
    while True:
        try:
            connection = await listener.accept()
        except OSError as error:
            log.error("cannot accept a connection, trying again in 1 s: %s", error)
            await trio.sleep(1)
        else:
            sessions.start_soon(serve, connection)
