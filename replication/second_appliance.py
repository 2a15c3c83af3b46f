"""The second appliance: serves agents and commands over connections, and is the one writer of the store.

Invariants:
- order: the records of a session are ingested in the order of its stream, a Compare is answered after all before it
  were, and each Ack is sent after the ingest or sync it reports.
- one-writer: a group has at most one live agent session. A newer agent's Welcome is said only when the older session
  has ended and its last batch with it.
- bounded: sessions, records per batch, compares and requests per session have limits; a peer that does not read
  stops its own session only.
- A peer can end nothing but its own session; only the store's failure, a signal or a bug ends the appliance.

Fencing: a group belongs to one agent, as its journal says; another one is refused unless it takes the group over. An
agent is admitted when its epoch is greater than the group's, or equal to it: the same start connecting again. While an
older session of the group lives, a newcomer of a higher epoch ends it; one of the same epoch waits
`SAME_EPOCH_SECONDS` for it to end, and is refused when it has not. Who was admitted once and is not any more, because
of a higher epoch or another agent, is told FENCED: it must not come again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from dedup.errors import StoreError, StoreFailed, StoreFull
from dedup.types import Epoch
from replication.commands import Commands
from replication.history_process import HistoryProcesses
from replication.maintenance import Maintenance
from replication.messages import ErrorCode, Hello
from replication.open_sessions import SESSIONS_MAX, Accepts, OpenSessions, accept_until
from replication.refused import Refused
from replication.server_session import ServerSession
from replication.space_gate import SpaceGate
from replication.store_writer import StoreWriter
from replication.transport import Connection

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter
    from dedup.store import Store

log = logging.getLogger("rewindfs.second_appliance")


def fenced_text(hello: Hello) -> str:
    """What an agent is told whose live session ends because of that newcomer."""
    who = f"agent {hello.agent} has taken over" if hello.take_over else f"a newer start, epoch {hello.epoch}, feeds"
    return f"{who} group {hello.group!r}; nothing more of this mount is recorded: unmount it"


SAME_EPOCH_SECONDS: Final = 5.0
DRAIN_SECONDS: Final = 10.0
"""How long `stop` lets sessions finish their batch and the answers to it."""


class SecondAppliance:
    """Serves sessions for one store, which the caller opens before and closes after."""

    def __init__(self, store: Store, *, sessions_max: int = SESSIONS_MAX, maintain: bool = False) -> None:
        """`maintain`: seal and collect in the background too, not only when asked to."""
        self.writer = StoreWriter(store)
        self.space = SpaceGate(store.path, store.storage)
        self.maintenance = Maintenance(self.writer)
        self.space.thinner = self.maintenance.consolidate
        self.commands = Commands(self.writer, self.live, self.space, self.maintenance)
        self.histories = HistoryProcesses(store.path)
        self._maintain = maintain
        self._sessions: OpenSessions[ServerSession] = OpenSessions(sessions_max)
        self._agents: dict[str, ServerSession] = {}
        self._fences: dict[str, tuple[Epoch, str]] = {}
        """The newest epoch that was let in, and the agent whose it is."""
        self._stop = trio.Event()

    def live(self) -> Counter[str]:
        """Number of live agent sessions per group, and of all sessions under ""."""
        count = Counter({"": len(self._sessions)})
        count.update(self._agents.keys())
        return count

    def stop(self) -> None:
        """Have `serve` accept nothing more, let each session finish its batch, and return."""
        self._stop.set()

    async def serve(
        self, listeners: Sequence[Accepts], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `stop`; close the listeners. All that was acknowledged is in the store, received at least.

        Raises StoreFailed once every session was told: the store must then be opened anew, by a new process.
        """
        async with trio.open_nursery() as background:
            background.start_soon(self.writer.serve)
            background.start_soon(self.space.serve)
            if self._maintain:
                background.start_soon(self.maintenance.serve)
            async with trio.open_nursery() as sessions:
                sessions.start_soon(self._watch_failure)
                await accept_until(self._stop, listeners, sessions, self.serve_connection, task_status)
                for session in self._sessions:
                    session.drain(DRAIN_SECONDS)
                await self._sessions.all_left()
                sessions.cancel_scope.cancel()
            background.cancel_scope.cancel()
        if self.writer.error is not None:
            raise self.writer.error

    async def serve_connection(self, connection: Connection) -> None:
        """One session, from Hello to its end; closes the connection. Raises nothing of the peer's making."""
        session = ServerSession(self, connection)
        self._sessions.came(session)
        try:
            if self._stop.is_set():
                session.drain(0)
            await session.run()
        finally:
            self._sessions.left(session)

    def greeted(self, session: ServerSession) -> None:
        """The session has said Hello, and may do what it said. Raises Refused when there are too many."""
        self._sessions.greeted(session)

    async def admit(self, session: ServerSession, hello: Hello) -> GroupWriter:
        """The group that an agent may feed from now on, alone. Raises Refused, or what the store raises."""
        try:
            group = await self.writer.run(self.writer.store.group, hello.group)
        except (StoreFull, StoreFailed):
            raise
        except StoreError as error:
            raise Refused(str(error)) from error
        with trio.move_on_after(SAME_EPOCH_SECONDS):
            while True:
                self._check_fences(group, hello)
                other = self._agents.get(hello.group)
                if other is None:
                    # No await since the check: from here on the group is this session's.
                    self._fences[hello.group] = hello.epoch, hello.agent
                    self._agents[hello.group] = session
                    break
                if hello.epoch > other.epoch:
                    self._fences[hello.group] = hello.epoch, hello.agent
                    other.end(ErrorCode.FENCED, fenced_text(hello))
                elif other.waits_for_room:
                    other.drain(0)  # it does not listen, and so did not hear that its link broke
                await other.ended.wait()
        if self._agents.get(hello.group) is not session:
            raise Refused(f"another agent of epoch {hello.epoch} feeds group {hello.group!r}; unmount that one first")
        try:
            await self.writer.run(group.set_owner, hello.agent)
        except BaseException:
            self.release(session, hello.group)
            raise
        return group

    def _check_fences(self, group: GroupWriter, hello: Hello) -> None:
        """Raises Refused for an agent whose group it is not, or not any more."""
        name = hello.group
        owner = group.owners[-1] if group.owners else hello.agent
        fence, admitted = self._fences.get(name, (Epoch(0), hello.agent))
        newest = max(group.epoch, fence)
        if hello.agent != owner and not hello.take_over:
            if hello.agent in group.owners:
                raise Refused(
                    f"group {name!r} was taken over by agent {owner}; mount with --take-over to make this source, "
                    f"agent {hello.agent}, feed it again: everything is compared then",
                    ErrorCode.FENCED,
                )
            raise Refused(
                f"group {name!r} is fed by agent {owner}, and this source is agent {hello.agent}: mount with "
                "--take-over to make this source its agent, or choose another --name"
            )
        # Every connection of an agent says take_over: one that took over, and lost the group to another since, must not
        # take it back. The epoch tells; where two chose the same, it is of the one that came first.
        begun = hello.epoch == group.epoch and hello.agent != owner
        taken = begun or (hello.epoch == fence and hello.agent != admitted)
        if hello.epoch < newest or taken:
            text = f"epoch {hello.epoch} of group {name!r} is over: epoch {newest} has begun"
            was_owner = hello.agent == owner or hello.agent in group.owners
            raise Refused(text, ErrorCode.FENCED if was_owner else ErrorCode.REFUSED)

    def release(self, session: ServerSession, group: str) -> None:
        """The session feeds the group no longer."""
        if self._agents.get(group) is session:
            del self._agents[group]

    async def _watch_failure(self) -> None:
        await self.writer.failed.wait()
        for session in self._sessions:
            session.end(ErrorCode.STORE_FAILED, str(self.writer.error))
        self._stop.set()
